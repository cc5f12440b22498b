"""A run that is interrupted and continued ends exactly as one that never was."""

import errno
import pickle
import random
import re
import shutil
import warnings
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import ROUNDING, in_process
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import TensorBoardLogger

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.networks import CNN, MLP
from mnist_lightning.optimizers import KerasAdam
from mnist_lightning.predictor import Predictor
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.checkpoints import CheckpointIO, FitLoop, RunCheckpoint

pytestmark = pytest.mark.numeric


def fit(folder, data_dir, epochs, ckpt_path=None, seed=4):
    """Train in ``folder``; a plateau scheduler and noise from three generators make continuing hard."""
    warnings.filterwarnings("ignore", ".*(many workers|logging interval|GPU available)")
    seed_everything(seed, verbose=False)

    class Noisy(Classifier):
        def training_step(self, batch):
            noise = random.random() + np.random.random() + torch.rand(()).item()
            return super().training_step((batch[0] + 0.1 * noise, batch[1]))

    classifier = Noisy(
        MLP(units=[32], dropout=0.3, l2=0.01),
        lambda params: KerasAdam(params, lr=0.02),
        lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val/loss", patience=0, factor=0.7, threshold=0.2),
    )
    checkpoint = RunCheckpoint()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger(folder, ""), callbacks=[checkpoint],
        plugins=[CheckpointIO()], enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit_loop = FitLoop(trainer)
    trainer.fit(classifier, MNISTDataModule(str(data_dir)), ckpt_path=ckpt_path)
    return classifier, trainer, checkpoint


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"), data_dir, 7)


def test_last_is_renewed_after_an_epoch_that_is_not_the_best(whole):
    classifier, _, checkpoint = whole
    best, last = (
        torch.load(path, weights_only=True) for path in (checkpoint.best_model_path, checkpoint.last_model_path)
    )
    assert best["epoch"] < last["epoch"] == 6
    assert last["callbacks"]["RunCheckpoint"]["history"] == checkpoint.history
    for name, weights in classifier.state_dict().items():
        assert torch.equal(weights, last["state_dict"][name])


@pytest.mark.parametrize("epochs", [1, 4, 6, 7])  # of 7 epochs
def test_a_resumed_run_equals_one_never_interrupted(whole, data_dir, tmp_path, epochs):
    _, _, interrupted = fit(tmp_path / "first", data_dir, epochs)
    shutil.move(tmp_path / "first", tmp_path / "moved")  # a run folder may move
    last = next((tmp_path / "moved").rglob("last.ckpt"))
    # another seed: all random state must come from the checkpoint
    resumed = fit(tmp_path / "second", data_dir, 7, str(last), seed=2)

    for expected, weights in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(expected, weights)
    assert len(interrupted.history) == epochs
    assert resumed[2].history == whole[2].history
    assert (resumed[2].run_dir / "metrics.csv").read_text() == (whole[2].run_dir / "metrics.csv").read_text()
    last = torch.load(resumed[2].last_model_path, weights_only=True)
    assert last["callbacks"]["RunCheckpoint"]["history"] == whole[2].history
    learning_rates = [run[1].optimizers[0].param_groups[0]["lr"] for run in (whole, resumed)]
    assert learning_rates[0] == learning_rates[1] < 0.02


def test_the_best_checkpoint_survives_resuming(whole, data_dir, tmp_path):
    scores = [row["val/accuracy"] for row in whole[2].history]
    best = scores.index(max(scores))
    for epochs in (best + 1, 6):
        fit(tmp_path / f"first{epochs}", data_dir, epochs)
        last = next((tmp_path / f"first{epochs}").rglob("last.ckpt"))
        _, _, checkpoint = fit(tmp_path / f"second{epochs}", data_dir, 7, str(last))
        expected, found = (torch.load(c.best_model_path, weights_only=True) for c in (whole[2], checkpoint))
        assert checkpoint.best_model_path.startswith(str(tmp_path / f"second{epochs}"))
        assert found["epoch"] == expected["epoch"] == best
        for name, weights in expected["state_dict"].items():
            assert torch.equal(weights, found["state_dict"][name])


