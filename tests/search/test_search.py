"""The search with real workers on small data: results, pruning, time, and what a person sees."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import optuna
import pandas as pd
import pytest
import yaml
from helpers.commands import ROOT, in_process, spelled_and_default
from helpers.studies import choices, counted_trials, load, outcome, wait_for
from jsonargparse import Namespace
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lightning.classifier import Classifier
from mnist_lightning.search.sampler import draw, make_sampler
from mnist_lightning.search.space import NOTEBOOK_SPACE, SearchSpace
from mnist_lightning.search.study import importances, pareto_front


def test_a_study_is_shown_and_kept(whole):
    cwd, output = whole
    study = load(cwd)
    assert "  model.network.init_args.units.0  8 to 32, step 1\n" in output
    assert "5 complete, 0 pruned, 0 failed" in output
    assert f"Best: trial {study.best_trial.number}, val/accuracy {study.best_value:.4f}" in output
    assert "Importance" not in output  # five trials are too few
    for trial in study.trials:
        executions = trial.user_attrs["executions"]
        assert [execution["seed"] for execution in executions] == [42, 43]
        assert executions[0]["values"] != executions[1]["values"]
        best = [max(value for _, value in execution["values"]) for execution in executions]
        assert [execution["score"] for execution in executions] == best
        assert trial.value == pytest.approx(sum(best) / 2)
        assert trial.intermediate_values[3] == pytest.approx(trial.value)
        assert sorted(trial.intermediate_values) == [0, 1, 2, 3]


def test_a_terminal_shows_what_each_worker_runs_and_how_much_is_done(whole):
    cwd, output = whole
    shown = (cwd / "terminal.txt").read_text()
    executions = re.findall(r"trial   [0-4], execution (\S+?), epoch +[12]/2", shown)
    assert {*executions} <= {"1/2", "2/2"}
    assert executions or "  starts" in shown  # shown once a second: the trials may be faster
    assert "Loading …" in shown
    counts = re.findall(r"(\d+) % \|.*?\| (\d+)/20 epochs, (\d)/5 trials", shown)
    assert all(int(share) == round(100 * int(epochs) / 20) and 4 * int(n) <= int(epochs) for share, epochs, n in counts)
    assert counts[-1] == ("100", "20", "5")
    assert not re.search(r"epochs, |\x1b|\r", output)


def test_importances_are_those_of_enough_trials_with_different_values():
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + 0.01 * trial.suggest_float("y", 0, 1), n_trials=19)
    assert importances(study) == {}
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + 0.01 * trial.suggest_float("y", 0, 1), n_trials=1)
    assert [*importances(study)] == ["x", "y"]
    assert importances(study)["x"] > 0.9
    same = optuna.create_study()
    same.optimize(lambda trial: 0 * trial.suggest_float("x", 0, 1), n_trials=20)
    assert importances(same) == {}


def test_each_execution_is_a_run_in_tensorboard(whole):
    cwd, _ = whole
    for trial in load(cwd).trials:
        for number, execution in enumerate(trial.user_attrs["executions"]):
            run = cwd / f"lightning_logs/tune/trial_{trial.number:03}/execution_{number}"
            events = EventAccumulator(str(run)).Reload()
            logged = [(event.value) for event in events.Scalars("val/accuracy")]
            assert logged == pytest.approx([value for _, value in execution["values"]])
            (score,) = events.Scalars("score")
            assert (score.step, score.value) == (2, pytest.approx(execution["score"]))
            plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
            assert b"model.network.init_args.units.0" in plugin
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert (
                config["model"]["network"]["init_args"]["units"][0] == trial.params["model.network.init_args.units.0"]
            )
            assert config["seed_everything"] == execution["seed"]


def test_best_yaml_trains_the_best(whole, quick, tmp_path):
    cwd, _ = whole
    study = load(cwd)
    path = cwd / "lightning_logs/tune/best.yaml"
    best = yaml.safe_load(path.read_text())
    assert best["name"] == "tuned"
    assert best["trainer"]["max_epochs"] == 20
    assert best["model"]["network"]["init_args"]["units"] == [study.best_params["model.network.init_args.units.0"], 64]
    name = study.best_params["model.optimizer.class_path"].rpartition(".")[2]
    assert best["model"]["optimizer"]["class_path"] == f"mnist_lightning.optimizers.{name}"
    # a training as long as a trial, with the seed of the first execution, equals that execution
    quick(tmp_path, "fit", f"--config={path}", "--trainer.max_epochs=2")
    with (tmp_path / "lightning_logs/tuned/version_0/metrics.csv").open(newline="") as file:
        values = [float(row["val/accuracy"]) for row in csv.DictReader(file)]
    assert values == pytest.approx([value for _, value in study.best_trial.user_attrs["executions"][0]["values"]])


@pytest.mark.slow
def test_a_larger_total_continues_with_any_number_of_workers(whole, tune, tmp_path):
    tune("--n_trials=2", "--workers=3")
    first = load(tmp_path / "here")
    best = first.best_trial
    code, output, _ = tune("--n_trials=5", "--workers=2")
    assert code == 0
    assert "5 complete" in output
    study = load(tmp_path / "here")
    assert [trial.number for trial in study.trials] == list(range(5))
    assert study.trials[best.number].value == best.value
    assert outcome(study) == outcome(load(whole[0]))
    _, output, _ = tune("--n_trials=5")  # nothing is left to do
    assert len(load(tmp_path / "here").trials) == 5
    assert "5 complete" in output


@pytest.mark.slow
def test_the_refit_is_a_run_beside_the_baseline(tune, quick, tmp_path):
    (tmp_path / "here").mkdir()
    quick(tmp_path / "here", "fit", "--trainer.max_epochs=1")
    arguments = ["--n_trials=1", "--refit=true", "--refit_epochs=2"]
    _, output, errors = tune(*arguments)
    run = tmp_path / "here/lightning_logs/tuned/version_0"
    assert (run / "checkpoints/last.ckpt").is_file()
    last = next(csv.DictReader((run / "test.csv").open(newline="")))
    for name in ("baseline", "tuned"):
        assert f"lightning_logs/{name}/version_0" in output, errors
    assert f"{float(last['test/accuracy']):.4f}" in output.splitlines()[-3]
    _, output, _ = tune(*arguments)
    assert "Refit: already done" in output
    assert not run.with_name("version_1").exists()
    (run / "config.yaml").write_text("[damaged")
    code, output, errors = tune(*arguments)
    assert code == 0, errors
    assert (run.with_name("version_1") / "test.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pruner", "pruned_at"),
    [
        (["MedianPruner", "--pruner.n_startup_trials=1"], 0),
        (["PercentilePruner", "--pruner.percentile=30", "--pruner.n_startup_trials=1"], 0),
        (["SuccessiveHalvingPruner", "--pruner.min_resource=1", "--pruner.reduction_factor=2"], 1),
        (["HyperbandPruner", "--pruner.max_resource=6", "--pruner.reduction_factor=2"], 1),
        (["WilcoxonPruner", "--pruner.p_threshold=0.4", "--pruner.n_startup_steps=1"], None),
    ],
)
def test_pruners_end_bad_trials(tune, tmp_path, pruner, pruned_at):
    """Check with a good first learning rate and mostly bad others."""
    space = choices(**{"model.optimizer.init_args.lr": [3e-3, 1e-7, 2e-7, 3e-7]})
    code, output, errors = tune(
        space, f"--pruner={pruner[0]}", *pruner[1:], "--model.optimizer.init_args.lr=3e-3", "--enqueue_baseline=true",
        "--n_trials=8", "--executions_per_trial=3", "--workers=1",
    )  # fmt: skip
    assert code == 0, errors
    study = load(tmp_path / "here")
    assert study.best_params == {"model.optimizer.init_args.lr": 3e-3}
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    for trial in pruned:
        assert trial.params["model.optimizer.init_args.lr"] < 1e-3
        run = tmp_path / f"here/lightning_logs/tune/trial_{trial.number:03}"
        epochs = [len(EventAccumulator(str(e)).Reload().Scalars("train/loss")) for e in sorted(run.iterdir())]
        last = max(trial.intermediate_values)
        expected = (last + 1) * 2 if pruner[0] == "WilcoxonPruner" else last + 1
        assert sum(epochs) == expected  # the logs are complete
        assert pruned_at is None or last >= pruned_at
    assert pruned, output


@pytest.mark.slow
def test_the_baseline_can_be_a_trial(tune, tmp_path):
    key, values = "model.network.init_args.dropout.0", [0.1, 0.15, 0.2, 0.25, 0.3]
    options = [choices(**{key: values}), "--enqueue_baseline=true", "--executions_per_trial=1"]

    def drawn():
        return [trial.params[key] for trial in load(tmp_path / "here").trials]

    def other():
        return next(value for value in values if value not in drawn())

    tune(*options, "--n_trials=1")
    assert drawn() == [0.2]
    tune(*options, "--n_trials=2")  # the trial already exists
    given = other()
    tune(*options, "--n_trials=3", f"--model.network.dropout=[{given},0.2]")  # continues the study
    assert len(drawn()) == 3
    assert drawn()[2] == given
    code, output, _ = tune(*options, "--n_trials=3", f"--model.network.dropout=[{other()},0.2]")
    assert code == 0
    assert "enqueue_baseline: left out, because the study is full. --n_trials 4 makes room" in output
    code, _, errors = tune(*options, "--model.network.dropout=[0.4,0.2]", folder="new")
    assert code == 1
    assert f"{key} is 0.4, which is not searched (one of 0.1, 0.15, 0.2, 0.25, 0.3)" in errors
    assert not (tmp_path / "new/lightning_logs").exists()


@pytest.mark.slow
def test_trials_come_from_a_file_or_another_study_and_the_best_keeps_its_weights(tune, capfd, tmp_path):
    units = "model.network.init_args.units.0"
    (tmp_path / "first.yaml").write_text(f"- {{{units}: 9}}\n- {{optimizer: KerasSGD}}\n")
    options = ["--executions_per_trial=1", "--n_trials=3", "--keep_checkpoints=best", "--workers=1"]
    older = tmp_path / "here/lightning_logs/tune/trial_099/execution_0/checkpoints"  # left by a deleted study
    older.mkdir(parents=True)
    (tmp_path / "here/lightning_logs/tune/trial_000_good").mkdir()  # a folder of the user
    code, output, errors = tune(*options, f"--enqueue={tmp_path / 'first.yaml'}")
    assert code == 0, errors
    study = load(tmp_path / "here")
    assert [study.trials[0].params[units], study.trials[1].params["model.optimizer.class_path"]] == [9, "KerasSGD"]

    trial = study.best_trial
    kept = sorted((tmp_path / "here").rglob("*.ckpt"))
    folder = tmp_path / f"here/lightning_logs/tune/trial_{trial.number:03}/execution_0"
    assert kept == [folder / "checkpoints/best.ckpt", folder / "checkpoints/last.ckpt"]
    assert older.is_dir()
    shown = re.search(r"Its weights: (\S+)\nTest them: .* test (.*)", output)
    assert tmp_path / "here" / shown[1] == kept[0]
    code, output, errors = in_process(capfd, "validate", *shown[2].split())
    assert code == 0, errors
    assert float(re.search(r"val/accuracy +([\d.]+)", output)[1]) == pytest.approx(trial.value)
    code, _, errors = tune(*options, "--storage=sqlite:///other.db")  # a study of the same name, in the same folder
    assert code == 0, errors
    assert kept[0].is_file()

    code, output, errors = tune("--executions_per_trial=1", "--n_trials=1", "--like=tune", "--study_name=next")
    assert code == 0, errors
    assert load(tmp_path / "here", "next").trials[0].params == trial.params
    space = choices(**{"model.optimizer.class_path": ["KerasAdam", "KerasSGD", "KerasRMSprop"]})
    _, output, _ = tune("--executions_per_trial=1", "--n_trials=1", "--like=tune", "--study_name=small", space)
    assert "like tune: left out, as this search space lacks them: l2.1, units.0" in output
    drawn = load(tmp_path / "here", "small").trials[0].params["model.optimizer.class_path"]
    assert trial.params["model.optimizer.class_path"].endswith(drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {data.batch_size: 4}", "trial 1 of 1 has keys that are not searched: data.batch_size."),
        ("- {model.network.init_args.units.0: 9}\n- 3", "trial 2 of 2 is not a mapping"),
        ("- {model.network.init_args.units.0: 9, units.0: 8}", "trial 1 of 1 has two values for one key."),
        ("- {model.network.init_args.units.0: 1}", "units.0 is 1, which is not searched (8 to 32, step 1)"),
        ("{", "is not valid YAML"),
        (None, "No such file"),
    ],
)
def test_trials_that_cannot_be_are_refused(tune, tmp_path, content, message):
    if content is not None:
        (tmp_path / "first.yaml").write_text(content)
    code, _, errors = tune(f"--enqueue={tmp_path / 'first.yaml'}")
    assert code == 1
    assert message in errors
    assert len(errors.splitlines()) <= 6


@pytest.mark.slow
def test_several_metrics_have_a_pareto_front(tune, capfd, tmp_path):
    units = "model.network.init_args.units.0"
    space = choices(**{units: [4, 32, 64]})
    options = [space, "--sampler=BruteForceSampler", "--executions_per_trial=1", "--metric", "val/loss"]
    options += ["--metric", "parameters", "--metric=flops", "--direction=minimize", "--direction=minimize"]
    options += ["--direction", "maximize"]
    code, output, errors = tune(*options, "--limits.parameters=30000", epochs=3)
    assert code == 0, errors
    study = load(tmp_path / "here")
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE", "MAXIMIZE"]
    for trial in counted_trials(study):
        width = trial.params[units]
        layers = [(784, width), (width, 64), (64, 10)]
        loss, parameters, flops = trial.values
        assert loss == min(value for _, value in trial.user_attrs["executions"][0]["values"])
        assert parameters == sum((into + 1) * out for into, out in layers)
        assert flops == sum(2 * into * out for into, out in layers)
    assert re.search(r"^trial +val/loss +parameters +flops", output, re.MULTILINE)
    assert "Pareto front, which no other trial dominates: 3 of " in output
    small = min(
        (trial for trial in counted_trials(study) if trial.values[1] <= 30000), key=lambda trial: trial.values[0]
    )
    assert f"Best within parameters 30,000: trial {small.number}, val/loss" in output
    best = tmp_path / "here/lightning_logs/tune/best.yaml"
    assert yaml.safe_load(best.read_text())["model"]["network"]["init_args"]["units"][0] == small.params[units]
    for limits in ([], ["--limits.parameters=30000"]):
        _, output, _ = tune("--show", *limits)
        assert f"Best within parameters 30,000: trial {small.number}, val/loss" in output
    code, _, errors = in_process(capfd, "report", "--study=tune")
    assert code == 0, errors
    report = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))["study"]
    assert report["best_trial"] == small.number
    assert report["pareto_front"] == {str(trial.number): trial.values for trial in pareto_front(study)}
    page = Path("lightning_logs/report/report.html").read_text(encoding="utf-8")
    assert '"title": "val/loss by parameters"' in page  # the chart of the Pareto front
    code, _, errors = tune(*options, "--limits.parameters=3")
    assert code == 1
    assert "epochs is 3 in the study, 2 in the command" in errors
    code, _, errors = tune(*options, "--limits.parameters=3", epochs=3)
    assert code == 1
    assert "No complete trial is within parameters 3:" in errors


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize(
    ("program", "page", "shown"),
    [
        ("tensorboard", "#timeseries", "trial_004/execution_1"),
        ("optuna-dashboard", "dashboard/studies/0", "val/accuracy"),
    ],
)
def test_the_programs_that_tune_names_show_the_study(whole, program, page, shown):
    cwd, output = whole
    arguments = shlex.split(re.search(rf"^ +{program} (.*)", output, re.MULTILINE)[1])
    path = Path(sys.executable).with_name(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(path), *arguments, "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:

        def answers():
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True

        wait_for(answers)
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--dump-dom"]
        browser += ["--virtual-time-budget=20000", f"http://127.0.0.1:{port}/{page}"]
        wait_for(lambda: shown in subprocess.run(browser, capture_output=True, text=True, timeout=120).stdout)
    finally:
        os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_study_is_of_its_data_and_its_training(tune, data_dir, tmp_path):
    options = ["--n_trials=1", "--executions_per_trial=1"]
    assert tune(*options)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    with (other / "train-images-idx3-ubyte").open("r+b") as file:
        file.seek(20_000)
        file.write(b"\x07")  # one pixel
    for more, message in (
        ([f"--data.data_dir={other}"], "data.digest is "),
        (["--data.val_split=0.3"], "data.val_split is 0.2 in the study, 0.3 in the command"),
        (["--trainer.gradient_clip_val=0.1"], "trainer.gradient_clip_val is None in the study, 0.1 in the command"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"], "trainer.callbacks is None"),
        (["--seed_everything=7"], "seed_everything is 42 in the study, 7 in the command"),
        (["--model.lr_interval=step"], "model.lr_interval is None in the study, step in the command"),
    ):
        code, _, errors = tune(*options, *more)
        assert code == 1
        assert "The study tune has other settings: " in errors
        assert message in errors
        assert errors.count("in the command") == 1
    shutil.copytree(data_dir, tmp_path / "moved")
    code, output, errors = tune(
        *options, f"--data.data_dir={tmp_path / 'moved'}", "--n_trials=2", "--workers=1", "--num_threads=2",
        "--name=other", "--sampler=TPESampler", "--trainer.enable_progress_bar=false", "--data.eval_batch_size=50",
        "--grace_period=30", "--trainer.accelerator=cpu",
    )  # fmt: skip
    assert code == 0, errors
    assert "2 complete" in output


@pytest.mark.slow
def test_what_an_older_study_lacks_is_what_is_done_by_default(tune, tmp_path):
    options = ["--n_trials=1", "--executions_per_trial=1"]
    tune(*options)
    study = load(tmp_path / "here")
    settings = study.user_attrs["settings"]
    del settings["data"]["digest"]
    settings["trainer"] = {"max_epochs": 2}
    study.set_user_attr("settings", settings)
    assert tune(*options)[0] == 0
    for option, value in (("max_epochs=3", 2), ("gradient_clip_val=0.1", None)):
        code, _, errors = tune(*options, f"--trainer.{option}")
        assert code == 1
        key, _, given = option.partition("=")
        assert f"trainer.{key} is {value} in the study, {given} in the command" in errors


def epochs_of(run):
    with (run / "metrics.csv").open() as file:
        return len([*csv.DictReader(file)])


@pytest.mark.slow
def test_the_refit_has_what_was_searched(tune, tmp_path):
    options = ["--n_trials=1", "--executions_per_trial=1", "--refit=true", "--refit_epochs=3"]
    code, output, errors = tune(choices(**{"trainer.max_epochs": [1], "trainer.gradient_clip_val": [0.5]}), *options)
    assert code == 0, errors
    assert "trainer.max_epochs was searched: 1. --refit_epochs 3 is not used." in output
    run = tmp_path / "here/lightning_logs/tuned/version_0"
    assert epochs_of(run) == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["gradient_clip_val"] == 0.5
    assert tune(*options, folder="plain")[0] == 0
    assert epochs_of(tmp_path / "plain/lightning_logs/tuned/version_0") == 3


@pytest.mark.slow
def test_any_trial_is_a_config_by_its_number(tune, data_dir, capfd, tmp_path):
    options = ["--n_trials=3", "--executions_per_trial=1"]
    _, output, _ = tune(*options)
    here = tmp_path / "here/lightning_logs"
    study = load(tmp_path / "here")
    assert "Config of another trial: python -m mnist_lightning tune" in output
    assert "--trial N" in output
    number = next(trial.number for trial in study.trials if trial.number != study.best_trial.number)
    code, output, errors = tune(*options, "--n_trials=9", f"--trial={number}", "--refit=true", "--refit_epochs=1")
    assert code == 0, errors
    assert len(load(tmp_path / "here").trials) == 3  # the search does not continue
    config = yaml.safe_load((here / f"tune/trial_{number:03}/config.yaml").read_text())
    assert config["origin"] == {"study_name": "tune", "trial": number}
    params = study.trials[number].params
    assert config["model"]["network"]["init_args"]["units"][0] == params["model.network.init_args.units.0"]
    run = here / "tuned/version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["origin"] == config["origin"]
    # the config of an execution can be trained like any other, and reproduces the trial's value
    code, _, errors = in_process(capfd, "fit", f"--config={here / f'tune/trial_{number:03}/execution_0/config.yaml'}")
    assert code == 0, errors
    again = here / "tuned/version_1"
    assert (again / "checkpoints/best.ckpt").is_file()
    with (again / "metrics.csv").open() as file:
        scores = [float(row["val/accuracy"]) for row in csv.DictReader(file)]
    assert max(scores) == pytest.approx(study.trials[number].value)
    code, _, errors = tune(*options, "--trial=7")
    assert code == 1
    assert "The study tune has no trial 7: its trials are 0, 1, 2" in errors


@pytest.mark.slow
def test_what_is_printed_at_the_end_can_be_typed(tune, capfd, data_dir, tmp_path):
    options = ["--n_trials=2", "--executions_per_trial=1", "--refit=true", "--refit_epochs=1", "--study_name=mine"]
    _, output, _ = tune(*options, "--name=better")
    assert "Train the notebook's baseline, to compare: python -m mnist_lightning fit" in output
    in_process(capfd, "fit", f"--data.data_dir={data_dir}", "--trainer.max_epochs=1")
    _, output, _ = tune(*options, "--name=better")
    (words,) = re.findall(r"^Compare them: python -m mnist_lightning (.*)", output, re.MULTILINE)
    code, output, errors = in_process(capfd, *shlex.split(words))
    assert code == 0, errors
    report = json.loads(Path("lightning_logs/report/report.json").read_text(encoding="utf-8"))
    assert [*report["models"]] == ["baseline", "better"]
    assert report["study"]["name"] == "mine"


def test_executions_keep_the_user_s_loggers(tune, tmp_path):
    code, _, errors = tune(
        "--n_trials=2", "--workers=2", "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=csv",
        "--refit=true", "--refit_epochs=1",
    )  # fmt: skip
    assert code == 0, errors
    for trial in load(tmp_path / "here").trials:
        for execution in trial.user_attrs["executions"]:
            name = f"trial_{trial.number:03}_execution_{execution['execution']}"
            with (tmp_path / f"here/csv/lightning_logs/tune_{name}/metrics.csv").open() as file:
                rows = [*csv.DictReader(file)]
            values = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
            assert values == pytest.approx([value for _, value in execution["values"]])
            assert [float(row["score"]) for row in rows if row.get("score")] == pytest.approx([execution["score"]])
    assert (tmp_path / "here/csv/lightning_logs/version_0/metrics.csv").is_file()  # from the refit
    assert (tmp_path / "here/lightning_logs/tuned/version_0/checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_each_execution_is_a_run_of_each_tracking_server(tune, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    code, output, errors = tune(
        "--trainer.logger+=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///m.db",
        "--trainer.logger+=WandbLogger", "--trainer.logger.offline=true", "--n_trials=2", "--workers=2",
    )  # fmt: skip
    assert code == 0, errors
    assert "2 complete, 0 pruned, 0 failed" in output
    cwd = tmp_path / "here"
    assert len([*cwd.glob("lightning_logs/wandb/offline-run-*")]) == 4
    client = mlflow.MlflowClient(f"sqlite:///{cwd / 'm.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = {f"tune_trial_{trial:03}_execution_{execution}" for trial in range(2) for execution in range(2)}
    assert {run.info.run_name for run in runs} == names
    assert all("score" in run.data.metrics for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("finish", [True, False])
def test_a_search_ends_when_its_time_is_over(tune, whole, tmp_path, finish):
    """Check a limit of five seconds with trials of half a second."""
    options = ["--workers=2", "--executions_per_trial=1", f"--finish_trials={str(finish).lower()}"]
    begin = time.monotonic()
    more = ["--n_trials=500", "--timeout=5s", "--refit=true", "--refit_epochs=1"]
    code, output, errors = tune(*options, *more, epochs=1)
    assert code == 0, errors
    assert 5 < time.monotonic() - begin < 200
    assert "The time is up. Continue: " in output
    assert "Best: trial" in output
    assert (tmp_path / "here/lightning_logs/tuned/version_0/test.csv").is_file()
    study = load(tmp_path / "here")
    states = Counter(trial.state for trial in study.trials)
    assert states[TrialState.COMPLETE] >= 1
    assert states[TrialState.RUNNING] == 0
    if finish:
        assert states[TrialState.COMPLETE] == len(study.trials)
    count = len(study.trials) + 1  # without a time limit, the search continues to the end
    code, output, errors = tune(*options, f"--n_trials={count}", epochs=1)
    assert code == 0, errors
    assert f"{count} complete" in output
    study = load(tmp_path / "here")
    assert [t.params for t in study.trials[:5]] == [t.params for t in load(whole[0]).trials][: len(study.trials)]


@pytest.mark.parametrize("timeout", ["0", "x", "5 minutes", "-3"])
def test_a_time_that_is_none_is_refused(tune, tmp_path, timeout):
    code, _, errors = tune(f"--timeout={timeout}", folder="new")
    assert code in (1, 2)
    assert "timeout" in errors
    assert not (tmp_path / "new/lightning_logs").exists()


def test_any_key_of_trainer_model_and_data_can_be_searched(tune, tmp_path):
    space = choices(**{
        "data.batch_size": [50],
        "trainer.gradient_clip_val": [0.5],
        "trainer.max_epochs": [1],
        "model.optimizer.class_path": ["torch.optim.AdamW"],
        "model.optimizer.init_args.lr": [0.002],
        "model.network.class_path": ["mnist_lightning.networks.MLP"],
    })  # fmt: skip
    code, _, errors = tune(space, "--n_trials=1", "--executions_per_trial=1")
    assert code == 0, errors
    run = tmp_path / "here/lightning_logs/tune/trial_000/execution_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == 50
    assert config["trainer"]["gradient_clip_val"] == 0.5
    optimizer = config["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["lr"] == 0.002
    assert optimizer["init_args"]["weight_decay"] == 0.01  # the default of AdamW
    assert EventAccumulator(str(run)).Reload().Scalars("val/accuracy")[-1].step == 1


@pytest.mark.slow
def test_what_a_trial_searches_can_depend_on_what_it_drew(tune, capfd, tmp_path):
    network, length = "model.network.init_args", "model.network.init_args.units.length"
    space = {
        f"{network}.units": [[8], [8, 16]],
        f"{network}.dropout.1": [0.5],
        "model.lr_scheduler.class_path": ["OneCycleLR", None],
        "model.lr_scheduler.init_args.max_lr": [0.01],
    }
    space = {key: {"class_path": "CategoricalDistribution", "init_args": {"choices": v}} for key, v in space.items()}
    space[f"{network}.dropout.1"]["when"] = {f"{network}.units": [[8, 16]]}
    space["model.lr_scheduler.init_args.max_lr"]["when"] = {"model.lr_scheduler.class_path": "OneCycleLR"}
    options = ["--model.network.l2=0.001", "--model.network.dropout=[0.25,0.25]", "--executions_per_trial=1"]
    sampler = ["--sampler=BruteForceSampler", "--n_trials=9"]
    code, output, errors = tune(f"--search_space={json.dumps(space)}", *options, *sampler, epochs=1)
    assert code == 0, errors
    assert f"{network}.dropout.1" in output
    assert "one of 0.5, when units is [8, 16]" in output
    assert length not in output
    models = []
    for file in (tmp_path / "here/lightning_logs/tune").glob("trial_*/execution_0/config.yaml"):
        model = yaml.safe_load(file.read_text())["model"]
        arguments, scheduler = model["network"]["init_args"], model["lr_scheduler"]
        models.append((arguments["units"], arguments["dropout"], scheduler and scheduler["init_args"]["max_lr"]))
    assert sorted(models, key=str) == [
        ([8, 16], [0.25, 0.5], 0.01),
        ([8, 16], [0.25, 0.5], None),
        ([8], [0.25], 0.01),
        ([8], [0.25], None),
    ]
    best = yaml.safe_load((tmp_path / "here/lightning_logs/tune/best.yaml").read_text())["model"]["network"]
    assert best["init_args"]["units"] in ([8], [8, 16])
    code, _, errors = in_process(capfd, "report", "--study=tune")
    assert code == 0, errors
    table = pd.read_csv("lightning_logs/report/trials.csv")
    assert sorted(table["dropout.1"].fillna(0)) == [0, 0, 0.5, 0.5]


@pytest.mark.slow
def test_deep_yaml_draws_two_to_four_layers(tune, tmp_path):
    config = f"--config={ROOT / 'configs/deep.yaml'}"
    code, _, errors = tune(config, "--n_trials=4", "--trainer.limit_train_batches=2")
    assert code == 0, errors
    for trial in load(tmp_path / "here").trials:
        layers = trial.params["model.network.init_args.units.length"]
        for key in ("units", "dropout", "l2"):
            drawn = {name for name in trial.params if f".{key}." in name and not name.endswith("length")}
            assert drawn == {f"model.network.init_args.{key}.{layer}" for layer in range(layers)}


@pytest.mark.slow
def test_no_trial_touches_the_test_images(data_dir, tune, tmp_path):
    folder = tmp_path / "no_test"
    folder.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        shutil.copy(data_dir / name, folder)
    code, _, errors = tune("--n_trials=1", f"--data.data_dir={folder}")
    assert code == 0, errors
    code, _, errors = tune("--n_trials=1", f"--data.data_dir={folder}", "--refit=true", "--refit_epochs=1")
    assert code == 1
    assert "t10k" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search_space={}"], "search_space is empty"),
        ([choices(**{"model.network.init_args.unitz.0": [1]})], "no key model.network.init_args.unitz.0"),
        ([choices(**{"model.network.init_args.units.3": [1]})], "no key model.network.init_args.units.3"),
        (
            [choices(**{"model.network.init_args.units.length": [2, 3]}), "--model.network.dropout=[0.2,0.2]"],
            "model.network.init_args.units.length cannot be 3. the length of dropout is 2, but the number of",
        ),
        (
            [
                '--search_space={"model.optimizer.class_path": {"class_path": "CategoricalDistribution", "init_args": '
                '{"choices": ["KerasSGD", "KerasAdam"]}}, "model.optimizer.init_args.momentum": {"class_path": '
                '"FloatDistribution", "init_args": {"low": 0, "high": 1}, "when": {"model.optimizer.class_path": '
                '["KerasSGD", "KerasAdam"]}}}',
                "--model.optimizer=KerasAdam",
            ],
            "model.optimizer.class_path cannot be 'KerasAdam'. ",
        ),
        ([choices(**{"n_trials": [1]})], "no key n_trials"),
        ([choices(**{"data.batch_size": [32, "many"]})], "data.batch_size cannot be 'many'"),
        ([choices(**{"data.batch_size": [32, 0]})], "data.batch_size cannot be 0"),
        ([choices(**{"model.optimizer.class_path": ["Adamm"]})], "model.optimizer.class_path cannot be 'Adamm'"),
        (
            ['--search_space={"data.batch_size": {"class_path": "Uniform"}}'],
            "data.batch_size has no valid distribution",
        ),
        (
            ['--search_space={"data.batch_size": {"class_path": "IntDistribution", "init_args": {"low": 2}}}'],
            "data.batch_size has no valid distribution",
        ),
        (["--sampler=NoSampler"], "NoSampler"),
        (
            ["--sampler=GridSampler", '--sampler.search_space={"x": [1]}'],
            "GridSampler cannot draw. The parameter name, ",
        ),
        (["--metric=val/loss", "--metric=parameters", "--pruner=MedianPruner"], "A pruner supports only one metric"),
        (["--metric=val/loss", "--metric=flops", "--direction=minimize"], "Each metric needs one direction"),
        (["--metric=parameters", "--metric=val/loss"], "parameters cannot"),
        (["--limits.parametres=3"], "The metric parametres is not logged"),
        (["--like=other"], "there is no study other in lightning_logs/other/journal.log"),
        (["--metric=test/accuracy"], "Logged metrics: val/loss, val/penalized_loss, val/accuracy"),
        (["--trainer.accelerator=cpu", "--trainer.devices=2"], "leave --trainer.devices at 1"),
        (["--n_trials=0"], "n_trials"),
        (["--storage=postgresql://nobody@127.0.0.1:1/x"], "The storage postgresql://nobody@127.0.0.1:1/x cannot be"),
    ],
)
def test_a_mistake_is_said_before_anything_trains(tune, tmp_path, arguments, message):
    code, _, errors = tune(*arguments)
    assert code in (1, 2)
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 6
    assert not (tmp_path / "here/lightning_logs/tune/trial_000").exists()


def test_another_space_is_refused(tune):
    tune("--n_trials=1", "--executions_per_trial=1")
    code, _, errors = tune("--n_trials=1", "--executions_per_trial=1", choices(**{"data.batch_size": [32]}))
    assert code == 1
    assert "data.batch_size is 32 in the study, one of 32 in the command" in errors


def test_tune_yaml_spells_out_the_defaults(capfd):
    spelled, default = spelled_and_default(capfd, "tune", ROOT / "configs/tune.yaml")
    for key in set(default) - {
        "trainer", "search_space", "sampler", "pruner", "storage", "workers", "trial", "origin", "tensorboard", "show",
    }:  # fmt: skip
        if key == "model":
            for name in ("lr_scheduler", "lr_interval", "lr_frequency"):
                default["model"].pop(name)
        if key == "data":
            default["data"]["init_args"].pop("data_dir")
        assert spelled[key] == default[key]
    assert spelled["search_space"].keys() == default["search_space"].keys() == NOTEBOOK_SPACE.keys()


@pytest.mark.slow
def test_a_metric_that_is_named_once_reaches_every_place(tune, monkeypatch, capfd, tmp_path):
    (tmp_path / "topthree.py").write_text(
        "from mnist_lightning.classifier import Classifier\n"
        "from mnist_lightning.networks import MLP\n"
        "original = Classifier.metrics\n"
        "def metrics(self, logits, labels, loss):\n"
        "    top3 = (logits.topk(3).indices == labels[:, None]).any(dim=1)\n"
        "    return {**original(self, logits, labels, loss), 'top3_accuracy': top3}\n"
        "Classifier.metrics = metrics\n"
        "class Net(MLP):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Classifier, "metrics", Classifier.metrics)  # monkeypatch restores it afterwards
    search = ["--metric=val/top3_accuracy", "--n_trials=1", "--executions_per_trial=1", "--model.network=topthree.Net"]
    code, output, errors = tune(*search, "--refit=true", "--refit_epochs=1")
    assert code == 0, errors
    run = tmp_path / "here/lightning_logs/tuned/version_0"
    value = next(csv.DictReader((run / "metrics.csv").open(newline="")))["val/top3_accuracy"]
    assert re.search(rf"val/top3_accuracy .*\n +1/1 .* {float(value):.4f} ", output)
    (trial,) = load(tmp_path / "here").trials
    assert trial.user_attrs["executions"][0]["values"][0][1] == pytest.approx(float(value))
    tested = float(next(csv.DictReader((run / "test.csv").open(newline="")))["test/top3_accuracy"])
    assert re.search(rf"^last epoch \(1\) .* {tested:.4f}$", output, re.MULTILINE)
    assert re.search(rf"^lightning_logs/tuned/version_0 .* {tested:.4f}$", output, re.MULTILINE)
    assert EventAccumulator(str(run)).Reload().Scalars("test/top3_accuracy")[0].value == pytest.approx(tested)
    code, _, errors = in_process(capfd, "report", *(f"{name}=lightning_logs/tuned/version_0" for name in "ab"))
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "here/lightning_logs/report/comparison.csv").set_index(["quantity", "epoch"])
    assert table.loc["test/top3_accuracy", "last"]["mean"].tolist() == pytest.approx([tested] * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "best"), [([], min), (["--direction=maximize"], max), (["--metric=train/loss"], min)]
)
def test_a_loss_is_minimized_unless_said_otherwise(tune, tmp_path, options, best):
    space = choices(**{"model.optimizer.init_args.lr": [1e-3, 1e-5]})
    loss = [] if "--metric=train/loss" in options else ["--metric=val/loss"]
    tune(space, "--sampler=BruteForceSampler", "--executions_per_trial=1", *loss, *options)
    study = load(tmp_path / "here")
    assert len({trial.value for trial in counted_trials(study)}) == 2
    assert study.best_value == best(trial.value for trial in counted_trials(study))
    for trial in counted_trials(study):
        assert trial.value == best(value for _, value in trial.user_attrs["executions"][0]["values"])


@pytest.mark.slow
def test_a_trial_with_augmentation_is_what_fit_makes_of_its_config(tune, quick, tmp_path):
    code, _, errors = tune(
        "--n_trials=1", "--executions_per_trial=1", "--workers=1", "--data.augmentation+=Distortion", epochs=1
    )
    assert code == 0, errors
    (trial,) = load(tmp_path / "here").trials
    (config,) = (tmp_path / "here").glob("lightning_logs/tune/trial_000/execution_0/config.yaml")
    quick(tmp_path, "fit", f"--config={config}", data=False)
    (table,) = tmp_path.glob("lightning_logs/*/version_0/metrics.csv")
    assert pd.read_csv(table)["val/accuracy"].max() == trial.value


def test_numbers_of_a_json_file_are_numbers(tune, tmp_path):
    """Check 1e-05, as json.dump writes it, which is text in YAML 1.1."""
    key = "model.optimizer.init_args.lr"
    space = {key: {"class_path": "FloatDistribution", "init_args": {"low": 1e-6, "high": 1e-2, "log": True}}}
    (tmp_path / "best.json").write_text(json.dumps({key: 1e-05}))
    options = ["--n_trials=1", "--executions_per_trial=1", "--workers=1", f"--enqueue={tmp_path / 'best.json'}"]
    code, _, errors = tune(f"--search_space={json.dumps(space)}", *options, epochs=1)
    assert code == 0, errors
    assert load(tmp_path / "here").trials[0].params == {key: 1e-05}


@pytest.mark.parametrize(
    "sampler",
    [
        Namespace(class_path="optuna.samplers.QMCSampler", init_args=Namespace(seed=None)),
        Namespace(
            class_path="optuna.samplers.PartialFixedSampler",
            init_args=Namespace(
                fixed_params={},
                base_sampler=Namespace(class_path="optuna.samplers.RandomSampler", init_args=Namespace(seed=None)),
            ),
        ),
        Namespace(
            class_path="optuna.samplers.GPSampler",
            init_args=Namespace(
                independent_sampler=Namespace(class_path="optuna.samplers.TPESampler", init_args=Namespace(seed=None))
            ),
        ),
    ],
    ids=lambda sampler: sampler.class_path,
)
def test_a_sampler_within_a_sampler_draws_anew_in_each_trial(sampler):
    space = SearchSpace({"a": CategoricalDistribution([*range(50)])})  # QMCSampler delegates it to another sampler
    drawn = []
    for seed in (1, 1, 2):
        study = optuna.create_study()
        study.sampler = make_sampler(study, sampler, seed, space)
        for _ in range(9):
            trial = study.ask()
            draw(trial, space)
            study.tell(trial, 0.0)
        drawn.append([trial.params["a"] for trial in study.trials])
    assert len({*drawn[0]}) > 5
    assert drawn[0] == drawn[1] != drawn[2]
