"""The short way through a training step changes nothing but its time."""

import functools
import inspect
import re
import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.networks import MLP
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD
from mnist_lightning.training import fast, progress
from mnist_lightning.training.checkpoints import RunCheckpoint
from mnist_lightning.training.progress import EpochProgressBar

pytestmark = pytest.mark.numeric


@pytest.fixture
def fit(data_dir, tmp_path, monkeypatch):
    """Train two epochs of 16 batches; return the checkpoint and the number of batches that went the short way."""

    def run(name, optimizer=KerasAdam, is_fast=True, callbacks=(), module=Classifier, data=MNISTDataModule, **flags):
        own = []  # batches that went Lightning's usual way
        advance = _TrainingEpochLoop.advance
        seed_everything(3, verbose=False)
        flags = {"enable_progress_bar": False, "max_epochs": 2, **flags}
        trainer = Trainer(
            accelerator="cpu", logger=CSVLogger(tmp_path / name, ""), callbacks=[RunCheckpoint(), *callbacks],
            enable_model_summary=False, num_sanity_val_steps=0, **flags,
        )  # fmt: skip
        if is_fast:
            fast.speed_up(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(_TrainingEpochLoop, "advance", lambda *arguments: own.append(advance(*arguments)))
            trainer.fit(module(MLP(units=[16], dropout=0.2, l2=0.01), optimizer), data(str(data_dir)))
        path = next((tmp_path / name).rglob("last.ckpt"), None)
        taken = trainer.fit_loop.epoch_loop.batch_progress.total.completed - len(own)
        return torch.load(path, weights_only=True) if path else None, taken

    return run


def assert_same(checkpoint, expected):
    """Check that two checkpoints are the same to the bit, except for times and paths."""
    assert checkpoint.keys() == expected.keys()
    for key in checkpoint.keys() - {"callbacks"}:
        assert_equal(checkpoint[key], expected[key])
    states = [{**each["callbacks"], **each["callbacks"]["RunCheckpoint"]} for each in (checkpoint, expected)]
    for key in ("history", "random_states", "best_model_score"):
        assert_equal(*(state[key] for state in states))


def assert_equal(one, other):
    """Check that two nested values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each, another in zip(one, other, strict=True):
            assert_equal(each, another)
    else:
        assert one == other


def lbfgs(params):
    return torch.optim.LBFGS(params, max_iter=2)


def one_cycle(network, optimizer):
    schedule = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=-1)
    return Classifier(network, optimizer, schedule)


@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer": each} for each in (KerasAdam, KerasSGD, KerasRMSprop, torch.optim.AdamW, lbfgs)),
        {"module": one_cycle},
    ],
    ids=["KerasAdam", "KerasSGD", "KerasRMSprop", "AdamW", "LBFGS", "a schedule of steps"],
)
def test_fast_and_not_fast_are_the_same_to_the_bit(fit, options):
    checkpoint, taken = fit("fast", **options)
    expected, none_taken = fit("slow", **options, is_fast=False)
    assert (taken, none_taken) == (30, 0)
    assert checkpoint["global_step"] == 32
    assert_same(checkpoint, expected)


def test_averages_of_weights_are_the_same_to_the_bit(fit):
    checkpoint, taken = fit("fast", callbacks=[EMAWeightAveraging(decay=0.9)])
    assert taken == 30
    assert checkpoint["averaging_state"]["n_averaged"] == 32
    assert_same(checkpoint, fit("slow", callbacks=[EMAWeightAveraging(decay=0.9)], is_fast=False)[0])


@pytest.mark.slow
def test_the_command_is_the_same_to_the_bit(quick, tmp_path):
    checkpoints = []
    for number, option in enumerate(("--fast=true", "--fast=false")):
        quick(tmp_path, "fit", option, "--trainer.max_epochs=3")
        path = tmp_path / f"lightning_logs/baseline/version_{number}/checkpoints/last.ckpt"
        checkpoints.append(torch.load(path, weights_only=True))
        assert checkpoints[-1]["callbacks"]["RunCheckpoint"]["config"]["fast"] == (number == 0)
    assert_same(*checkpoints)


@pytest.mark.parametrize("optimizer", [KerasAdam, KerasSGD, KerasRMSprop])
def test_no_step_reads_a_value_from_the_device(fit, monkeypatch, optimizer):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    calls = []
    original = fast.EpochLoop._advance_to_last

    def watched(self, fetcher):
        with Calls():
            original(self, fetcher)

    monkeypatch.setattr(fast.EpochLoop, "_advance_to_last", watched)
    assert fit("watched", optimizer)[1] == 30
    assert torch.ops.aten.addmm.default in calls
    assert torch.ops.aten._local_scalar_dense.default not in calls


def test_the_progress_bar_sees_each_batch(fit, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(progress, "REFRESH", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress.tqdm, "refresh", lambda bar, **_: bar.n and shown.append((bar.n, bar.bar_format)))
    _, taken = fit("bar", callbacks=[EpochProgressBar()], enable_progress_bar=True)
    assert taken == 30
    assert [batch for batch, _ in shown] == 2 * [*range(1, 17), 16]  # the last time, while it validates
    header, first, second = capsys.readouterr().out.splitlines()
    for (_, running), line in ((shown[16], first), (shown[33], second)):
        assert running.split()[:3] == line.split()[:3]  # the metrics of train are complete
        assert re.fullmatch(r" +\d/2( +\d\.\d{4}){3} +0\.\d{4}[* ] +\d\.\d +00:0\d", line)
        running = running.replace("{bar:17}", 17 * "=").replace("{percentage:3.0f}", "100")
        assert len(header) == len(line) == len(running) <= 80
    assert header.split() == ["epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "seconds", "left"]
    best = [line for line in (first, second) if "*" in line]
    accuracies = [float(line.split()[4].strip("*")) for line in (first, second)]
    assert best == ([first, second] if accuracies[1] > accuracies[0] else [first])


def hooks_of(*classes):
    """Return the public methods that Lightning calls on these classes."""
    names = {name for each in classes for name, value in vars(each).items() if inspect.isfunction(value)}
    return sorted(name for name in names if not name.startswith("_"))


HOOKS = {
    "callback": (Callback, hooks_of(Callback), fast.CALLBACK_HOOKS),
    "data": (
        MNISTDataModule,
        [hook for hook in hooks_of(DataHooks, LightningDataModule) if hasattr(MNISTDataModule, hook)],
        fast.DATA_HOOKS,
    ),
    "module": (
        Classifier,
        sorted({
            *hooks_of(ModelHooks, DataHooks, CheckpointHooks), "configure_callbacks", "configure_optimizers", "forward",
            "lr_scheduler_step", "validation_step", *fast.MODULE_HOOKS,
        }),
        fast.MODULE_HOOKS,
    ),
}  # fmt: skip
"""By kind: the class, its hooks, and the hooks within a step, which the short way does not call."""


def noting(base, hook, calls):
    """Return a wrapper around a hook of a class that records its calls."""
    original = getattr(base, hook)

    @functools.wraps(original)
    def note(self, *arguments, **keywords):
        calls.append((hook, *(argument for argument in arguments if isinstance(argument, int))))
        return original(self, *arguments, **keywords)

    return note


def calls_of(fit, kind, hooks, **options):
    """Return the hooks that a training calls on a subclass that overrides them, and the batches taken."""
    base, calls = HOOKS[kind][0], []
    made = type("Listener", (base,), {hook: noting(base, hook, calls) for hook in hooks})
    given = {"callbacks": [made()]} if kind == "callback" else {kind: made}
    return calls, fit(kind, **given, limit_train_batches=5, **options)[1]


@pytest.fixture(scope="module")
def expected():
    """The hooks that Lightning's own loop calls, by kind; filled on first use."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "hooks"),
    [
        *((kind, (hook,)) for kind, (_, _, in_step) in HOOKS.items() for hook in in_step),
        *((kind, tuple({*hooks} - {*in_step})) for kind, (_, hooks, in_step) in HOOKS.items()),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0] if len(value) == 1 else "all others",
)
def test_each_hook_is_called_as_often_and_in_the_order_of_lightning_s_own_loop(fit, expected, kind, hooks):
    if kind not in expected:
        expected[kind], _ = calls_of(fit, kind, HOOKS[kind][1], is_fast=False)
    calls, taken = calls_of(fit, kind, hooks)
    assert calls == [call for call in expected[kind] if call[0] in hooks]
    assert taken == (8 if len(hooks) > 1 and kind != "module" else 0)


