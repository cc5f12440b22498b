"""MNIST classifiers with PyTorch Lightning and Optuna: a Keras notebook, rebuilt and taken further."""

__version__ = "0.2.0"
