"""Metrics of torchmetrics are exact and reach all outputs; class weights weigh only the loss that is minimized."""

import csv
import inspect
import json
import math
import re
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.commands import in_process
from helpers.studies import choices, load
from lightning.pytorch import Trainer
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score, top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torchmetrics import Metric, classification
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassHammingDistance,
    MulticlassRecall,
)

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.metrics import EpochMetrics
from mnist_lightning.networks import MLP
from mnist_lightning.optimizers import KerasAdam
from mnist_lightning.search.study import best_trial
from mnist_lightning.system.errors import UserError
from mnist_lightning.training import fast
from mnist_lightning.training.saved_run import SavedRun

RECALL = ["--model.metrics+=torchmetrics.classification.MulticlassRecall", "--model.metrics.average", "macro"]


@pytest.fixture
def fit(data_dir):
    """Train an epoch of 16 batches; return the classifier, the data and the trainer."""

    def run(make=Classifier, data=None, is_fast=False, network=None, **arguments):
        warnings.filterwarnings("ignore", ".*(many workers|logging interval)")
        torch.manual_seed(0)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        if is_fast:
            fast.speed_up(trainer)
        classifier = make(MLP([16]) if network is None else network, **arguments)
        data = data or MNISTDataModule(str(data_dir), eval_batch_size=64)
        trainer.fit(classifier, data)
        return classifier, data, trainer

    return run


def predicted(classifier, split):
    with torch.no_grad():
        return classifier.eval()(split.images / 255).double().softmax(dim=1).numpy()


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refused(capfd, *options):
    """Return the message of a command that ends with a mistake of the user."""
    code, _, errors = in_process(capfd, *options)
    assert code in {1, 2}
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.numeric
def test_values_are_scikit_learn_s_over_the_whole_epoch(fit):
    metrics = ["f1", "top3_accuracy", MulticlassAUROC(10), MulticlassRecall(10)]
    classifier, data, trainer = fit(metrics=metrics)
    probabilities, labels = predicted(classifier, data.val), data.val.labels.numpy()
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert {
        "val/f1": f1_score(labels, probabilities.argmax(1), average="macro"),
        "val/top3_accuracy": top_k_accuracy_score(labels, probabilities, k=3),
        "val/auroc": roc_auc_score(labels, probabilities, multi_class="ovr"),
        "val/recall": balanced_accuracy_score(labels, probabilities.argmax(1)),
    } == pytest.approx({name: found[name] for name in found if name not in SUMMED}, rel=1e-5)
    assert found.keys() >= SUMMED
    assert all(metric.update_count == 0 for metric in metrics[2:])  # the given ones stay unused


SUMMED = {"lr", *(f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "penalized_loss", "accuracy"))}


def test_a_class_that_is_never_there_does_not_count():
    logits, labels = torch.randn(200, 12), torch.randint(0, 7, (200,))
    logits[:, 9:] = -9
    metrics = EpochMetrics(["f1"])
    metrics.update("val", logits[:90], labels[:90])
    metrics.update("val", logits[90:], labels[90:])
    assert metrics.compute("val")["f1"].item() == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    assert metrics.compute("val") == {}


def test_large_logits_keep_their_order():
    """Check logits whose probabilities are 0 in float32."""
    logits = torch.linspace(0, -400, 10).repeat(10, 1)
    metrics = EpochMetrics(["top3_accuracy"])
    metrics.update("val", logits, torch.arange(10))
    assert metrics.compute("val")["top3_accuracy"].item() == pytest.approx(0.3)


REFUSED = [
    *(f"Multiclass{name}" for name in ("Accuracy", "ConfusionMatrix", "EER", "LogAUC", "PrecisionRecallCurve", "ROC")),
    *(f"Multiclass{name}" for name in ("PrecisionAtFixedRecall", "RecallAtFixedPrecision", "StatScores")),
    *(f"Multiclass{name}" for name in ("SensitivityAtSpecificity", "SpecificityAtSensitivity")),
]
NEEDED = {"beta": 2.0, "min_recall": 0.5, "min_precision": 0.5, "min_specificity": 0.5, "min_sensitivity": 0.5}


