"""Find the models and the study that a report is about."""

import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import optuna
from optuna.trial import TrialState

from mnist_lightning.comparison.evaluation import Model, have_same, load_run
from mnist_lightning.search.study import find_study, source_of
from mnist_lightning.system.console import hide_password
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.figures import COLORS
from mnist_lightning.training.runs import newest_complete_run


def load_models(arguments: Sequence[str], weights: str, logs: Path) -> list[Model]:
    """Load and evaluate the models; see :func:`write`."""
    folders: dict[str, list[Path]] = {}
    for name, found in find_models(arguments, logs):
        if not name or name in folders:
            raise UserError(f"Each model needs its own name, as NAME=PATH: {' '.join(arguments)}")
        folders[name] = [*dict.fromkeys(found)]
    models: list[Model] = []
    for name, paths_of in folders.items():
        slug = re.sub(r"[^\w.-]+", "_", name)[:50]
        if slug in [model.slug for model in models]:
            slug += f"_{len(models)}"
        number = len(models) % len(COLORS)
        color = f"var(--model-{number})"  # in page.css
        models.append(Model(name, slug, COLORS[number], color, [*map(load_run, paths_of)], weights))
    runs = [run for model in models for run in model.runs]
    for run in runs:
        if not have_same("test", runs[0], run):
            raise UserError(
                f"{runs[0].path} and {run.path} have different test images: their results cannot be compared."
            )
        if (weights, "test") not in run.evaluations:
            raise UserError(f"{run.path} has no weights of its best epoch; use --ckpt_path last.")
    return models


def find_models(arguments: Sequence[str], logs: Path) -> list[tuple[str, list[Path]]]:
    """Return the name and the runs of each model.

    It is given as NAME=PATHS; or as the path of a run or of its checkpoint; or as a name in the logs or a folder of
    runs, of which the newest complete run is taken. Without NAME, the name is the run's, with its version where two
    have the same name.

    Raises:
        UserError: If a name has no complete run.
    """
    unnamed = {argument: run for argument in arguments if (run := find_unnamed(argument, logs))}
    paths = [path.absolute() for path in unnamed.values()]
    of_run = [path.parents[1] if path.parent.name == "checkpoints" else path for path in paths]
    names = [path.parent.name for path in of_run]
    full = [name if names.count(name) == 1 else f"{name} {path.name}" for name, path in zip(names, of_run, strict=True)]
    found = {argument: (name, [unnamed[argument]]) for argument, name in zip(unnamed, full, strict=True)}
    for argument in arguments:
        if argument not in found:
            name, _, patterns = argument.partition("=")
            runs = [run for pattern in patterns.split(",") for run in find_runs(name, pattern)] if patterns else []
            found[argument] = name, runs if runs or not name else [newest_complete_run(logs / name)]
    return [found[argument] for argument in arguments]


def find_unnamed(argument: str, logs: Path) -> Path | None:
    """Return the run or checkpoint that an argument without NAME= means; None if it has a name, or there is none."""
    path, in_logs = Path(argument), logs / argument
    if any(in_logs.glob("version_*")):
        return newest_complete_run(in_logs)
    if path.is_file() or (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return path
    if any(path.glob("version_*")):
        return newest_complete_run(path)
    return path if "=" not in argument and path.name != argument else None  # reading it says that nothing is there


def find_runs(name: str, pattern: str) -> list[Path]:
    """Find the run at a path, or the complete runs that match a pattern, in natural order.

    Raises:
        UserError: If no complete run matches the pattern.
    """
    if Path(pattern).exists() or not re.search(r"[*?[]", pattern):
        return [Path(pattern)]
    natural = lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]  # noqa: E731
    matches = [Path(path) for path in sorted(glob(pattern), key=natural)]
    complete = [
        path
        for path in matches
        if path.is_file() or all((path / file).is_file() for file in ("test.csv", "checkpoints/last.ckpt"))
    ]
    left_out = ", ".join(str(path) for path in matches if path not in complete)
    if not complete:
        remedy = f" (incomplete: {left_out})" if left_out else ""
        raise UserError(f"{name}: no complete run matches {pattern}{remedy}.")
    if left_out:
        print(f"{name}: incomplete runs are left out: {left_out}\n")
    return complete


def load_study(name: str | None, storage: str | None, logs: Path, models: Sequence[Model]) -> optuna.Study | None:
    """Load the study, or return None if there is none with a complete trial; see :func:`write`."""
    origins = {origin["study_name"]: model for model in models if (origin := model.origin)}
    if name is None and not origins:
        return None
    found = name or [*origins][-1]
    source = source_of(found, storage, logs)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = find_study(found, source)
    if study is None:
        source = hide_password(source)
        if name is None and storage is None:
            print(
                f"{origins[found].name} is from study {found}, which is not in {source}. To show the study, add "
                "--storage URL\n"
            )
            return None
        raise UserError(f"There is no study {found} in {source}.")
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    return study
