"""The short way through an epoch changes nothing but its time."""

import functools
import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_lightning.callbacks import EpochProgressBar
from mnist_lightning.checkpoints import RunCheckpoint
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.loops import EpochLoop, NoProfiler
from mnist_lightning.networks import MLP
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD

pytestmark = pytest.mark.numeric


@pytest.fixture
def fit(data_dir, tmp_path, monkeypatch):
    """Trains two epochs of 16 batches; gives the checkpoint and the number of batches that went the short way."""

    def run(name, optimizer=KerasAdam, short=True, callbacks=(), module=Classifier, data=MNISTDataModule, **flags):
        taken = []
        original = EpochLoop._advance_to_last

        def advance_to_last(self, fetcher):
            before = self.batch_progress.total.completed
            original(self, fetcher)
            taken.append(self.batch_progress.total.completed - before)

        seed_everything(3, verbose=False)
        flags = {"profiler": NoProfiler(), "enable_progress_bar": False, "max_epochs": 2, **flags}
        trainer = Trainer(
            accelerator="cpu", logger=CSVLogger(tmp_path / name, ""), callbacks=[RunCheckpoint(), *callbacks],
            enable_model_summary=False, num_sanity_val_steps=0, **flags,
        )  # fmt: skip
        trainer.fit_loop.epoch_loop = EpochLoop(trainer, trainer.min_steps, trainer.max_steps)
        with monkeypatch.context() as patch:
            patch.setattr(EpochLoop, "_advance_to_last", advance_to_last)
            if not short:
                patch.setattr(EpochLoop, "_can_skip_hooks", lambda self: False)
            trainer.fit(module(MLP(units=[16], dropout=0.2, l2=0.01), optimizer), data(str(data_dir)))
        path = next((tmp_path / name).rglob("last.ckpt"), None)
        return torch.load(path, weights_only=True) if path else None, sum(taken)

    return run


def lbfgs(params):
    return torch.optim.LBFGS(params, max_iter=2)


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop, torch.optim.AdamW, lbfgs])
def test_the_checkpoint_is_that_of_lightning_s_own_loop(fit, optimizer):
    checkpoint, taken = fit("short", optimizer)
    expected, none_taken = fit("long", optimizer, short=False)
    assert (taken, none_taken) == (30, 0)
    assert checkpoint["global_step"] == 32
    for key, weight in expected["state_dict"].items():
        assert torch.equal(weight, checkpoint["state_dict"][key])
    assert checkpoint["loops"]["fit_loop"] == expected["loops"]["fit_loop"]
    histories = [c["callbacks"]["RunCheckpoint"]["history"] for c in (checkpoint, expected)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop])
def test_no_step_reads_a_value_from_the_device(fit, monkeypatch, optimizer):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    calls = []
    original = EpochLoop._advance_to_last

    def watched(self, fetcher):
        with Calls():
            original(self, fetcher)

    monkeypatch.setattr(EpochLoop, "_advance_to_last", watched)
    assert fit("watched", optimizer)[1] == 30
    assert torch.ops.aten.addmm.default in calls
    assert torch.ops.aten._local_scalar_dense.default not in calls


def test_the_progress_bar_sees_each_batch(fit, monkeypatch):
    seen = []
    monkeypatch.setattr(EpochProgressBar, "on_train_batch_end", lambda *arguments: seen.append(arguments[-1]))
    _, taken = fit("bar", callbacks=[EpochProgressBar()], enable_progress_bar=True)
    assert taken == 30
    assert seen == [*range(16), *range(16)]


def hooks_of(*classes):
    """The public methods that these classes of Lightning call by themselves."""
    names = {name for each in classes for name, value in vars(each).items() if inspect.isfunction(value)}
    return sorted(name for name in names if not name.startswith("_"))


CALLBACK_HOOKS = hooks_of(Callback)
DATA_HOOKS = [hook for hook in hooks_of(DataHooks, LightningDataModule) if hasattr(MNISTDataModule, hook)]
MODULE_HOOKS = sorted({
    *hooks_of(ModelHooks, DataHooks, CheckpointHooks), "backward", "configure_callbacks", "configure_gradient_clipping",
    "configure_optimizers", "forward", "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad", "training_step",
    "validation_step",
})  # fmt: skip


