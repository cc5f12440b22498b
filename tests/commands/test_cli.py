"""The commands, run as a user runs them."""

import csv
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from helpers.commands import ROOT, ROUNDING, in_process, posix, spelled_and_default
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lightning.__main__ import COMMANDS, MODULES
from mnist_lightning.classifier import Classifier
from mnist_lightning.commands import help as help_of
from mnist_lightning.commands import parsing
from mnist_lightning.training import checkpoints

IMAGES = ("samples", "predictions", "accuracy", "loss", "confusion_matrix", "confusion_matrix/val")

METRICS = [f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "penalized_loss", "accuracy")]

EACH = [
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.save_on_train_epoch_end=true",
    "--trainer.callbacks.filename={epoch}",
]
"""Keep the files that a run killed after an epoch leaves behind."""


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


# --- help ---------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_command_and_loads_no_torch():
    code = "import sys, runpy, atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    code += "sys.argv = ['m', '--help']\nrunpy.run_module('mnist_lightning', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, description in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(description)}$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("False\n")


def test_an_unknown_command_is_named():
    result = subprocess.run(
        [sys.executable, "-m", "mnist_lightning", "fti"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "invalid choice: 'fti'" in result.stderr


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict", "tune", "export"])
def test_help_of_a_command_is_what_its_parser_says(monkeypatch, capfd, name):
    said = {}
    monkeypatch.setattr(parsing, "print_help", lambda prog, description, groups: said.update(groups))
    with pytest.raises(SystemExit):
        importlib.import_module(f"mnist_lightning.{MODULES[name]}").main(name, COMMANDS[name], ["--help"])
    if "UPDATE_HELP" in os.environ:
        Path(help_of.__file__).with_name(f"{name}.json").write_text(f"{json.dumps(said, indent=2)}\n")
    assert help_of.stored_help(name) == said, (
        "UPDATE_HELP=1 pytest tests/commands/test_cli.py -k help rewrites the files"
    )
    for width in ("60", "120"):
        monkeypatch.setenv("COLUMNS", width)
        code, out, _ = in_process(capfd, name, "--help")
        assert code == 0
        assert " ".join(out.split()).startswith(f"usage: python -m mnist_lightning {name} [options] {COMMANDS[name]}")
        assert int(width) - 30 < max(map(len, out.splitlines())) <= int(width)
    assert "--data.data_dir" in out
    assert all((option in out) == (name in ("fit", "tune")) for option in ("lr_scheduler", "max_epochs", "--seed"))
    assert len(out.splitlines()) < (92 if name == "tune" else 48)


def test_help_of_all_options_and_of_a_class(capfd):
    code, every, _ = in_process(capfd, "fit", "--help", "all")
    assert code == 0
    assert "--trainer.limit_train_batches" in every
    code, out, _ = in_process(capfd, "fit", "--model.network.help", "MLP")
    assert code == 0
    assert "--model.network.units" in out


# --- configuration ------------------------------------------------------------------------------------------


def test_baseline_yaml_spells_out_the_defaults(capfd):
    spelled, default = spelled_and_default(capfd, "fit", ROOT / "configs/baseline.yaml")
    assert spelled["model"] == default["model"]
    assert spelled["data"] == default["data"]
    assert spelled["trainer"]["max_epochs"] == 20
    assert spelled["seed_everything"] == 42


def test_short_names_choose_classes(monkeypatch, capfd):
    code, out, err = in_process(
        capfd, "fit", "--model.network.units=[50]", "--model.network.dropout=0.5", "--model.network.l2=0",
        "--model.optimizer=KerasSGD", "--model.optimizer.lr=0.1", "--model.lr_scheduler=CosineAnnealingLR",
        "--model.lr_scheduler.T_max=20", "--print_config",
    )  # fmt: skip
    assert code == 0, err
    model = yaml.safe_load(out)["model"]
    assert model["network"]["init_args"]["units"] == [50]
    assert model["optimizer"]["class_path"] == "mnist_lightning.optimizers.KerasSGD"
    assert model["optimizer"]["init_args"]["lr"] == 0.1
    assert model["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.CosineAnnealingLR"


# --- fit ----------------------------------------------------------------------------------------------------


def test_fit_shows_data_layers_progress_and_a_table(fitted):
    _, output = fitted
    assert "train  images (1000, 1, 28, 28) torch.float32, labels (1000,) torch.int64" in output
    assert "val    images (250, 1, 28, 28)" in output
    assert "test   images (300, 1, 28, 28)" in output
    assert re.search(r"^network\.dense_1 +Dense +128 +100,480 +200 K$", output, re.MULTILINE)
    epochs = re.findall(r"^ +\d/4(?: +\d\.\d{4}){3} +0\.\d{4}[* ] +\d+\.\d +\d\d:\d\d$", output, re.MULTILINE)
    assert len(epochs) == 4
    assert output.count("epoch  train/loss  train/accuracy  val/loss  val/accuracy") == 1
    assert max(len(line) for line in output.splitlines() if not line.startswith("Data: ")) <= 80
    assert not re.search(r"Seed set|[GT]PU available|`Trainer|\x1b|\r", output)
    assert re.search(r"^last epoch \(4\) +\d\.\d{4} +\d\.\d{4} +0\.\d{4}$", output, re.MULTILINE)
    assert re.search(r"^best val/accuracy \(epoch \d\) +\d\.\d{4} +\d\.\d{4} +0\.\d{4}$", output, re.MULTILINE)
    assert "Traceback" not in output
    assert "Warning" not in output


def test_a_run_folder_is_complete(fitted):
    run, _ = fitted
    for name in ("config.yaml", "hparams.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0
    for name in ("samples", "accuracy", "loss", "predictions", "confusion_matrix"):
        assert (run / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.rglob("*partial*"))
    made_by = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert made_by["command"].startswith("python -m mnist_lightning fit ")
    assert (made_by["python"], made_by["torch"]) == (platform.python_version(), importlib.metadata.version("torch"))
    assert made_by["commit"] is made_by["has_uncommitted_changes"] is None  # the folder is not a repository
    table = rows(run)
    assert list(table[0]) == ["epoch", "step", "lr", *METRICS]
    assert [row["epoch"] for row in table] == ["0", "1", "2", "3"]
    accuracies = [float(row["val/accuracy"]) for row in table]
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies))


def test_the_recording_in_the_readme_shows_what_fit_prints(fitted, data_dir):
    output = fitted[1].replace(f" in {data_dir}", "")
    without_numbers = runpy.run_path(f"{ROOT}/docs/screenshots.py")["without_numbers"]
    command, *recorded = json.loads(Image.open(f"{ROOT}/docs/pictures/fit.gif").info["comment"])
    assert command == "$ python -m mnist_lightning fit --trainer.max_epochs 0"
    assert len(recorded) > 20
    assert not {*recorded} - {*map(without_numbers, output.splitlines())}


def test_tensorboard_shows_everything(fitted):
    run, _ = fitted
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert {*METRICS, "test/loss", "test/penalized_loss", "test/accuracy"} <= set(tags["scalars"])
    assert {f"figures/{name}" for name in IMAGES} <= set(tags["images"])
    assert "train/lr" in tags["scalars"]
    assert not {"lr", "epoch"} & {*tags["scalars"]}  # they would be the first charts
    assert tags["graph"]
    assert len(events.Images("figures/confusion_matrix/val")) == 4
    logged = {(point.step, round(point.value, 6)) for point in events.Scalars("val/accuracy")}
    assert logged == {(int(row["epoch"]) + 1, round(float(row["val/accuracy"]), 6)) for row in rows(run)}
    plugins = {plugin: list(events.PluginTagToContent(plugin)) for plugin in ("hparams", "custom_scalars")}
    assert "_hparams_/session_start_info" in plugins["hparams"]
    session = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert all(key in session for key in (b"model.optimizer.class_path", b"model.network.init_args.units.0"))
    assert b"model.network.init_args.dropout.1" in session  # as in trials, though 0.2 was given for all layers
    assert "_hparams_/experiment" not in plugins["hparams"]  # it would hide the settings that other runs have
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^val/accuracy$" in layout
    assert b"^(train|val)/accuracy$" in layout


def test_the_saved_config_repeats_the_run(fitted, quick, tmp_path):
    run, _ = fitted
    quick(tmp_path, "fit", f"--config={run / 'config.yaml'}")
    again = tmp_path / "lightning_logs/baseline/version_0"
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(again)[name])


def test_another_seed_gives_another_run_beside_the_first(quick, tmp_path):
    for seed in (1, 2):
        quick(tmp_path, "fit", "--name=seeds", "--trainer.max_epochs=1", f"--seed_everything={seed}")
    first, second = (tmp_path / "lightning_logs/seeds" / f"version_{n}" for n in (0, 1))
    assert rows(first) != rows(second)


def fit_in_background(cwd, data_dir, epochs=4, until="checkpoints/last.ckpt"):
    """Start a fit and wait for a file of its run, by default the first checkpoint."""
    options = [f"--data.data_dir={data_dir}", f"--trainer.max_epochs={epochs}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_lightning", "fit", *options],
        cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (cwd / "lightning_logs/baseline/version_0" / until).exists():
        assert process.poll() is None
        time.sleep(0.002)
    return process


@posix
@pytest.mark.slow
def test_two_runs_at_once_get_two_folders(quick, data_dir, tmp_path):
    process = fit_in_background(tmp_path, data_dir, epochs=1, until="config.yaml")
    process.send_signal(signal.SIGSTOP)  # in the middle of its run
    quick(tmp_path, "fit", "--trainer.max_epochs=1")
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=240) == 0
    first, second = sorted((tmp_path / "lightning_logs/baseline").iterdir())
    assert (first.name, second.name) == ("version_0", "version_1")
    for name in ("metrics.csv", "test.csv"):
        assert (first / name).read_text() == (second / name).read_text()


