"""How long the notebook's search takes: `tune` with one and with two workers, and KerasTuner.

Run by hand, with nothing else running: python benchmarks/tune.py

(1) tune --workers 1
(2) tune --workers 2
(k) KerasTuner, with the same trials that `tune` drew, if it is installed (--keras names its Python)

All train the same trials, each in its own process, in turn, several times. The time is the wall time of the process,
including imports, without the refit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fit import mnist

NAMES = {"1": "tune --workers 1", "2": "tune --workers 2", "k": "KerasTuner"}
HERE = Path(__file__).resolve()


def keras_tuner(trials: list[dict[str, Any]], executions: int, epochs: int) -> None:
    """Search as the notebook does, but with the given trials."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import keras_tuner as kt

    given = iter(trials)

    class Given(kt.oracles.RandomSearchOracle):  # type: ignore[misc]
        def populate_space(self, trial_id: str) -> dict[str, Any]:
            values = next(given, None)
            return {"status": "STOPPED", "values": None} if values is None else {"status": "RUNNING", "values": values}

    def build(hp: Any) -> Any:
        model = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten()])
        for layer in (0, 1):
            l2 = keras.regularizers.l2(hp.Choice(f"l2.{layer}", [0.01, 0.1, 1.0]))
            units = hp.Int(f"units.{layer}", 32, 512, step=32)
            model.add(keras.layers.Dense(units, activation="relu", kernel_regularizer=l2))
            model.add(keras.layers.Dropout(hp.Float(f"dropout.{layer}", 0.1, 0.5, step=0.1)))
        model.add(keras.layers.Dense(10, activation="softmax"))
        optimizer = hp.Choice("optimizer", ["adam", "sgd", "rmsprop"])
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    images, labels = mnist("train")
    oracle = Given(objective=kt.Objective("val_accuracy", "max"), max_trials=len(trials))
    with tempfile.TemporaryDirectory() as folder:
        tuner = kt.Tuner(oracle, build, executions_per_trial=executions, directory=folder)
        tuner.search(images, labels, epochs=epochs, validation_split=0.2)


def drawn(journal: Path) -> list[dict[str, Any]]:
    """Return the trials of a study, with KerasTuner's names."""
    import optuna

    from mnist_lightning.search.space import short_key
    from mnist_lightning.search.storage import open_storage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(storage=open_storage(str(journal)), study_name="tune")
    trials = [{short_key(key): value for key, value in trial.params.items()} for trial in study.trials]
    for trial in trials:
        trial["optimizer"] = trial["optimizer"].rpartition(".Keras")[2].lower()
    return trials


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4, help="trials of a search (4)")
    parser.add_argument("--executions", type=int, default=2, help="executions of a trial (2)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of an execution (3)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (3)")
    parser.add_argument("--which", default="12k", help="variants to run (12k)")
    parser.add_argument("--keras", default=sys.executable, help="a Python that has Keras, KerasTuner and TensorFlow")
    parser.add_argument("--given", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.given:
        keras_tuner(options.given, options.executions, options.epochs)
        return
    which = options.which
    if not {"1", "2"} & set(which):
        parser.error("--which needs 1 or 2: KerasTuner gets the trials that they draw")
    check = [options.keras, "-c", "import keras_tuner, tensorflow"]
    if "k" in which and subprocess.run(check, capture_output=True).returncode:
        which = which.replace("k", "")
        print("(k) skipped: this Python does not have KerasTuner with TensorFlow; name another Python with --keras")
    seconds: dict[str, list[float]] = {letter: [] for letter in which}
    trials: list[dict[str, Any]] = []
    budget = [f"--executions={options.executions}", f"--epochs={options.epochs}"]
    for _ in range(options.repeats):
        for letter in sorted(which):
            with tempfile.TemporaryDirectory() as folder:
                if letter == "k":
                    command = [options.keras, str(HERE), f"--given={json.dumps(trials)}", *budget]
                else:
                    command = [
                        sys.executable, "-m", "mnist_lightning", "tune", "--refit=false", f"--workers={letter}",
                        f"--n_trials={options.trials}", f"--executions_per_trial={options.executions}",
                        f"--trainer.max_epochs={options.epochs}",
                    ]  # fmt: skip
                environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
                seconds[letter].append(time.perf_counter() - start)
                if letter != "k":
                    trials = drawn(Path(folder, "lightning_logs/tune/journal.log"))
    fastest = "2" if "2" in which else "1"
    print(f"{'median of ' + str(options.repeats):24}{'wall s':>10}{'to (' + fastest + ')':>10}")
    for letter, walls in seconds.items():
        ratio = statistics.median(x / y for x, y in zip(walls, seconds[fastest], strict=True))
        print(f"({letter}) {NAMES[letter]:20}{statistics.median(walls):10.1f}{ratio:10.2f}")


if __name__ == "__main__":
    main()
