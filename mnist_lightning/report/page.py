"""The page: gathers its sections, and writes them as HTML, JSON, CSV, PNG and for TensorBoard."""

import json
import math
import re
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any

import jinja2
import optuna
import pandas as pd
from markupsafe import Markup
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning.errors import UserError
from mnist_lightning.export.page import Contestant, panel
from mnist_lightning.report import interactive, plots
from mnist_lightning.report.comparison import Comparison, accuracy_interval, compare_to_first, verdict
from mnist_lightning.report.evaluation import COLORS, Model, have_same, load_run
from mnist_lightning.runs import newest_complete_run
from mnist_lightning.tune.record import metrics_of
from mnist_lightning.tune.space import bounds, short_key, short_value
from mnist_lightning.tune.storage import hide_password
from mnist_lightning.tune.study import best_trial, find_study, pareto_front, results

TIME = "training time, s"
TRIALS = 100
"""Rows of the page's table of a study."""


@dataclass
class Section:
    """A heading with a paragraph, a table and pictures below it, as far as there are any.

    Attributes:
        title: Empty where the section above goes on.
        level: Of the heading, 2 or 3.
        table: Its index is the first column.
        is_code: Whether the table's cells are code.
        summary: If given, the table is folded below it.
        pictures: On the page, or in their files only if a widget shows the same.
        widget: A macro of the page: what its script makes interactive.
        fragment: HTML, below all else.
    """

    title: str
    level: int = 2
    text: str = ""
    table: pd.DataFrame | None = None
    is_code: bool = False
    summary: str = ""
    pictures: Sequence[plots.Picture] = ()
    widget: str = ""
    fragment: str = ""


class Report:
    """The results that the page and the other files share.

    Args:
        models: Any number, also none; the first one is what the others are compared to. Where only one run of each can
            be compared or shown, it is the first.
        study: The study, if there is one with a complete trial.
    """

    def __init__(self, models: Sequence[Model], study: optuna.Study | None) -> None:
        self.models, self.study = models, study
        self.edges = describe_edges(study) if study and len(study.directions) == 1 else ""
        self.trials = results(study, list(searched(study))).set_index("trial") if study else None
        self.comparisons: dict[str, Comparison] = {}
        lines = []
        if models:
            first, *others = models
            accuracies = [model.accuracies for model in models]
            found = compare_to_first([model.test.correct for model in models], accuracies)
            self.comparisons = {model.name: one for model, one in zip(others, found, strict=True)}
            count = len(first.test.labels)
            lines = [verdict(name, first.name, one, count, len(models)) for name, one in self.comparisons.items()] or [
                _describe(first)
            ]
            lines += filter(None, map(_describe_divergence, models))
        self.verdict = " ".join(lines)
        self.lines = [*lines, *filter(None, [self.edges])]
        self.quantities = quantities(models, self.comparisons)

    @property
    def title(self) -> str:
        """What is reported."""
        names = [model.name for model in self.models]
        return (" against " if len(names) == 2 else ", ").join(names) or f"Study {self.study and self.study.study_name}"

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        study = self.study and {
            "name": self.study.study_name,
            "trials": _count_trials(self.study),
            **_describe_best(self.study),
            "edges": self.edges,
        }
        models = {
            model.name: {
                "runs": [str(run.path) for run in model.runs],
                "parameters": model.runs[0].parameters,
                "training_seconds": [round(run.seconds, 1) for run in model.runs],
                "epochs": [len(run.history) for run in model.runs],
                "best_epoch": [run.best_epoch for run in model.runs],
                "metrics": {metric: values for metric, values in model.metrics.items() if values},
                "accuracy_interval": accuracy_interval(model.test.correct),
                "calibration_error": model.test.calibration_error,
                "confusion_matrix": model.test.confusion_matrix.tolist(),
                "per_class": model.test.scores.to_dict("list"),
            }
            for model in self.models
        }
        return {
            "weights": self.models[0].weights if models else None,
            "images": len(self.models[0].test.labels) if models else 0,
            "models": models,
            "differences": {name: asdict(comparison) for name, comparison in self.comparisons.items()},
            "verdict": self.verdict,
            "comparison": [{"name": name, "values": values} for name, *values in self.quantities.itertuples()],
            "study": study,
        }


