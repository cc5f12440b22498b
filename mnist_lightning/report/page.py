"""The page: gathers its sections, and writes them as HTML, JSON, CSV, PNG and for TensorBoard."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import optuna
import pandas as pd
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.trial import TrialState
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning.report import plots
from mnist_lightning.report.comparison import compare, format_p, seeds_p_value, verdict
from mnist_lightning.report.evaluation import Model, check_same_data, load_run
from mnist_lightning.runs import newest_complete_run
from mnist_lightning.tune.space import bounds, short_key, short_value
from mnist_lightning.tune.study import check_trials, find_study, results


@dataclass
class Section:
    """A heading with a paragraph, a table and pictures below it, as far as there are any.

    Attributes:
        level: Of the heading, 2 or 3.
        table: Its index is the first column.
        is_code: Whether the table's cells are code.
        marked: For each row of the table, whether it stands out.
    """

    title: str
    level: int = 2
    text: str = ""
    table: pd.DataFrame | None = None
    is_code: bool = False
    marked: Sequence[bool] = ()
    pictures: Sequence[plots.Picture] = ()


class Report:
    """The results that the page and the other files share.

    Args:
        models: The two; where only one run of each can be compared or shown, it is the first.
        study: The study, if there is one with a complete trial.
    """

    def __init__(self, models: Sequence[Model], study: optuna.Study | None) -> None:
        first, second = self.models = models
        self.study = study
        self.edges = describe_edges(study) if study else ""
        self.quantities = pd.DataFrame({model.name: _quantities(model) for model in models}).rename_axis("quantity")
        self.comparison = compare(first.test.correct, second.test.correct)
        self.seeds_p_value = seeds_p_value(first.accuracies, second.accuracies)
        text = verdict(second.name, first.name, self.comparison, len(first.test.labels))
        if self.seeds_p_value is not None:
            text += (
                f" Over {len(first.runs)} and {len(second.runs)} seeds, the mean accuracies are "
                f"{statistics.mean(first.accuracies):.4f} and {statistics.mean(second.accuracies):.4f} "
                f"(Welch's t-test: p {format_p(self.seeds_p_value)})."
            )
        self.verdict = text

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        study = self.study and {
            "name": self.study.study_name,
            "trials": {state.name.lower(): len(self.study.get_trials(states=(state,))) for state in TrialState},
            "best_trial": self.study.best_trial.number,
            "best_value": self.study.best_value,
            "best_params": self.study.best_params,
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
                "calibration_error": model.test.calibration_error,
                "confusion_matrix": model.test.confusion_matrix.tolist(),
                "per_class": model.test.scores.to_dict("list"),
            }
            for model in self.models
        }
        return {
            "weights": self.models[0].weights,
            "images": len(self.models[0].test.labels),
            "models": models,
            "difference": {**asdict(self.comparison), "seeds_p_value": self.seeds_p_value},
            "verdict": self.verdict,
            "comparison": [{"name": name, "values": values} for name, *values in self.quantities.itertuples()],
            "study": study,
        }


def write(
    models: Sequence[str], weights: str, study: str | None, storage: str | None, logs: Path, output: Path | None
) -> None:
    """Write the report.

    Args:
        models: Two of NAME or NAME=PATH,PATH,...
        weights: ``last`` or ``best``.
        study: Name of the study, or None for the one that made the last model that one has made.
        storage: Its storage, or None for the journal in its folder.
        logs: Folder of the runs.
        output: Folder of the report, or None for ``report`` in ``logs``.

    Raises:
        MisconfigurationException: A run or the study is missing or damaged, or the models do not compare.
    """
    output = output or logs / "report"
    if output.exists() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise MisconfigurationException(f"{output} holds something else than a report: choose another --output.")
    loaded = load_models(models, weights, logs)
    report = Report(loaded, load_study(study, storage, logs, loaded))
    sections = [*model_sections(report), *study_sections(report)]
    save(report, sections, output)
    print(report.quantities.rename_axis(None).to_string())
    print(f"\n{report.verdict}\n\nReport: {output / 'report.html'}")


def load_models(arguments: Sequence[str], weights: str, logs: Path) -> list[Model]:
    """Load and evaluate the two models; see :func:`write`."""
    runs = {}
    for argument in arguments:
        name, _, paths = argument.partition("=")
        folders = [Path(path) for path in paths.split(",")] if paths else [newest_complete_run(logs / name)]
        runs[name] = [load_run(folder) for folder in folders]
    if len(runs) < 2:
        raise MisconfigurationException(f"The two models need two names: {' and '.join(arguments)}")
    models = [Model(name, side, runs[name], weights) for name, side in zip(runs, ("first", "second"), strict=True)]
    check_same_data([run for model in models for run in model.runs])
    for run in (run for model in models for run in model.runs):
        if (weights, "test") not in run.evaluations:
            raise MisconfigurationException(f"{run.path} has no weights of its best epoch; take --weights last.")
    return models


def load_study(name: str | None, storage: str | None, logs: Path, models: Sequence[Model]) -> optuna.Study | None:
    """Load the study, if there is one with a complete trial; see :func:`write`."""
    origins = {origin["study_name"]: model for model in models if (origin := _origin(model))}
    if name is None and not origins:
        return None
    found = name or [*origins][-1]
    source = storage or str(logs / found / "journal.log")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = find_study(found, source)
    if study is None and name is None and storage is None:
        print(f"{origins[found].name} is of the study {found}, which is not in {source}. Show it: --storage URL\n")
        return None
    if study is None:
        raise MisconfigurationException(f"There is no study {found} in {source}.")
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        return None
    check_trials(study)
    return study


def _origin(model: Model) -> dict[str, Any] | None:
    """The study and trial that made a model's first run, if one has."""
    origin = model.runs[0].config.get("origin")
    return origin if isinstance(origin, dict) and {"study_name", "trial"} <= origin.keys() else None


