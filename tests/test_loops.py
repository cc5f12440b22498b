"""The short way through an epoch changes nothing but its time."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_lightning.callbacks import EpochProgressBar
from mnist_lightning.checkpoints import RunCheckpoint
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.loops import STEP_HOOKS, EpochLoop, NoProfiler
from mnist_lightning.networks import MLP
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD


@pytest.fixture
def fit(data_dir, tmp_path, monkeypatch):
    """Trains two epochs of 16 batches; gives the checkpoint and the number of batches that went the short way."""

    def run(name, optimizer=KerasAdam, short=True, callbacks=(), **flags):
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
                patch.setattr(EpochLoop, "_is_plain", lambda self: False)
            trainer.fit(Classifier(MLP(units=[16], dropout=0.2, l2=0.01), optimizer), MNISTDataModule(str(data_dir)))
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


@pytest.mark.parametrize("hook", STEP_HOOKS)
def test_a_callback_hears_each_step(fit, hook):
    calls = []
    listener = type("Listener", (Callback,), {hook: lambda *_: calls.append(1)})
    _, taken = fit("callback", callbacks=[listener()])
    assert (taken, len(calls)) == (0, 32)


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


def test_limits_of_batches_and_a_stop_are_kept(fit):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = True

    checkpoint, taken = fit("limits", limit_train_batches=5, callbacks=[Stop()])
    assert (taken, checkpoint["global_step"]) == (4, 5)
