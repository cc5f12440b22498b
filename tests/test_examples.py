"""The example of a project of one's own: the commands of its README, in a copy of its folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers.commands import ROOT

from mnist_lightning import Run

EXAMPLE = ROOT / "examples/letters"
SHORT = {
    "fit": ["--trainer.max_epochs=6"],
    "tune": ["--trainer.max_epochs=1", "--n_trials=2", "--refit_epochs=6"],
}
"""Options that shorten a command."""
pytestmark = pytest.mark.xdist_group("letters")  # one worker makes the project, for all tests


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the folder after the README's commands without loggers, and their outputs by the word after python."""
    folder = tmp_path_factory.mktemp("project") / "letters"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "images", "lightning_logs"))
    outputs = {}
    for words in commands():
        if "pip" not in words and "loggers.yaml" not in words:
            name = words[3] if words[1] == "-m" else words[1]
            outputs[name] = run(folder, [*words, *SHORT.get(name, [])])
    return folder, outputs


def commands():
    """Return the words of the README's commands that start with python."""
    lines = re.findall(r"^    (python .*)", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def run(folder, words):
    # a service of W&B that another test has started would write its files to that test's folder
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_a_project_of_one_s_own_trains_searches_and_reports(project):
    folder, outputs = project
    own, tuned = (Run(folder / f"lightning_logs/{name}/version_0") for name in ("letters", "letters_tuned"))
    for found in (own, tuned):
        assert found.config["model"]["class_path"] == "letters.Focal"
        assert found.test["test/accuracy"].iloc[0] > 0.9  # of letters in other fonts; chance is 1/26
        worst = found.history["val/worst_letter"]
        assert (worst <= found.history["val/accuracy"]).all()
        assert 0.5 < worst.max() < 1
    assert tuned.config["model"]["gamma"] != own.config["model"]["gamma"] == 2
    assert re.search(r"trial +val/worst_letter +executions +gamma +channels\.0 +optimizer\.lr", outputs["tune"])

    assert "Compare them: python -m mnist_lightning report letters=" in outputs["tune"]
    report = json.loads((folder / "lightning_logs/report/report.json").read_text(encoding="utf-8"))
    assert [*report["models"]] == ["letters", "letters_tuned"]
    for model, found in zip(report["models"].values(), (own, tuned), strict=True):
        values = model["metrics"]["test/worst_letter (last epoch)"]
        assert values == pytest.approx(found.test["test/worst_letter"].iloc[:1].tolist())
    assert "test/worst_letter (last epoch)" in outputs["report"]
    assert "worst_letter" in (folder / "lightning_logs/report/report.html").read_text(encoding="utf-8")
    assert pd.read_csv(folder / "predictions.csv")["class"].tolist() == ["Q"]
    assert not (folder / "lightning_logs/baseline").exists()


@pytest.mark.slow
def test_a_project_of_one_s_own_logs_to_mlflow_and_wandb(project):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    folder, _ = project
    (words,) = (words for words in commands() if "loggers.yaml" in words)
    run(folder, [*words, "--name", "logged", "--trainer.max_epochs", "1"])
    client = mlflow.MlflowClient(f"sqlite:///{(folder / 'lightning_logs/mlflow.db').as_posix()}")
    (logged,) = client.search_runs([client.get_experiment_by_name("letters").experiment_id])
    assert {"val/worst_letter", "test/worst_letter"} < logged.data.metrics.keys()
    assert len([*folder.glob("lightning_logs/wandb/offline-run-*/*.wandb")]) == 1
    assert (folder / "lightning_logs/logged/version_0/test.csv").is_file()


@pytest.mark.slow
def test_the_letters_are_the_same_each_time(project):
    folder, _ = project
    run(folder, ["python", "make_letters.py", "--output", "again"])
    pictures = sorted(path.relative_to(folder / "images") for path in folder.glob("images/*/*/*.png"))
    assert len({path.parts[1] for path in pictures}) == 26
    fonts = [{path.name.rpartition("_")[0] for path in pictures if path.parts[0] == part} for part in ("train", "test")]
    assert not fonts[0] & fonts[1]
    assert all((folder / "images" / path).read_bytes() == (folder / "again" / path).read_bytes() for path in pictures)
