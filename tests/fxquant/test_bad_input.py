"""What a user gets wrong ends in one clear line: what, where, and what to try."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

import fxquant
from fxquant.artifact.file import FORMAT_VERSION
from fxquant.artifact.golden import digest_of
from fxquant.data import open_batches
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
from fxquant.frontend.models import load_model
from fxquant.measure.evaluate import evaluate
from tests.fxquant.small_networks import Residual, compiled, conv_net, images, module


def refused(kind: type[FxquantError], call: Callable[[], Any], *parts: str) -> None:
    """`call` raises exactly `kind`, in one line that holds all `parts`."""
    with pytest.raises(FxquantError) as caught:
        call()
    message = str(caught.value)
    assert caught.type is kind, message
    assert "\n" not in message
    for part in parts:
        assert part in message


# -- the model -----------------------------------------------------------------------------------


def test_training_mode() -> None:
    refused(ModelError, lambda: compiled(Residual().train()), "training mode", "model.eval()")


def test_a_part_in_training_mode_is_named() -> None:
    model = Residual()
    model.norm.train()
    refused(ModelError, lambda: compiled(model), "norm (BatchNorm2d)", "model.eval()")


def test_weights_with_nan_are_named() -> None:
    model = Residual()
    model.conv1.weight.data[0, 0, 0, 0] = float("nan")
    refused(ModelError, lambda: compiled(model), "conv1.weight holds NaN", "retrain")


def test_infinite_statistics_are_named() -> None:
    model = Residual()
    model.norm.running_var[0] = float("inf")
    refused(ModelError, lambda: compiled(model), "norm.running_var holds infinite values")


def test_a_model_that_is_no_module() -> None:
    refused(ModelError, lambda: compiled(lambda x: x), "nn.Module", "function")  # type: ignore[arg-type]


def test_a_branch_on_a_value() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x

    model = module(forward, conv=nn.Conv2d(3, 3, 1))
    refused(TraceError, lambda: compiled(model), "test_bad_input.py", "x.sum() > 0")


def test_a_model_without_a_layer() -> None:
    model = module(lambda self, x: F.softmax(x, 1))
    refused(CompileError, lambda: compiled(model), "nothing would be quantized", "softmax")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.conv(x) * self.calls


def quantized_by_torch() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: compiled(conv_net()), ("compiled already",)),
        (lambda: conv_net().half(), ("weights are float16", "model.float()")),
        (lambda: conv_net(device="meta"), ("0.weight is on the meta device",)),
        (quantized_by_torch, ("2 is a Linear that torch has quantized", "float model")),
        (Counting().eval, ("called again", "counters of calls")),
        (
            lambda: module(
                lambda s, x: s.conv(x) + torch.rand_like(x[:, :1]), conv=nn.Conv2d(3, 4, 1)
            ),
            ("called again", "random numbers"),
        ),
    ],
)
def test_models_that_are_none(make: Callable[[], Any], parts: tuple[str, ...]) -> None:
    refused(ModelError, lambda: compiled(make()), *parts)


def test_a_traced_module_of_torchscript() -> None:
    traced = torch.jit.trace(conv_net(), images())
    refused(TraceError, lambda: compiled(traced), "TorchScript", "nn.Module it came from")


@pytest.mark.parametrize(
    ("model", "example", "part"),
    [
        (nn.Linear(8, 4).eval(), torch.zeros(8), "a vector without a batch dimension"),
        (conv_net(), images()[0], "an image without a batch dimension"),
    ],
)
def test_inputs_without_a_batch_dimension(model: nn.Module, example: Tensor, part: str) -> None:
    refused(CompileError, lambda: compiled(model, calibration=[example]), part, "give batches")


def test_dynamic_quantization_asks_for_an_example_where_it_can_guess_none() -> None:
    model = module(lambda self, x, y: self.fc(x) + y, fc=nn.Linear(8, 4))
    refused(CalibrationError, lambda: fxquant.compile(model, "dynamic_w8a8"), "one batch", "traced")


def test_a_stage_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "m.fxq"
    compiled(conv_net()).save(path)
    stages = fxquant.load(path).stages
    refused(InputError, lambda: stages["float"], "no stage 'float'", "integer, x86", "loaded file")


# -- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite(value: float) -> None:
    bad = images()
    bad[1, 0, 0, 0] = value
    refused(
        CalibrationError,
        lambda: compiled(calibration=[images(), bad]),
        "batch 1, input 0 holds 1 values that are NaN or infinite",
        "preprocessing",
    )


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, 3, 8, 8), iter(())])
def test_empty_calibration(nothing: Any) -> None:
    refused(CalibrationError, lambda: compiled(calibration=nothing), "is empty", "at least one")


def test_no_calibration() -> None:
    refused(
        CalibrationError,
        lambda: fxquant.compile(Residual(), "w8a8"),
        "no calibration data",
        "calibration=batches",
    )


@pytest.mark.parametrize(
    ("calibration", "part"),
    [
        ("images", "is a str"),
        (3, "is a int"),
        ({"x": 1}, "is a dict"),
        ([3], "batch 0, input 0 is a int, not a tensor"),
    ],
)
def test_calibration_that_holds_no_tensors(calibration: Any, part: str) -> None:
    refused(CalibrationError, lambda: compiled(calibration=calibration), part)


def test_calibration_with_too_few_inputs() -> None:
    model = module(lambda self, x, y: self.conv(x) + y, conv=nn.Conv2d(3, 3, 1))
    refused(
        CalibrationError,
        lambda: compiled(model, calibration=[images()]),
        "holds 1 values, the model takes 2",
    )


def test_calibration_that_the_model_does_not_take() -> None:
    refused(
        ModelError,
        lambda: compiled(calibration=images(channels=1)),
        "does not run on the first calibration batch",
        "stem",
        "[4, 1, 8, 8]",
    )


def test_a_later_batch_that_the_model_does_not_take() -> None:
    refused(
        CalibrationError,
        lambda: compiled(calibration=[images(), images(channels=1)]),
        "batch 1 (float32[4, 1, 8, 8]) does not run",
    )


# -- recipes and targets -------------------------------------------------------------------------


def test_unknown_recipe() -> None:
    refused(
        RecipeError,
        lambda: fxquant.compile(Residual(), "w8a9", calibration=images()),
        "unknown recipe 'w8a9'",
        "did you mean 'w8a8'",
    )


def test_a_recipe_that_is_none() -> None:
    refused(
        RecipeError,
        lambda: fxquant.compile(Residual(), {"fusion": "all"}, calibration=images()),  # type: ignore[arg-type]
        "found a dict",
        "Recipe.from_dict",
    )


def test_unknown_recipe_key() -> None:
    refused(
        RecipeError,
        lambda: fxquant.Recipe.named("w8a8").replace({"weights.bit": 4}),
        "unknown key 'weights.bit'",
        "did you mean 'weights.bits'",
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"float": ["conv3"]}, ("float[0]: 'conv3' matches no module", "did you mean 'conv")),
        ({"start_at": "steem"}, ("start_at: 'steem' matches no module", "did you mean 'stem'")),
        (
            {"overrides": [{"type": "Conv3d", "weights": {"bits": 4}}]},
            ("overrides[0]: 'type:Conv3d' matches no module", "did you mean 'Conv2d'"),
        ),
    ],
)
def test_a_selector_that_matches_nothing(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(RecipeError, lambda: compiled(changes=changes), *parts)


def test_a_recipe_that_leaves_nothing_to_quantize() -> None:
    refused(
        CompileError,
        lambda: compiled(changes={"float": ["*"]}),
        "nothing would be quantized: the recipe keeps it in float",
    )


def test_unknown_target() -> None:
    refused(TargetError, lambda: compiled(target="x68"), "unknown target 'x68'", "'x86'?")
    refused(TargetError, lambda: compiled(target="atuo"), "unknown target 'atuo'", "'auto'?")
    refused(TargetError, lambda: compiled().to_target("arm"), "'arm': known are x86, ")


# -- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["x86", "reference"])
@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ((images().double(),), "input 0 is float64[any, 3, 8, 8], expected float32[any, 3, 8, 8]"),
        ((images().byte(),), "input 0 is uint8[any, 3, 8, 8], expected float32[any, 3, 8, 8]"),
        ((images()[0],), "input 0 is float32[any, 8, 8], expected float32[any, 3, 8, 8]"),
        ((images(channels=1),), "input 0 is float32[any, 1, 8, 8], expected float32[any, 3, 8, 8]"),
        ((images().numpy(),), "input 0 is a ndarray, expected float32[any, 3, 8, 8]"),
        ((), "the model takes 1 inputs, found 0"),
        ((images(), images()), "the model takes 1 inputs, found 2"),
    ],
)
def test_wrong_input_at_run_time(target: str, inputs: tuple[Any, ...], part: str) -> None:
    q = compiled(conv_net(), target=target)
    refused(InputError, lambda: q(*inputs), part)


TARGETS = tuple(fxquant.available_targets())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    q, bad = compiled(conv_net()), images()
    bad[0, 0, 0, 0] = value
    refused(InputError, lambda: q(bad), "input 0 holds 1 values that are NaN or infinite")


def test_a_sum_that_overflows_is_no_infinite_input() -> None:
    compiled(conv_net())(torch.full_like(images(), 1e38))


@pytest.mark.parametrize("target", TARGETS)
def test_unchecked_a_nan_is_zero_and_infinity_is_clipped(target: str) -> None:
    q = compiled(conv_net(), target=target, check_inputs=False)
    bad = images()
    bad[0, 0], bad[1, 0], bad[2, 0] = float("nan"), float("inf"), -float("inf")
    assert torch.equal(q(bad), q(bad.nan_to_num(0.0, 1e20, -1e20)))


@pytest.mark.parametrize("target", TARGETS)
def test_unchecked_a_nan_behind_a_float_layer_is_zero(target: str) -> None:
    model = nn.Sequential(nn.Softsign(), nn.Conv2d(3, 4, 3)).eval()
    q = compiled(model, target=target, check_inputs=False)
    bad, zero = images(), images()
    bad[0, 0], zero[0, 0] = float("nan"), 0.0
    assert torch.equal(q(bad), q(zero))


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artefact") / "m.fxq"
    compiled(conv_net()).save(path)
    return path


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(ArtifactError, lambda: fxquant.load(tmp_path / "m.fxq"), "m.fxq", "no such file")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(saved: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "short.fxq"
    path.write_bytes(saved.read_bytes()[:kept])
    refused(ArtifactError, lambda: fxquant.load(path), "short.fxq", "truncated")


def test_any_flipped_byte_is_found(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    path = tmp_path / "flipped.fxq"
    for position in range(0, len(content), max(1, len(content) // 60)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError) as caught:
            fxquant.load(path)
        assert "\n" not in str(caught.value)
        assert "flipped.fxq" in str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no tensors at all " * 20)
    refused(ArtifactError, lambda: fxquant.load(path), "notes.txt", "no fxquant artefact")


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(Residual().state_dict(), path)
    refused(
        ArtifactError, lambda: fxquant.load(path), "no fxquant artefact", "fxquant compile --save"
    )


def parts(saved: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(saved), framework="pt") as file:
        metadata = json.loads(file.metadata()["fxquant"])
    del metadata["digest"]
    return load_file(saved), metadata


def put_together(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    whole = {**metadata, "digest": digest_of(tensors, metadata)}
    save_file(tensors, path, metadata={"fxquant": json.dumps(whole)})
    return path


def rewritten(saved: Path, path: Path, change: Callable[[dict[str, str]], None]) -> Path:
    """A copy of the file with other metadata and the digest that belongs to it."""
    tensors, metadata = parts(saved)
    change(metadata)
    return put_together(path, tensors, metadata)


def test_a_newer_version(saved: Path, tmp_path: Path) -> None:
    newer = str(FORMAT_VERSION + 1)
    path = rewritten(saved, tmp_path / "n.fxq", lambda data: data.update(format_version=newer))
    refused(
        ArtifactError,
        lambda: fxquant.load(path),
        f"format version {newer}",
        f"up to {FORMAT_VERSION}",
        "upgrade fxquant",
    )


@pytest.mark.parametrize(
    ("op", "target"),
    [
        ("call_function", "os.system"),
        ("call_function", "builtins.eval"),
        ("call_function", "torch.load"),
        ("call_function", "torch.hub.load"),
        ("call_function", "torch.from_file"),
        ("call_function", "operator.attrgetter"),
        ("call_function", "functional.__import__"),
        ("call_method", "__reduce__"),
        ("call_method", "apply_"),
        ("call_method", "map_"),
        ("call_method", "register_hook"),
        ("call_method", "__setstate__"),
        ("call_module", "weights"),
        ("get_attr", "__class__.__init__.__globals__"),
    ],
)
def test_a_crafted_file_runs_no_code(saved: Path, tmp_path: Path, op: str, target: str) -> None:
    def change(data: dict[str, str]) -> None:
        graph = json.loads(data["graph"])
        evil = {"name": "evil", "op": op, "target": target, "args": ["true"], "kwargs": {}}
        graph["nodes"].insert(1, evil)
        data["graph"] = json.dumps(graph)

    path = rewritten(saved, tmp_path / "crafted.fxq", change)
    refused(ArtifactError, lambda: fxquant.load(path), "crafted.fxq", target)


@pytest.mark.parametrize("name", ["x=print(1), y", "a.b", "1x", "None", ""])
def test_a_crafted_keyword_never_becomes_code(saved: Path, tmp_path: Path, name: str) -> None:
    # torch.fx writes the Python that runs a graph from its names.
    def change(data: dict[str, str]) -> None:
        graph = json.loads(data["graph"])
        source = graph["nodes"][0]["name"]
        call = {"op": "call_function", "target": "torch.relu", "args": [{"node": source}]}
        graph["nodes"].insert(1, {**call, "name": "evil", "kwargs": {name: 1}})
        data["graph"] = json.dumps(graph)

    path = rewritten(saved, tmp_path / "crafted.fxq", change)
    refused(ArtifactError, lambda: fxquant.load(path), "crafted.fxq")


@pytest.mark.parametrize("name", ["x=print(1)", "x: print(1)", "*x", "lambda"])
def test_a_crafted_input_never_becomes_code(saved: Path, tmp_path: Path, name: str) -> None:
    def change(data: dict[str, str]) -> None:
        graph = json.loads(data["graph"])
        graph["nodes"][0]["target"] = name
        data["graph"] = json.dumps(graph)

    path = rewritten(saved, tmp_path / "crafted.fxq", change)
    refused(ArtifactError, lambda: fxquant.load(path), "crafted.fxq", "no name of an argument")


@pytest.mark.parametrize("name", ['x") or print("1', "x\nprint(1)", "x\\", "a..b"])
def test_a_crafted_tensor_never_becomes_code(saved: Path, tmp_path: Path, name: str) -> None:
    tensors, metadata = parts(saved)
    path = put_together(
        tmp_path / "crafted.fxq", {**tensors, f"weights.{name}": torch.zeros(1)}, metadata
    )
    refused(ArtifactError, lambda: fxquant.load(path), "crafted.fxq", "no name of a tensor")


@pytest.mark.parametrize("key", ["graph", "recipe", "report"])
@pytest.mark.parametrize("content", ["{", "[]", "7", '{"nodes": [{"op": "output"}]}'])
def test_metadata_that_cannot_be_understood(
    saved: Path, tmp_path: Path, key: str, content: str
) -> None:
    path = rewritten(saved, tmp_path / "odd.fxq", lambda data: data.update({key: content}))
    refused(ArtifactError, lambda: fxquant.load(path), "odd.fxq", "cannot be understood")


def test_a_golden_output_that_is_not_met(saved: Path, tmp_path: Path) -> None:
    tensors, metadata = parts(saved)
    tensors["golden.output.0"] += 1.0
    path = put_together(tmp_path / "golden.fxq", tensors, metadata)
    refused(ArtifactError, lambda: fxquant.load(path), "golden", "compile again")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "m.fxq"
    refused(ArtifactError, lambda: compiled(conv_net()).save(path), "cannot write", "m.fxq")


def test_a_missing_weights_key_is_named(tmp_path: Path) -> None:
    model = load_model("tests.fxquant.small_networks:Residual")
    weights = {key: value for key, value in model.state_dict().items() if key != "head.bias"}
    save_file(weights, tmp_path / "w.safetensors")
    refused(
        ModelError,
        lambda: load_model("tests.fxquant.small_networks:Residual", tmp_path / "w.safetensors"),
        "w.safetensors does not fit the model",
        "1 of",
        "keys missing (head.bias)",
    )


# -- images --------------------------------------------------------------------------------------


def folder(path: Path, label: int) -> Path:
    Image.new("RGB", (8, 8)).save(path / "a.png")
    (path / "labels.csv").write_text(f"file,label\na.png,{label}\n")
    return path


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    folder(tmp_path, 0)
    (tmp_path / "a.png").write_text("no picture")
    refused(
        DataError,
        lambda: list(open_batches(tmp_path, preprocessing="none")),
        "a.png",
        "cannot be read as an image",
        "remove it",
    )


def test_a_label_out_of_range(tmp_path: Path) -> None:
    folder(tmp_path, 4)
    batches = open_batches(tmp_path, preprocessing="none")
    refused(
        DataError,
        lambda: evaluate(Residual(), batches, classes=4),
        "a.png: label 4 is out of range",
        "4 classes, 0 to 3",
    )


def test_every_error_of_fxquant_is_one_class() -> None:
    kinds = [value for value in vars(fxquant.errors).values() if isinstance(value, type)]
    errors = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(errors) == 12
    assert all(issubclass(kind, FxquantError) for kind in errors)
    assert re.search(r"TraceError", fxquant.errors.__doc__ or "")
