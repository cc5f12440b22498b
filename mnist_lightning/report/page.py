"""The page: gathers numbers and figures, and writes them as HTML, JSON, CSV and PNG."""

import base64
import csv
import io
import json
import math
import statistics as numbers
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import optuna
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from optuna.trial import TrialState
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning.figures import confusion_matrix as confusion_figure
from mnist_lightning.figures import curves, render
from mnist_lightning.report import figures
from mnist_lightning.report.runs import Run, check_same_data, load
from mnist_lightning.report.statistics import (
    calibration_error,
    compare,
    format_p,
    seeds_p_value,
    verdict,
)
from mnist_lightning.runs import newest_complete_run
from mnist_lightning.tune.space import bounds, short_key, short_value
from mnist_lightning.tune.storage import open_storage
from mnist_lightning.tune.study import check_trials, results

METRICS = ("accuracy", "loss", "penalized_loss")
CMAPS = ("Blues", "Greens")
SHOWN = 10


class Pictures:
    """Figures with their captions, as files and inside the page.

    Args:
        folder: Where the PNG files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pixels: dict[str, Any] = {}
        folder.mkdir()

    def add(self, name: str, figure: Figure, alt: str) -> dict[str, str]:
        """Save a figure; gives what the page needs to show it."""
        pixels = self.pixels[name] = render(figure)
        file = io.BytesIO()
        Image.fromarray(pixels).quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
        (self.folder / f"{name}.png").write_bytes(file.getvalue())
        data = base64.b64encode(file.getvalue()).decode()
        height, width = pixels.shape[:2]
        return {"alt": alt, "src": f"data:image/png;base64,{data}", "width": str(width), "height": str(height)}


def write(
    models: Sequence[str], weights: str, study: str, storage: str | None, logs: Path, output: Path | None
) -> None:
    """Write the report.

    Args:
        models: Two of NAME or NAME=PATH,PATH,...
        weights: ``last`` or ``best``.
        study: Name of the study.
        storage: Its storage, or None for the journal in its folder.
        logs: Folder of the runs.
        output: Folder of the report, or None for ``report`` in ``logs``.

    Raises:
        MisconfigurationException: A run is missing, not complete, or does not fit the other.
    """
    output = output or logs / "report"
    if output.exists() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise MisconfigurationException(f"{output} holds something else than a report: choose another --output.")
    sides = {name: [load(path) for path in paths] for name, paths in (_paths(model, logs) for model in models)}
    if len(sides) < 2:
        raise MisconfigurationException(f"The two models need two names: {' and '.join(models)}")
    check_same_data([run for runs in sides.values() for run in runs])
    for runs in sides.values():
        for run in runs:
            if (weights, "test") not in run.evaluations:
                raise MisconfigurationException(f"{run.path} has no weights of its best epoch; take --weights last.")

    output.parent.mkdir(parents=True, exist_ok=True)
    # made beside its place, so that the old report stays until the new one is whole
    with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        pictures = Pictures(new / "figures")
        report = _numbers(sides, weights)
        content = _content(sides, weights, report, pictures)
        content["study"] = _study(study, storage, logs, pictures, report)
        (new / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        with (new / "comparison.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["quantity", *sides])
            writer.writerows([row["name"], *row["values"]] for row in report["comparison"])
        template = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        source = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        page = template.from_string(source).render(names=list(sides), weights=weights, report=report, **content)
        (new / "report.html").write_text(page, encoding="utf-8")
        with SummaryWriter(str(new)) as tensorboard:
            for name, pixels in pictures.pixels.items():
                tensorboard.add_image(f"report/{name}", pixels, dataformats="HWC")
        if output.exists():
            output.rename(Path(temporary, "old"))
        new.rename(output)
    _print(report, list(sides))
    print(f"\n{report['verdict']}\n\nReport: {output / 'report.html'}")


def _paths(model: str, logs: Path) -> tuple[str, list[Path]]:
    name, _, paths = model.partition("=")
    return name, [Path(path) for path in paths.split(",")] if paths else [newest_complete_run(logs / name)]


def _numbers(sides: dict[str, list[Run]], weights: str) -> dict[str, Any]:
    """All numbers of the comparison."""
    (first, first_runs), (second, second_runs) = sides.items()
    labels = first_runs[0].test.labels.numpy()
    models: dict[str, Any] = {}
    for name, runs in sides.items():
        metrics = {
            f"{split}/{metric} ({kind} epoch)": [
                getattr(run.evaluations[kind, split], metric) for run in runs if (kind, split) in run.evaluations
            ]
            for kind in ("last", "best")
            for split in ("test", "val")
            for metric in METRICS
        }
        evaluation = runs[0].evaluations[weights, "test"]
        scores = precision_recall_fscore_support(labels, evaluation.predicted, labels=range(10), zero_division=0)
        models[name] = {
            "runs": [str(run.path) for run in runs],
            "parameters": runs[0].parameters,
            "training_seconds": [round(run.seconds, 1) for run in runs],
            "epochs": [len(run.history) for run in runs],
            "best_epoch": [run.best_epoch for run in runs],
            "metrics": {metric: values for metric, values in metrics.items() if values},
            "calibration_error": calibration_error(evaluation.probabilities, labels),
            "confusion_matrix": confusion_matrix(labels, evaluation.predicted, labels=range(10)).tolist(),
            "per_class": {
                key: [float(value) for value in values]
                for key, values in zip(("precision", "recall", "f1", "support"), scores, strict=True)
            },
        }
    right = [runs[0].evaluations[weights, "test"].predicted == labels for runs in sides.values()]
    comparison = compare(right[0], right[1])
    accuracies = [[run.evaluations[weights, "test"].accuracy for run in runs] for runs in sides.values()]
    p_value = seeds_p_value(accuracies[0], accuracies[1])
    rows = [
        *({"name": key, "values": [models[name]["metrics"].get(key, []) for name in sides]} for key in metrics),
        {"name": "parameters", "values": [[models[name]["parameters"]] for name in sides]},
        {"name": "training time, s", "values": [models[name]["training_seconds"] for name in sides]},
        {"name": "epochs", "values": [models[name]["epochs"] for name in sides]},
        {"name": "best epoch", "values": [models[name]["best_epoch"] for name in sides]},
        {"name": f"calibration error ({weights} epoch)", "values": [[models[n]["calibration_error"]] for n in sides]},
    ]
    sentence = verdict(second, first, comparison, len(labels))
    if p_value is not None:
        means = [numbers.mean(values) for values in accuracies]
        sentence += (
            f" Over {len(first_runs)} and {len(second_runs)} seeds, the mean accuracies are {means[0]:.4f} and "
            f"{means[1]:.4f} (Welch's t-test: p {format_p(p_value)})."
        )
    return {
        "weights": weights,
        "images": len(labels),
        "models": models,
        "difference": {**vars(comparison), "interval": list(comparison.interval), "seeds_p_value": p_value},
        "verdict": sentence[0].upper() + sentence[1:],
        "comparison": [{"name": row["name"], "values": [_format(values) for values in row["values"]]} for row in rows],
    }


def _format(values: Sequence[float]) -> str:
    """A value, or mean ± standard deviation of several."""
    if not values:
        return "-"
    if all(isinstance(value, int) for value in values) and len({*values}) == 1:
        return f"{values[0]:,}"
    digits = 4 if max(values) < 10 else 1
    spread = f" ± {numbers.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{numbers.mean(values):.{digits}f}{spread}"


def _content(sides: dict[str, list[Run]], weights: str, report: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """Figures and tables of the two models."""
    runs = {name: runs[0] for name, runs in sides.items()}
    names, test = list(runs), next(iter(runs.values())).test
    images, labels = test.images[:, 0].numpy() / 255, test.labels.numpy()
    evaluations = {name: run.evaluations[weights, "test"] for name, run in runs.items()}
    predicted = {name: evaluation.predicted for name, evaluation in evaluations.items()}
    right = {name: guess == labels for name, guess in predicted.items()}
    both = " and ".join(names)

    def shown(name: str, indices: Any, alt: str, guesses: dict[str, Any] = predicted) -> dict[str, str] | None:
        chosen = [int(index) for index in indices[:SHOWN]]
        if not chosen:
            return None
        truth = ", ".join(str(labels[index]) for index in chosen)
        figure = figures.sample_predictions(images, labels, guesses, chosen)
        return pictures.add(name, figure, f"{alt}; true digits: {truth}")

    parts: dict[str, Any] = {"curves": [], "confusion": [], "misclassified": [], "confident": [], "only": []}
    for split, word in (("val", "validation"), ("train", "training")):
        for metric, title in (("penalized_loss", "loss with penalty"), ("accuracy", "accuracy")):
            figure = figures.comparison_curves(sides, f"{split}/{metric}")
            last = ", ".join(f"{n} {run.history[-1].get(f'{split}/{metric}', math.nan):.4f}" for n, run in runs.items())
            alt = f"{word} {title} of {both} over the epochs, at the end {last}"
            parts["curves"].append(pictures.add(f"{split}_{metric}", figure, alt))
    for metrics in (["accuracy"], ["penalized_loss", "loss"]):
        alt = f"{metrics[0].replace('_', ' ')} of {names[1]} in training and validation over the epochs"
        parts.setdefault("history", []).append(
            pictures.add(f"second_{metrics[0]}", curves(runs[names[1]].history, metrics), alt)
        )
    parts["samples"] = shown("samples", range(SHOWN), f"the first ten test digits with what {both} predict")
    for number, (name, evaluation) in enumerate(evaluations.items()):
        side, guess, wrong = ("first", "second")[number], {name: predicted[name]}, np.flatnonzero(~right[name])
        matrix = np.array(report["models"][name]["confusion_matrix"])
        figure = confusion_figure(matrix, name, CMAPS[number])
        alt = f"confusion matrix of {name} on the test images: {matrix.trace()} of {matrix.sum()} on the diagonal"
        parts["confusion"].append(pictures.add(f"confusion_{side}", figure, alt))
        alt = f"ten digits that {name} gets wrong"
        parts["misclassified"].append((name, len(wrong), shown(f"misclassified_{side}", wrong, alt, guess)))
        by_confidence = wrong[np.argsort(-evaluation.probabilities[wrong].max(axis=1), kind="stable")]
        alt = f"the mistakes of which {name} is most confident"
        parts["confident"].append((name, shown(f"confident_{side}", by_confidence, alt, guess)))
        other = names[1 - number]
        only = np.flatnonzero(right[name] & ~right[other])
        alt = f"digits that {name} gets right and {other} wrong"
        parts["only"].append((name, other, len(only), shown(f"only_{side}", only, alt)))
    figure = figures.reliability_diagram({n: e.probabilities for n, e in evaluations.items()}, labels)
    errors = ", ".join(f"{name} {report['models'][name]['calibration_error']:.4f}" for name in names)
    parts["reliability"] = pictures.add("reliability", figure, f"reliability diagram; calibration error: {errors}")
    alt = f"test accuracy of {both} against parameters and training time"
    parts["costs"] = pictures.add("costs", figures.costs(sides, weights), alt)
    parts["per_class"] = [
        [
            digit,
            *(
                f"{report['models'][n]['per_class'][key][digit]:.4f}"
                for key in ("precision", "recall", "f1")
                for n in names
            ),
        ]
        for digit in range(10)
    ]
    flat = {name: dict(_flatten(run.config)) for name, run in runs.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    rows = [(key, [str(flat[name].get(key, "-")) for name in names]) for key in keys]
    parts["config"] = [(key, values, values[0] != values[1]) for key, values in rows if set(values) != {"None"}]
    return parts


def _flatten(config: Any, prefix: str = "") -> Any:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _study(
    name: str, storage: str | None, logs: Path, pictures: Pictures, report: dict[str, Any]
) -> dict[str, Any] | None:
    """Figures and remarks of the study, if there is one."""
    journal = logs / name / "journal.log"
    report["study"] = None
    if storage is None and not journal.is_file():
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(storage=open_storage(storage or str(journal)), study_name=name)
    except KeyError as error:
        raise MisconfigurationException(f"There is no study {name} in {storage or journal}.") from error
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    if not trials:
        return None
    best, space = study.best_trial, study.best_trial.distributions
    check_trials(study, space)
    names = {key: short_key(key) for key in space}
    parts: dict[str, Any] = {"figures": [], "edges": ""}
    on_edge: list[str] = []
    alts = {
        "optimization_history": f"values of the trials of {name}; the best is {best.value:.4f}, of trial {best.number}",
        "param_importances": "importance of each parameter",
        "parallel_coordinate": "parameters of the trials as lines, coloured by value",
    }
    if len({trial.value for trial in trials}) > 1:
        for key, figure in figures.of_study(study, names).items():
            alt = alts.get(key) or f"values of the trials against {key.removeprefix('slice_')}"
            parts["figures"].append(pictures.add(f"study_{key}", figure, alt))
    alt = f"scores of the executions of each trial of study {name}"
    parts["figures"].append(pictures.add("study_executions", figures.executions(trials), alt))
    for key, distribution in space.items():
        edges, value = bounds(distribution), best.params[key]
        ordered = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges)
        if ordered and len(edges) > 1 and value in (min(edges), max(edges)):
            on_edge.append(f"{names[key]} ({short_value(value)})")
    if on_edge:
        listed = ", ".join(on_edge[:-1]) + (" and " if on_edge[:-1] else "") + on_edge[-1]
        parts["edges"] = (
            f"In study {name}, the best {listed} lie{'s' * (len(on_edge) == 1)} at the edge of what was searched: "
            "better values may lie beyond."
        )
    table = results(study, list(space))
    parts["rows"], parts["columns"] = table.to_numpy().tolist(), list(table.columns)
    parts["name"] = name
    report["study"] = {
        "name": name,
        "trials": {state.name.lower(): sum(t.state == state for t in study.trials) for state in TrialState},
        "best_trial": best.number,
        "best_value": best.value,
        "best_params": best.params,
        "edges": parts["edges"],
    }
    return parts


def _print(report: dict[str, Any], names: list[str]) -> None:
    rows = [["", *names], *([row["name"], *row["values"]] for row in report["comparison"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        print(f"{first:{widths[0]}}" + "".join(f"  {c:>{width}}" for c, width in zip(cells, widths[1:], strict=True)))
