"""The best value of several studies over time, as a table and a picture.

Run by hand, in the folder of the runs, after searches that ran side by side or with nothing else running:

    python benchmarks/studies.py deep flat --output deep.png
"""

import argparse
from datetime import timedelta
from pathlib import Path

import optuna
from matplotlib import pyplot
from optuna.trial import TrialState

from mnist_lightning.search.study import find_study

MARKS = (1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
"""Columns of the table, as shares of the time."""


def best_over_time(name: str) -> tuple[list[float], list[float]]:
    """Return minutes since the start of the first trial, and the best value of a complete trial so far."""
    study = find_study(name, f"lightning_logs/{name}/journal.log")
    if study is None:
        raise SystemExit(f"There is no study {name} in lightning_logs.")
    is_max = study.direction == optuna.study.StudyDirection.MAXIMIZE
    trials = study.get_trials(deepcopy=False)
    start = min(trial.datetime_start for trial in trials if trial.datetime_start)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    minutes: list[float] = []
    values: list[float] = []
    for trial in sorted(complete, key=lambda trial: trial.datetime_complete or start):
        minutes.append(((trial.datetime_complete or start) - start) / timedelta(minutes=1))
        values.append((max if is_max else min)([*values[-1:], trial.values[0]]))
    print(f"{name}: {len(complete)} trials complete, {pruned} pruned; the best is {values[-1]:.4f}")
    return minutes, values


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="names of studies in lightning_logs")
    parser.add_argument("--output", type=Path, help="PNG file of the picture")
    options = parser.parse_args()
    curves = {name: best_over_time(name) for name in options.studies}
    end = max(minutes[-1] for minutes, _ in curves.values())
    print(
        "| after | "
        + " | ".join(f"{share * end:.0f} min" for share in MARKS)
        + " |\n"
        + "|---" * (1 + len(MARKS))
        + "|"
    )
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for name, (minutes, values) in curves.items():
        reached = [[v for m, v in zip(minutes, values, strict=True) if m <= share * end][-1:] for share in MARKS]
        print(f"| {name} | " + " | ".join(f"{value[0]:.4f}" if value else "" for value in reached) + " |")
        axes.step([*minutes, end], [*values, values[-1]], where="post", label=name)
    axes.set(xlabel="minutes", ylabel="best val/accuracy so far")
    axes.grid(alpha=0.3)
    axes.legend()
    if options.output:
        figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
