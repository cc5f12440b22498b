"""Sections of the page: headings, texts, tables and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mnist_lightning.comparison import plots
from mnist_lightning.comparison.evaluation import Model, have_same
from mnist_lightning.comparison.loading import origin_of
from mnist_lightning.comparison.summary import Report, searched
from mnist_lightning.deployment.page import PadModel, panel
from mnist_lightning.search.record import metrics_of
from mnist_lightning.search.space import short_key
from mnist_lightning.search.study import pareto_front

CONFUSION = "Rows are true, columns predicted classes. A click on a number shows its images below."
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


def model_sections(report: Report) -> list[Section]:
    """Return the sections of the models; a section that is added to this list is on the page."""
    models = report.models
    return [
        comparison(report),
        curves(models),
        Section("Predictions", pictures=[plots.first_images(models)]),
        drawing(models),
        Section("Confusion matrices", level=3, text=CONFUSION, widget="confusion"),
        Section("Misclassified images", level=3, widget="gallery"),
        *differences(models),
        classes(models),
        calibration_and_cost(models),
        *hyperparameters(models),
    ]


def comparison(report: Report) -> Section:
    """Return the table of all quantities, and what its numbers mean."""
    models = report.models
    text = "The loss is the cross-entropy; penalized_loss adds the L2 penalty and is what Keras calls loss."
    if len(models) > 2:
        text += (
            f" p-values are corrected for {len(models) - 1} comparisons (Holm); the intervals hold together with 95 %"
            " (Bonferroni)."
        )
    if others := [model.name for model in models if not have_same("val", models[0].runs[0], model.runs[0])]:
        text += (
            f" {' and '.join(others)} had other validation images than {models[0].name}: their validation metrics do "
            "not compare, those of the test do."
        )
    return Section("Comparison", text=text, table=report.quantities)


def curves(models: Sequence[Model]) -> Section:
    """Return the curves of all metrics over the epochs."""
    augmented = [
        model.name
        for model in models
        if (model.runs[0].config.get("data") or {}).get("init_args", {}).get("augmentation")
    ]
    text = f"The training metrics of {', '.join(augmented)} are of augmented images." if augmented else ""
    return Section("Curves", text=text, widget="curves")


def drawing(models: Sequence[Model]) -> Section:
    """Return the pad, and which networks cannot run in the page."""
    contestants = [
        PadModel(model.name, model.color, model.runs[0].classifiers[model.weights].network, model.runs[0].data)
        for model in models
    ]
    pad, remarks = panel(contestants, models[0].test.classes)
    text = ["The networks run in this page; nothing that is drawn leaves it."] if pad else []
    text += [f"{name}: {remark}" for name, remark in remarks.items() if remark]
    return Section("Draw", level=3, text=" ".join(text), fragment=pad)


def differences(models: Sequence[Model]) -> list[Section]:
    """Return the images that only one of the first model and another gets right."""
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
    """Return how far the probabilities can be trusted, and accuracy against size and time."""
    text = (
        "Of the images that a well-calibrated model is 90 % sure of, it gets 90 % right. The calibration error is the "
        "mean distance from that."
    )
    pictures = [plots.reliability_diagram(models), plots.costs(models)]
    return Section("Calibration and cost", text=text, pictures=pictures)


def hyperparameters(models: Sequence[Model]) -> list[Section]:
    """Return the keys of the configs: first those that differ, then, folded, those that do not."""
    configs = {}
    for model in models:
        given = {key: value for key, value in model.runs[0].config.items() if key != "origin"}  # the study's section
        configs[model.name] = pd.Series(pd.json_normalize(given).to_dict("records")[0], dtype=object).map(str)
    table = pd.DataFrame(configs).fillna("-").rename_axis("key")
    table = table[(table != "None").any(axis=1)]
    title = "Hyper-parameters"
    if len(models) == 1:
        return [Section(title, table=table, is_code=True, summary=f"{len(table)} keys")]
    is_same = table.nunique(axis=1) == 1
    different = None if is_same.all() else table[~is_same]
    summary = f"{is_same.sum()} that are the same"
    return [
        Section(title, text="Those that differ.", table=different, is_code=True),
        Section("", table=table[is_same], is_code=True, summary=summary),
    ]


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
    origins = [(model.name, origin_of(model)) for model in report.models]
    made = [
        f"{name} is its trial {origin['trial']}."
        for name, origin in origins
        if origin and origin["study_name"] == study.study_name
    ]
    cut = f"The table has the best {TRIALS} of {len(table)} trials, trials.csv all." if len(table) > TRIALS else ""
    text = " ".join(filter(None, [*made, report.edges, several, cut]))
    return [Section(f"The study {study.study_name}", text=text, table=table[:TRIALS], pictures=pictures)]