def _count_trials(study: optuna.Study) -> dict[str, int]:
    counts = Counter(trial.state for trial in study.get_trials(deepcopy=False))
    return {state.name.lower(): counts[state] for state in TrialState}


def _describe(model: Model) -> str:
    """The accuracy of a model that is compared to no other."""
    low, high = accuracy_interval(model.test.correct)
    text = (
        f"{model.name} gets {model.test.accuracy:.4f} of {len(model.test.labels):,} test images right "
        f"(95 % interval {low:.4f} to {high:.4f}); {len(model.test.mistakes):,} it gets wrong."
    )
    if len(model.runs) == 1:
        return text
    means = f"{statistics.mean(model.accuracies):.4f} ± {statistics.stdev(model.accuracies):.4f}"
    return f"{model.name} has a mean test accuracy of {means} over {len(model.runs)} seeds. Its first run: {text}"


def _describe_divergence(model: Model) -> str:
    """Say that runs of a model have diverged, if any has."""
    diverged = [run for run in model.runs if run.evaluations[model.weights, "test"].has_diverged]
    who = (
        f"{model.name} has"
        if len(model.runs) == 1
        else f"{len(diverged)} of {len(model.runs)} runs of {model.name} have"
    )
    text = (
        f"{who} diverged: where probabilities are not numbers, the first class, {model.test.classes[0]}, is predicted."
    )
    return text if diverged else ""


def write(
    models: Sequence[str], weights: str, study: str | None, storage: str | None, logs: Path, output: Path | None
) -> None:
    """Write the report.

    Args:
        models: Any number of NAME or NAME=PATH,PATH,..., of which a path may be a pattern; none for the study alone.
        weights: ``last`` or ``best``.
        study: Name of the study, or None for the one that made the last model that one has made.
        storage: Its storage, or None for the journal in its folder.
        logs: Folder of the runs.
        output: Folder of the report, or None for ``report`` in ``logs``.

    Raises:
        UserError: If a run or the study is missing or damaged, or the models do not compare.
    """
    output = output or logs / "report"
    if output.exists() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise UserError(f"{output} holds something else than a report: choose another --output.")
    loaded = load_models(models, weights, logs)
    found = load_study(study, storage, logs, loaded)
    if not loaded and found is None:
        raise UserError(f"The study {study} has no complete trial yet.")
    report = Report(loaded, found)
    sections = [*(model_sections(report) if loaded else ()), *study_sections(report)]
    save(report, sections, output)
    if loaded:
        print(f"{report.quantities.rename_axis(None).to_string()}\n")
    print("\n".join(report.lines) + f"\n\nReport: {output / 'report.html'}")


def load_models(arguments: Sequence[str], weights: str, logs: Path) -> list[Model]:
    """Load and evaluate the models; see :func:`write`."""
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        name, _, paths = argument.partition("=")
        if not name or name in folders:
            raise UserError(f"Each model needs a name of its own, as NAME=PATH: {' '.join(arguments)}")
        found = [run for path in paths.split(",") for run in find_runs(name, path)] if paths else []
        folders[name] = [*dict.fromkeys(found)] or [newest_complete_run(logs / name)]
    models: list[Model] = []
    for name, paths_of in folders.items():
        slug = re.sub(r"[^\w.-]+", "_", name)[:50]
        if slug in [model.slug for model in models]:
            slug += f"_{len(models)}"
        models.append(Model(name, slug, COLORS[len(models) % len(COLORS)], [*map(load_run, paths_of)], weights))
    runs = [run for model in models for run in model.runs]
    for run in runs:
        if not have_same("test", runs[0], run):
            raise UserError(
                f"{runs[0].path} and {run.path} have other test images than each other: their results do not compare."
            )
        if (weights, "test") not in run.evaluations:
            raise UserError(f"{run.path} has no weights of its best epoch; take --ckpt_path last.")
    return models


