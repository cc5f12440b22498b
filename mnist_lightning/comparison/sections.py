"""Sections of the page: headings, texts, tables and data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mnist_lightning.comparison.evaluation import Model, have_same
from mnist_lightning.comparison.summary import Report, card, searched
from mnist_lightning.deployment.page import PadModel, panel
from mnist_lightning.search.record import metrics_of
from mnist_lightning.search.space import short_key
from mnist_lightning.search.study import ENOUGH_TRIALS, importances, pareto_front
from mnist_lightning.system.nested import flatten

TRIALS = 100
"""The most rows in the page's table of a study."""
NETWORKS = 450 * 2**10
"""Bytes of the page for networks: those that fit only in 16 bits are rounded, where nothing changes."""


@dataclass
class Section:
    """A part of the page with an entry in its contents.

    Attributes:
        title: The heading.
        text: A paragraph below it.
        widget: A macro of the page, or empty.
        data: What the macro shows.
        table: A table whose index is the first column.
        folded: More tables, each folded below its line.
    """

    title: str
    text: str = ""
    widget: str = ""
    data: Any = None
    table: pd.DataFrame | None = None
    folded: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """The title as the end of an address."""
        return re.sub(r"\W+", "-", self.title.lower())


def sections(report: Report) -> list[Section]:
    """Return the sections in the order of the page."""
    models = report.models
    if not models:
        return study(report)
    return [
        Section("Models", widget="cards", data=[card(model, models[0]) for model in models]),
        drawing(models),
        curves(models),
        Section("Mistakes", widget="mistakes"),
        classes(models),
        calibration_and_cost(models),
        *study(report),
        hyperparameters(models),
        all_numbers(report),
    ]


def drawing(models: Sequence[Model]) -> Section:
    """Return the drawing pad, and name the networks that cannot run in the page."""
    contestants = [
        PadModel(model.name, model.page_color, model.runs[0].classifiers[model.weights].network, model.runs[0].data)
        for model in models
    ]
    pad, _, left_out = panel(contestants, models[0].test.classes, NETWORKS)
    text = ["The networks run in this page; your drawing never leaves it."] if pad else []
    text += [f"{model.name}: {left_out[model.name]}" for model in models if model.name in left_out]
    return Section("Draw", " ".join(text), "draw", pad)


def curves(models: Sequence[Model]) -> Section:
    """Return the curves of all metrics over the epochs."""
    augmented = [
        model.name
        for model in models
        if (model.runs[0].config.get("data") or {}).get("init_args", {}).get("augmentation")
    ]
    text = f"The training metrics of {', '.join(augmented)} are for augmented images." if augmented else ""
    return Section("Curves", text, "curves")


def classes(models: Sequence[Model]) -> Section:
    """Return precision, recall and F1 of each class."""
    scores = {
        f"{title}, {model.name}": model.test.scores[title.lower()].map("{:.4f}".format)
        for title in ("precision", "recall", "F1")
        for model in models
    }
    table = pd.DataFrame(scores).fillna("-").rename_axis("class")
    return Section("Classes", folded={"Precision, recall and F1 of each class": table})


def calibration_and_cost(models: Sequence[Model]) -> Section:
    """Return the calibration of the probabilities, and accuracy against size and time."""
    text = (
        "A well-calibrated model gets right 90 % of the images that it is 90 % sure of. The calibration error is the "
        "mean distance from this ideal."
    )
    errors = [(model.name, model.test.calibration_error) for model in models]
    if found := ", ".join(f"{error:.4f} for {name}" for name, error in errors if error is not None):
        text += f" It is {found}."
    return Section("Calibration and cost", text, "calibration")