@pytest.mark.numeric
def test_killed_and_resumed_ends_as_if_never_killed(fitted, quick, data_dir, tmp_path):
    """Check a SIGKILL that may hit a batch, a figure or a checkpoint."""
    process = fit_in_background(tmp_path, data_dir)
    process.kill()
    process.wait()

    result = quick(tmp_path, "fit", "--trainer.max_epochs=4", "--ckpt_path=last")
    assert " 1/4 " not in result.stdout  # a restart from the beginning would end the same
    run, _ = fitted
    resumed = tmp_path / "lightning_logs/baseline/version_1"
    assert (resumed / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    for name in ("last", "best"):
        for key, tensor in weights(run, name).items():
            assert torch.equal(tensor, weights(resumed, name)[key])
    table = fitted[1][fitted[1].index("weights after") : fitted[1].index("\nRun:")]
    assert table in result.stdout
    events = EventAccumulator(str(resumed))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [int(row["epoch"]) + 1 for row in rows(run)]


def test_fit_without_a_logger_leaves_nothing(quick, tmp_path):
    for option in ("--trainer.logger=false", "--trainer.fast_dev_run=true"):
        result = quick(tmp_path, "fit", "--trainer.max_epochs=1", option)
        assert "last epoch (1)" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_loggers_come_beside_the_run_s_folder(quick, tmp_path):
    options = ["--trainer.max_epochs=2", "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=csv"]
    for number in range(2):  # the second run in a folder is as complete as the first
        quick(tmp_path, "fit", *options)
        run = tmp_path / f"lightning_logs/baseline/version_{number}"
        for name in ("config.yaml", "metrics.csv", "test.csv", "checkpoints/last.ckpt", "figures/predictions.png"):
            assert (run / name).is_file()
        assert {"figures/confusion_matrix/val", "figures/predictions"} < set(
            EventAccumulator(str(run)).Reload().Tags()["images"]
        )
        table = pd.read_csv(tmp_path / f"csv/lightning_logs/version_{number}/metrics.csv")
        assert set(METRICS) < set(table.columns)
        assert table.groupby("epoch")[METRICS].count().eq(1).all(axis=None)
    quick(tmp_path, "fit", *options, "--tensorboard=false", "--name=without")
    run = run_of(tmp_path, "without")
    assert (run / "checkpoints/last.ckpt").is_file()
    assert not list(run.glob("events*"))
    quick(tmp_path, "fit", "--ckpt_path=last", "--name=without", "--trainer.max_epochs=3")
    table = pd.read_csv(tmp_path / "csv/lightning_logs/version_3/metrics.csv")
    assert sorted(table["epoch"].unique()) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logger", "left"),
    [
        ("CSVLogger", ["version_0/hparams.yaml", "version_0/metrics.csv"]),
        ("TensorBoardLogger --trainer.logger.name=other", ["other/version_0/events.*"]),
    ],
)
def test_a_logger_alone_leaves_its_files_beside_the_runs(quick, tmp_path, logger, left):
    quick(tmp_path, "fit", "--trainer.max_epochs=1", *f"--trainer.logger+={logger}".split())
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]
    for pattern in left:
        assert [*(tmp_path / "lightning_logs").glob(pattern)], pattern


def test_a_logger_that_cannot_be_used_is_said_in_a_line(capfd, data_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CSVLogger, "experiment", property(lambda self: (_ for _ in ()).throw(OSError("no\nserver"))))
    options = [f"--data.data_dir={data_dir}", "--trainer.logger+=CSVLogger"]
    code, _, errors = in_process(capfd, "fit", *options)
    assert code == 1
    assert "error: CSVLogger cannot be used: no. Fix that, give it other arguments" in errors
    assert not list(tmp_path.rglob("baseline"))