@pytest.mark.parametrize("name", [name for name in dir(classification) if name.startswith("Multiclass")])
def test_each_metric_of_torchmetrics_is_a_number_or_refused_in_a_line(name):
    cls = getattr(classification, name)
    needed = {key: NEEDED[key] for key in inspect.signature(cls).parameters if key in NEEDED}
    metric = cls(num_classes=10, **needed)
    if name in REFUSED:
        with pytest.raises(UserError, match=r"^metrics: [^\n]*(the name accuracy|only a single number)[^\n]*$"):
            EpochMetrics([metric])
        return
    metrics = EpochMetrics([metric])
    (own,) = metrics.names
    logits, labels = torch.randn(200, 10).double(), torch.randint(0, 10, (200,))
    logits[range(200), labels] += 2
    for start in range(0, 200, 64):
        metrics.update("val", logits[start : start + 64], labels[start : start + 64])
    metric.update(logits.softmax(1), labels)
    assert metrics.compute("val")[own].item() == pytest.approx(metric.compute().item())
    logits[3, 3] = math.nan
    metrics.update("val", logits, labels)
    metrics.update("val", logits[10:], labels[10:])
    assert metrics.compute("val")[own].isnan()


class Odd(Metric):
    """A metric that needs no number of classes."""

    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, probabilities, labels):
        self.sum += probabilities.shape[1] + 0 * labels.sum()

    def compute(self):
        return self.sum


def test_names_and_directions():
    metrics = EpochMetrics(["f1", "top5_accuracy", MulticlassF1Score(10), MulticlassHammingDistance(10), Odd()])
    assert metrics.names == ["f1", "top5_accuracy", "f1_score", "hamming_distance", "odd"]
    assert [metrics.higher_is_better(name) for name in metrics.names] == [True, True, True, False, False]
    assert metrics.higher_is_better("loss") is None
    assert EpochMetrics("f1").names == ["f1"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["f1", "f1"], "two metrics have the name f1"),
        ([MulticlassRecall(10), MulticlassRecall(10, average="micro")], "two metrics have the name recall"),
        (["loss"], "'loss' is not f1, top3_accuracy"),
        ("top0_accuracy", "'top0_accuracy' is not f1"),
        ([MulticlassConfusionMatrix(10)], r"MulticlassConfusionMatrix is a tensor of shape \(10, 10\), but only a"),
        ([MulticlassF1Score(10, average=None)], r"MulticlassF1Score is a tensor of shape \(10,\), but only a"),
    ],
)
def test_what_cannot_be_logged_is_refused(metrics, message):
    with pytest.raises(UserError, match=message) as error:
        Classifier(MLP(), metrics=metrics)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["top11_accuracy"], "top11_accuracy needs at least 11 classes, but the network has 10"),
        ([MulticlassF1Score(12)], "f1_score does not take labels and the probabilities of 10 classes"),
    ],
)
def test_metrics_for_other_outputs_are_refused(metrics, message):
    with pytest.raises(UserError, match=message):
        Classifier(MLP(), metrics=metrics).check_images((1, 28, 28), 10)


@pytest.mark.numeric
def test_metrics_change_neither_weights_nor_the_other_metrics(fit):
    plain, _, expected = fit()
    measured, _, trainer = fit(metrics=["f1", MulticlassAUROC(10)])
    assert [*measured.state_dict()] == [*plain.state_dict()]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in measured.state_dict().items())
    assert expected.callback_metrics.keys() == trainer.callback_metrics.keys() - {"val/f1", "val/auroc"}
    assert all(torch.equal(value, trainer.callback_metrics[n]) for n, value in expected.callback_metrics.items())


def test_an_epoch_that_was_stopped_does_not_count(fit):
    class Stopped(Classifier):
        is_stopped = False

        def validation_step(self, batch):
            logits = super().validation_step(batch)
            if not self.is_stopped:
                self.is_stopped = True
                raise InterruptedError
            return logits

    classifier = Stopped(MLP([16]), metrics=["f1"])
    with pytest.raises(InterruptedError):
        fit(lambda _: classifier)
    _, data, trainer = fit(lambda _: classifier)
    labels = data.val.labels.numpy()
    guesses = predicted(classifier, data.val).argmax(1)
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx((guesses == labels).mean())
    assert trainer.callback_metrics["val/f1"].item() == pytest.approx(f1_score(labels, guesses, average="macro"))


