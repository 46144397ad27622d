import subprocess
import sys

import pytest

import fxquant
from fxquant.errors import FxquantError
from fxquant.sensitivity import Sensitivity, measure
from fxquant.training_loop import TrainingError


@pytest.mark.parametrize("name", fxquant.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert hasattr(fxquant, name)


def test_sensitivity_is_a_function_beside_its_module() -> None:
    assert fxquant.sensitivity is measure
    assert sys.modules["fxquant.sensitivity"].Sensitivity is Sensitivity


def test_importing_the_modules_leaves_the_functions() -> None:
    names = ("compile", "finetune", "sensitivity")
    code = "".join(f"import fxquant.{name}; assert callable(fxquant.{name}); " for name in names)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_error_is_one_of_ours_and_keeps_the_best() -> None:
    assert fxquant.TrainingError is TrainingError
    assert issubclass(TrainingError, FxquantError)
    assert TrainingError("broke", "model").best == "model"
