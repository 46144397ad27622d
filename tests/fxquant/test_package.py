import subprocess
import sys

import pytest

import fxquant
from fxquant.errors import FxquantError
from fxquant.qat.training_loop import TrainingError


@pytest.mark.parametrize("name", fxquant.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert hasattr(fxquant, name)


def test_importing_a_module_leaves_the_function_of_its_name() -> None:
    code = "import fxquant, fxquant.compile; assert callable(fxquant.compile)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_error_is_one_of_ours_and_keeps_the_best() -> None:
    assert fxquant.TrainingError is TrainingError
    assert issubclass(TrainingError, FxquantError)
    assert TrainingError("broke", "model").best == "model"
