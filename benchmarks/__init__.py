"""Measurements: one question for each file, run from the repository's root."""
