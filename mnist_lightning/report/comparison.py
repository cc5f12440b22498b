"""Statistics of two classifiers: whether they differ, and how far their probabilities can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass
class Comparison:
    """Two classifiers on the same images.

    Attributes:
        difference: Accuracy of the second minus that of the first.
        interval: 95 % bootstrap interval of the difference.
        corrected: Images that only the second gets right.
        broken: Images that only the first gets right.
        p_value: McNemar's exact test of ``corrected`` against ``broken``.
    """

    difference: float
    interval: tuple[float, float]
    corrected: int
    broken: int
    p_value: float


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_], samples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare which images two classifiers get right.

    The exact McNemar test is a binomial test of the images on which they differ. The interval is the paired
    bootstrap's: images are drawn with replacement, so that both classifiers always see the same ones.

    Args:
        first: Whether the first classifier is right, of shape (n,).
        second: Whether the second is, of shape (n,).
        samples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    count = len(first)
    corrected, broken = int((second & ~first).sum()), int((first & ~second).sum())
    p_value = float(stats.binomtest(corrected, corrected + broken).pvalue) if corrected + broken else 1.0
    # n images drawn with replacement hold multinomial numbers of corrected, broken and other images
    shares = np.array([corrected, broken, count - corrected - broken]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, samples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return Comparison((corrected - broken) / count, (float(low), float(high)), corrected, broken, p_value)


def calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): how far accuracy and confidence are apart, on average.

    Args:
        probabilities: Of shape (n, classes).
        labels: Of shape (n,).
        bins: Of equal width, over the confidence in the predicted class.
    """
    confidence, accuracy, weight = reliability(probabilities, labels, bins)
    return float((np.abs(confidence - accuracy) * weight).sum())


def reliability(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean confidence, accuracy and share of the images, for each bin of confidence that is not empty."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    used = counts > 0
    sums = [np.bincount(which, values, minlength=bins)[used] for values in (confidence.astype(float), right)]
    return sums[0] / counts[used], sums[1] / counts[used], counts[used] / len(labels)


def seeds_p_value(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Welch's t-test of the accuracies of several runs on each side; None with fewer than two on a side."""
    if min(len(first), len(second)) < 2:
        return None
    if len({*first}) == len({*second}) == 1:  # no spread to compare with
        return float(first[0] == second[0])
    return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def verdict(name: str, other: str, comparison: Comparison, count: int) -> str:
    """The comparison in plain words.

    Args:
        name: The second classifier.
        other: The first.
        comparison: What was found.
        count: Images.
    """
    low, high = (100 * bound for bound in comparison.interval)
    points = 100 * comparison.difference
    numbers = (
        f"of {count:,} digits, {name} corrects {comparison.corrected} that {other} gets wrong and breaks "
        f"{comparison.broken} that it gets right (exact McNemar test: p {format_p(comparison.p_value)})"
    )
    if comparison.p_value < 0.05:
        word = "better" if points > 0 else "worse"
        bounds = (low, high) if points > 0 else (-high, -low)
        return (
            f"{name} is {word} than {other} by {abs(points):.2f} points of test accuracy "
            f"(95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}): {numbers}."
        )
    return (
        f"No difference between {name} and {other} can be told from chance: {points:+.2f} points of test accuracy "
        f"(95 % interval {low:+.2f} to {high:+.2f}); {numbers}."
    )


def format_p(p_value: float) -> str:
    """A p-value for people: three digits, or a bound."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