def test_they_reach_all_outputs(quick, tmp_path):
    output = quick(tmp_path, "fit", "--trainer.max_epochs=2", "--model.metrics=[f1,top3_accuracy]", *RECALL).stdout
    folder = tmp_path / "lightning_logs/baseline/version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())["model"]["metrics"]
    assert config[:2] == ["f1", "top3_accuracy"]
    assert config[2]["init_args"]["num_classes"] == 10
    names = ["f1", "top3_accuracy", "recall"]
    history = rows(folder / "metrics.csv")
    last, best = rows(folder / "test.csv")
    assert {f"val/{name}" for name in names} <= history[-1].keys()
    assert not {f"train/{name}" for name in names} & history[-1].keys()
    header, *_, line = [line.split() for line in output.splitlines() if "val/f1" in line or re.match(r" +\d/2 ", line)]
    assert [line[header.index(f"val/{name}")] for name in names] == [
        f"{float(history[-1][f'val/{name}']):.4f}" for name in names
    ]
    assert "test f1  test top3 accuracy  test recall" in output
    events = EventAccumulator(str(folder)).Reload()
    for name in names:
        logged = {event.step: event.value for event in events.Scalars(f"val/{name}")}
        assert logged == pytest.approx({int(row["epoch"]) + 1: float(row[f"val/{name}"]) for row in history})

    run = SavedRun.read(folder / "checkpoints/last.ckpt")
    data = run.datamodule
    data.setup("test")
    probabilities, labels = run.predict(data.test).softmax(1).numpy(), data.test.labels.numpy()
    expected = {
        "test/f1": f1_score(labels, probabilities.argmax(1), average="macro"),
        "test/top3_accuracy": top_k_accuracy_score(labels, probabilities, k=3),
        "test/recall": balanced_accuracy_score(labels, probabilities.argmax(1)),
    }
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected, rel=1e-5)

    tested = quick(tmp_path, "test", "--ckpt_path", str(folder / "checkpoints/last.ckpt")).stdout
    assert float(re.search(r"test/f1\s+(\S+)", tested)[1]) == pytest.approx(expected["test/f1"], rel=1e-5)
    assert "val/recall" in quick(tmp_path, "validate").stdout

    quick(tmp_path, "fit", "--trainer.max_epochs=1", "--name=other")
    quick(tmp_path, "report", f"plain={tmp_path}/lightning_logs/other/version_0", f"measured={folder}", data=False)
    report = json.loads((tmp_path / "lightning_logs/report/report.json").read_text())
    found = report["models"]["measured"]["metrics"]
    assert found["test/f1 (last epoch)"] == pytest.approx([expected["test/f1"]], rel=1e-5)
    table = pd.DataFrame([row["values"] for row in report["comparison"]], [row["name"] for row in report["comparison"]])
    assert [*table.loc["test/f1 (best epoch)"]] == ["-", f"{float(best['test/f1']):.4f}", "-"]


