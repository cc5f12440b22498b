"""What a pruner would have saved: the curves of a search without one, replayed with each of Optuna's.

Run by hand, on a study that drew its trials at random and pruned none, with one execution for each trial:

    python -m mnist_lightning tune --config configs/tune_wide.yaml --sampler RandomSampler --pruner NopPruner \
        --study_name random --timeout 2h --refit false
    python benchmarks/pruners.py random

Each pruner sees the values that it would have seen, trial by trial, in many random orders, because its luck depends on
which trials come first. Time counts the epochs of all trials up to their pruning; the result is the value of the best
trial that was trained to its end.
"""

import argparse
import statistics
from typing import Any

import numpy as np
import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.trial import TrialState

from mnist_lightning.search.study import find_study


def pruners(epochs: int) -> dict[str, BasePruner]:
    """Return the compared pruners, by class and arguments as on the command line."""
    return {
        "NopPruner": NopPruner(),
        "MedianPruner, n_warmup_steps 1": MedianPruner(n_warmup_steps=1),
        "MedianPruner, n_warmup_steps 3": MedianPruner(n_warmup_steps=3),
        "PercentilePruner 25, n_warmup_steps 1": PercentilePruner(25, n_warmup_steps=1),
        "PercentilePruner 10, n_warmup_steps 1": PercentilePruner(10, n_warmup_steps=1),
        "PatientPruner(MedianPruner), patience 1": PatientPruner(MedianPruner(n_warmup_steps=1), patience=1),
        "SuccessiveHalvingPruner, reduction_factor 2": SuccessiveHalvingPruner(reduction_factor=2),
        "SuccessiveHalvingPruner, reduction_factor 3": SuccessiveHalvingPruner(reduction_factor=3),
        "SuccessiveHalvingPruner, reduction_factor 4": SuccessiveHalvingPruner(reduction_factor=4),
        "HyperbandPruner, reduction_factor 3": HyperbandPruner(max_resource=epochs, reduction_factor=3),
    }


def replay(pruner: BasePruner, trials: list[Any], is_max: bool) -> tuple[float, float]:
    """Return the share of the time that remains with a pruner, and the best value of a complete trial."""
    study = optuna.create_study(pruner=pruner, direction="maximize" if is_max else "minimize")
    spent = 0.0
    for curve, seconds in trials:
        trial = study.ask()
        for count, (step, value) in enumerate(curve, start=1):
            trial.report(value, step)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                spent += seconds * count / len(curve)
                break
        else:
            study.tell(trial, curve[-1][1])
            spent += seconds
    return spent / sum(seconds for _, seconds in trials), study.best_value


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name of the study, in lightning_logs")
    parser.add_argument("--orders", type=int, default=30, help="number of random orders of its trials (30)")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = find_study(options.study, f"lightning_logs/{options.study}/journal.log")
    if study is None:
        parser.error(f"there is no study {options.study} in lightning_logs")
    is_max = study.direction == optuna.study.StudyDirection.MAXIMIZE
    trials = [
        (sorted(trial.intermediate_values.items()), trial.duration.total_seconds())
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
        if trial.duration is not None
    ]
    best = (max if is_max else min)(curve[-1][1] for curve, _ in trials)
    epochs = max(len(curve) for curve, _ in trials)
    hours = sum(seconds for _, seconds in trials) / 3600
    print(f"{len(trials)} trials of at most {epochs} epochs, {hours:.1f} hours; the best is {best:.4f}")
    print(f"{'':46}{'time':>8}{'lost: mean':>12}{'worst':>8}{'best found':>12}")
    for name, pruner in pruners(epochs).items():
        generator, times, losses = np.random.default_rng(0), [], []
        for _ in range(options.orders):
            order = [trials[index] for index in generator.permutation(len(trials))]
            share, found = replay(pruner, order, is_max)
            times.append(share)
            losses.append(abs(best - found))
        hits = sum(loss == 0 for loss in losses)
        print(
            f"{name:46}{statistics.mean(times):8.0%}{statistics.mean(losses):12.4f}{max(losses):8.4f}"
            f"{f'{hits} of {len(losses)}':>12}"
        )


if __name__ == "__main__":
    main()