def listener(base, hooks, calls):
    """A subclass in which each of these hooks notes its call."""

    def noting(hook):
        original = getattr(base, hook)

        @functools.wraps(original)
        def note(self, *arguments, **keywords):
            calls.append((hook, *(argument for argument in arguments if isinstance(argument, int))))
            return original(self, *arguments, **keywords)

        return note

    return type("Listener", (base,), {hook: noting(hook) for hook in hooks})


@pytest.fixture(scope="module")
def expected():
    """What Lightning's own loop calls, by kind; filled when it is first asked for."""
    return {}


KINDS = {
    "callback": (Callback, CALLBACK_HOOKS),
    "module": (Classifier, MODULE_HOOKS),
    "data": (MNISTDataModule, DATA_HOOKS),
}


@pytest.mark.parametrize(("kind", "hook"), [(kind, hook) for kind, (_, hooks) in KINDS.items() for hook in hooks])
def test_each_hook_is_called_as_often_and_in_the_order_of_lightning_s_own_loop(fit, expected, kind, hook):
    def calls(hooks, **options):
        noted = []
        made = listener(KINDS[kind][0], hooks, noted)
        fit(kind, **({"callbacks": [made()]} if kind == "callback" else {kind: made}), limit_train_batches=5, **options)
        return noted

    if kind not in expected:
        expected[kind] = calls(KINDS[kind][1], short=False)
    assert calls([hook]) == [call for call in expected[kind] if call[0] == hook]


class Manual(Classifier):
    """Steps by itself."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


class Logging(Classifier):
    """Logs in a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        self.log("step_loss", loss, on_step=True)
        return loss


class Patched(Classifier):
    """Is a Classifier for all its class tells."""

    def __new__(cls, *arguments):
        classifier = Classifier(*arguments)
        classifier.optimizer_step = functools.partial(classifier.optimizer_step)
        return classifier


class Bar(EpochProgressBar):
    """A progress bar of one's own."""

    def on_train_batch_start(self, *_):
        """Note it."""


@pytest.mark.parametrize(
    "options",
    [
        {"module": Manual},
        {"module": Logging},
        {"module": Patched},
        {"callbacks": [LambdaCallback(on_before_zero_grad=lambda *_: None)]},
        {"callbacks": [Bar()], "enable_progress_bar": True},
    ],
    ids=["manual optimization", "self.log in a step", "a method set on the module", "LambdaCallback", "progress bar"],
)
def test_what_sees_a_step_takes_lightning_s_way(fit, options):
    checkpoint, taken = fit("watched", **options)
    assert taken == 0
    expected, _ = fit("expected", **options, short=False)
    for key, weight in expected["state_dict"].items():
        assert torch.equal(weight, checkpoint["state_dict"][key])


@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"val_check_interval": 0.5},
        {"val_check_interval": 20, "check_val_every_n_epoch": None},
        {"max_steps": 5},
        {"max_time": "00:00:01:00"},
        {"profiler": "simple"},
    ],
)
def test_flags_that_matter_in_a_step_take_lightning_s_way(fit, flags):
    assert fit("flags", **flags)[1] == 0


def test_a_schedule_of_steps_goes_the_short_way(fit):
    def module(network, optimizer):
        return Classifier(
            network, optimizer, functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=-1)
        )

    checkpoint, taken = fit("short", module=module)
    assert taken == 30
    expected, _ = fit("whole", module=module, short=False)
    assert checkpoint["lr_schedulers"] == expected["lr_schedulers"]
    for key, weight in expected["state_dict"].items():
        assert torch.equal(weight, checkpoint["state_dict"][key])


def test_averages_of_weights_go_the_short_way(fit):
    checkpoint, taken = fit("short", callbacks=[EMAWeightAveraging(decay=0.9)])
    assert taken == 30
    expected, _ = fit("whole", callbacks=[EMAWeightAveraging(decay=0.9)], short=False)
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(tensor, checkpoint[part][name]) for name, tensor in expected[part].items())
    assert checkpoint["averaging_state"]["n_averaged"] == 32


def test_an_average_that_listens_to_more_takes_lightning_s_way(fit):
    class Listening(EMAWeightAveraging):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(outputs["loss"])
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    losses = []
    assert fit("listening", callbacks=[Listening()])[1] == 0
    assert len(losses) == 32


def test_limits_of_batches_and_a_stop_are_kept(fit):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = True

    checkpoint, taken = fit("limits", limit_train_batches=5, callbacks=[Stop()])
    assert (taken, checkpoint["global_step"]) == (4, 5)
