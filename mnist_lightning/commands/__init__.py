"""The commands that train, evaluate and predict."""