def find_runs(name: str, pattern: str) -> list[Path]:
    """The runs that a model's path names, or the complete ones that its pattern matches, in natural order.

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
        remedy = f"; without a checkpoint, or stopped before their end: {left_out}" if left_out else ""
        raise UserError(f"{name}: no complete run matches {pattern}{remedy}.")
    if left_out:
        print(f"{name}: left out, without a checkpoint or stopped before their end: {left_out}\n")
    return complete


def load_study(name: str | None, storage: str | None, logs: Path, models: Sequence[Model]) -> optuna.Study | None:
    """Load the study, if there is one with a complete trial; see :func:`write`."""
    origins = {origin["study_name"]: model for model in models if (origin := _origin(model))}
    if name is None and not origins:
        return None
    found = name or [*origins][-1]
    source = storage or str(logs / found / "journal.log")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = find_study(found, source)
    if study is None:
        source = hide_password(source)
        if name is None and storage is None:
            print(f"{origins[found].name} is of the study {found}, which is not in {source}. Show it: --storage URL\n")
            return None
        raise UserError(f"There is no study {found} in {source}.")
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    return study


def searched(study: optuna.Study) -> dict[str, BaseDistribution]:
    """What the complete trials have drawn: a parameter need not be in all of them."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {key: distribution for trial in trials for key, distribution in trial.distributions.items()}


def _origin(model: Model) -> dict[str, Any] | None:
    """The study and trial that made a model's first run, if one has."""
    origin = model.runs[0].config.get("origin")
    return origin if isinstance(origin, dict) and {"study_name", "trial"} <= origin.keys() else None


def quantities(models: Sequence[Model], comparisons: dict[str, Comparison]) -> pd.DataFrame:
    """The table of the comparison, as text: a column for each model, and for each one's difference to the first."""
    values = [_quantities(model) for model in models]
    table = {
        model.name: {name: _format(name, numbers) for name, numbers in own.items()}
        for model, own in zip(models, values, strict=True)
    }
    for model, own in zip(models[1:], values[1:], strict=True):
        column = {name: _format_difference(name, values[0][name], numbers) for name, numbers in own.items()}
        if not have_same("val", models[0].runs[0], model.runs[0]):
            column |= {name: "-" for name in own if name.startswith("val/")}
        found, counts = comparisons[model.name], (len(models[0].runs), len(model.runs))
        if found.seeds or counts == (1, 1):  # else there is no interval of this difference
            low, high = (found.seeds or found).interval
            column[f"test/accuracy ({model.weights} epoch)"] += f" ({low:+.4f} to {high:+.4f})"
        table[f"{model.name} - {models[0].name}"] = column
    return pd.DataFrame(table).rename_axis("quantity")


def _quantities(model: Model) -> dict[str, Sequence[float]]:
    error = model.test.calibration_error
    return {
        **model.metrics,
        "parameters": [model.runs[0].parameters],
        TIME: [run.seconds for run in model.runs],
        "epochs": [len(run.history) for run in model.runs],
        "best epoch": [run.best_epoch for run in model.runs],
        f"calibration error ({model.weights} epoch)": [] if error is None else [error],
    }


def _format(name: str, values: Sequence[float]) -> str:
    """A value, or mean ± standard deviation of several."""
    if not values:
        return "-"
    if all(isinstance(value, int) for value in values) and len({*values}) == 1:
        return f"{values[0]:,}"
    digits = _digits(name, values)
    spread = ""
    if len(values) > 1:  # Python's function takes none but finite numbers
        spread = f" ± {statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _format_difference(name: str, first: Sequence[float], second: Sequence[float]) -> str:
    if not first or not second:
        return "-"
    difference = statistics.mean(second) - statistics.mean(first)
    if not math.isfinite(difference):
        return "-"
    return f"{difference:+,}" if isinstance(difference, int) else f"{difference:+.{_digits(name, first)}f}"


def _digits(name: str, values: Sequence[float]) -> int:
    return 1 if name == TIME or isinstance(values[0], int) or max(values) >= 10 else 4


