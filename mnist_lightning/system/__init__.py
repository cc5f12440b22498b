"""Errors, notes, files and signals: nothing of it knows about learning."""
