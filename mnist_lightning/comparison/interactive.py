"""Data for the page's script: the curves and all mistakes."""

import base64
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.plots import data_url
from mnist_lightning.training.figures import mosaic, pictures
from mnist_lightning.training.saliency import integrated_gradients, smoothed

LIMIT = 1000
"""Mistakes of a model on the page, most confident first: a poor model has thousands, a phone little memory."""
COLUMNS = 32
EXPLAINED, SIDE = 1500, 14
"""Explained mistakes of all models, and the side of an explanation: together less than half a megabyte."""


def metrics(models: Sequence[Model]) -> list[str]:
    """Return the metrics that any model has logged during its training."""
    logged = [(model, {key for row in model.runs[0].history for key in row}) for model in models]
    names = [name for model, keys in logged for name in model.test.metrics if {f"train/{name}", f"val/{name}"} & keys]
    return list(dict.fromkeys(names))


def content(models: Sequence[Model]) -> dict[str, Any]:
    """Return the interactive content of the page.

    Returns:
        ``script``: the data that the page's script reads, in plain types; ``sprite``: the gallery's images, as a URL.
    """
    gallery, answers, sprite = mistakes(models)
    named = [
        {"name": model.name, "color": model.color, **answer} for model, answer in zip(models, answers, strict=True)
    ]
    return {"script": {"models": named, "charts": charts(models), "gallery": gallery}, "sprite": sprite}


def charts(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Return one chart per metric: validation and training lines of each model, with bands over several runs."""
    epochs = range(max(len(run.history) for model in models for run in model.runs))
    return [
        {
            "title": metric.replace("_", " "),
            "epochs": [epoch + 1 for epoch in epochs],
            "lines": [
                {"model": index, "stage": stage, **_line(model, f"{stage}/{metric}", epochs)}
                for index, model in enumerate(models)
                for stage in ("val", "train")
            ],
        }
        for metric in metrics(models)
    ]


def _line(model: Model, key: str, epochs: range) -> dict[str, Any]:
    rows = [{row["epoch"]: row[key] for row in run.history if key in row} for run in model.runs]
    # JSON has neither infinity nor NaN: the curve gets a gap
    values = [[row[epoch] for row in rows if math.isfinite(row.get(epoch, math.nan))] for epoch in epochs]
    functions: dict[str, Any] = {"mean": statistics.mean}
    if len(rows) > 1:
        functions |= {"low": min, "high": max}
    return {
        name: [round(function(some), 6) if some else None for some in values] for name, function in functions.items()
    }


def mistakes(models: Sequence[Model]) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Return the images that any model gets wrong, and each model's answers for them.

    Returns:
        The layout of the sprite, and the images' true classes and indices; for each model its number of mistakes, the
        predicted classes, confidences in hundredths of a percent, and explanations; the sprite, a PNG as a URL.
    """
    test = models[0].test
    indices = np.unique(np.concatenate([model.test.confident_mistakes[:LIMIT] for model in models]))
    images = (255 * pictures(test.split.scaled(indices))).round().astype(np.uint8)
    height, width = images.shape[1:3]
    file = io.BytesIO()
    Image.fromarray(mosaic(images, COLUMNS)).save(file, "png", optimize=True)
    place: dict[str, Any] = {"width": width, "height": height, "columns": COLUMNS, "limit": LIMIT}
    place |= {"classes": test.classes, "grey": images.ndim == 3}
    answers = [
        {
            "mistakes": len(model.test.mistakes),
            "predicted": model.test.predicted[indices].tolist(),
            "confidence": (10_000 * model.test.confidence[indices]).round().astype(int).tolist(),
            "explained": explanations(model, EXPLAINED // len(models)),
        }
        for model in models
    ]
    return (
        {**place, "labels": test.labels[indices].tolist(), "indices": indices.tolist()},
        answers,
        data_url(file.getvalue()),
    )


def explanations(model: Model, count: int) -> dict[str, Any]:
    """Explain a model's most confident mistakes: the evidence for the predicted class and against the true class.

    Returns:
        ``indices`` of the images, ``height`` and ``width`` of an explanation, and ``base64`` of the pixels of all
        explanations in order: bytes from -127 (for the true class) to 127 (for the predicted class).
    """
    test, run = model.test, model.runs[0]
    indices = test.confident_mistakes[: 0 if test.has_diverged else count]
    predicted, labels = (torch.from_numpy(values[indices]) for values in (test.predicted, test.labels))
    attributions = torch.zeros(0, 1, 1)
    if len(indices):
        network, images = run.classifiers[model.weights].network, test.split.scaled(indices)
        attributions = integrated_gradients(network, images, test.split, predicted, labels, steps=16)
        attributions = F.avg_pool2d(attributions, max(1, max(images.shape[2:]) // SIDE), ceil_mode=True)
    values = (127 * smoothed(attributions)).round().astype(np.int8)
    _, height, width = values.shape
    encoded = base64.b64encode(values.tobytes()).decode()
    return {"indices": indices.tolist(), "height": height, "width": width, "base64": encoded}
