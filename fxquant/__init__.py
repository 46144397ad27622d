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

from fxquant.backends import available_targets
from fxquant.compile import compile, load
from fxquant.compiled import CompiledModel
from fxquant.convert import convert
from fxquant.errors import (
    AccuracyError,
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
    TrainingError,
)
from fxquant.measure.accuracy_target import Drop
from fxquant.measure.auto_bits import auto_recipe, choose_bits
from fxquant.measure.benchmark import benchmark
from fxquant.measure.compare import compare
from fxquant.measure.compare_ops import compare_ops
from fxquant.measure.evaluate import evaluate
from fxquant.measure.metric import Metric
from fxquant.measure.sensitivity import measure as sensitivity
from fxquant.qat.finetune import finetune
from fxquant.recipe import Recipe
from fxquant.report.report import Report
from fxquant.version import __version__

__all__ = [
    "AccuracyError",
    "ArtifactError",
    "CalibrationError",
    "CompileError",
    "CompiledModel",
    "DataError",
    "Drop",
    "FxquantError",
    "InputError",
    "Metric",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Report",
    "TargetError",
    "TraceError",
    "TrainingError",
    "__version__",
    "auto_recipe",
    "available_targets",
    "benchmark",
    "choose_bits",
    "compare",
    "compare_ops",
    "compile",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "sensitivity",
]
