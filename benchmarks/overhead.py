"""What a search costs in addition to its trainings: CPU time of a trial, and memory of a worker.

Run by hand, with nothing else running, some six minutes: python benchmarks/overhead.py

time    One worker of `tune` with trainings that take no time, and Optuna's plainest loop, on journal files and with the
        notebook's search space, in turn, several times. CPU time of a trial, over the first 100 and over 2,000 trials.
memory  One worker with the notebook's network and trainings of one batch: its memory after 10 and after 500 trials.
"""

import argparse
import contextlib
import gc
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil

HERE = Path(__file__).resolve()
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]


def counter() -> Callable[[], None]:
    """Return a function to call once per trial, which prints CPU seconds and MiB after certain calls."""
    start, count = time.process_time(), 0

    def call() -> None:
        nonlocal count
        count += 1
        if count in (10, 100, 500, 2000):
            print(count, time.process_time() - start, psutil.Process().memory_info().rss / 2**20, file=sys.stderr)

    return call


def plain(n_trials: int) -> None:
    """Run Optuna's plainest loop."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    def objective(trial: optuna.Trial) -> float:
        for layer in (0, 1):
            trial.suggest_int(f"units.{layer}", 32, 512, step=32)
            trial.suggest_float(f"dropout.{layer}", 0.1, 0.5, step=0.1)
            trial.suggest_categorical(f"l2.{layer}", [0.01, 0.1, 1.0])
        trial.suggest_categorical("optimizer", ["adam", "sgd", "rmsprop"])
        trial.report(0.5, 0)
        count()
        return 0.5

    storage = JournalStorage(JournalFileBackend("plain.log", JournalFileOpenLock("plain.log")))
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(0), direction="maximize")
    count = counter()
    study.optimize(objective, n_trials=n_trials)


def worker(n_trials: int, is_trained: bool) -> None:
    """Run ``tune`` with one worker, in this process."""
    from mnist_lightning.search import command
    from mnist_lightning.search.trial import Objective, run_trials

    execute = Objective.execute

    class Here(command.Pool):
        def run(self, interrupt: Any) -> bool:
            gc.freeze()  # as a worker does
            count = counter()

            def counted(objective: Any, trial: optuna.Trial, number: int, executions: Any) -> dict[str, Any]:
                count()
                if is_trained:
                    return execute(objective, trial, number, executions)
                return {"execution": number, "seed": 0, "score": 0.5, "values": [[0, 0.5]]}

            Objective.execute = counted  # type: ignore[assignment, method-assign]
            run_trials(self.search, self.storage)
            return False

    command.Pool = Here  # type: ignore[misc]
    with contextlib.redirect_stdout(io.StringIO()):
        command.main("tune", "", [f"--n_trials={n_trials}", "--executions_per_trial=1", "--refit=false", *SHORT])


def measure(*arguments: str) -> dict[int, tuple[float, float]]:
    """Run a part in its own process; return CPU seconds and MiB by the number of trials."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        result = subprocess.run(
            [sys.executable, str(HERE), *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
        )
    rows = [line.split() for line in result.stderr.splitlines() if line[:1].isdigit()]
    if result.returncode or not rows:
        sys.exit(result.stderr)
    return {int(count): (float(seconds), float(memory)) for count, seconds, memory in rows}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("plain", "worker", "memory"), help="only this, in this process")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.part:
        plain(2000) if options.part == "plain" else worker(
            2000 if options.part == "worker" else 500, options.part == "memory"
        )
        return
    rounds = [(measure("plain"), measure("worker")) for _ in range(options.rounds)]
    print("CPU milliseconds of a trial, median of the rounds")
    for trials in (100, 2000):
        a, b = (statistics.median(each[part][trials][0] / trials * 1000 for each in rounds) for part in (0, 1))
        print(f"  over {trials:5} trials: plain loop {a:.2f}, tune {b:.2f}, ratio {b / a:.2f}")
    memory = measure("memory")
    print(f"Memory of a worker: {memory[10][1]:.0f} MiB after 10 trials, {memory[500][1]:.0f} MiB after 500", end="")
    print(f", ratio {memory[500][1] / memory[10][1]:.2f}")


if __name__ == "__main__":
    main()
