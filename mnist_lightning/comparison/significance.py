"""Statistics of two classifiers: do they differ, and are their probabilities calibrated?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass
class Seeds:
    """The mean accuracies of two models over several seeds each.

    Attributes:
        counts: Number of seeds of the first and of the second model.
        means: The mean accuracies.
        deviations: The standard deviations.
        difference: Mean of the second minus mean of the first.
        interval: Welch's interval of the difference.
        p_value: The p-value of Welch's t-test.
        adjusted_p_value: The p-value, corrected for the number of compared models.
    """

    counts: tuple[int, int]
    means: tuple[float, float]
    deviations: tuple[float, float]
    difference: float
    interval: tuple[float, float]
    p_value: float
    adjusted_p_value: float


@dataclass
class Comparison:
    """The comparison of two classifiers on the same images.

    Attributes:
        difference: Accuracy of the second minus accuracy of the first.
        interval: Bootstrap interval of the difference.
        corrected: Number of images that only the second gets right.
        broken: Number of images that only the first gets right.
        p_value: The p-value of McNemar's exact test of ``corrected`` against ``broken``.
        adjusted_p_value: The p-value, corrected for the number of compared models.
        seeds: The comparison over seeds, if both sides have several.
    """

    difference: float
    interval: tuple[float, float]
    corrected: int
    broken: int
    p_value: float
    adjusted_p_value: float
    seeds: Seeds | None = None


def compare_to_first(correct: Sequence[NDArray[np.bool_]], accuracies: Sequence[Sequence[float]]) -> list[Comparison]:
    """Compare each classifier with the first.

    All p-values are corrected together (Holm 1979), and all intervals hold jointly with 95 % (Bonferroni).

    Args:
        correct: Whether each classifier is right, of shape (n,).
        accuracies: Accuracies of each classifier's runs with different seeds.
    """
    level = 1 - 0.05 / max(len(correct) - 1, 1)
    found = [compare(correct[0], other, level) for other in correct[1:]]
    for comparison, others in zip(found, accuracies[1:], strict=True):
        comparison.seeds = compare_seeds(accuracies[0], others, level)
    families: list[list[Any]] = [found, [comparison.seeds for comparison in found if comparison.seeds]]
    for family in families:
        for one, adjusted in zip(family, holm([one.p_value for one in family]), strict=True):
            one.adjusted_p_value = adjusted
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's p-values (A simple sequentially rejective multiple test procedure, 1979), in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(
    first: NDArray[np.bool_], second: NDArray[np.bool_], level: float = 0.95, samples: int = 10_000
) -> Comparison:
    """Compare which images two classifiers get right.

    The exact McNemar test is a binomial test of the images on which they differ. The interval is from the paired
    bootstrap: images are drawn with replacement, and both classifiers always get the same images.

    Args:
        first: Whether the first classifier is right, of shape (n,).
        second: Whether the second classifier is right, of shape (n,).
        level: Confidence level of the interval.
        samples: Number of bootstrap samples.
    """
    count = len(first)
    corrected, broken = int((second & ~first).sum()), int((first & ~second).sum())
    p_value = float(stats.binomtest(corrected, corrected + broken).pvalue) if corrected + broken else 1.0
    # in n images drawn with replacement, the counts of corrected, broken and other images are multinomial
    shares = np.array([corrected, broken, count - corrected - broken]) / count
    drawn = np.random.default_rng(0).multinomial(count, shares, samples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [(1 - level) / 2, (1 + level) / 2])
    return Comparison((corrected - broken) / count, (float(low), float(high)), corrected, broken, p_value, p_value)


def compare_seeds(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Seeds | None:
    """Return Welch's t-test of the accuracies of several runs per side, or None with fewer than two on a side."""
    if min(len(first), len(second)) < 2:
        return None
    counts, means = (len(first), len(second)), (statistics.mean(first), statistics.mean(second))
    deviations, difference = (statistics.stdev(first), statistics.stdev(second)), means[1] - means[0]
    if deviations == (0, 0):  # no spread to compare with
        interval, p_value = (difference, difference), float(first[0] == second[0])
    else:
        welch = stats.ttest_ind(second, first, equal_var=False)
        low, high = welch.confidence_interval(level)
        interval, p_value = (float(low), float(high)), float(welch.pvalue)
    return Seeds(counts, means, deviations, difference, interval, p_value, p_value)