@pytest.mark.parametrize(
    ("owner", "hook"),
    [
        *((Classifier, hook) for hook in fast.MODULE_HOOKS),
        (LightningModule, "optimizer_step"),
        (Callback, "on_train_batch_start"),
        (EpochProgressBar, "on_train_batch_end"),
        (RunCheckpoint, "on_train_batch_end"),
        (DataHooks, "on_after_batch_transfer"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_hook_set_on_a_class_is_called_for_each_batch(fit, monkeypatch, owner, hook):
    calls = []
    monkeypatch.setattr(owner, hook, noting(owner, hook, calls))
    bar = {"callbacks": [EpochProgressBar()], "enable_progress_bar": True} if owner is EpochProgressBar else {}
    _, taken = fit("patched", **bar)
    assert taken == 0
    assert len(calls) >= 32


class Manual(Classifier):
    """A classifier with manual optimization."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


class Logging(Classifier):
    """A classifier that logs in a step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch)
        self.log("step_loss", loss, on_step=True)
        return loss


def patched(*arguments):
    """Return a Classifier whose instance overrides a hook."""
    classifier = Classifier(*arguments)
    classifier.optimizer_step = functools.partial(classifier.optimizer_step)
    return classifier


class Bar(EpochProgressBar):
    """A custom progress bar."""

    def on_train_batch_start(self, *_):
        """Override the hook."""


@pytest.mark.parametrize(
    "options",
    [
        {"module": Manual},
        {"module": Logging},
        {"module": patched},
        {"callbacks": [LambdaCallback(on_before_zero_grad=lambda *_: None)]},
        {"callbacks": [Bar()], "enable_progress_bar": True},
    ],
    ids=["manual optimization", "self.log in a step", "a method set on the module", "LambdaCallback", "progress bar"],
)
def test_what_sees_a_step_takes_lightning_s_way(fit, options):
    checkpoint, taken = fit("watched", **options)
    assert taken == 0
    assert_same(checkpoint, fit("expected", **options, is_fast=False)[0])


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


def test_batches_without_a_number_take_lightning_s_way(fit):
    class Stream(IterableDataset):
        def __init__(self, split):
            self.split = split

        def __iter__(self):
            yield from (self.split.__getitems__(range(at, at + 8)) for at in range(0, 32, 8))

    class Streamed(MNISTDataModule):
        def train_dataloader(self):
            return DataLoader(Stream(self.train), batch_size=None)

    checkpoint, taken = fit("streamed", data=Streamed)
    assert taken == 0
    assert "val/loss" in checkpoint["callbacks"]["RunCheckpoint"]["history"][-1]


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