def hyperparameters(models: Sequence[Model]) -> Section:
    """Return the keys of the configs: first the different values, then, folded, the equal ones and environments."""
    configs = {}
    for model in models:
        given = {key: value for key, value in model.runs[0].config.items() if key != "origin"}  # in the study's section
        configs[model.name] = pd.Series(flatten(_numbered(given)), dtype=object).map(str)
    table = pd.DataFrame(configs).fillna("-").rename_axis("key")
    table = table[(table != "None").any(axis=1)]
    made = {model.name: pd.Series(model.runs[0].environment, dtype=object).map(str) for model in models}
    environments = pd.DataFrame(made).fillna("-").rename_axis("what made the run")
    folded = {"Commands, versions and machines": environments} if len(environments) else {}
    if len(models) == 1:
        return Section("Hyper-parameters", folded={f"{len(table)} keys": table, **folded})
    is_same = table.nunique(axis=1) == 1
    folded = {f"{is_same.sum()} keys with the same value": table[is_same], **folded}
    if is_same.all():
        return Section("Hyper-parameters", "The models have the same hyper-parameters.", folded=folded)
    return Section("Hyper-parameters", "Keys with different values.", table=table[~is_same], folded=folded)


def _numbered(config: Any) -> Any:
    """Return a config in which lists of classes, such as an ensemble's members, are mappings from 0, 1 and so on."""
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = dict(enumerate(config))
    return {key: _numbered(value) for key, value in config.items()} if isinstance(config, dict) else config


def all_numbers(report: Report) -> Section:
    """Return the table of all quantities, folded, with an explanation."""
    models = report.models
    text = "The loss is the cross-entropy; the penalized loss adds the L2 penalty and is what Keras calls loss."
    if len(models) > 2:
        text += (
            f" p-values are corrected for {len(models) - 1} comparisons (Holm); the intervals hold jointly with 95 %"
            " confidence (Bonferroni)."
        )
    if others := [model.name for model in models if not have_same("val", models[0].runs[0], model.runs[0])]:
        text += (
            f" {' and '.join(others)} had different validation images from {models[0].name}: the test metrics can be "
            "compared, the validation metrics cannot."
        )
    table = report.quantities.rename(index=in_words)
    return Section("All numbers", text, folded={f"{len(table)} quantities": table})


def in_words(quantity: str) -> str:
    """Return the name of a quantity, such as ``test/penalized_loss (last epoch)``, in words."""
    name, _, weights = quantity.removesuffix(")").partition(" (")
    stage, _, metric = name.rpartition("/")
    images = {"test": " on the test images", "val": " on the validation images"}.get(stage, "")
    return metric.replace("_", " ") + images + (f", {weights}" if weights else "")


def study(report: Report) -> list[Section]:
    """Return the section of the study, or an empty list without a study."""
    study, table = report.study, report.trials
    if study is None or table is None:
        return []
    several = ""
    if len(study.directions) > 1:
        front = {str(trial.number) for trial in pareto_front(study)}
        table = table.copy()
        table.insert(0, "front", ["yes" if number in front else "" for number in table.index])
        several = (
            f"On the Pareto front, no other trial dominates: {len(front)} of {len(table)}. "
            f"Scores, history and importances are for {metrics_of(study)[0].name}."
        )
    cut = f"The table has the best {TRIALS} of {len(table)} trials; trials.csv has all." if len(table) > TRIALS else ""
    few = (
        f"It takes {ENOUGH_TRIALS} complete trials to tell which hyper-parameters matter."
        if len(table) < ENOUGH_TRIALS
        else ""
    )
    text = " ".join(filter(None, [several, few, cut]))
    shares = {short_key(key): share for key, share in importances(study).items()}
    data = {"importances": shares, "metric": metrics_of(study)[0].name, "parameters": len(searched(study))}
    return [Section(f"Study {study.study_name}", text, "study", data, table[:TRIALS])]


def origins(models: Sequence[Model]) -> dict[str, list[str]]:
    """Return what made the runs, in short: their commands, the versions and the machines."""
    runs = [(model.name, run.environment) for model in models for run in model.runs if run.environment]
    found: dict[str, list[str]] = {"Commands": [], "Versions": [], "Machines": []}
    for name, made in runs:
        versions = [f"{package} {made.get(package, '?')}" for package in ("mnist_lightning", "torch", "lightning")]
        for title, text in (
            ("Commands", f"{name}: {made.get('command')}, started {str(made.get('started'))[:16].replace('T', ' ')}"),
            ("Versions", f"Python {made.get('python')}, {', '.join(versions)}"),
            ("Machines", f"{made.get('cores')} cores, {made.get('gpus')} GPUs, {made.get('system')}"),
        ):
            found[title] += [text] * (text not in found[title])
    return found if runs else {}
