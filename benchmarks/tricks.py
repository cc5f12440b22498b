"""What each trick that makes ``fit`` fast buys: the time of a step without it, to that with all.

Run by hand, with nothing else running: python benchmarks/tricks.py [--rounds 30]

The benchmark trains the notebook's network on one thread, in stretches of 100 steps. In each round, each trick is left
out of one stretch, in random order. The times are CPU seconds of the process. On a shared machine, the quiet stretches
are more reliable: the last column compares the 20th percentiles.
"""

import argparse
import contextlib
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

from torch import nn

from mnist_lightning.__main__ import main as command
from mnist_lightning.classifier import Classifier
from mnist_lightning.networks import Dropout
from mnist_lightning.training import fast
from mnist_lightning.training.progress import EpochProgressBar

STEPS = 100
"""The number of steps in a stretch."""


WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "short way": partial(mock.patch.object, fast, "is_unwatched", lambda _: False),
    "dropout mask": partial(mock.patch.object, Dropout, "forward", nn.Dropout.forward),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="stretches without each trick (30)")
    rounds = parser.parse_args().rounds
    order = [trick for _ in range(rounds) for trick in random.sample([*WITHOUT], len(WITHOUT))]
    trick, start, remaining, stack = "warm-up", 0.0, iter(order), contextlib.ExitStack()
    seconds: dict[str, list[float]] = {trick: [] for trick in (trick, *WITHOUT)}
    print_line, on_validation_start = EpochProgressBar._print_line, Classifier.on_validation_start

    def begin(*arguments: Any) -> None:
        """Start the clock at the start of an epoch."""
        nonlocal start
        print_line(*arguments)
        stack.enter_context(WITHOUT.get(trick, contextlib.nullcontext)())
        start = time.process_time()

    def end(module: Classifier) -> None:
        """Stop the clock after the last step of an epoch."""
        nonlocal trick
        seconds[trick].append(time.process_time() - start)
        stack.close()
        trick = next(remaining, "warm-up")
        on_validation_start(module)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(EpochProgressBar, "_print_line", begin),
        mock.patch.object(Classifier, "on_validation_start", end),
    ):
        command([
            *("fit", f"--trainer.max_epochs={len(order) + 1}", f"--trainer.limit_train_batches={STEPS}"),
            *("--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0", "--tensorboard=false"),
        ])  # fmt: skip
    quiet, medians = (
        {trick: statistics.quantiles(seconds[trick], n=20)[part] / STEPS for trick in WITHOUT} for part in (3, 9)
    )
    print(f"{rounds} rounds; with all {1e3 * medians['nothing']:.2f} ms a step, {1e3 * quiet['nothing']:.2f} if quiet")
    for name in WITHOUT:
        print(f"without {name:20} {medians[name] / medians['nothing']:.3f} {quiet[name] / quiet['nothing']:.3f}")
    print(end="", flush=True)
    os._exit(0)  # as `fit` exits


if __name__ == "__main__":
    main()