def test_a_lost_best_checkpoint_is_said(data_dir, tmp_path):
    fit(tmp_path / "first", data_dir, 2)
    last = next((tmp_path / "first").rglob("last.ckpt"))
    last.with_name("best.ckpt").unlink()
    with pytest.warns(UserWarning, match="is gone"):
        _, _, checkpoint = fit(tmp_path / "second", data_dir, 3, str(last))
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == 2


def test_history_has_a_row_for_each_epoch(whole):
    history = whole[2].history
    assert [row["epoch"] for row in history] == list(range(7))
    assert [row["step"] for row in history] == [16 * epoch + 15 for epoch in range(7)]
    assert {f"{s}/{m}" for s in ("train", "val") for m in ("loss", "penalized_loss", "accuracy")} < set(history[0])


def test_epochs_without_validation_have_no_validation_metrics(data_dir, tmp_path):
    checkpoint = RunCheckpoint()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=TensorBoardLogger(tmp_path, ""), callbacks=[checkpoint],
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=2, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Classifier(MLP()), MNISTDataModule(str(data_dir)))
    assert ["val/loss" in row for row in checkpoint.history] == [False, True, False]
    assert ["train/loss" in row for row in checkpoint.history] == [True] * 3


def test_the_best_is_the_earliest_of_the_highest(whole):
    checkpoint = whole[2]
    scores = [row["val/accuracy"] for row in checkpoint.history]
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == scores.index(max(scores))


def fit_average(folder, data_dir, average, ckpt_path=None, seed=4):
    """Train a network with batch statistics for four epochs, with a checkpoint after each."""
    seed_everything(seed, verbose=False)
    classifier = Classifier(
        CNN([4, 6], 1, dropout=0.1),
        lambda params: KerasAdam(params, lr=0.03),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    )
    checkpoint = RunCheckpoint()
    each = ModelCheckpoint(filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = Trainer(
        max_epochs=4, accelerator="cpu", logger=TensorBoardLogger(folder, ""), callbacks=[average, checkpoint, each],
        plugins=[CheckpointIO()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit_loop = FitLoop(trainer)
    trainer.fit(classifier, MNISTDataModule(str(data_dir)), ckpt_path=ckpt_path)
    return classifier, checkpoint


AVERAGES = {
    "steps": lambda: EMAWeightAveraging(decay=0.8),
    "late steps": lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=40),
    "epochs": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=1),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_weights_are_continued_exactly(data_dir, tmp_path, kind):
    whole, expected = fit_average(tmp_path / "whole", data_dir, AVERAGES[kind]())
    path = next((tmp_path / "whole").rglob("epoch=2.ckpt"))
    resumed, checkpoint = fit_average(tmp_path / "rest", data_dir, AVERAGES[kind](), str(path), seed=2)
    assert checkpoint.history == expected.history
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name])
    files = [torch.load(each.last_model_path, weights_only=True) for each in (expected, checkpoint)]
    for part in {"state_dict", "current_model_state", "averaging_state"} & {*files[0]}:
        assert all(torch.equal(tensor, files[1][part][name]) for name, tensor in files[0][part].items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["steps", "late steps", "epochs"])
def test_averaged_weights_are_validated_as_they_are_saved(data_dir, tmp_path, kind):
    classifier, checkpoint = fit_average(tmp_path, data_dir, AVERAGES[kind]())
    for row in checkpoint.history:
        saved = torch.load(next(tmp_path.rglob(f"epoch={row['epoch']}.ckpt")), weights_only=True)
        classifier.load_state_dict(saved["state_dict"])
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        (results,) = trainer.validate(classifier, MNISTDataModule(str(data_dir)), verbose=False)
        assert results == pytest.approx({name: row[name] for name in results}, rel=ROUNDING)
        is_begun = row["epoch"] > {"steps": -1, "late steps": 1, "epochs": 1}[kind]
        current = saved["current_model_state"]
        is_averaged = any(not torch.equal(current[name], tensor) for name, tensor in saved["state_dict"].items())
        assert is_averaged == is_begun, row["epoch"]


