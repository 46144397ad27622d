"""Whole uses of fxquant that run offline, each with one command."""
