"""The command ``fxquant``: what the Python API does, for shells and scripts."""

from fxquant.cli.app import main

__all__ = ["main"]
