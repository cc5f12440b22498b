"""Each config of tests/conf goes through fit, test and predict; those of earlier versions still work."""

import csv
import re
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT

from mnist_lightning.classifier import Classifier

CONF = ROOT / "tests/conf"


def printed_accuracy(result):
    return float(re.search(r"test/accuracy +([\d.]+)", result.stdout)[1])


@pytest.mark.numeric
@pytest.mark.parametrize("config", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_trained_tested_and_predicted(quick, tmp_path, config):
    quick(tmp_path, "fit", f"--config={config}", "--trainer.max_epochs=2")
    with (tmp_path / "lightning_logs/baseline/version_0/test.csv").open(newline="") as file:
        last = next(csv.DictReader(file))
    saved = yaml.safe_load((tmp_path / "lightning_logs/baseline/version_0/config.yaml").read_text())
    given = yaml.safe_load(config.read_text())
    assert saved["model"]["network"]["init_args"].items() >= given["model"]["network"]["init_args"].items()
    result = quick(tmp_path, "test", f"--config={config}")
    assert printed_accuracy(result) == pytest.approx(float(last["test/accuracy"]))
    quick(tmp_path, "predict", f"--config={config}")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert (table.label == table.predicted).mean() == pytest.approx(float(last["test/accuracy"]))
    assert float(last["test/accuracy"]) > 0.2


def test_every_config_is_read_by_a_process_of_its_own():
    """Where nobody else has imported the classes that configs name."""
    program = """
        import sys
        from mnist_lightning.__main__ import main
        for path in sys.argv[1:]:
            try:
                main([("tune" if "search_space" in open(path).read() else "fit"), f"--config={path}", "--print_config"])
            except SystemExit as exit:
                assert not exit.code, (path, exit.code)
    """
    configs = [
        str(path) for path in sorted((ROOT / "configs").glob("*.yaml")) if "FashionMNIST" not in path.read_text()
    ]
    command = [sys.executable, "-c", textwrap.dedent(program), *configs]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("seed_everything:") == len(configs) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tune", "tune_wide", "deep"])
def test_a_recommended_search_can_be_run(quick, tmp_path, name):
    """Those of ``fit`` are rows of conformance.py."""
    config = ROOT / f"configs/{name}.yaml"
    small = ["--n_trials=2", "--timeout=null", "--trainer.max_epochs=1", "--workers=1", "--refit_epochs=1"]
    quick(tmp_path, "tune", f"--config={config}", *small, "--trainer.limit_train_batches=2")
    given = yaml.safe_load(config.read_text())
    assert (tmp_path / f"lightning_logs/{given['name']}/version_0/test.csv").is_file()


@pytest.mark.numeric
def test_a_run_of_an_earlier_version_is_evaluated_continued_and_repeated(quick, tmp_path):
    """Made by the version of November 2026, before options stood without their command's name."""
    checkpoint, config = CONF / "before/last.ckpt", CONF / "before/config.yaml"
    expected = pd.read_csv(CONF / "before/test.csv").iloc[0]
    assert "mnist_lightning.networks.MLP" in config.read_text()
    result = quick(tmp_path, "test", f"--ckpt_path={checkpoint}", data=False)
    assert printed_accuracy(result) == pytest.approx(expected["test/accuracy"])
    quick(tmp_path, "fit", f"--config={config}", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2", data=False)
    metrics = pd.read_csv(tmp_path / "lightning_logs/baseline/version_0/metrics.csv")
    assert metrics.epoch.tolist() == [0, 1]
    assert metrics["train/loss"].is_monotonic_decreasing
    quick(tmp_path, "fit", f"--config={config}", data=False)
    repeated = torch.load(tmp_path / "lightning_logs/baseline/version_1/checkpoints/last.ckpt", weights_only=True)
    for name, tensor in Classifier.load_from_checkpoint(checkpoint, weights_only=True).state_dict().items():
        # another processor rounds differently
        assert torch.allclose(tensor, repeated["state_dict"][name], atol=1e-4)
