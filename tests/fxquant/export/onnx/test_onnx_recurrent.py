"""LSTMs and GRUs of dynamic recipes as ONNX: a Scan for each layer and direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.errors import TargetError
from passes.infra.verify import flatten

# What sigmoid and tanh differ by in their last bits, 2^-23 of at most 1, grows by less than 4 in
# each of the steps of these tests; a code of h that flipped would show as 1e-3.
LAST_BITS = 1e-5


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 6, **options)

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        if not state:
            return self.layer(x)
        return self.layer(x, state if isinstance(self.layer, nn.LSTM) else state[0])


def compiled(model: nn.Module, *example: Tensor) -> CompiledModel:
    calibration = [example if len(example) > 1 else example[0]]
    return fxquant.compile(
        model.eval(), "dynamic_w8a8", calibration=calibration, target="reference"
    )


def check(path: Path, q: CompiledModel, *inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    expected = flatten(q(*inputs))
    for (_, want), got in zip(expected, found, strict=True):
        assert torch.allclose(torch.from_numpy(got), want, rtol=0, atol=LAST_BITS)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "num_layers": 2},
        {"bidirectional": True, "num_layers": 2, "bias": False},
    ],
    ids=["plain", "batch_first", "bidirectional"],
)
def test_a_recurrent_layer_is_a_scan_that_takes_another_batch(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    q = compiled(Recurrent(kind, **options), torch.randn(3, 5, 8))
    report = q.export_onnx(tmp_path / "m.onnx", exact=True)
    directions = 2 if options.get("bidirectional") else 1
    assert report.operators["Scan"] == directions * options.get("num_layers", 1)
    # The first dimension is free: samples where they come first, steps otherwise.
    for first in (3, 4):
        check(tmp_path / "m.onnx", q, torch.randn(first, 5, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_state_that_is_handed_in_starts_it(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(1)
    states = [torch.randn(1, 3, 6)] * (2 if kind is nn.LSTM else 1)
    example = torch.randn(5, 3, 8), *states
    q = compiled(Recurrent(kind), *example)
    q.export_onnx(tmp_path / "m.onnx", exact=True)
    check(tmp_path / "m.onnx", q, *example)


def test_the_default_quantizes_each_step_as_onnx_does(tmp_path: Path) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 5, 8)
    q = compiled(Recurrent(nn.LSTM, batch_first=True), x)
    report = q.export_onnx(tmp_path / "m.onnx")
    assert report.operators["DynamicQuantizeLinear"] == 1, "that of h is inside of the Scan"
    (sqnr,) = {
        check.output_sqnr_db for check in report.checks if check.runtime.endswith("optimized")
    } - {None}
    assert sqnr > 40


def test_a_float_layer_is_refused_by_its_name(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(8, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(x)[0])
            return y

    q = fxquant.compile(
        Tagger().eval(), "w8a8", calibration=[torch.randn(5, 3, 8)], target="reference"
    )
    with pytest.raises(TargetError, match=r"layer \(nn.GRU\).*recipe dynamic_w8a8"):
        q.export_onnx(tmp_path / "m.onnx")
