"""The verdict, the table and ``report.json``."""

import html
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.significance import (
    Comparison,
    accuracy_interval,
    compare_to_first,
    seeds_needed,
    verdict,
)
from mnist_lightning.comparison.table import quantities
from mnist_lightning.search.record import is_counted, metrics_of
from mnist_lightning.search.space import bounds, short_key, short_value
from mnist_lightning.search.study import best_trial, pareto_front, ranked_trials, results
from mnist_lightning.system.console import command_line

DEVIATION = 0.004
"""Standard deviation of the test accuracies of fifteen runs of the defaults on MNIST (docs/results.md)."""


class Report:
    """The results that the page and the other files share.

    Args:
        models: Any number of models, or none; the others are compared with the first. Where only one run of each can
            be compared or shown, it is the first.
        study: The study, or None if there is none with a complete trial.

    Attributes:
        verdict: A comparison of each model with the first, or the accuracy of a single model; empty for a study alone.
        notes: Advice on how to settle it, and remarks on the study.
        commands: Commands that train more seeds, if each model has one run.
        path: Path of the page, once it is written.
        quantities: A table of the models: a row for each quantity, as text.
        trials: A table of the study's complete trials; None without a study.
    """

    def __init__(self, models: Sequence[Model], study: optuna.Study | None) -> None:
        self.models, self.study = models, study
        self.path: Path | None = None
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
            again = _compare_other_weights(models)
            lines = [
                verdict(name, first.name, one, count, len(models), again.get(name))
                for name, one in self.comparisons.items()
            ] or [_describe(first)]
            lines += filter(None, map(_describe_divergence, models))
        self.verdict, self.notes = lines, _advise(models, self.comparisons)
        if study:
            self.notes += [*_describe_refits(models, study), *filter(None, [self.edges])]
        self.commands = _more_seeds(models)
        self.quantities = quantities(models, self.comparisons)

    def _repr_html_(self) -> str:
        """Show the page in a cell of a notebook."""
        page = self.path.read_text(encoding="utf-8") if self.path else ""
        return f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 800px; border: 0"></iframe>'

    @property
    def title(self) -> str:
        """The title of the page."""
        names = [model.name for model in self.models]
        return (" against " if len(names) == 2 else ", ").join(names) or f"Study {self.study and self.study.study_name}"

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        study = self.study and {
            "name": self.study.study_name,
            "trials": _count_trials(self.study),
            **_describe_best(self.study),
            "edges": self.edges,
        }
        models = {model.name: _describe_model(model) for model in self.models}
        return {
            "weights": self.models[0].weights if models else None,
            "images": len(self.models[0].test.labels) if models else 0,
            "models": models,
            "differences": {name: asdict(comparison) for name, comparison in self.comparisons.items()},
            "verdict": " ".join(self.verdict),
            "comparison": [{"name": name, "values": values} for name, *values in self.quantities.itertuples()],
            "study": study,
        }


