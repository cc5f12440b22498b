"""A checkpoint against what the commands wrote of its run."""

import csv

import pandas as pd
import pytest
import yaml
from helpers.commands import ROUNDING

from mnist_lightning.training.saved_run import SavedRun


@pytest.mark.numeric
def test_a_saved_run_has_what_the_commands_wrote(fitted):
    folder = fitted[0]
    run = SavedRun.read(folder / "checkpoints/last.ckpt")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config[key] for key in run.config} == run.config
    assert run.model == config["model"]
    assert run.data == config["data"]
    pd.testing.assert_frame_equal(pd.DataFrame(run.history), pd.read_csv(folder / "metrics.csv"))
    assert run.epoch == run.history[-1]["epoch"] == 3
    assert run.seconds > 0
    assert not run.classifier.training
    run.datamodule.setup("test")
    labels = run.datamodule.test.labels
    accuracy = (run.predict(run.datamodule.test).argmax(dim=1) == labels).float().mean().item()
    with (folder / "test.csv").open() as file:
        assert float(next(csv.DictReader(file))["test/accuracy"]) == pytest.approx(accuracy, abs=ROUNDING)
