"""The LightningModule: the penalty is Keras's, and the metrics are what they say."""

import copy
import threading
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROUNDING
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.networks import CNN, MLP
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.callbacks import Figures
from mnist_lightning.training.checkpoints import RunCheckpoint

pytestmark = pytest.mark.numeric


@pytest.fixture
def trainer():
    warnings.filterwarnings("ignore", ".*(many workers|logging interval|GPU available)")
    return Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


@pytest.fixture
def datamodule(data_dir):
    datamodule = MNISTDataModule(str(data_dir), batch_size=96)
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


def batch(mnist, count=64):
    images, labels = mnist.train.__getitems__(range(count))
    return images.double(), labels


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop, torch.optim.Adagrad, torch.optim.AdamW])
def test_a_step_equals_one_on_cross_entropy_plus_the_penalty(mnist, optimizer):
    factors = [0.01, 0.3]
    classifier = Classifier(MLP(dropout=0, l2=factors).double(), optimizer)
    explicit = copy.deepcopy(classifier.network)
    images, labels = batch(mnist)

    stepper = classifier.configure_optimizers()
    classifier.training_step((images, labels)).backward()
    stepper.step()

    kernels = [explicit.dense_1.weight, explicit.dense_2.weight]
    penalty = sum(factor * kernel.square().sum() for factor, kernel in zip(factors, kernels, strict=True))
    loss = F.cross_entropy(explicit(images), labels) + penalty
    loss.backward()
    optimizer(explicit.parameters()).step()

    for ours, expected in zip(classifier.network.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_the_penalty_is_on_the_hidden_kernels_alone(mnist):
    network = MLP(units=[20, 10, 5], dropout=0, l2=[0.1, 0.1, 0.4])
    (optimizer,) = [Classifier(network).configure_optimizers()]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        expected = {"dense_1.weight": 0.2, "dense_2.weight": 0.2, "dense_3.weight": 0.8}.get(name, 0)
        assert decay[id(parameter)] == expected, name
    assert len(optimizer.param_groups) == 3


def test_the_user_s_own_weight_decay_stays_where_there_is_no_l2():
    classifier = Classifier(MLP(), lambda params: torch.optim.Adam(params, weight_decay=0.5))
    decays = sorted(group["weight_decay"] for group in classifier.configure_optimizers().param_groups)
    assert decays == [0.5, 0.52]  # the second includes the penalty


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, torch.optim.AdamW])
def test_clipping_holds_the_penalty_as_well(datamodule, optimizer):
    """Clip as Keras does, with the penalty in the loss; a step of rate 1 moves a weight by the clipped gradient."""
    torch.manual_seed(0)
    classifier = Classifier(MLP(dropout=0, l2=1.0), optimizer)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_train_batches=3, gradient_clip_val=1e-3,
    )  # fmt: skip
    norms = []
    original = classifier.configure_gradient_clipping

    def clip(*arguments, **keywords):
        before = [parameter.grad.clone() for parameter in classifier.parameters()]
        norms.append(torch.stack([gradient.norm() for gradient in before]).norm().item())
        original(*arguments, **keywords)

    classifier.configure_gradient_clipping = clip
    trainer.fit(classifier, datamodule)
    assert classifier.penalty_in_loss
    assert min(norms) > 20  # 2λ‖W‖, far above that of the cross-entropy
    own = torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"] if optimizer is torch.optim.AdamW else 0
    assert {group["weight_decay"] for group in trainer.optimizers[0].param_groups} == {own}


