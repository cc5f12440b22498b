"""The commands that train, evaluate and predict: a class each, with its options and its ``run``."""