@pytest.mark.slow
def test_figures_go_to_mlflow(command, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):  # within a process, MLflow keeps its first database
        command(tmp_path, "fit", "--trainer.max_epochs=1", "--trainer.logger+=MLFlowLogger")
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/lightning_logs/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 2
    for run in runs:
        assert set(METRICS) < run.data.metrics.keys()
        images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
        assert any("predictions" in path for path in images)
        assert any("confusion_matrix" in path for path in images)
    assert [*tmp_path.glob("lightning_logs/mlruns/**/predictions*")]
    assert (tmp_path / "lightning_logs/baseline/version_1/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_figures_go_to_wandb(command, quick, tmp_path):
    wandb = pytest.importorskip("wandb")
    options = ["--trainer.max_epochs=1", "--trainer.logger+=WandbLogger", "--trainer.logger.offline=true"]
    command(tmp_path, "fit", *options)  # also writes data that is pending when the process ends
    wandb.finish()  # ends the run of an earlier test
    quick(tmp_path, "fit", *options)
    wandb.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["lightning_logs"]
    runs = list(tmp_path.glob("lightning_logs/wandb/offline-run-*"))
    assert len(runs) == 2
    for run in runs:
        assert list(run.glob("files/media/images/predictions*"))
        assert list(run.glob("files/media/images/confusion_matrix/val*"))
    assert (tmp_path / "lightning_logs/baseline/version_1/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_the_script_takes_classes_of_the_current_folder(data_dir, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
    )
    script = Path(sys.executable).with_name("mnist_lightning")
    options = [f"--data.data_dir={data_dir}", "--trainer.max_epochs=1", "--model.network=mine.Net"]
    result = subprocess.run([script, "fit", *options], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_lightning_s_flags_work(quick, tmp_path):
    quick(
        tmp_path, "fit", "--trainer.max_epochs=3", "--trainer.gradient_clip_val=0.5",
        "--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed",
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
        "--model.optimizer=torch.optim.AdamW", "--model.lr_scheduler=CosineAnnealingLR",
        "--model.lr_scheduler.T_max=3", "--model.network.activation=GELU",
    )  # fmt: skip
    table = rows(tmp_path / "lightning_logs/baseline/version_0")
    assert [row["step"] for row in table] == ["7", "15", "23"]  # 16 batches, two per step
    assert float(table[-1]["train/loss"]) < float(table[0]["train/loss"])


def test_half_precision_goes_all_the_way(quick, recwarn, tmp_path):
    options = ["--trainer.accelerator=cpu", "--trainer.precision=bf16-true"]
    for epochs, more in ((1, []), (2, ["--ckpt_path=last"])):
        quick(tmp_path, "fit", *options, f"--trainer.max_epochs={epochs}", *more)
        assert (tmp_path / f"lightning_logs/baseline/version_{epochs - 1}/figures/predictions.png").exists()
    assert not [warning for warning in recwarn if "no graph" in str(warning.message)]
    quick(tmp_path, "predict", *options)
    probabilities = pd.read_csv(tmp_path / "predictions.csv").filter(like="probability_")
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1, abs=ROUNDING)


def test_a_network_that_cannot_be_traced_still_trains(quick, monkeypatch, tmp_path):
    (tmp_path / "untraceable.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, l2: float = 0.5):\n"
        "        super().__init__(784, 10)\n"
        "        self.l2 = l2\n"
        "    def forward(self, images):\n"
        "        if torch.jit.is_tracing():\n"
        "            raise RuntimeError('not to be traced')\n"
        "        return super().forward(images.flatten(1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(match="TensorBoard gets no graph"):
        quick(tmp_path, "fit", "--trainer.max_epochs=1", "--model.network=untraceable.Net")
    (row,) = rows(tmp_path / "lightning_logs/baseline/version_0")
    assert float(row["val/penalized_loss"]) > float(row["val/loss"])


def run_of(tmp_path, name):
    (run,) = (tmp_path / "lightning_logs" / name).iterdir()
    return run


@pytest.mark.slow
def test_two_devices_continue_exactly(command, quick, tmp_path):
    """Check with 1,001 training and 249 validation images, each used once per epoch."""
    options = ["--trainer.accelerator=cpu", "--data.val_split=0.1992"]
    two = [*options, "--trainer.devices=2"]
    command(tmp_path, "fit", "--name=whole", *two, *EACH, "--trainer.max_epochs=2")
    whole = run_of(tmp_path, "whole")
    assert [row["step"] for row in rows(whole)] == ["7", "15"]  # batches of 2 x 64
    path = whole / "checkpoints/epoch=0.ckpt"
    states = torch.load(path, weights_only=True)["callbacks"]["RunCheckpoint"]["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])  # each device has its own dropout masks
    command(tmp_path, "fit", "--name=rest", *two, "--trainer.max_epochs=2", f"--ckpt_path={path}")
    rest = run_of(tmp_path, "rest")
    for key, weight in weights(whole).items():
        assert torch.equal(weight, weights(rest)[key])
    assert (whole / "metrics.csv").read_text() == (rest / "metrics.csv").read_text()
    results = quick(tmp_path, "validate", f"--ckpt_path={rest / 'checkpoints/last.ckpt'}", *options).stdout
    row = rows(rest)[-1]
    for name in ("loss", "penalized_loss", "accuracy"):
        value = float(re.search(rf"val/{name}\s+(\S+)", results)[1])
        assert value == pytest.approx(float(row[f"val/{name}"]), rel=ROUNDING)  # no image counts twice


@pytest.mark.slow
def test_torchrun_takes_the_step_of_one_device(quick, data_dir, tmp_path):
    """Read the gradient from the weights after a single step with a learning rate of 1."""
    options = [
        "--trainer.max_epochs=1", "--model.network.dropout=0", "--model.optimizer=KerasSGD", "--model.optimizer.lr=1",
        "--trainer.accelerator=cpu",
    ]  # fmt: skip
    quick(tmp_path, "fit", "--name=one", *options, "--data.batch_size=1000")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "mnist_lightning", "fit", "--name=two", f"--data.data_dir={data_dir}", *options,
         "--data.batch_size=500", "--trainer.devices=2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for printed in ("Data:", " parameters, ", "    1/1 ", "last epoch (1)", "Run: lightning_logs/two/version_0"):
        assert result.stdout.count(printed) == 1
    two = run_of(tmp_path, "two")
    expected = weights(run_of(tmp_path, "one"))
    for key, weight in weights(two).items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=ROUNDING)
    results = quick(tmp_path, "test", f"--ckpt_path={two / 'checkpoints/last.ckpt'}").stdout
    last, _ = pd.read_csv(two / "test.csv").to_dict("records")
    for name in ("loss", "penalized_loss", "accuracy"):
        assert float(re.search(rf"test/{name}\s+(\S+)", results)[1]) == pytest.approx(
            last[f"test/{name}"], rel=ROUNDING
        )


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    ],
    ids=["torchrun", "slurm", "slurm without tasks per node"],
)
def test_a_launcher_s_processes_must_be_the_trainer_s_devices(monkeypatch, capfd, data_dir, tmp_path, environment):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, err = in_process(capfd, "fit", f"--data.data_dir={data_dir}", "--trainer.accelerator=cpu")
    assert code == 1
    assert re.search(r"error: You set `(devices=1|--ntasks=2)", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_requeued_slurm_job_ends_as_if_never_stopped(fitted, quick, monkeypatch, data_dir, tmp_path):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "9", "ARRAY_JOB_ID": "8", "ARRAY_TASK_ID": "3", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in (job | {"NODEID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    process = fit_in_background(tmp_path, data_dir)
    process.send_signal(signal.SIGUSR1)
    while not (tmp_path / "requeued").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (tmp_path / "requeued").read_text() == "requeue 8_3\n"

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    handler = signal.getsignal(signal.SIGUSR1)
    output = quick(tmp_path, "fit", "--trainer.max_epochs=4").stdout
    signal.signal(signal.SIGUSR1, handler)
    assert re.search("^ +4/4 ", output, re.MULTILINE)
    assert " 1/4 " not in output  # a restart from the beginning would end the same
    requeued = tmp_path / "lightning_logs/baseline/version_1"
    assert (requeued / "metrics.csv").read_text() == (fitted[0] / "metrics.csv").read_text()
    assert (requeued / "test.csv").read_text() == (fitted[0] / "test.csv").read_text()
    assert not list(tmp_path.glob("hpc_ckpt*"))


# --- the other commands -------------------------------------------------------------------------------------


def test_checkpoints_are_evaluated_and_predicted(fitted, monkeypatch, capfd, data_dir, tmp_path):
    run, output = fitted
    monkeypatch.chdir(run.parents[2])  # here, the newest run is this one
    data = f"--data.data_dir={data_dir}"
    last = [f"{float(number):.4f}" for number in re.search(r"last epoch \(4\) +(.*)", output)[1].split()]

    code, out, err = in_process(capfd, "test", data)
    assert code == 0, err
    found = {name: f"{float(value):.4f}" for name, value in re.findall(r"(test/\w+) +([\d.]+)", out)}
    assert [found[f"test/{name}"] for name in ("loss", "penalized_loss", "accuracy")] == last

    code, out, err = in_process(capfd, "validate", data, "--ckpt_path=best")
    assert code == 0, err
    best = max(float(row["val/accuracy"]) for row in rows(run))
    assert float(re.search(r"val/accuracy +([\d.]+)", out)[1]) == pytest.approx(best, abs=1e-6)

    csv_file = tmp_path / "predictions.csv"
    arguments = ("predict", data, f"--ckpt_path={run / 'checkpoints/last.ckpt'}", f"--output={csv_file}")
    code, _, err = in_process(capfd, *arguments)
    assert code == 0, err
    table = pd.read_csv(csv_file, index_col="index")
    probabilities = table.filter(like="probability_")
    assert table.shape == (300, 12)
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1, abs=ROUNDING)
    assert (probabilities.to_numpy().argmax(axis=1) == table["predicted"]).all()
    assert f"{(table['label'] == table['predicted']).mean():.4f}" == last[2]

    before = csv_file.read_bytes()
    code, _, err = in_process(capfd, *arguments)
    assert code == 1
    assert "exists and is not overwritten" in err
    assert csv_file.read_bytes() == before
    assert sorted(path.name for path in run.parents[2].iterdir()) == ["lightning_logs"]


def test_a_checkpoint_brings_its_network(quick, monkeypatch, capfd, data_dir, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_epochs=1", "--model.network.units=[7]", "--model.network.dropout=0",
          "--model.network.l2=0.1", "--data.batch_size=50")  # fmt: skip
    last = tmp_path / "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    code, out, err = in_process(capfd, "test", f"--data.data_dir={data_dir}", f"--ckpt_path={last}")
    assert code == 0, err
    assert "is used, not the one given" not in out
    network = Classifier.load_from_checkpoint(last, weights_only=True).network
    assert network.dense_1.weight.shape == (7, 784)

    # options that differ from the run's are reported
    monkeypatch.chdir(tmp_path)
    code, out, err = in_process(
        capfd, "fit", f"--data.data_dir={data_dir}", "--ckpt_path=last", "--trainer.max_epochs=2",
        "--trainer.logger=false", "--model.network.units=[9,9]", "--data.batch_size=60",
    )  # fmt: skip
    assert code == 0, err
    assert "as in the checkpoint: the given value is not used" in out
    for line in ("data.batch_size 60: the run had 50", "trainer.max_epochs 2: the run had 1"):
        assert f"Continuing with {line}" in out
    assert out.count("Continuing with") == 3  # the third is the logger


def schedule(name, steps, **arguments):
    """Return the learning rates of a torch schedule, before each of its steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.001)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ("OneCycleLR max_lr=0.1 cycle_momentum=false", schedule(
            "OneCycleLR", 48, max_lr=0.1, total_steps=48, cycle_momentum=False)[::16]),
        ("OneCycleLR max_lr=0.1 cycle_momentum=false --trainer.accumulate_grad_batches=3", schedule(
            "OneCycleLR", 18, max_lr=0.1, total_steps=18, cycle_momentum=False)[::6]),
        ("CosineAnnealingLR", schedule("CosineAnnealingLR", 3, T_max=3)),
        ("CosineAnnealingLR T_max=5", schedule("CosineAnnealingLR", 3, T_max=5)),
        ("CosineAnnealingLR --model.lr_interval=step", schedule("CosineAnnealingLR", 48, T_max=48)[::16]),
        ("CosineAnnealingLR --model.lr_interval=step --model.lr_frequency=5", schedule(
            "CosineAnnealingLR", 9, T_max=9)[::3]),
        ("LinearLR total_iters=-1 end_factor=0.1 start_factor=1", schedule(
            "LinearLR", 3, total_iters=3, end_factor=0.1, start_factor=1)),
        ("PolynomialLR total_iters=-1", schedule("PolynomialLR", 3, total_iters=3)),
        ("StepLR step_size=1 --model.lr_frequency=2", [0.001, 0.001, 0.0001]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_schedule_lasts_as_long_as_the_training(quick, tmp_path, options, rates):
    """Check three epochs of 16 batches."""
    name, *words = options.split()
    words = [word if word.startswith("--") else f"--model.lr_scheduler.{word}" for word in words]
    quick(tmp_path, "fit", "--trainer.max_epochs=3", f"--model.lr_scheduler={name}", *words)
    table = rows(run_of(tmp_path, "baseline"))
    assert [float(row["lr"]) for row in table] == pytest.approx(rates)


COSINE = ["--model.lr_scheduler=CosineAnnealingLR"]
CYCLE = ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1"]


@pytest.mark.slow
def test_tensorboard_shows_by_step_a_rate_that_changes_within_an_epoch(quick, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=4", *CYCLE)
    events = EventAccumulator(str(run_of(tmp_path, "baseline")))
    events.Reload()
    points = events.Scalars("train/lr_by_step")
    rates = schedule("OneCycleLR", 16, max_lr=0.1, total_steps=16, cycle_momentum=False)
    assert [point.step for point in points] == [4, 8, 12, 16]
    assert [point.value for point in points[:3]] == pytest.approx(rates[4::4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "more", "rates", "line"),
    [
        (COSINE, [], schedule("CosineAnnealingLR", 4, T_max=4), "CosineAnnealingLR over 4 steps: the run had 2"),
        (CYCLE, [], schedule("OneCycleLR", 64, max_lr=0.1, total_steps=64, cycle_momentum=False)[::16],
         "OneCycleLR over 64 steps: the run had 32. To keep the current learning rate"),
        (["--model.lr_scheduler=LinearLR", "--model.lr_scheduler.total_iters=-1"], [],
         schedule("LinearLR", 4, total_iters=4), "LinearLR over 4 steps: the run had 2"),
        (["--model.lr_scheduler=PolynomialLR", "--model.lr_scheduler.total_iters=-1"], [],
         schedule("PolynomialLR", 4, total_iters=4), "PolynomialLR over 4 steps: the run had 2"),
        (["--model.lr_scheduler=LinearLR"], [], schedule("LinearLR", 4), None),  # a warm-up
        ([*COSINE, "--model.lr_scheduler.T_max=4"], [], schedule("CosineAnnealingLR", 4, T_max=4), None),
        ([*COSINE, "--model.lr_scheduler.T_max=2"], [*COSINE, "--model.lr_scheduler.T_max=-1"],
         schedule("CosineAnnealingLR", 4, T_max=4), "CosineAnnealingLR: the run had it with other options"),
        ([*COSINE, "--model.lr_scheduler.T_max=3"], ["--model.lr_scheduler=null"],
         [*schedule("CosineAnnealingLR", 3, T_max=3), 0.00025], "the constant learning rate 0.00025: the run had "),
        (COSINE, CYCLE, schedule("OneCycleLR", 64, max_lr=0.1, total_steps=64, cycle_momentum=False)[::16],
         "OneCycleLR: the run had CosineAnnealingLR"),
        (CYCLE, [*COSINE, "--model.lr_interval=step"], schedule("CosineAnnealingLR", 64, T_max=64)[::16],
         "CosineAnnealingLR: the run had OneCycleLR"),
        ([], ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=3"], [0.001, 0.001, 0.001, 0.0001],
         "StepLR: the run had a constant rate"),
        (COSINE, ["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"],
         [0.0005, 0.0005, 0, 0], "ReduceLROnPlateau: the run had CosineAnnealingLR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)  # fmt: skip
def test_a_longer_training_has_the_schedule_that_it_would_have_had(quick, tmp_path, options, more, rates, line):
    """Check two epochs of 16 batches, then two more."""
    quick(tmp_path, "fit", "--trainer.max_epochs=2", "--name=short", *options)
    before = [float(row["lr"]) for row in rows(run_of(tmp_path, "short"))]
    checkpoint = run_of(tmp_path, "short") / "checkpoints/last.ckpt"
    output = quick(tmp_path, "fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=4", "--name=long", *more).stdout
    table = rows(run_of(tmp_path, "long"))
    assert [float(row["lr"]) for row in table] == pytest.approx(before + rates[2:])
    assert line is None or f"Continuing with {line}" in output
    assert output.count("Continuing with") == 1 + bool(line)  # the other is max_epochs
    assert "The checkpoint's model" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps=40"],  # 16 steps per epoch
        ["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss", "--model.optimizer.lr=0.03",
         "--model.lr_scheduler.patience=0", "--trainer.check_val_every_n_epoch=2"],
        ["--trainer.limit_train_batches=7", "--trainer.precision=bf16-mixed", "--data.batch_size=32"],
        ["--data.augmentation+=Distortion", "--data.augmentation.degrees=30", "--data.standardize=true",
         "--data.augmentation+=torchvision.transforms.v2.MixUp"],
    ],
    ids=lambda options: " ".join(options)[10:40],
)  # fmt: skip
def test_a_run_is_continued_with_all_that_it_had(quick, tmp_path, options):
    whole = quick(tmp_path, "fit", "--name=whole", "--trainer.max_epochs=4", *EACH, *options).stdout
    run = run_of(tmp_path, "whole")
    kept = sorted((run / "checkpoints").glob("epoch=*.ckpt"))
    assert len(kept) == len(rows(run)) == (3 if options == ["--trainer.max_steps=40"] else 4)
    (run / "checkpoints/best.ckpt").unlink(missing_ok=True)  # it may not have existed yet
    for number, path in enumerate([kept[0], kept[-1]]):
        rest = quick(tmp_path, "fit", f"--ckpt_path={path}", f"--name=rest{number}").stdout
        resumed = run_of(tmp_path, f"rest{number}")
        assert (resumed / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
        for key, weight in weights(run).items():
            assert torch.equal(weight, weights(resumed)[key])
        last = re.search(r"^last epoch.*", whole, re.MULTILINE)[0]
        assert last.split() in [line.split() for line in rest.splitlines()]
    results = quick(tmp_path, "test", "--name=whole").stdout
    tested = {name: float(value) for name, value in re.findall(r"test/(\w+)\s+(\S+)", results)}
    with (run / "test.csv").open() as file:
        (expected, *_) = csv.DictReader(file)
    for name, value in tested.items():
        assert value == pytest.approx(float(expected[f"test/{name}"]), rel=ROUNDING)


def test_the_time_of_a_run_is_that_of_the_whole(quick, caplog, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_epochs=1000", "--trainer.max_time=00:00:00:01")
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    quick(tmp_path, "fit", "--ckpt_path=last")
    logger.removeHandler(caplog.handler)
    assert "Time limit reached" in caplog.text
    first, second = sorted((tmp_path / "lightning_logs/baseline").iterdir())
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()


def test_an_epoch_without_validation_shows_none(quick, tmp_path):
    out = quick(tmp_path, "fit", "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2").stdout
    cells = [len(line.split()) for line in out.splitlines() if re.match(r" +\d/3 ", line)]
    assert [count - cells[0] for count in cells] == [0, 2, 0]


def test_a_run_may_be_chosen_without_a_look_at_the_test_images(quick, tmp_path):
    out = quick(tmp_path, "fit", "--trainer.max_epochs=1", "--trainer.limit_test_batches=0").stdout
    assert "test accuracy" not in out
    assert "Run: lightning_logs/baseline/version_0" in out
    assert not (run_of(tmp_path, "baseline") / "test.csv").exists()


@pytest.mark.numeric
def test_a_run_is_evaluated_on_its_own_data(quick, monkeypatch, capfd, data_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    quick(tmp_path, "fit", "--trainer.max_epochs=1", "--data.val_split=0.4")
    run = run_of(tmp_path, "baseline")
    (row,) = rows(run)
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    code, out, err = in_process(capfd, "validate", path)
    assert code == 0, err
    assert f"Data: MNIST in {data_dir}" in out
    assert "0.4 of the training images for validation" in out
    accuracy = float(re.search(r"val/accuracy\s+(\S+)", out)[1])
    assert accuracy == pytest.approx(float(row["val/accuracy"]))
    code, out, err = in_process(capfd, "predict", path)
    assert code == 0, err
    assert len(pd.read_csv("predictions.csv")) == 300  # the size of the small data set
    code, out, err = in_process(capfd, "validate", path, "--data.data_dir=null", "--data.val_split=0.1")
    assert code == 0, err
    assert "Data: MNIST, scaled to [0, 1], 0.1 of the training images" in out


# --- mistakes -----------------------------------------------------------------------------------------------


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope=3"], "unrecognized arguments: --nope=3"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: many is not one of int, null"),
        (["--data.augmentation=Distortion"], "Distortion is not one of list[Module], null: give a list, or add an it"),
        (["--data.augmentation+=Distorsion"], "data.augmentation: Distorsion is not one of list[Module], null (there "),
        (["--data.batch_size=0"], "data.batch_size: Not of type PositiveInt: 0"),
        (["--data.batch_size=x"], "error: data.batch_size: "),
        (["--data.val_split=1"], "error: data.val_split: "),
        (["--model.lr_interval=batch"], "error: model.lr_interval: batch is not one of 'epoch', 'step', null"),
        (["--model.network=Foo"], "error: model.network: there is no class Foo"),
        (["--model.network.units=x"], "error: model.network.units: Expected a Sequence. Got value: x"),
        (["--model.optimizer.lr=fast"], "error: model.optimizer.lr: Expected a float. Got value: fast"),
        (["--model.lr_scheduler=OneCycleLR"], "(the following arguments are required: max_lr)"),
        (["--num_threads=0"], "error: num_threads: "),
        (["--config=nope.yaml"], "nope.yaml"),
        (["--model.network=Nope"], "Nope"),
        (
            ["--model.network.units=[5]", "--model.network.dropout=[0.2,0.2]"],
            "the length of dropout is 2, but the number of hidden layers",
        ),
        (["--model.network.activation=relu"], "activation 'relu' is not an activation in torch.nn; try ReLU"),
        (["--model.optimizer=KerasSGD", "--model.optimizer.lr=-1"], "Invalid learning rate: -1"),
        (
            ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.pct_start=2", "--model.lr_scheduler.max_lr=1"],
            "pct_start",
        ),
        (
            ["--trainer.max_epochs=3", "--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=2"],
            "T_max is 2, but it steps 3 times",
        ),
        (
            ["--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:09", "--model.lr_scheduler=CosineAnnealingLR"],
            "T_max of the lr_scheduler cannot be -1",
        ),
        (["--data.data_dir=/nowhere"], "/nowhere has no file train-images-idx3-ubyte"),
        (["--ckpt_path=none.ckpt"], "There is no checkpoint at none.ckpt"),
        (["--ckpt_path=last"], "has a last.ckpt. Train one with"),
        (["--ckpt_path={truncated}"], "truncated.ckpt cannot be used: it is damaged or not a checkpoint"),
        (["--ckpt_path={text}"], "text.ckpt cannot be used: it is damaged or not a checkpoint"),
        (["--ckpt_path={other}"], "other.ckpt cannot be used: it is damaged or not a checkpoint"),
        (["--trainer.default_root_dir={text}"], "text.ckpt"),
        (["--name={text}/x"], "text.ckpt"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.devices=0"], "devices"),
    ],
    ids=lambda value: value[0].split("/")[0] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_or_two_lines(fitted, monkeypatch, capfd, tmp_path, data_dir, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], tmp_path / "other.ckpt")
    files = {
        "truncated": damaged(tmp_path / "truncated.ckpt", (fitted[0] / "checkpoints/last.ckpt").read_bytes()[:5000]),
        "text": damaged(tmp_path / "text.ckpt", b"root:x:0:0:root:/root:/bin/bash\n"),
        "other": str(tmp_path / "other.ckpt"),
    }
    before = sorted(tmp_path.iterdir())
    data = f"--data.data_dir={data_dir}"
    code, out, err = in_process(capfd, "fit", data, *[text.format(**files) for text in arguments])
    lines = err.splitlines()
    assert code in (1, 2)
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(lines) <= 2
    assert "Traceback" not in err + out
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_run_says_which_command_makes_one(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(capfd, "test", "--name=mine")
    assert code == 1
    assert "No run in lightning_logs/mine has a last.ckpt. Train one with `python -m mnist_lightning fit`" in err


def test_a_checkpoint_of_another_network_is_said(fitted, monkeypatch, capfd, data_dir, tmp_path):
    checkpoint = torch.load(fitted[0] / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {f"{name}_": tensor for name, tensor in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    code, _, err = in_process(capfd, "test", f"--data.data_dir={data_dir}", f"--ckpt_path={tmp_path / 'other.ckpt'}")
    assert code == 1
    assert "its weights do not match its network" in err


@pytest.mark.slow
def test_the_process_itself_ends_without_a_traceback(command, tmp_path):
    result = command(tmp_path, "fit", "--data.val_split=2", check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 2


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_no_broken_checkpoint(data_dir, tmp_path):
    # limit files to a megabyte: the checkpoints of the default network are larger
    limited = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", sys.executable, "-m", "mnist_lightning", "fit"]
    result = subprocess.run(
        [*limited, f"--data.data_dir={data_dir}", "--trainer.max_epochs=4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("version_0/checkpoints/best.ckpt: File too large"), result.stderr
    assert "Traceback" not in result.stderr
    run = tmp_path / "lightning_logs/baseline/version_0"
    assert [*run.glob("checkpoints/*")] == []
    assert len(rows(run)) == 1


def test_a_run_folder_that_is_deleted_ends_the_run(monkeypatch, capfd, data_dir, tmp_path):
    write = checkpoints.write_csv

    def delete(path, history):
        if len(history) == 2:
            os.rename(tmp_path / "lightning_logs", tmp_path / "gone")  # rmtree would race with TensorBoard's thread
        write(path, history)

    monkeypatch.setattr(checkpoints, "write_csv", delete)
    monkeypatch.chdir(tmp_path)
    options = [f"--data.data_dir={data_dir}", "--trainer.max_epochs=9"]
    code, output, errors = in_process(capfd, "fit", *options)
    assert code == 1
    assert " 3/9 " not in output
    assert re.search(
        r"^error: .*lightning_logs/baseline/version_0/.*: No such file or directory$", errors, re.MULTILINE
    )
    assert "Traceback" not in errors


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, capfd, data_dir, tmp_path):
    if os.name == "nt" or os.geteuid() == 0:
        (tmp_path / "lightning_logs").write_text("a file where the folder should be")
    else:
        tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    code, _, errors = in_process(capfd, "fit", f"--data.data_dir={data_dir}", "--trainer.max_epochs=1")
    tmp_path.chmod(0o700)
    assert code == 1
    assert f"error: {Path('lightning_logs/baseline/version_0')}: " in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("option", ["--trainer.max_epochs=0", "--trainer.limit_train_batches=0"])
def test_an_untrained_network_is_evaluated(quick, tmp_path, option):
    """Check the loss before training: ln 10 and the penalty."""
    quick(tmp_path, "fit", option)
    (row,) = pd.read_csv(tmp_path / "lightning_logs/baseline/version_0/test.csv").to_dict("records")
    assert row["weights"] == "last epoch (0)"
    assert row["test/loss"] == pytest.approx(math.log(10), abs=0.3)
    assert row["test/penalized_loss"] - row["test/loss"] == pytest.approx(3.06, abs=0.1)


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_a_progress_bar_of_the_user_s_replaces_ours(quick, tmp_path, name):
    if name == "RichProgressBar":
        pytest.importorskip("rich", reason="rich is not installed")
    output = quick(tmp_path, "fit", "--trainer.max_epochs=1", f"--trainer.callbacks+={name}").stdout
    assert "seconds     left" not in output
    assert "last epoch (1)" in output


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_copy_the_process_are_refused(monkeypatch, capfd, data_dir, tmp_path, strategy):
    monkeypatch.chdir(tmp_path)
    options = [f"--data.data_dir={data_dir}", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    code, _, errors = in_process(capfd, "fit", *options, f"--trainer.strategy={strategy}")
    assert code == 1
    assert errors.splitlines()[-1].startswith(f"error: --trainer.strategy {strategy} starts processes")
    assert not (tmp_path / "lightning_logs").exists()


def test_a_folder_is_made_before_anything_is_predicted(quick, fitted, tmp_path):
    checkpoint = fitted[0] / "checkpoints/last.ckpt"
    quick(tmp_path, "predict", f"--ckpt_path={checkpoint}", "--output=new/folder/table.csv")
    assert len(pd.read_csv(tmp_path / "new/folder/table.csv")) == 300


@pytest.mark.slow
def test_no_module_of_the_current_folder_comes_before_a_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch.py of the folder')")
    script = Path(sys.executable).with_name("mnist_lightning")
    for command in ([script], [sys.executable, "-P", "-m", "mnist_lightning"]):
        result = subprocess.run([*command, "fit", "--print_config"], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"], "EarlyStopping monitors val_"),
        (["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=loss"], "ModelCheckpoint monitors loss"),
        (["--model.lr_scheduler=ReduceLROnPlateau", "--model.lr_scheduler.monitor=val"], "lr_scheduler monitors val,"),
    ],
)  # fmt: skip
def test_a_metric_that_is_not_logged_is_refused_before_the_first_step(
    monkeypatch, capfd, data_dir, tmp_path, options, message
):
    monkeypatch.chdir(tmp_path)
    code, out, errors = in_process(capfd, "fit", f"--data.data_dir={data_dir}", *options)
    assert code == 1
    assert f"error: {message}" in errors
    assert "Logged metrics: lr, train/loss, train/penalized_loss, train/accuracy, val/loss" in errors
    assert "Epoch" not in out
    assert not (tmp_path / "lightning_logs").exists()


def test_a_home_folder_is_meant_by_its_sign_and_a_url_is_not_a_folder(quick, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    output = quick(tmp_path, "fit", "--trainer.max_epochs=1", "--trainer.default_root_dir=~/my runs").stdout
    run = tmp_path / "my runs/lightning_logs/baseline/version_0"
    assert shlex.split(output.splitlines()[-1])[-2:] == ["--logdir", str(tmp_path / "my runs/lightning_logs")]
    assert (run / "checkpoints/last.ckpt").is_file()
    assert list(run.glob("events.*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my runs"]
    quick(tmp_path, "fit", "--trainer.max_epochs=2", "--trainer.default_root_dir=~/my runs", "--ckpt_path=last")
    assert (run.with_name("version_1") / "test.csv").is_file()
    code, _, errors = in_process(capfd, "fit", "--trainer.default_root_dir=s3://bucket/runs")
    assert code == 1
    assert "error: --trainer.default_root_dir s3://bucket/runs is a URL" in errors


def test_a_config_of_another_folder_means_the_current_one(quick, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "digits")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.yaml").write_text(
        "model:\n  network:\n    class_path: MLP\n    init_args: {units: [8, 8]}\n"
        "data:\n  class_path: MNISTDataModule\n  init_args: {data_dir: digits}\n"
    )
    quick(tmp_path, "fit", "--config=sub/mine.yaml", "--trainer.max_epochs=1", data=False)
    assert (tmp_path / "lightning_logs/baseline/version_0/test.csv").is_file()


def printed_numbers(result):
    return {name: float(value) for name, value in re.findall(r"((?:test|val)/\w+)\s+([-\d.e]+)", result.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=5"],  # an epoch has 16 batches
        ["--trainer.max_steps=40"],
        ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"],
        ["--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured",
         "--trainer.callbacks.amount=0.5"],
    ],
    ids=lambda options: options[0][10:],
)  # fmt: skip
def test_the_last_row_is_of_the_weights_that_are_saved(quick, tmp_path, options):
    quick(tmp_path, "fit", "--trainer.max_epochs=3", *options)
    last = rows(run_of(tmp_path, "baseline"))[-1]
    for name, value in printed_numbers(quick(tmp_path, "validate")).items():
        assert value == pytest.approx(float(last[name]), rel=ROUNDING)


def test_a_training_that_ended_inside_an_epoch_is_evaluated_but_not_continued(quick, capfd, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_steps=20", "--trainer.max_epochs=4")
    quick(tmp_path, "fit", f"--ckpt_path={run_of(tmp_path, 'baseline') / 'checkpoints/last.ckpt'}", "--name=evaluated")
    assert (run_of(tmp_path, "evaluated") / "test.csv").is_file()
    code, _, error = in_process(capfd, "fit", "--ckpt_path=last", "--trainer.max_steps=60")
    assert (code, "last.ckpt was written inside an epoch, after batch 4" in error) == (1, True)
    assert len(list((tmp_path / "lightning_logs/baseline").iterdir())) == 1


@pytest.mark.slow
def test_weights_of_double_precision_are_not_rounded_when_a_run_is_continued(quick, tmp_path):
    quick(tmp_path, "fit", "--trainer.max_epochs=2", "--trainer.precision=64-true", "--name=whole")
    quick(tmp_path, "fit", "--trainer.max_epochs=1", "--trainer.precision=64-true", "--name=half")
    quick(tmp_path, "fit", "--ckpt_path=last", "--name=half", "--trainer.max_epochs=2")
    whole, rest = weights(run_of(tmp_path, "whole")), weights(sorted((tmp_path / "lightning_logs/half").iterdir())[-1])
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())
    assert whole["network.dense_1.weight"].dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("finders", "found"),
    [
        (["LearningRateFinder"], {"lr"}),
        (["LearningRateFinder", "BatchSizeFinder"], {"batch_size", "lr"}),
    ],
)
def test_what_a_finder_finds_is_in_the_config(quick, tmp_path, finders, found):
    options = [f"--trainer.callbacks+={name}" for name in finders]
    out = quick(tmp_path, "fit", *options, "--trainer.max_epochs=2", "--data.batch_size=8").stdout
    config = yaml.safe_load((run_of(tmp_path, "baseline") / "config.yaml").read_text())
    assert config["trainer"]["callbacks"] is None
    values = {
        "lr": config["model"]["optimizer"]["init_args"]["lr"],
        "batch_size": config["data"]["init_args"]["batch_size"],
    }
    assert {name for name in values if values[name] != {"lr": 0.001, "batch_size": 8}[name]} == found
    for name in found:
        assert f".{name} {values[name]:.4g}: the run uses it." in out
    assert {path.name for path in tmp_path.iterdir()} == {"lightning_logs"}
    quick(tmp_path, "fit", f"--config={run_of(tmp_path, 'baseline') / 'config.yaml'}", "--name=again")
    assert rows(run_of(tmp_path, "again")) == rows(run_of(tmp_path, "baseline"))
    quick(tmp_path, "fit", "--ckpt_path=last", "--trainer.max_epochs=3", "--name=baseline")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--trainer.callbacks+=BackboneFinetuning",
            "--trainer.callbacks BackboneFinetuning: .*no attribute 'backbone'",
        ),
        ("--model.optimizer=torch.optim.SparseAdam", "--model.optimizer SparseAdam: .*dense gradients"),
    ],
)
def test_where_a_library_fails_is_one_line_and_its_traceback_a_file(
    data_dir, monkeypatch, capfd, tmp_path, options, message
):
    monkeypatch.chdir(tmp_path)
    code, _, error = in_process(capfd, "fit", f"--data.data_dir={data_dir}", *options.split())
    (line,) = [line for line in error.splitlines() if "error: " in line]
    assert code == 1
    assert re.search(message, line)
    assert "Traceback" not in error
    assert "Traceback" in Path(line.rpartition("The traceback is in ")[2]).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_traceback_through_the_user_s_own_code_is_shown(command, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        "        1 / 0  # here\n"
    )
    result = command(tmp_path, "fit", "--trainer.callbacks+=mine.Broken", check=False)
    assert result.returncode == 1
    assert "1 / 0  # here" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fit --trainer.plugins+=AsyncCheckpointIO", "--trainer.plugins AsyncCheckpointIO: checkpoints are written by"),
        ("fit --trainer.plugins+=MixedPrecision", "MixedPrecision: the following arguments are required: precision"),
        ("fit --data.augmentation+=torchvision.transforms.v2.RGB", r"RGB makes images of shape \(2, 3, 28, 28\)"),
        ("fit --model.lr_scheduler=torch.optim.lr_scheduler.LRScheduler", "lr_scheduler LRScheduler: NotImpl"),
        ("fit --trainer.callbacks+=LearningRateFinder --trainer.devices=2", "LearningRateFinder works on one device"),
        ("test --trainer.barebones=true", "--trainer.barebones logs nothing, so test would have no result"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(fitted, monkeypatch, capfd, options, message):
    monkeypatch.chdir(fitted[0].parents[2])
    code, out, error = in_process(capfd, *options.split())
    assert code in (1, 2)
    assert re.search(message, error)
    assert " 1/" not in out


def test_arguments_of_types_that_the_parser_does_not_know_are_read_and_written(quick, tmp_path):
    """Check a Number, an Enum, and a name in place of a function."""
    options = ["--data.augmentation+=torchvision.transforms.v2.RandomRotation", "--data.augmentation.degrees=10",
               "--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00",
               "--trainer.callbacks+=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"]  # fmt: skip
    quick(tmp_path, "fit", *options, "--trainer.max_epochs=1")
    config = run_of(tmp_path, "baseline") / "config.yaml"
    quick(tmp_path, "fit", f"--config={config}", "--name=again")
    assert rows(run_of(tmp_path, "again")) == rows(run_of(tmp_path, "baseline"))


def test_barebones_trains_without_a_trace(quick, tmp_path):
    out = quick(tmp_path, "fit", "--trainer.barebones=true", "--trainer.max_epochs=1").stdout
    assert "nothing is logged, shown or kept" in out
    assert not [*tmp_path.iterdir()]


@posix
@pytest.mark.slow
def test_a_config_may_come_from_a_pipe(quick, tmp_path):
    """Check a pipe, which can be read only once, as a shell passes for ``--config <(…)``."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe:
        pipe.write("{name: piped, trainer: {max_epochs: 1}}")
    quick(tmp_path, "fit", f"--config=/dev/fd/{reading}")
    os.close(reading)
    assert (run_of(tmp_path, "piped") / "test.csv").is_file()


@posix
@pytest.mark.parametrize(("arguments", "code"), [("--version", 0), ("fit --help", 0), ("fit", 1)])
def test_a_folder_that_was_deleted_is_a_line(tmp_path, arguments, code):
    command = f"rmdir {tmp_path}; {sys.executable} -m mnist_lightning {arguments}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, "The current folder has been deleted" in result.stderr) == (code, code == 1)
    assert "Traceback" not in result.stderr