def _quantities(model: Model) -> pd.Series:
    quantities: dict[str, Sequence[float]] = {
        **model.metrics,
        "parameters": [model.runs[0].parameters],
        "training time, s": [round(run.seconds, 1) for run in model.runs],
        "epochs": [len(run.history) for run in model.runs],
        "best epoch": [run.best_epoch for run in model.runs],
        f"calibration error ({model.weights} epoch)": [model.test.calibration_error],
    }
    return pd.Series(quantities).map(_format)


def _format(values: Sequence[float]) -> str:
    """A value, or mean ± standard deviation of several."""
    if not values:
        return "-"
    if all(isinstance(value, int) for value in values) and len({*values}) == 1:
        return f"{values[0]:,}"
    digits = 4 if max(values) < 10 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def model_sections(report: Report) -> list[Section]:
    """The sections of the two models; what is added to them here is on the page."""
    models = first, second = report.models
    metrics = [name for name in first.test.metrics if f"train/{name}" in first.runs[0].history[-1]]
    scores = {
        f"{title}, {model.name}": model.test.scores[title.lower()].map("{:.4f}".format)
        for title in ("precision", "recall", "F1")
        for model in models
    }
    given = [
        {k: v for k, v in model.runs[0].config.items() if k != "origin"} for model in models
    ]  # the study's section
    configs = {
        model.name: pd.Series(pd.json_normalize(config).to_dict("records")[0], dtype=object).map(str)
        for model, config in zip(models, given, strict=True)
    }
    config = pd.DataFrame(configs).fillna("-").rename_axis("key")
    config = config[(config != "None").any(axis=1)]
    differs = [*(config[first.name] != config[second.name])]
    loss = "The loss is the cross-entropy; penalized_loss adds the L2 penalty and is what Keras calls loss."
    calibration = (
        "Of the images that a well-calibrated model is 90 % sure of, it gets 90 % right. The calibration error is the "
        "mean distance from that."
    )
    curves = [plots.comparison_curves(models, stage, metric) for metric in metrics for stage in ("val", "train")]
    history = [plots.training_curves(second, metric) for metric in metrics]
    trust_and_cost = [plots.reliability_diagram(models), plots.costs(models)]
    differing = [plots.right_in_one(first, second), plots.right_in_one(second, first)]
    return [
        Section("Comparison", text=loss, table=report.quantities),
        Section("Curves", pictures=curves),
        Section(f"{second.name}, training against validation", level=3, pictures=history),
        Section("Predictions", pictures=[plots.first_digits(models)]),
        Section("Confusion matrices", level=3, pictures=[*map(plots.confusion_matrix, models)]),
        Section("Misclassified digits", level=3, pictures=[*map(plots.misclassified, models)]),
        Section("Most confident mistakes", level=3, pictures=[*map(plots.confident_mistakes, models)]),
        Section("Where they differ", level=3, pictures=differing),
        Section("Classes", table=pd.DataFrame(scores).fillna("-").rename_axis("digit")),
        Section("Calibration and cost", text=calibration, pictures=trust_and_cost),
        Section("Hyper-parameters", text="Marked where they differ.", table=config, is_code=True, marked=differs),
    ]


def study_sections(report: Report) -> list[Section]:
    """The section of the study, if there is one."""
    study = report.study
    if study is None:
        return []
    names = {key: short_key(key) for key in study.best_trial.distributions}
    table = results(study, list(names)).set_index("trial")
    pictures = [plots.execution_scores(study)]
    if len({trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))}) > 1:
        pictures = [*plots.study_plots(study, names), *pictures]
    title = f"The study {study.study_name}"
    origins = [(model.name, _origin(model)) for model in report.models]
    made = [
        f"{name} is its trial {origin['trial']}."
        for name, origin in origins
        if origin and origin["study_name"] == study.study_name
    ]
    return [Section(title, text=" ".join([*made, report.edges]).strip(), table=table, pictures=pictures)]


def describe_edges(study: optuna.Study) -> str:
    """Say which of the best values lie at the edge of what was searched, if any does."""
    best, at_edge = study.best_trial, []
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


def save(report: Report, sections: Sequence[Section], output: Path) -> None:
    """Write all files, beside their place: an old report stays until the new one is whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=output.parent) as temporary:
        new = Path(temporary, "new")
        (new / "figures").mkdir(parents=True)
        (new / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        report.quantities.to_csv(new / "comparison.csv")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
        (new / "report.html").write_text(template.render(report=report, sections=sections), encoding="utf-8")
        with SummaryWriter(str(new)) as tensorboard:
            for picture in (picture for section in sections for picture in section.pictures if picture.png):
                (new / f"figures/{picture.name}.png").write_bytes(picture.png)
                tensorboard.add_image(f"report/{picture.name}", picture.pixels, dataformats="HWC")
        if output.exists():
            output.rename(Path(temporary, "old"))
        new.rename(output)
