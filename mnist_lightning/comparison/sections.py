"""Sections of the page: headings, texts, tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mnist_lightning.comparison import plots
from mnist_lightning.comparison.evaluation import Model, have_same
from mnist_lightning.comparison.interactive import metrics
from mnist_lightning.comparison.summary import Report, searched
from mnist_lightning.deployment.page import PadModel, panel
from mnist_lightning.search.record import metrics_of
from mnist_lightning.search.space import short_key
from mnist_lightning.search.study import ENOUGH_TRIALS, pareto_front

CONFUSION = "Rows are true classes, columns predicted classes. Click a number to see its images below."
TRIALS = 100
"""The most rows in the page's table of a study."""


@dataclass
class Section:
    """A heading with an optional paragraph, table and pictures below it.

    Attributes:
        title: The heading; empty if the section continues the one above.
        level: Level of the heading, 2 or 3.
        table: A table whose index is the first column.
        is_code: Whether the table's cells are code.
        summary: If given, the table is folded below this line.
        widget: A macro of the page that its script makes interactive.
        files: Pictures of the widget, which are only in the folder.
        fragment: HTML below everything else.
    """

    title: str
    level: int = 2
    text: str = ""
    table: pd.DataFrame | None = None
    is_code: bool = False
    summary: str = ""
    pictures: Sequence[plots.Picture] = ()
    widget: str = ""
    files: Sequence[plots.Picture] = ()
    fragment: str = ""


def model_sections(report: Report) -> list[Section]:
    """Return the sections of the models, in the order of the page."""
    models = report.models
    return [
        comparison(report),
        curves(models),
        Section("Predictions", pictures=[plots.first_images(models)]),
        drawing(models),
        Section(
            "Confusion matrices",
            level=3,
            text=CONFUSION,
            widget="confusion",
            files=[plots.confusion_matrix(model) for model in models],
        ),
        Section("Misclassified images", level=3, widget="gallery"),
        *differences(models),
        classes(models),
        calibration_and_cost(models),
        *hyperparameters(models),
        *environments(models),
    ]


def comparison(report: Report) -> Section:
    """Return the table of all quantities, with an explanation."""
    models = report.models
    text = "The loss is the cross-entropy; penalized_loss adds the L2 penalty and is what Keras calls loss."
    if len(models) > 2:
        text += (
            f" p-values are corrected for {len(models) - 1} comparisons (Holm); the intervals hold jointly with 95 %"
            " confidence (Bonferroni)."
        )
    if others := [model.name for model in models if not have_same("val", models[0].runs[0], model.runs[0])]:
        text += (
            f" {' and '.join(others)} had other validation images than {models[0].name}: the test metrics can be "
            "compared, the validation metrics cannot."
        )
    return Section("Comparison", text=text, table=report.quantities)


def curves(models: Sequence[Model]) -> Section:
    """Return the curves of all metrics over the epochs."""
    augmented = [
        model.name
        for model in models
        if (model.runs[0].config.get("data") or {}).get("init_args", {}).get("augmentation")
    ]
    text = f"The training metrics of {', '.join(augmented)} are for augmented images." if augmented else ""
    return Section("Curves", text=text, widget="curves", files=[plots.curves(models, metrics(models))])


def drawing(models: Sequence[Model]) -> Section:
    """Return the drawing pad, and name the networks that cannot run in the page."""
    contestants = [
        PadModel(model.name, model.color, model.runs[0].classifiers[model.weights].network, model.runs[0].data)
        for model in models
    ]
    pad, remarks = panel(contestants, models[0].test.classes)
    text = ["The networks run in this page; your drawing never leaves it."] if pad else []
    text += [f"{name}: {remark}" for name, remark in remarks.items() if remark]
    return Section("Draw", level=3, text=" ".join(text), fragment=pad)


def differences(models: Sequence[Model]) -> list[Section]:
    """Return the images that only the first model, or only another model, gets right."""
    pairs = [pair for other in models[1:] for pair in ((models[0], other), (other, models[0]))]
    pictures = [plots.right_in_one(one, other) for one, other in pairs]
    return [Section("Where they differ", level=3, pictures=pictures)] if pictures else []


def classes(models: Sequence[Model]) -> Section:
    """Return precision, recall and F1 of each class."""
    scores = {
        f"{title}, {model.name}": model.test.scores[title.lower()].map("{:.4f}".format)
        for title in ("precision", "recall", "F1")
        for model in models
    }
    return Section("Classes", table=pd.DataFrame(scores).fillna("-").rename_axis("class"))


def calibration_and_cost(models: Sequence[Model]) -> Section:
    """Return the calibration of the probabilities, and accuracy against size and time."""
    text = (
        "A well-calibrated model gets 90 % right of the images that it is 90 % sure of. The calibration error is the "
        "mean distance from this ideal."
    )
    pictures = [plots.reliability_diagram(models), plots.costs(models)]
    return Section("Calibration and cost", text=text, pictures=pictures)


def hyperparameters(models: Sequence[Model]) -> list[Section]:
    """Return the keys of the configs: first the different values, then, folded, the equal ones."""
    configs = {}
    for model in models:
        given = {key: value for key, value in model.runs[0].config.items() if key != "origin"}  # in the study's section
        configs[model.name] = pd.Series(pd.json_normalize(given).to_dict("records")[0], dtype=object).map(str)
    table = pd.DataFrame(configs).fillna("-").rename_axis("key")
    table = table[(table != "None").any(axis=1)]
    title = "Hyper-parameters"
    if len(models) == 1:
        return [Section(title, table=table, is_code=True, summary=f"{len(table)} keys")]
    is_same = table.nunique(axis=1) == 1
    different = None if is_same.all() else table[~is_same]
    summary = f"{is_same.sum()} keys with the same value"
    return [
        Section(title, text="Keys with different values.", table=different, is_code=True),
        Section("", table=table[is_same], is_code=True, summary=summary),
    ]


def environments(models: Sequence[Model]) -> list[Section]:
    """Return what made the first run of each model: command, versions, machine and commit."""
    found = {model.name: pd.Series(model.runs[0].environment, dtype=object).map(str) for model in models}
    table = pd.DataFrame(found).fillna("-").rename_axis("what made the run")
    return [Section("", table=table, is_code=True, summary="Commands, versions and machines")] if len(table) else []


def study_sections(report: Report) -> list[Section]:
    """Return the section of the study, or an empty list without a study."""
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
            f"{len(front)} trials are on the Pareto front: no other trial beats them in every metric. "
            f"Scores, history and importances are for {metrics_of(study)[0].name}."
        )
    cut = f"The table has the best {TRIALS} of {len(table)} trials; trials.csv has all." if len(table) > TRIALS else ""
    few = f"{len(table)} trials are too few to tell which parameters matter." if len(table) < ENOUGH_TRIALS else ""
    text = " ".join(filter(None, [report.edges, several, few, cut]))
    return [Section(f"The study {study.study_name}", text=text, table=table[:TRIALS], pictures=pictures)]