def seeds_needed(difference: float, deviation: float, power: float = 0.8) -> int | None:
    """Return how many runs of each model a t-test at 5 % needs to find a difference.

    The power of the two-sided test of two means is that of the noncentral t-distribution.

    Args:
        difference: Difference of the mean accuracies.
        deviation: Standard deviation of the accuracies of a model's runs.
        power: Probability that the test finds the difference.

    Returns:
        The number of runs, or None if it is larger than 100.
    """
    if deviation == 0:
        return 2 if difference else None
    for count in range(2, 101):
        freedom, shift = 2 * count - 2, abs(difference) / deviation * math.sqrt(count / 2)
        if stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift) >= power:  # the other tail is negligible
            return count
    return None


def accuracy_interval(correct: NDArray[np.bool_]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy.

    Args:
        correct: Whether the classifier is right, of shape (n,).
    """
    interval = stats.binomtest(int(correct.sum()), len(correct)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017), the mean distance of accuracy and confidence.

    Args:
        probabilities: Probabilities of shape (n, classes).
        labels: Labels of shape (n,).
        bins: Number of bins of equal width, over the confidence in the predicted class.
    """
    confidence, accuracy, weight = reliability(probabilities, labels, bins)
    return float((np.abs(confidence - accuracy) * weight).sum())


def reliability(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return mean confidence, accuracy and share of the images for each non-empty bin of confidence."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    used = counts > 0
    sums = [np.bincount(which, values, minlength=bins)[used] for values in (confidence.astype(float), right)]
    return sums[0] / counts[used], sums[1] / counts[used], counts[used] / len(labels)


def verdict(
    name: str,
    other: str,
    comparison: Comparison,
    count: int,
    models: int = 2,
    again: dict[str, Comparison] | None = None,
) -> str:
    """Return the comparison in plain words: over the seeds, if there are several, then on the same images.

    The test on the images compares two trained networks, not two configs: with one run a side, the verdict says so.

    Args:
        name: Name of the second classifier.
        other: Name of the first classifier.
        comparison: The comparison to describe.
        count: Number of images.
        models: Number of compared models.
        again: The comparison with other weights of the same runs, by their description.
    """
    numbers = (
        f"of {count:,} images, {name} corrects {comparison.corrected} that {other} gets wrong and breaks "
        f"{comparison.broken} that {other} gets right (exact McNemar test: {_format_p(comparison, models)})"
    )
    seeds = comparison.seeds
    if seeds is None:
        text = f"{_judge(name, other, comparison, 'test accuracy', 'chance')}: {numbers}."
        for weights, found in (again or {}).items():
            word = (
                "no clear difference"
                if found.adjusted_p_value >= 0.05
                else "better"
                if found.difference > 0
                else "worse"
            )
            text += f" With {weights}: {word} ({100 * found.difference:+.2f} points, {_format_p(found, models)})."
        return text
    sides = [
        f"{mean:.4f} ± {deviation:.4f} over {count} seeds"
        for mean, deviation, count in zip(seeds.means, seeds.deviations, seeds.counts, strict=True)
    ]
    return (
        f"{_judge(name, other, seeds, 'mean test accuracy', 'the luck of seeds')}: {sides[1]} against {sides[0]} "
        f"(Welch's t-test: {_format_p(seeds, models)}). In the first runs, {numbers}."
    )


def _judge(name: str, other: str, found: Comparison | Seeds, what: str, luck: str) -> str:
    points, (low, high) = 100 * found.difference, (100 * bound for bound in found.interval)
    if found.adjusted_p_value < 0.05:
        word = "better" if points > 0 else "worse"
        low, high = (low, high) if points > 0 else (-high, -low)
        size = f"{abs(points):.2f} points of {what} (95 % interval {low:.2f} to {high:.2f})"
        who = "" if isinstance(found, Seeds) else "In these runs, "
        return f"{who}{name} is {word} than {other} by {size}"
    size = f"{points:+.2f} points of {what} (95 % interval {low:+.2f} to {high:+.2f})"
    return f"The difference between {name} and {other} cannot be told from {luck}: {size}"


def _format_p(found: Comparison | Seeds, models: int) -> str:
    """Format a p-value with three digits, or as a bound."""
    p_value = found.adjusted_p_value
    bound = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{bound} after Holm" if models > 2 else bound