@pytest.mark.parametrize("accumulated", [1, 3, 5])
@pytest.mark.parametrize("is_coupled", [True, False])
def test_a_step_has_the_penalty_once_whatever_it_accumulates(datamodule, accumulated, is_coupled):
    """Check an epoch of 11 batches: the last step accumulates two batches of three, or one of five."""
    torch.manual_seed(0)
    classifier = Classifier(MLP([16], dropout=0, l2=0.3).double(), partial(KerasSGD, lr=0.1))
    explicit = copy.deepcopy(classifier.network)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, precision="64-true",
        accumulate_grad_batches=accumulated, gradient_clip_val=None if is_coupled else 1e9,
    )  # fmt: skip
    batches = []
    original = classifier.training_step
    classifier.training_step = lambda batch: (batches.append(batch), original(batch))[1]
    trainer.fit(classifier, datamodule)
    assert classifier.penalty_in_loss is not is_coupled
    assert len(batches) == 11

    optimizer = torch.optim.SGD(explicit.parameters(), lr=0.1)
    for start in range(0, 11, accumulated):
        loss = sum(F.cross_entropy(explicit(images), labels) for images, labels in batches[start : start + accumulated])
        (loss / accumulated + 0.3 * explicit.dense_1.weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, expected in zip(classifier.network.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_kernel_that_is_computed_has_its_penalty_in_the_loss(mnist):
    network = MLP([16], dropout=0, l2=0.3).double()
    nn.utils.parametrizations.weight_norm(network.dense_1)
    classifier = Classifier(network, KerasSGD)
    explicit = copy.deepcopy(network)
    images, labels = batch(mnist)
    stepper, reference = classifier.configure_optimizers(), KerasSGD(explicit.parameters())
    for _ in range(2):
        stepper.zero_grad()
        classifier.training_step((images, labels)).backward()
        stepper.step()
        reference.zero_grad()
        (F.cross_entropy(explicit(images), labels) + 0.3 * explicit.dense_1.weight.square().sum()).backward()
        reference.step()
    for ours, expected in zip(network.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", [KerasSGD, torch.optim.AdamW])
def test_a_kernel_that_layers_share_has_one_penalty(optimizer):
    """Compare with Keras, where the penalty belongs to the variable."""
    network = MLP([16, 16, 16], dropout=0, l2=[0.0, 0.5, 0.5])
    network.dense_3.weight = network.dense_2.weight
    classifier = Classifier(network, optimizer)
    assert classifier.penalty().item() == pytest.approx(0.5 * network.dense_2.weight.square().sum().item())
    decays = [group["weight_decay"] for group in classifier.configure_optimizers().param_groups]
    assert decays == ([0, 1.0] if optimizer is KerasSGD else [0.01])


def test_penalty_at_the_start_is_keras_s():
    penalties = [Classifier(MLP()).penalty().item() for _ in range(5)]
    assert sum(penalties) / 5 == pytest.approx(3.057, abs=0.03)  # keras: 3.0566 ± 0.018 over five seeds


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasRMSprop, torch.optim.AdamW])
def test_a_step_stays_on_its_device(mnist, optimizer):
    """Check on the meta device, where tensors of another device raise, and so does reading a value."""
    with torch.device("meta"):
        classifier = Classifier(MLP(), optimizer)
    stepper = classifier.configure_optimizers()
    batch = mnist.train.to(torch.device("meta")).__getitems__(range(8))
    classifier.training_step(batch).backward()
    stepper.step()
    figures = Figures(RunCheckpoint())
    figures.on_validation_epoch_start(None, classifier)
    figures.on_validation_batch_end(None, classifier, classifier.validation_step(batch), batch, 0)
    assert {total.device.type for totals in classifier.totals.values() for total in totals.values()} == {"meta"}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_metrics_are_right_in_any_precision(data_dir, precision):
    """Check with batches of 7, which half precision cannot count exactly."""

    def fit(**flags):
        torch.manual_seed(0)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, **flags,
        )  # fmt: skip
        classifier = Classifier(MLP(units=[16], dropout=0, l2=0.05), lambda params: KerasSGD(params, lr=0.0))
        trainer.fit(classifier, MNISTDataModule(str(data_dir), batch_size=7))
        return {name: value.item() for name, value in trainer.callback_metrics.items()}

    assert fit(precision=precision) == pytest.approx(fit(), rel=0.005, abs=0.005)