def model_sections(report: Report) -> list[Section]:
    """The sections of the models; what is added to them here is on the page."""
    models = report.models
    metrics = interactive.metrics(models)
    scores = {
        f"{title}, {model.name}": model.test.scores[title.lower()].map("{:.4f}".format)
        for title in ("precision", "recall", "F1")
        for model in models
    }
    configs = {}
    for model in models:
        given = {key: value for key, value in model.runs[0].config.items() if key != "origin"}  # the study's section
        configs[model.name] = pd.Series(pd.json_normalize(given).to_dict("records")[0], dtype=object).map(str)
    config = pd.DataFrame(configs).fillna("-").rename_axis("key")
    config = config[(config != "None").any(axis=1)]
    is_same = config.nunique(axis=1) == 1
    same = f"{is_same.sum()} that are the same" if len(models) > 1 else f"{len(config)} keys"
    loss = "The loss is the cross-entropy; penalized_loss adds the L2 penalty and is what Keras calls loss."
    if len(models) > 2:
        loss += (
            f" p-values are corrected for {len(models) - 1} comparisons (Holm); the intervals hold together with 95 %"
            " (Bonferroni)."
        )
    if others := [model.name for model in models if not have_same("val", models[0].runs[0], model.runs[0])]:
        loss += (
            f" {' and '.join(others)} had other validation images than {models[0].name}: their validation metrics do "
            "not compare, those of the test do."
        )
    calibration = (
        "Of the images that a well-calibrated model is 90 % sure of, it gets 90 % right. The calibration error is the "
        "mean distance from that."
    )
    augmented = [
        model.name
        for model in models
        if (model.runs[0].config.get("data") or {}).get("init_args", {}).get("augmentation")
    ]
    of_training = f"The training metrics of {', '.join(augmented)} are of augmented images." if augmented else ""
    curves = [plots.comparison_curves(models, stage, metric) for metric in metrics for stage in ("val", "train")]
    curves += [plots.training_curves(model, metric) for model in models for metric in metrics]
    matrices = [*map(plots.confusion_matrix, models)]
    mistakes = [*map(plots.misclassified, models), *map(plots.confident_mistakes, models)]
    pairs = [pair for other in models[1:] for pair in ((models[0], other), (other, models[0]))]
    differing = [plots.right_in_one(one, other) for one, other in pairs]
    click = "Rows are true, columns predicted classes. A click on a number shows its images below."
    trust_and_cost = [plots.reliability_diagram(models), plots.costs(models)]
    contestants = [
        Contestant(model.name, model.color, model.runs[0].classifiers[model.weights].network, model.runs[0].data)
        for model in models
    ]
    pad, said = panel(contestants, models[0].test.classes)
    drawing = "The networks run in this page; nothing that is drawn leaves it."
    drawing = " ".join([drawing] * bool(pad) + [f"{name}: {what}" for name, what in said.items() if what])
    sections = [
        Section("Comparison", text=loss, table=report.quantities),
        Section("Curves", text=of_training, pictures=curves, widget="curves"),
        Section("Predictions", pictures=[plots.first_images(models)]),
        Section("Draw", level=3, text=drawing, fragment=pad),
        Section("Confusion matrices", level=3, text=click, pictures=matrices, widget="confusion"),
        Section("Misclassified images", level=3, pictures=mistakes, widget="gallery"),
    ]
    if differing:
        sections.append(Section("Where they differ", level=3, pictures=differing))
    sections += [
        Section("Classes", table=pd.DataFrame(scores).fillna("-").rename_axis("class")),
        Section("Calibration and cost", text=calibration, pictures=trust_and_cost),
    ]
    if len(models) > 1:
        differs = None if is_same.all() else config[~is_same]
        sections.append(Section("Hyper-parameters", text="Those that differ.", table=differs, is_code=True))
        config = config[is_same]
    return [*sections, Section("" if len(models) > 1 else "Hyper-parameters", table=config, is_code=True, summary=same)]


def _describe_best(study: optuna.Study) -> dict[str, Any]:
    best = best_trial(study)
    described: dict[str, Any] = {"best_trial": best.number, "best_value": best.values[0], "best_params": best.params}
    if len(study.directions) > 1:
        described["metrics"] = [metric.name for metric in metrics_of(study)]
        described["pareto_front"] = {trial.number: trial.values for trial in pareto_front(study)}
    return described


