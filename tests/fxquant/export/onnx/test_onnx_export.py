"""A compiled model as an ONNX file: what is in it, and when there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.compiled import CompiledModel
from fxquant.errors import InputError, TargetError
from fxquant.export.onnx import layers


class Residual(nn.Module):
    """Two layers around a shortcut; the shape of the features is computed when the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 8 * 8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).relu()
        x = (x + self.conv2(x)).relu()
        return self.head(x.view(x.size(0), -1))


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8)]
    return fxquant.compile(Residual().eval(), "w8a8", calibration=batches, target="reference")


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"image": x.numpy()})
    return torch.from_numpy(result)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_an_exact_file_gives_the_reference_s_bits_for_any_batch(
    compiled: CompiledModel, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "m.onnx"
    report = compiled.export_onnx(path, form=form, exact=True)
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(run(path, x), compiled(x))
    assert all(check.largest == 0 for check in report.checks if check.allowed == 0)
    assert "lock-step" in str(report)


def test_the_default_is_one_step_away_at_most_and_says_how_often(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    report = compiled.export_onnx(tmp_path / "m.onnx")
    steps = [check for check in report.checks if check.run == "lock-step"]
    assert len(steps) == 2
    assert all(check.largest <= check.allowed == 1 and check.values > 0 for check in steps)
    data = report.to_json()
    assert data["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert [entry["integers"] for entry in data["checks"]] == [c.values for c in report.checks]


def test_nodes_have_the_names_of_modules_and_values_those_of_the_graph(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    compiled.export_onnx(tmp_path / "m.onnx", form="qoperator")
    graph = onnx.load(tmp_path / "m.onnx").graph
    nodes = {node.name: node for node in graph.node}
    assert nodes["conv1/QLinearConv"].output[0] == "conv1"
    sizes = graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 3, 8, 8]


def test_the_true_scales_stand_in_the_metadata_of_an_exact_file(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    compiled.export_onnx(tmp_path / "m.onnx", form="qoperator", exact=True)
    model = ir.load(tmp_path / "m.onnx")
    grid = next(n.meta["grid"] for n in compiled.stages["integer"].graph.nodes if n.name == "conv1")
    value = next(v for node in model.graph for v in node.outputs if v.name == "conv1")
    assert float(value.metadata_props["fxquant.scale"]) == grid.scale
    assert model.metadata_props["fxquant.recipe"] == compiled.recipe.to_toml()


def test_a_file_that_fails_is_not_kept(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A residual of another scale: a mistake that no checker of ONNX sees.
    factor = layers.rescale_factor
    monkeypatch.setattr(layers, "rescale_factor", lambda x, y: 1.1 * factor(x, y))
    with pytest.raises(TargetError, match=r"(?s)not kept.*conv2.*differs by up to"):
        compiled.export_onnx(tmp_path / "m.onnx", exact=True)
    assert list(tmp_path.iterdir()) == []


def test_what_openvino_reads_wrongly_is_refused(compiled: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="per-channel QLinearConv"):
        compiled.export_onnx(tmp_path / "m.onnx", form="qoperator", for_="openvino")
    with pytest.raises(InputError, match="no form is exact"):
        compiled.export_onnx(tmp_path / "m.onnx", exact=True, for_="openvino")


def test_a_form_that_is_unknown_has_a_nearest_one(compiled: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'qdq'"):
        compiled.export_onnx(tmp_path / "m.onnx", form="dqd")


def test_without_the_extra_the_error_says_what_to_install(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r"onnxruntime.*pip install 'fxquant\[onnx\]'"):
        compiled.export_onnx(tmp_path / "m.onnx")