def test_an_evaluation_takes_more_metrics(quick, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_epochs=1")
    checkpoint = tmp_path / "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    for key in ("metrics", "class_weights"):  # as in a checkpoint that is older than them
        del content["hyper_parameters"][key]
    torch.save(content, checkpoint)
    assert SavedRun.read(checkpoint).classifier.epoch_metrics.names == []
    output = quick(tmp_path, "test", "--model.metrics+=MulticlassAUROC").stdout
    assert "test/auroc" in output
    quick(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_epochs=2", "--model.metrics=f1")
    history = rows(tmp_path / "lightning_logs/baseline/version_1/metrics.csv")
    assert [bool(row["val/f1"]) for row in history] == [False, True]


def test_a_continued_run_is_the_same(quick, tmp_path):
    options = ["--model.metrics=[f1,top5_accuracy]", "--model.class_weights=balanced"]
    quick(tmp_path, "fit", "--trainer.max_epochs=3", *options, "--name=whole")
    quick(tmp_path, "fit", "--trainer.max_epochs=1", *options, "--name=parts")
    quick(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--name=parts")
    one, other = (tmp_path / f"lightning_logs/{name}" for name in ("whole/version_0", "parts/version_1"))
    for file in ("metrics.csv", "test.csv"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    model = SavedRun.read(other / "checkpoints/last.ckpt").model
    assert (model["class_weights"], model["metrics"]) == ("balanced", ["f1", "top5_accuracy"])


def test_callbacks_monitor_them(quick, tmp_path, capfd):
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.mode=max", "--trainer.callbacks.patience=0"]
    stop += ["--trainer.callbacks.min_delta=1", "--model.metrics=f1", "--trainer.max_epochs=5"]
    quick(tmp_path, "fit", *stop, "--trainer.callbacks.monitor=val/f1")
    assert len(rows(tmp_path / "lightning_logs/baseline/version_0/metrics.csv")) == 2
    message = refused(capfd, "fit", *stop, "--trainer.callbacks.monitor=train/f1")
    assert "EarlyStopping monitors train/f1, which is not logged" in message
    assert message.endswith("val/f1.")


@pytest.mark.slow
def test_several_devices_compute_the_same(command, quick, tmp_path):
    """Check with a network that does not train: 125 validation images and 150 test images for each of two devices."""
    options = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--model.optimizer=KerasSGD"]
    options += ["--model.optimizer.lr=1e-12", "--model.metrics=[f1,top3_accuracy]", "--model.metrics+=MulticlassAUROC"]
    options += ["--model.class_weights=balanced"]
    found = []
    for number, (devices, size) in enumerate(((1, 7), (2, 7), (2, 250))):
        fit = quick if devices == 1 else command
        fit(tmp_path, "fit", *options, f"--trainer.devices={devices}", f"--data.eval_batch_size={size}")
        folder = tmp_path / f"lightning_logs/baseline/version_{number}"
        values = {**rows(folder / "metrics.csv")[0], **rows(folder / "test.csv")[0]}
        found.append({n: float(values[f"{n}"]) for n in values if re.search("val/|test/", n)})
    for values in found[1:]:
        assert found[0] == pytest.approx(values, rel=1e-5)
    assert {"val/f1", "val/top3_accuracy", "val/auroc", "test/f1"} <= found[0].keys()


@pytest.mark.slow
def test_a_search_follows_them_in_their_direction(tune, tmp_path):
    units = choices(**{"model.network.init_args.units.0": [2, 64]})
    options = [units, "--sampler=BruteForceSampler", "--n_trials=2", "--executions_per_trial=1", "--workers=1"]
    options += ["--model.metrics=[f1]", "--model.metrics+=MulticlassHammingDistance"]
    for name, direction in (("f1", "maximize"), ("hamming_distance", "minimize")):
        code, output, errors = tune(*options, f"--metric=val/{name}", f"--study_name={name}")
        assert code == 0, errors
        study = load(tmp_path / "here", name)
        assert study.user_attrs["settings"]["direction"] == direction
        assert best_trial(study).params["model.network.init_args.units.0"] == 64
        assert f"val/{name}" in output


@pytest.mark.slow
def test_a_limit_knows_the_direction_of_its_metric(tune, tmp_path):
    units = choices(**{"model.network.init_args.units.0": [2, 64]})
    options = [units, "--sampler=BruteForceSampler", "--n_trials=2", "--executions_per_trial=1", "--workers=1"]
    code, _, errors = tune(
        *options, "--metric=val/loss", "--model.metrics+=MulticlassHammingDistance",
        '--limits={"val/hamming_distance": 0.5}', epochs=4,
    )  # fmt: skip
    assert code == 0, errors
    study = load(tmp_path / "here")
    limited = {
        trial.params["model.network.init_args.units.0"]: trial.constraints["val/hamming_distance"]
        for trial in study.trials
    }
    assert limited[64] < 0 < limited[2]
    assert best_trial(study).params["model.network.init_args.units.0"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.metrics+=MulticlassConfusionMatrix"], "only a single number can be logged"),
        (["--model.metrics+=MulticlassROC"], "the result of MulticlassROC is tuple"),
        (["--model.metrics=accurcy"], "'accurcy' is not f1"),
        (["--model.metrics=[f1,f1]"], "two metrics have the name f1"),
        (["--model.metrics=top11_accuracy"], "needs at least 11 classes"),
        (["--model.metrics+=MulticlassRecall", "--model.metrics.averag=macro"], "Option 'averag' is not accepted"),
        (
            ["--model.metrics+=MulticlassRecall", "--model.metrics.average=foo"],
            "MulticlassRecall: average: foo is",
        ),
        (["--model.class_weights=[1,2]"], "10 outputs, but the length of class_weights is 2"),
        (["--model.class_weights=[1,1,1,1,1,1,1,1,1,-1]"], "must be a finite number that is not negative"),
        (["--model.class_weights=[1,1,1,1,1,1,1,1,1,.nan]"], "must be a finite number"),
        (["--model.class_weights=equal"], "equal is not one of 'balanced', list"),
    ],
)
def test_a_mistake_is_told_in_a_line(capfd, data_dir, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capfd, "fit", f"--data.data_dir={data_dir}", *options)
    assert not (tmp_path / "lightning_logs").exists()


class Unbalanced(MNISTDataModule):
    """MNIST with a tenth of the zeros, and without training images of ``lacking``."""

    lacking = 10

    def setup(self, stage):
        super().setup(stage)
        if self.train is not None and len(self.train) == 1000:
            labels = self.train.labels
            keeps = (labels != self.lacking) & ((labels != 0) | (torch.arange(len(labels)) % 10 == 0))
            self.train.images, self.train.labels = self.train.images[keeps], labels[keeps]


@pytest.mark.numeric
def test_balanced_weights_are_scikit_learn_s(fit, data_dir):
    classifier, data, _ = fit(data=Unbalanced(str(data_dir)), class_weights="balanced")
    labels = data.train.labels.numpy()
    assert (labels == 0).sum() < 20
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    np.testing.assert_allclose(classifier.loss_weights, expected, rtol=1e-6)
    assert classifier.loss_weights[data.train.labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_weights_weigh_the_minimized_loss_and_no_logged_one(mnist, smoothing, is_mixed):
    torch.manual_seed(0)
    network, weights = MLP([16], dropout=0, l2=0), [*range(1, 11)]
    classifier = Classifier(network, label_smoothing=smoothing, class_weights=weights)
    images, labels = mnist.train.__getitems__(range(64))
    shares = F.one_hot(labels, 10).float()
    shares = 0.7 * shares + 0.3 * shares.roll(1, 0) if is_mixed else shares
    loss = classifier.training_step((images, shares if is_mixed else labels))
    logs = network(images).log_softmax(1)
    targets = (1 - smoothing) * shares + smoothing / 10
    torch.testing.assert_close(loss, -(targets * torch.tensor(weights) * logs).sum() / 64)
    torch.testing.assert_close(classifier.totals["train"]["loss"], -(shares * logs).sum().detach())


@pytest.mark.numeric
def test_weighted_fast_and_not_fast_are_the_same_to_the_bit(fit, data_dir):
    options = {"class_weights": "balanced", "metrics": ["f1"]}
    (one, _, trainer), (other, _, expected) = (
        fit(data=Unbalanced(str(data_dir)), is_fast=is_fast, **options) for is_fast in (True, False)
    )
    assert fast.is_unwatched(trainer)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert trainer.callback_metrics == expected.callback_metrics


def test_weights_find_more_of_a_rare_class(fit, data_dir):
    found = []
    for weights in (None, "balanced"):
        classifier, data, _ = fit(
            data=Unbalanced(str(data_dir)), class_weights=weights, network=MLP(dropout=0, l2=0),
            optimizer=partial(KerasAdam, lr=0.003),
        )  # fmt: skip
        found.append((predicted(classifier, data.val)[data.val.labels == 0].argmax(1) == 0).mean())
    assert found[1] > found[0] + 0.1


def test_outputs_without_a_class_have_the_weight_1(fit):
    classifier, *_ = fit(network=MLP([16], num_classes=12), class_weights="balanced")
    assert classifier.loss_weights.shape == (12,)
    assert classifier.loss_weights[10:].tolist() == [1, 1]


def test_a_class_without_images_cannot_be_balanced(fit, data_dir):
    class Lacking(Unbalanced):
        lacking = 3

    with pytest.raises(UserError, match=r"^class_weights balanced: class 3 has no training images\."):
        fit(data=Lacking(str(data_dir)), class_weights="balanced")


def test_balanced_weights_need_a_data_module(data_dir):
    data = MNISTDataModule(str(data_dir))
    data.setup("fit")
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="balanced needs a data module"):
        trainer.fit(Classifier(MLP(), class_weights="balanced"), data.train_dataloader())