def test_a_mixture_costs_what_its_parts_cost_and_counts_as_the_larger(mnist):
    torch.manual_seed(0)
    classifier = Classifier(MLP(units=[16], dropout=0, l2=0))
    images, labels = mnist.train.__getitems__(range(64))
    others = labels.roll(1)
    shares = 0.7 * F.one_hot(labels, 10) + 0.3 * F.one_hot(others, 10)
    classifier._step((images, labels), "hard")
    loss, logits = classifier._step((images, shares), "soft")
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits, others)
    torch.testing.assert_close(loss, expected)
    hard, soft = classifier.totals["hard"], classifier.totals["soft"]
    assert soft["accuracy"] == hard["accuracy"] > 0
    assert soft["images"] == 64
    torch.testing.assert_close(soft["loss"], 64 * expected.detach())


def test_label_smoothing_is_followed_and_not_logged(mnist):
    torch.manual_seed(0)
    network = MLP(units=[16], dropout=0, l2=0)
    images, labels = mnist.train.__getitems__(range(64))
    classifier = Classifier(network, label_smoothing=0.2)
    loss = classifier.training_step((images, labels))
    logits = network(images)
    plain = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, 0.8 * plain - 0.2 * logits.log_softmax(1).mean())
    torch.testing.assert_close(classifier.totals["train"]["loss"], 64 * plain.detach())
    assert classifier.validation_step((images, labels)).shape == (64, 10)
    torch.testing.assert_close(classifier.totals["val"]["loss"], 64 * plain.detach())


@pytest.mark.slow
def test_compiling_changes_no_name_and_no_result(trainer, datamodule, monkeypatch):
    def fit(compile):
        torch.manual_seed(0)
        classifier = Classifier(CNN([4, 8], 1, dropout=0.1), compile=compile)
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit(classifier, datamodule)
        return classifier, trainer.test(classifier, datamodule, verbose=False)

    traced = []
    compile = torch.compile

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *_, **keywords: compile(*_, **keywords, backend=backend))
    (plain, expected), (compiled, results) = fit(False), fit(True)
    assert len(traced) >= 3  # sanity check, training and evaluation
    assert [*compiled.state_dict()] == [*plain.state_dict()]
    for name, weights in plain.state_dict().items():
        assert torch.equal(weights, compiled.state_dict()[name])
    assert results == expected
    images, _ = datamodule.test.__getitems__(range(4))
    assert copy.deepcopy(compiled).network._compiled_call_impl is None
    torch.jit.trace(copy.deepcopy(compiled.network).eval(), images)  # as for TensorBoard's graph


def test_a_missing_compiler_is_said_in_a_line(trainer, datamodule, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r"compiler found\. Install a C.. compiler .*false\.$") as error:
        trainer.fit(Classifier(MLP(), compile=True), datamodule)
    assert "\n" not in str(error.value)


def test_the_layer_table_has_the_images_of_the_data():
    classifier = Classifier(CNN([4], in_channels=3))
    classifier._trainer = SimpleNamespace(
        global_rank=0, precision_plugin=None, datamodule=SimpleNamespace(image_shape=(3, 20, 24))
    )
    classifier.setup("fit")
    assert classifier.example_input_array.shape == (1, 3, 20, 24)


def test_images_that_the_network_does_not_take_are_refused_in_a_line():
    classifier = Classifier(CNN([4], in_channels=3))
    classifier.check_images((3, 20, 24), 10)
    assert classifier.example_input_array.shape == (1, 3, 20, 24)
    assert classifier.network.training
    with pytest.raises(UserError, match=r"^CNN does not take images of shape \(1, 28, 28\).*$"):
        classifier.check_images((1, 28, 28), 10)


def test_batch_normalization_has_no_penalty_and_its_statistics_are_saved():
    classifier = Classifier(CNN([4, 8], 1, l2=0.1))
    optimizer = classifier.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        assert decay[id(parameter)] == (0.2 if name.endswith("convolution_1.weight") else 0), name
    assert "network.stage_2.normalization_1.running_var" in classifier.state_dict()