def card(model: Model, first: Model) -> dict[str, str]:
    """Return what is worth knowing first of a model: ``value``, ``interval`` and, by name, other numbers."""
    several = len(model.runs) > 1

    def mean(values: Sequence[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if several else ""
        return f"{statistics.mean(values):,.{digits}f}{spread}"

    low, high = (100 * edge for edge in accuracy_interval(model.test.correct))
    interval = f"95 % interval {low:.2f} to {high:.2f} %"
    if several:
        interval = f"mean ± standard deviation of {len(model.runs)} seeds"
    if model is not first:
        difference = statistics.mean(model.accuracies) - statistics.mean(first.accuracies)
        interval += f"; {100 * difference:+.2f} points against {first.name}"
    mistakes = [len(run.evaluations[model.weights, "test"].mistakes) for run in model.runs]
    seeds = [run.config["seed_everything"] for run in model.runs if "seed_everything" in run.config]
    facts = {
        "mistakes": f"{mean(mistakes, 0)} of {len(model.test.labels):,}",
        "parameters": f"{model.runs[0].parameters:,}",
        "training": f"{mean([run.seconds for run in model.runs], 1)} s",
        "epochs": f"{len(model.runs[0].history)}, best {model.runs[0].best_epoch}",
        "seeds" if several else "seed": ", ".join(map(str, seeds)),
    }
    value = mean([100 * accuracy for accuracy in model.accuracies], 2)
    return {"value": f"{value} %", "interval": interval} | {name: text for name, text in facts.items() if text}


def _describe_model(model: Model) -> dict[str, Any]:
    return {
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


def _describe(model: Model) -> str:
    """Describe the accuracy of a single model."""
    low, high = accuracy_interval(model.test.correct)
    text = (
        f"{model.name} gets {model.test.accuracy:.4f} of {len(model.test.labels):,} test images right "
        f"(95 % interval {low:.4f} to {high:.4f}) and {len(model.test.mistakes):,} wrong."
    )
    if len(model.runs) == 1:
        return text
    means = f"{statistics.mean(model.accuracies):.4f} ± {statistics.stdev(model.accuracies):.4f}"
    return f"{model.name} has a mean test accuracy of {means} over {len(model.runs)} seeds. Its first run: {text}"


def _compare_other_weights(models: Sequence[Model]) -> dict[str, dict[str, Comparison]]:
    """Compare each model with the first with the other weights of the runs, if all have them."""
    texts = {"last": "the weights of the last epoch", "best": "the weights of the best validation epoch"}
    (weights,) = texts.keys() - {models[0].weights}
    others = [model.runs[0].evaluations.get((weights, "test")) for model in models]
    evaluations = [other for other in others if other]
    if len(evaluations) < len(models):
        return {}
    found = compare_to_first([one.correct for one in evaluations], [[one.accuracy] for one in evaluations])
    return {model.name: {texts[weights]: one} for model, one in zip(models[1:], found, strict=True)}


def _advise(models: Sequence[Model], comparisons: dict[str, Comparison]) -> list[str]:
    """Say how many runs with other seeds would settle each difference that is not settled."""
    lines = []
    for model in models[1:]:
        found = comparisons[model.name]
        if found.seeds and found.seeds.adjusted_p_value < 0.05:
            continue
        several = [side.accuracies for side in (models[0], model) if len(side.runs) > 1]
        deviation, source = DEVIATION, "as those of the defaults do over fifteen seeds"
        if several:
            deviation, source = max(map(statistics.stdev, several)), "as those of these runs do"
        sentences = []
        if not found.seeds:
            sentences.append(f"With other seeds, {models[0].name} and {model.name} may compare differently.")
        if difference := (found.seeds or found).difference:
            needed = seeds_needed(difference, deviation)
            sentences.append(
                f"If test accuracies vary {source} (± {100 * deviation:.2f} points), it takes "
                f"{needed or 'more than 100'} seeds of each model to find a difference of {100 * abs(difference):.2f} "
                "points."
            )
        if sentences:
            lines.append(" ".join(sentences))
    return lines


def _more_seeds(models: Sequence[Model]) -> list[str]:
    """Return commands that train three more seeds of each model and compare all; none if a model has several runs."""
    commands, given = [], []
    for model in models:
        folder, seed = model.runs[0].path, model.runs[0].config.get("seed_everything")
        if len(model.runs) > 1 or not isinstance(seed, int) or not folder.is_dir():
            return []
        name = f"{model.slug}_seeds"
        command = command_line("fit", "--config", folder / "config.yaml", "--name", name, "--seed_everything")
        seeds = [str(seed + number) for number in (1, 2, 3)]
        loop = [f"for seed in {' '.join(seeds)}; do {command} $seed; done"]
        commands += [f"{command} {seed}" for seed in seeds] if os.name == "nt" else loop
        given.append(f"{model.name}={folder},{folder.parent.parent / name}/*")
    return [*commands, command_line("report", *given)] if len(models) > 1 else []


def _describe_refits(models: Sequence[Model], study: optuna.Study) -> list[str]:
    """Say what the value of a trial came to when its settings were trained again."""
    metric, trials = metrics_of(study)[0], {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    lines = []
    for model in models:
        origin = model.origin or {}
        trial = trials.get(origin.get("trial", -1)) if origin.get("study_name") == study.study_name else None
        values = [row[metric.name] for row in model.runs[0].history if metric.name in row]
        if trial is not None and trial.values and values:
            lines.append(
                f"{model.name} is trial {trial.number} of study {study.study_name}: its {metric.name} of "
                f"{trial.values[0]:.4f} was the choice among {len(ranked_trials(study))}, so chance played a part; its "
                f"settings, trained again for {len(values)} epoch{'s' * (len(values) != 1)}, came to "
                f"{metric.best(values):.4f}."
            )
    return lines


def _describe_divergence(model: Model) -> str:
    """Say that runs of a model have diverged, if any have."""
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


def _count_trials(study: optuna.Study) -> dict[str, int]:
    counts = Counter(trial.state for trial in study.get_trials(deepcopy=False) if is_counted(trial))
    return {state.name.lower(): counts[state] for state in TrialState}


def _describe_best(study: optuna.Study) -> dict[str, Any]:
    best = best_trial(study)
    described: dict[str, Any] = {"best_trial": best.number, "best_value": best.values[0], "best_params": best.params}
    if len(study.directions) > 1:
        described["metrics"] = [metric.name for metric in metrics_of(study)]
        described["pareto_front"] = {trial.number: trial.values for trial in pareto_front(study)}
    return described


def searched(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return the distributions of all complete trials; not every trial has every parameter."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {key: distribution for trial in trials for key, distribution in trial.distributions.items()}


def describe_edges(study: optuna.Study) -> str:
    """Say which of the best values lie at the edge of the search space, if any do."""
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
        f"In study {study.study_name}, the best {listed} lie{'s' * (len(at_edge) == 1)} at the edge of the search "
        "space: better values may lie beyond."
    )
