"""Small searches: start them, look at them, disturb them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.trial import TrialState

from mnist_lightning.search.record import is_counted
from mnist_lightning.search.storage import open_storage

SPACE = {
    "model.network.init_args.units.0": {"class_path": "IntDistribution", "init_args": {"low": 8, "high": 32}},
    "model.network.init_args.l2.1": {"class_path": "CategoricalDistribution", "init_args": {"choices": [0.01, 0.1]}},
    "model.optimizer.class_path": {
        "class_path": "CategoricalDistribution",
        "init_args": {"choices": ["KerasAdam", "KerasSGD", "mnist_lightning.optimizers.KerasRMSprop"]},
    },
}
"""A small search space."""


def tune_options(data_dir: Path, *more: str, epochs: int = 2) -> list[str]:
    """Return the arguments of a small search without a refit."""
    has_space = any(option.startswith(("--search_space", "--config=")) for option in more)
    space = [] if has_space else [f"--search_space={json.dumps(SPACE)}"]
    return [
        "tune", f"--data.data_dir={data_dir}", f"--trainer.max_epochs={epochs}", "--refit=false", *space, *more,
    ]  # fmt: skip


def choices(**values):
    """Return the option for a search space of choices."""
    space = {key: {"class_path": "CategoricalDistribution", "init_args": {"choices": v}} for key, v in values.items()}
    return f"--search_space={json.dumps(space)}"


def load(folder, name="tune"):
    storage = open_storage(str(Path(folder) / f"lightning_logs/{name}/journal.log"))
    return optuna.load_study(storage=storage, study_name=name)


def counted_trials(study):
    """Return the trials that count: several workers may ask for more than a finite space has."""
    return [trial for trial in study.trials if is_counted(trial)]


def outcome(study):
    """Return parameters and value of each trial that counts, which no interruption or number of workers may change."""
    return sorted((tuple(trial.params.values()), trial.value) for trial in counted_trials(study))


def start(data_dir, cwd, *more, epochs=2):
    command = [sys.executable, "-m", "mnist_lightning", *tune_options(data_dir, *more, epochs=epochs)]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.1)  # checking costs time, too


def reported(cwd):
    """Return whether one trial is complete and another is running and has reported its first epoch."""
    journal = cwd / "lightning_logs/tune/journal.log"
    if not journal.exists() or b'"owner"' not in journal.read_bytes():  # the study may not exist yet
        return False
    states = [trial.state for trial in load(cwd).trials if trial.intermediate_values]
    return TrialState.COMPLETE in states and TrialState.RUNNING in states


def session(leader):
    """Return the living processes of a session."""
    left = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, fields = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, number, *_ = fields.split()
        if int(number) == leader and state != "Z":
            left.append(stat.parent.name)
    return left


@contextmanager
def stopped_worker(cwd, execution):
    """Stop a worker during the execution with this number; yield its process and the number of the trial."""

    def is_at(trial):
        return len(trial.user_attrs.get("executions", [])) == execution and len(trial.params) == len(SPACE)

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        journal = cwd / "lightning_logs/tune/journal.log"
        for trial in load(cwd).trials if journal.exists() and b'"owner"' in journal.read_bytes() else []:
            name = trial.user_attrs.get("owner")
            if name and trial.state == TrialState.RUNNING and is_at(trial):
                pid = int(name.split(":")[-2])
                os.kill(pid, signal.SIGSTOP)
                try:
                    now = load(cwd).trials[trial.number]
                    if (
                        now.state == TrialState.RUNNING
                        and now.user_attrs["owner"] == name
                        and is_at(now)
                        and not journal.with_name("journal.log.lock").exists()
                    ):
                        yield pid, trial.number
                        return
                finally:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
    raise AssertionError("no worker was caught")
