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
from fxquant.export.onnx import export, layers, validate


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


def optimized_kinds(path: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


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


def test_a_file_for_openvino_is_compared_in_it(compiled: CompiledModel, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    report = compiled.export_onnx(tmp_path / "m.onnx", for_="openvino")
    (check,) = [c for c in report.checks if (c.runtime, c.run) == ("OpenVINO", "lock-step")]
    assert check.values > 0
    assert check.largest <= 1


def test_without_openvino_its_file_says_that_nothing_was_compared_in_it(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (export, validate):
        monkeypatch.setattr(module, "has_openvino", lambda: False)
    report = compiled.export_onnx(tmp_path / "m.onnx", for_="openvino")
    assert "nothing was compared in it" in str(report)


def test_integers_that_openvino_narrows_are_refused(tmp_path: Path) -> None:
    recipe = fxquant.Recipe.named("w8a8").replace({"requantization": "dyadic"})
    batches = [torch.randn(2, 3, 8, 8)]
    q = fxquant.compile(Residual().eval(), recipe, calibration=batches, target="reference")
    with pytest.raises(TargetError, match="take a recipe of 8 bits"):
        q.export_onnx(tmp_path / "m.onnx", for_="openvino")
    path = tmp_path / "m.onnx"
    q.export_onnx(path, form="qoperator", exact=True)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(run(path, x), q(x))


class FixedBatch(Residual):
    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).relu()
        return self.head(x.reshape(2, 512)) + self.head(self.conv2(x).reshape(2, 512))


def test_a_batch_that_is_written_into_the_network_stays_fixed(tmp_path: Path) -> None:
    batches = [torch.randn(2, 3, 8, 8)]
    q = fxquant.compile(FixedBatch().eval(), "w8a8", calibration=batches, target="reference")
    report = q.export_onnx(tmp_path / "m.onnx", exact=True)
    assert "it is fixed" in str(report)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(run(tmp_path / "m.onnx", x), q(x))


def test_weights_of_7_bits_leave_room_for_two_products_in_16(tmp_path: Path) -> None:
    recipe = fxquant.Recipe.named("w8a8_onnx").replace({"weights.bits": 7})
    batches = [torch.randn(2, 3, 8, 8)]
    q = fxquant.compile(Residual().eval(), recipe, calibration=batches, target="reference")
    q.export_onnx(tmp_path / "m.onnx", form="qoperator")
    model = ir.load(tmp_path / "m.onnx")
    weights = [v.const_value.numpy() for v in model.graph.initializers.values() if len(v.shape) > 1]
    assert weights
    assert all(2 * 255 * int(abs(weight.astype(int)).max()) < 2**15 for weight in weights)


def test_4_bit_weights_are_integer_layers_once_the_file_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    # The 16 codes of a channel lie where its weights do, here above -8 .. 7.
    model.conv1.weight.data[0] += 0.3
    batches = [torch.randn(4, 3, 8, 8)]
    q = fxquant.compile(model, "w4a8", calibration=batches, target="reference")
    assert q.stages["integer"].get_buffer("conv1.weight").max() > 7
    q.export_onnx(tmp_path / "m.onnx")
    stored = ir.load(tmp_path / "m.onnx").graph.initializers.values()
    wide = {value.dtype.name for value in stored if value.name.endswith("weight_int4")}
    assert wide == {"INT4"}
    kinds = optimized_kinds(tmp_path / "m.onnx")
    assert "QLinearConv" in kinds
    assert "Cast" not in kinds


def test_uint8_weights_are_the_same_values_in_the_same_layers(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    compiled.export_onnx(tmp_path / "s.onnx", exact=True)
    compiled.export_onnx(tmp_path / "u.onnx", exact=True, weights="uint8")
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(run(tmp_path / "u.onnx", x), compiled(x))
    stored = ir.load(tmp_path / "u.onnx").graph.initializers.values()
    assert {v.dtype.name for v in stored if v.name.endswith(".weight")} == {"UINT8"}
    kinds = optimized_kinds(tmp_path / "u.onnx")
    assert kinds == optimized_kinds(tmp_path / "s.onnx")
    assert "QLinearConv" in kinds


class Curve(nn.Module):
    """A layer norm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def test_what_float_functions_make_cannot_be_exact(tmp_path: Path) -> None:
    model, x = Curve().eval(), torch.randn(4, 12)
    q = fxquant.compile(model, "vit_w8a8", calibration=[x], target="reference")
    with pytest.raises(InputError, match=r"\(layer_norm\) is computed in float"):
        q.export_onnx(tmp_path / "m.onnx", exact=True)
    q = fxquant.compile(model, "vit_w8a8_integer", calibration=[x], target="reference")
    q.export_onnx(tmp_path / "m.onnx", exact=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), q(x))


class Halved(nn.Module):
    """Windows of 3 in steps of 2 leave the last padding of an even size unread."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.conv(x), 3, 2, 1)


def test_a_float_average_whose_last_padding_no_window_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    recipe = fxquant.Recipe.named("w8a32")
    q = fxquant.compile(Halved().eval(), recipe, calibration=[x], target="reference")
    q.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    # A sum of 27 float32 products of values below 4, in another order.
    assert torch.allclose(found, q(x), rtol=0, atol=27 * 2**-24 * 16)
