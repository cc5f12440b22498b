"""MNIST classifiers with PyTorch Lightning and Optuna: a Keras notebook, rebuilt and taken further."""

import importlib

TYPE_CHECKING = False  # type checkers take it for typing's, whose import would double the time of this one
if TYPE_CHECKING:
    from mnist_lightning.classifier import Classifier
    from mnist_lightning.data import ImageDataModule, MNISTDataModule
    from mnist_lightning.functions import export, fit, report, tune
    from mnist_lightning.networks import CNN, MLP, Ensemble
    from mnist_lightning.predictor import Predictor
    from mnist_lightning.run import Run, runs
    from mnist_lightning.search.pruning import PruningCallback

__version__ = "0.2.0"
__all__ = [
    "CNN",
    "MLP",
    "Classifier",
    "Ensemble",
    "ImageDataModule",
    "MNISTDataModule",
    "Predictor",
    "PruningCallback",
    "Run",
    "export",
    "fit",
    "report",
    "runs",
    "tune",
]

_MODULES = {
    "classifier": ["Classifier"],
    "data": ["ImageDataModule", "MNISTDataModule"],
    "functions": ["export", "fit", "report", "tune"],
    "networks": ["CNN", "MLP", "Ensemble"],
    "predictor": ["Predictor"],
    "run": ["Run", "runs"],
    "search.pruning": ["PruningCallback"],
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: torch and Lightning take seconds."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
