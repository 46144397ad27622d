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


def test_importing_fxquant_imports_little_beside_torch() -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import fxquant
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(new & {"torchvision", "sympy", "triton", "matplotlib", "onnx", "onnxscript", "argparse"})
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "set()"


def test_a_training_error_is_one_of_ours_and_keeps_the_best() -> None:
    assert fxquant.TrainingError is TrainingError
    assert issubclass(TrainingError, FxquantError)
    assert TrainingError("broke", "model").best == "model"
