"""What a user can be told went wrong.

FxquantError
├── RecipeError        a recipe's key, value or selector is wrong
├── ModelError         the model cannot be compiled as it is (training mode, NaN weights, keys)
│   └── TraceError     torch.fx cannot trace the root; says where and what to change
├── CalibrationError   the calibration data is empty, not finite or of the wrong form
├── InputError         an argument, or an input at run time, does not fit
├── DataError          a folder, image or label file cannot be read
├── ArtifactError      a file is damaged, foreign or from a newer version
├── TargetError        a lowering target is unknown or cannot run the graph
├── TrainingError      finetuning broke down; `best` is the best model before that
├── AccuracyError      no accuracy target was reached; `best` is the model that came nearest
└── CompileError       a pass broke its contract (a bug of ours: please report it)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FxquantError(Exception):
    """The base of every error that a user's input can cause."""


class RecipeError(FxquantError):
    """A recipe's key, value or selector is wrong."""


class ModelError(FxquantError):
    """The model cannot be compiled as it is."""


class TraceError(ModelError):
    """torch.fx cannot trace the root module."""


class CalibrationError(FxquantError):
    """The calibration data is empty, not finite or of the wrong form."""


class InputError(FxquantError):
    """An argument, or an input at run time of a compiled model, does not fit."""


class DataError(FxquantError):
    """A folder, image or label file cannot be read."""


class ArtifactError(FxquantError):
    """A file is damaged, foreign or from a newer version."""


class TargetError(FxquantError):
    """A lowering target is unknown or cannot run the graph."""


class CompileError(FxquantError):
    """A pass broke its contract."""


class TrainingError(FxquantError):
    """Finetuning broke down. `best` is the CompiledModel of the best state before that."""

    def __init__(self, message: str, best: Any) -> None:
        super().__init__(message)
        self.best = best


class AccuracyError(FxquantError):
    """An accuracy target was not reached. `best` is the CompiledModel that came nearest."""

    def __init__(self, message: str, best: Any) -> None:
        super().__init__(message)
        self.best = best


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """The clause ``; did you mean 'a' or 'b'?`` for a name that is not known, or ``""``."""
    matches = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
