"""Arithmetic on intervals, and what each operation says about its range."""