@pytest.mark.slow
def test_two_devices_validate_the_averages_and_batch_statistics_that_they_save(command, quick, tmp_path):
    network = ["--model.network=CNN", "--model.network.channels=[4,6]", "--model.optimizer.lr=0.01"]
    average = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.8"]
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    command(tmp_path, "fit", "--trainer.max_epochs=2", *network, *average, *devices)
    expected = pd.read_csv(next(tmp_path.rglob("metrics.csv"))).iloc[-1]
    results = quick(tmp_path, "validate", "--trainer.accelerator=cpu").stdout
    loss = float(re.search(r"val/loss\s+(\S+)", results)[1])
    assert loss == pytest.approx(expected["val/loss"], rel=ROUNDING)


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    for weights_only in (None, False, True):
        with pytest.raises(pickle.UnpicklingError):
            CheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=weights_only)
    assert not (tmp_path / "pwned").exists()


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch, tmp_path):
    path = tmp_path / "last.ckpt"
    CheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()

    def full(partial, content):
        with partial.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")  # without a file name, as from write(2)

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match=r"last\.ckpt"):
        CheckpointIO().save_checkpoint({"epoch": 2}, path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_the_sanity_check_is_not_an_epoch(quick, tmp_path):
    quick(
        tmp_path, "fit", "--trainer.max_epochs=2", "--trainer.num_sanity_val_steps=2",
        "--trainer.check_val_every_n_epoch=2",
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "lightning_logs/baseline/version_0/metrics.csv")
    assert table["val/loss"].isna().tolist() == [True, False]


def flip(path):
    """Change a byte of the weights, which torch.load does not detect."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0x40
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_by_every_command(fitted, monkeypatch, capfd, tmp_path):
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    flip(checkpoint)
    assert torch.load(checkpoint, weights_only=True)  # torch.load does not detect it
    for arguments in (
        ["fit", "--ckpt_path=last"], ["test"], ["predict"], ["export"], ["report", f"one={checkpoint}"],
        ["predict", f"--images={fitted[0] / 'figures/samples.png'}"],
    ):  # fmt: skip
        code, _, errors = in_process(capfd, *arguments)
        assert code == 1, arguments
        assert re.search(r"error: .*last\.ckpt cannot be used: it is damaged", errors), errors
    with pytest.raises(UserError, match="it is damaged"):
        Predictor(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["null", "0.5"])
def test_a_run_is_continued_with_and_without_clipping(quick, tmp_path, before):
    after = {"null": "0.5", "0.5": "null"}[before]
    quick(tmp_path, "fit", "--trainer.max_epochs=1", f"--trainer.gradient_clip_val={before}")
    quick(tmp_path, "fit", "--trainer.max_epochs=2", f"--trainer.gradient_clip_val={after}", "--ckpt_path=last")
    last = tmp_path / "lightning_logs/baseline/version_1/checkpoints/last.ckpt"
    (optimizer,) = torch.load(last, weights_only=True)["optimizer_states"]
    decays = sorted(group["weight_decay"] for group in optimizer["param_groups"])
    assert decays == ([0, 0] if after == "0.5" else [0, 0.02])


def test_a_damaged_best_checkpoint_does_not_end_what_is_continued(fitted, quick, tmp_path, recwarn):
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    flip(tmp_path / "lightning_logs/baseline/version_0/checkpoints/best.ckpt")
    quick(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_epochs=5")
    (said,) = [str(each.message) for each in recwarn if "best epoch" in str(each.message)]
    assert re.search(r"best\.ckpt is damaged: only epochs from here on can become the best epoch", said)
    assert (tmp_path / "lightning_logs/baseline/version_1/test.csv").is_file()