def test_a_copy_has_its_own_weights_and_the_same_factories():
    """Check a copy, as Lightning's weight averaging keeps, with factories that refer to any object."""
    lock = threading.Lock()  # a lock cannot be copied
    classifier = Classifier(MLP(), lambda params, _=lock: KerasAdam(params), partial(StepLR, step_size=1, gamma=lock))
    copied = copy.deepcopy(classifier)
    assert (copied.optimizer, copied.lr_scheduler) == (classifier.optimizer, classifier.lr_scheduler)
    penalty = classifier.penalty().item()
    with torch.no_grad():
        copied.network.dense_1.weight.zero_()
    assert classifier.penalty().item() == penalty > 2 * copied.penalty().item()


def test_metrics_are_means_over_all_images(trainer, datamodule):
    network = MLP(units=[16], dropout=0, l2=0.05)
    classifier = Classifier(network, lambda params: KerasSGD(params, lr=0.0))
    trainer.fit(classifier, datamodule)
    expected = {"lr": 0.0}
    for stage in ("train", "val"):
        split = getattr(datamodule, stage)
        logits, labels = network(split.images / 255), split.labels
        loss = F.cross_entropy(logits, labels).item()
        expected[f"{stage}/loss"] = loss
        expected[f"{stage}/penalized_loss"] = loss + 0.05 * network.dense_1.weight.square().sum().item()
        expected[f"{stage}/accuracy"] = (logits.argmax(1) == labels).float().mean().item()
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == pytest.approx(
        expected, rel=ROUNDING
    )


def test_the_training_penalty_is_a_mean_over_the_epoch(trainer, datamodule):
    torch.manual_seed(0)
    classifier = Classifier(MLP(l2=0.5))
    seen = []
    original = classifier.training_step

    def spy(batch):
        seen.append((classifier.penalty().item(), len(batch[1])))
        return original(batch)

    classifier.training_step = spy
    trainer.fit(classifier, datamodule)
    mean = sum(penalty * count for penalty, count in seen) / sum(count for _, count in seen)
    metrics = trainer.callback_metrics
    assert (metrics["train/penalized_loss"] - metrics["train/loss"]).item() == pytest.approx(mean, rel=ROUNDING)
    assert seen[0][0] > 1.05 * mean > 1.05 * seen[-1][0]


def test_it_learns(trainer, datamodule):
    torch.manual_seed(0)
    classifier = Classifier(MLP(l2=0.0001), lambda params: KerasAdam(params, lr=0.01))
    trainer.fit_loop.max_epochs = 5
    trainer.fit(classifier, datamodule)
    (metrics,) = trainer.test(classifier, datamodule, verbose=False)
    assert metrics["test/accuracy"] > 0.8


def test_any_module_optimizer_and_scheduler_will_do(trainer, datamodule):
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 13 * 13, 10))
    classifier = Classifier(
        network, torch.optim.NAdam, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    )
    trainer.fit(classifier, datamodule)
    assert classifier.penalty() == 0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 2e-3)


def test_plateau_scheduler_follows_its_metric(trainer, datamodule):
    trainer.fit_loop.max_epochs = 3
    classifier = Classifier(
        MLP(),
        lambda params: KerasSGD(params, lr=1e-12),  # never improves after the first epoch
        lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, factor=0.5),
    )
    trainer.fit(classifier, datamodule)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-12 / 4)


def test_predictions_are_probabilities(trainer, datamodule):
    classifier = Classifier(MLP())
    probabilities = torch.cat(trainer.predict(classifier, datamodule))
    assert probabilities.shape == (300, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(300))
    classifier.eval()
    expected = classifier(datamodule.test.images / 255).softmax(1)
    torch.testing.assert_close(probabilities, expected)


def test_subnormals_are_flushed(trainer, datamodule):
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5).item() > 0
    trainer.fit(Classifier(MLP()), datamodule)
    assert (tiny * 0.5).item() == 0
