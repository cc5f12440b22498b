"""Data of the page's gallery: images, what the models say of them, and why."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.training.figures import AGAINST, FOR, mosaic, pictures
from mnist_lightning.training.saliency import integrated_gradients, smoothed

LIMIT = 1000
"""Mistakes of a model on the page, most confident first: a poor model has thousands, a phone little memory."""
SAMPLES = 10
"""The number of first test images on the page."""
BARS = 10
"""The most classes whose probabilities the page has for an image."""
COLUMNS = 32
EXPLAINED, SIDE = 1500, 14
"""Explained mistakes of all models, and the side of an explanation: together less than half a megabyte."""
LEVELS = 15
"""Steps of the evidence for a class; against it, there are as many."""


def gallery(models: Sequence[Model]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Return the first test images and those that any model gets wrong, with each model's answers.

    Returns:
        The layout of the sprites, and the images' indices, true classes and classes to show; for each model its number
        of mistakes, their places in order, how many of those are explained, and for each image the predicted class, the
        confidence in hundredths of a percent and the probabilities; URLs of the sprites: the images, and each model's
        explanations.
    """
    test = models[0].test
    first = np.arange(min(SAMPLES, len(test.labels)))
    mistakes = [model.test.confident_mistakes[:LIMIT] for model in models]
    indices = np.unique(np.concatenate([first, *mistakes]))
    images = (255 * pictures(test.split.scaled(indices))).round().astype(np.uint8)
    height, width = images.shape[1:3]
    probabilities = [np.nan_to_num(model.test.probabilities[indices]) for model in models]
    likely = np.max(probabilities, axis=0)
    likely[np.arange(len(indices)), test.labels[indices]] = 2  # the true class is always shown
    bars = np.sort(np.argsort(-likely, axis=1, kind="stable")[:, :BARS], axis=1)
    layout = {
        "width": width, "height": height, "columns": COLUMNS, "isGrey": images.ndim == 3, "limit": LIMIT,
        "classes": test.classes,
        "labels": test.labels[indices].tolist(), "indices": indices.tolist(), "samples": len(first),
        "bars": bars.shape[1], "shown": _encode(bars) if bars.shape[1] < len(test.classes) else None,
    }  # fmt: skip
    answers, sprites = [], [sprite(images)]
    for model, own, values in zip(models, mistakes, probabilities, strict=True):
        evidence = explanations(model, own[: 0 if model.test.has_diverged else EXPLAINED // len(models)])
        sprites.append(evidence_sprite(evidence))
        answers.append(
            {
                "mistakes": len(model.test.mistakes),
                "order": np.searchsorted(indices, own).tolist(),
                "explained": len(evidence),
                "predicted": model.test.predicted[indices].tolist(),
                "confidence": (10_000 * model.test.confidence[indices]).round().astype(int).tolist(),
                "probabilities": _encode((10_000 * np.take_along_axis(values, bars, axis=1)).round()),
            }
        )
    return layout, answers, sprites


def explanations(model: Model, indices: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the evidence in some mistakes: above 0 for the predicted class, below 0 for the true class."""
    if not len(indices):
        return np.zeros((0, 1, 1), np.float32)
    test, run = model.test, model.runs[0]
    predicted, labels = (torch.from_numpy(values[indices]) for values in (test.predicted, test.labels))
    network, images = run.classifiers[model.weights].network, test.split.scaled(indices)
    attributions = integrated_gradients(network, images, test.split, predicted, labels, steps=16)
    return smoothed(F.avg_pool2d(attributions, max(1, max(images.shape[2:]) // SIDE), ceil_mode=True))


def sprite(images: NDArray[np.uint8], **options: Any) -> str:
    """Return all images as one PNG, as a URL; ``options`` may have a ``palette`` and its ``transparency``."""
    picture, file = Image.fromarray(mosaic(images, COLUMNS)), io.BytesIO()
    if palette := options.pop("palette", None):
        picture.putpalette(palette)
    picture.save(file, "png", optimize=True, **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def evidence_sprite(evidence: NDArray[np.float32]) -> str:
    """Return evidence as a sprite to lay over the images: one color is for a class, one against it, 0 transparent."""
    levels = (LEVELS * evidence).round().astype(int)
    alphas = [0, *(255 * level // LEVELS for level in range(1, LEVELS + 1))]
    colors = [bytes.fromhex(color[1:]) for color in (FOR, *LEVELS * [FOR], *LEVELS * [AGAINST])]
    places = np.where(levels < 0, LEVELS - levels, levels).astype(np.uint8)
    return sprite(places, palette=b"".join(colors), transparency=bytes(alphas + alphas[1:]))


def _encode(numbers: NDArray[Any]) -> str:
    """Return whole numbers up to 65,535 as base64, two bytes each."""
    return base64.b64encode(numbers.astype("<u2").tobytes()).decode()