def study_sections(report: Report) -> list[Section]:
    """The section of the study, if there is one."""
    study, table = report.study, report.trials
    if study is None or table is None:
        return []
    names = {key: short_key(key) for key in searched(study)}
    pictures = [plots.execution_scores(study)]
    if table[metrics_of(study)[0].name].nunique() > 1:
        pictures = [*plots.study_plots(study, names), *pictures]
    several = ""
    if len(study.directions) > 1:
        pictures = [*plots.pareto_fronts(study), *pictures]
        front = {str(trial.number) for trial in pareto_front(study)}
        table = table.copy()
        table.insert(0, "front", ["yes" if number in front else "" for number in table.index])
        several = (
            f"{len(front)} trials are on the Pareto front: no other betters them in every metric. "
            f"Scores, history and importances are those of {metrics_of(study)[0].name}."
        )
    origins = [(model.name, _origin(model)) for model in report.models]
    made = [
        f"{name} is its trial {origin['trial']}."
        for name, origin in origins
        if origin and origin["study_name"] == study.study_name
    ]
    cut = f"The table has the best {TRIALS} of {len(table)} trials, trials.csv all." if len(table) > TRIALS else ""
    text = " ".join(filter(None, [*made, report.edges, several, cut]))
    return [Section(f"The study {study.study_name}", text=text, table=table[:TRIALS], pictures=pictures)]


def describe_edges(study: optuna.Study) -> str:
    """Say which of the best values lie at the edge of what was searched, if any does."""
    best, at_edge = best_trial(study), []
    for key, distribution in best.distributions.items():
        edges, value = bounds(distribution), best.params[key]
        is_ordered = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges)
        if is_ordered and len(edges) > 1 and value in (min(edges), max(edges)):
            at_edge.append(f"{short_key(key)} ({short_value(value)})")
    if not at_edge:
        return ""
    listed = " and ".join([", ".join(at_edge[:-1]), at_edge[-1]][len(at_edge) == 1 :])
    return (
        f"In study {study.study_name}, the best {listed} lie{'s' * (len(at_edge) == 1)} at the edge of what was "
        "searched: better values may lie beyond."
    )


def render(report: Report, sections: Sequence[Section]) -> str:
    """The page: one file, which asks for no other."""
    style, script, *libraries = [
        Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))  # noqa: S704
        for name in ("page.css", "page.js", "uplot/uPlot.min.css", "uplot/uPlot.iife.min.js")
    ]
    data = interactive.content(report.models) if report.models else {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(report=report, sections=sections, style=style, script=script, libraries=libraries, data=data)


def save(report: Report, sections: Sequence[Section], output: Path) -> None:
    """Write all files, beside their place: an old report stays until the new one is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as temporary:
        new = Path(temporary, "new")
        (new / "figures").mkdir(parents=True)
        (new / "report.json").write_text(
            json.dumps(_plain(report.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        if report.models:
            report.quantities.to_csv(new / "comparison.csv")
        if report.trials is not None:
            report.trials.to_csv(new / "trials.csv")
        (new / "report.html").write_text(render(report, sections), encoding="utf-8")
        with SummaryWriter(str(new)) as tensorboard:
            for picture in (picture for section in sections for picture in section.pictures if picture.png):
                (new / f"figures/{picture.name}.png").write_bytes(picture.png)
                # add_image would compress it once more
                image = Summary.Image(encoded_image_string=picture.png, height=picture.height, width=picture.width)
                value = Summary.Value(tag=f"report/{picture.name}", image=image)
                tensorboard.file_writer.add_summary(Summary(value=[value]))
        if output.exists():
            _keep_others(output, new)
            output.rename(Path(temporary, "old"))
        new.rename(output)


def _plain(content: Any) -> Any:
    """Content for JSON, which has no numbers but finite ones: null stands for others."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [*map(_plain, content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _keep_others(old: Path, new: Path) -> None:
    """Copy what is in an old report's folder, but is not of a report."""
    for path in old.rglob("*"):
        name = path.relative_to(old)
        is_of_report = str(name) in ("report.html", "report.json", "comparison.csv", "trials.csv") or (
            (name.parent, name.suffix) == (Path("figures"), ".png") or str(name).startswith("events.out.tfevents.")
        )
        if path.is_dir():
            (new / name).mkdir(exist_ok=True)
        elif not is_of_report:
            shutil.copy2(path, new / name)
