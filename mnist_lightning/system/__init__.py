"""Errors, notes, files and signals: nothing here knows about machine learning."""
