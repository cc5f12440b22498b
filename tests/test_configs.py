"""Each config of tests/conf goes through fit, test and predict."""

import csv
import re
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import yaml
from helpers.commands import ROOT

CONF = ROOT / "tests/conf"


def printed_accuracy(result):
    return float(re.search(r"test/accuracy +([\d.]+)", result.stdout)[1])


def has(saved, given):
    """Return whether a saved config has the values that were given, also inside items of a list."""
    if isinstance(given, dict):
        return all(has(saved[name], value) for name, value in given.items())
    if isinstance(given, list):
        return len(saved) == len(given) and all(map(has, saved, given))
    return saved == given or str(saved).endswith(f".{given}")  # the full name of a class


@pytest.mark.numeric
@pytest.mark.parametrize("config", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_is_trained_tested_and_predicted(quick, tmp_path, config):
    quick(tmp_path, "fit", f"--config={config}", "--trainer.max_epochs=2")
    with (tmp_path / "lightning_logs/baseline/version_0/test.csv").open(newline="") as file:
        last = next(csv.DictReader(file))
    saved = yaml.safe_load((tmp_path / "lightning_logs/baseline/version_0/config.yaml").read_text())
    given = yaml.safe_load(config.read_text())
    assert has(saved["model"]["network"]["init_args"], given["model"]["network"]["init_args"])
    result = quick(tmp_path, "test", f"--config={config}")
    assert "not used" not in result.stdout  # the given network is the checkpoint's
    assert printed_accuracy(result) == pytest.approx(float(last["test/accuracy"]))
    quick(tmp_path, "predict", f"--config={config}")
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert (table.label == table.predicted).mean() == pytest.approx(float(last["test/accuracy"]))
    assert float(last["test/accuracy"]) > 0.2


@pytest.mark.slow
def test_every_config_is_read_by_a_process_of_its_own():
    """Check in a new process, which has not yet imported the classes that configs name."""
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
    """Check the configs of ``tune``; those of ``fit`` are rows of conformance.py."""
    config = ROOT / f"configs/{name}.yaml"
    small = ["--n_trials=2", "--timeout=null", "--trainer.max_epochs=1", "--workers=1", "--refit_epochs=1"]
    quick(tmp_path, "tune", f"--config={config}", *small, "--trainer.limit_train_batches=2")
    given = yaml.safe_load(config.read_text())
    assert (tmp_path / f"lightning_logs/{given['name']}/version_0/test.csv").is_file()
