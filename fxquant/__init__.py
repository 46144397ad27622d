"""fxquant: a torch.fx graph-transformation compiler for quantization.

q = fxquant.compile(model, fxquant.Recipe.named("w8a8"), calibration=batches)
q(x), print(q.report), q.save("m.fxq"), fxquant.load("m.fxq")
"""

from pathlib import Path

import passes

if not hasattr(passes, "InsertQuantDequant"):
    raise ImportError(
        f"fxquant needs its own package `passes`, but {getattr(passes, '__file__', 'another one')} "
        f"shadows it; expected {Path(__file__).resolve().parent.parent / 'passes'}: remove or "
        "rename the other, or change the order of sys.path"
    )

from fxquant.benchmark import benchmark
from fxquant.compare import compare
from fxquant.compare_ops import compare_ops
from fxquant.compile import compile, load
from fxquant.compiled import CompiledModel
from fxquant.errors import (
    ArtifactError,
    CalibrationError,
    CompileError,
    DataError,
    FxquantError,
    InputError,
    ModelError,
    RecipeError,
    TargetError,
    TraceError,
)
from fxquant.evaluate import evaluate
from fxquant.recipe import Recipe
from fxquant.report import Report
from fxquant.version import __version__

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CompileError",
    "CompiledModel",
    "DataError",
    "FxquantError",
    "InputError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Report",
    "TargetError",
    "TraceError",
    "__version__",
    "benchmark",
    "compare",
    "compare_ops",
    "compile",
    "evaluate",
    "load",
]
