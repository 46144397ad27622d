"""One file: what is in it, and that it gives the same model back."""

from __future__ import annotations

import copy
import io
import json
import math
import operator
import os
import pickle
import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import fxquant
from fxquant.artifact.float_modules import build_module
from fxquant.artifact.graph_json import GraphFormatError, _names, decode_graph, encode_graph
from fxquant.errors import ArtifactError, InputError
from tests.fxquant.small_networks import compiled, conv_net, images, module

RECIPES = ("w8a8", "w8a8_x86", "w8a32", "w4a32", "w4a8", "w4a4_head_stem8")


def loaded(q: Any, path: Path, target: str = "x86") -> Any:
    q.save(path)
    return fxquant.load(path, target)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gives_the_same_bits_back(recipe: str, tmp_path: Path) -> None:
    q = compiled(recipe=recipe)
    for target in ("x86", "reference"):
        again = loaded(q, tmp_path / "m.fxq", target)
        assert torch.equal(again(images()), q.to_target(target)(images())), target


def test_keeps_recipe_report_and_example(tmp_path: Path) -> None:
    q = compiled(changes={"name": "mine"})
    again = loaded(q, tmp_path / "m.fxq")
    assert again.recipe == q.recipe
    assert again.report.int8_share == q.report.int8_share
    assert [x.shape for x in again.example] == [x.shape for x in q.example]
    assert list(again.stages) == ["integer", "x86"]


def test_a_loaded_model_is_saved_as_the_same_file(tmp_path: Path) -> None:
    q = compiled()
    q.save(tmp_path / "a.fxq")
    fxquant.load(tmp_path / "a.fxq").save(tmp_path / "b.fxq")
    first, second = (fxquant.load(tmp_path / name) for name in ("a.fxq", "b.fxq"))
    assert torch.equal(first(images()), second(images()))


def test_a_stage_that_no_file_holds_is_an_error_that_says_so(tmp_path: Path) -> None:
    again = loaded(compiled(), tmp_path / "m.fxq")
    with pytest.raises(InputError, match="no stage 'float', there are integer, x86; a loaded file"):
        again.stages["float"]


def test_any_batch_size_runs_after_loading(tmp_path: Path) -> None:
    again = loaded(compiled(), tmp_path / "m.fxq")
    assert again(images(7)).shape == (7, 4)


def test_holds_integer_weights(tmp_path: Path) -> None:
    compiled().save(tmp_path / "m.fxq")
    with safe_open(str(tmp_path / "m.fxq"), framework="pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["fxquant"])
    assert types["weights.conv1.weight"] == torch.int8
    assert types["weights.conv1.bias"] == torch.int32
    names = {"graph", "shapes", "recipe", "report", "versions", "format_version", "digest"}
    assert set(metadata) == names | {"aliases", "golden"}
    assert set(json.loads(metadata["versions"])) >= {"fxquant", "torch"}


def test_names_need_not_be_words(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("block-1 (main)", nn.Conv2d(3, 4, 1))
    q = compiled(model.eval())
    assert torch.equal(loaded(q, tmp_path / "m.fxq")(images()), q(images()))


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.fxq"
    path.write_text("old")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxquant.artifact.file.save_file", fails)
    with pytest.raises(ArtifactError, match="No space left"):
        compiled(conv_net()).save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.fxq"]


def test_a_module_that_runs_as_code_cannot_be_saved(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else x + 1

    with pytest.warns(UserWarning, match=r"cannot be saved: module '1' \(Branches\)"):
        q = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), Branches()).eval())
    with pytest.raises(ArtifactError, match=r"m\.fxq.*'1' \(Branches\) runs in float as code"):
        q.save(tmp_path / "m.fxq")


def test_inputs_too_large_for_half_precision(tmp_path: Path) -> None:
    x = images() * 1e6
    again = loaded(compiled(conv_net(), calibration=x), tmp_path / "m.fxq")
    assert again(x).isfinite().all()


def test_structures_and_several_inputs(tmp_path: Path) -> None:
    model = module(
        lambda self, x, y: {"a": [self.conv(x) + self.conv(y)], "size": x.size(2)},
        conv=nn.Conv2d(3, 4, 1),
    )
    batch = (images(), images())
    again = loaded(compiled(model, calibration=[batch]), tmp_path / "m.fxq")(*batch)
    assert again["size"] == 8
    assert again["a"][0].shape == (4, 4, 8, 8)


def test_float_parts_are_saved_as_functions(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).flatten(2)).unflatten(2, (8, 8))
        y = F.softmax(y, 1).masked_fill(y > 100, 0.0)[..., ::2] - self.shift
        return y.new_zeros(1) + y

    model = module(
        forward, conv=nn.Conv2d(3, 4, 1), norm=nn.LayerNorm(64), shift=torch.randn(4, 1, 1)
    )
    q = compiled(model)
    assert torch.equal(loaded(q, tmp_path / "m.fxq")(images()), q(images()))


def test_arguments_of_every_kind_come_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.clamp, (x,), {"min": float("-inf"), "max": 2.5})
    y = graph.call_function(torch.sum, (y, (1,)), {"dtype": torch.float64})
    y = graph.call_method("to", (y,), {"memory_format": torch.contiguous_format})
    z = graph.call_function(operator.getitem, (y, (slice(None, 2), Ellipsis)))
    graph.output({"z": [z, (None, True)]})
    original = fx.GraphModule(nn.Module(), graph)
    again = decode_graph(json.loads(json.dumps(encode_graph(original))), {})
    value = torch.randn(3, 4)
    expected, found = original(value), again(value)
    assert torch.equal(expected["z"][0], found["z"][0])
    assert found["z"][1] == (None, True)
    assert [node.name for node in again.graph.nodes] == [node.name for node in original.graph.nodes]


def test_functions_outside_the_table_are_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(print, (graph.placeholder("x"),)))
    with pytest.raises(GraphFormatError, match=r"'print'.*table of operations"):
        encode_graph(fx.GraphModule(nn.Module(), graph))


def test_attributes_of_tensors_are_read_and_no_others() -> None:
    def reads(attribute: str) -> fx.GraphModule:
        graph = fx.Graph()
        x = graph.placeholder("x")
        found = graph.call_function(getattr, (x, attribute))
        graph.output(graph.call_function(torch.zeros, (3,), {"device": found}))
        return fx.GraphModule(nn.Module(), graph)

    written = encode_graph(reads("device"))
    assert torch.equal(decode_graph(written, {})(torch.ones(3)), torch.zeros(3))
    with pytest.raises(GraphFormatError, match="getattr"):
        encode_graph(reads("__class__"))
    written["nodes"][1]["args"][1] = "__class__"
    with pytest.raises(GraphFormatError, match="no attribute that a graph reads"):
        decode_graph(written, {})


@pytest.mark.parametrize("word", ["load", "save", "file", "hub", "compile", "exec", "import"])
def test_the_table_has_nothing_that_reaches_outside(word: str) -> None:
    assert not [name for name in _names().values() if word in re.split(r"[._]", name)]


def test_no_image_is_in_the_file(tmp_path: Path) -> None:
    q = compiled()
    q.save(tmp_path / "m.fxq")
    stored = load_file(tmp_path / "m.fxq")["golden.input.0"].float()
    image = q.example[0]
    assert stored.shape == image.shape
    assert float(stored.min()) == pytest.approx(float(image.min()), rel=2**-11)
    correlation = torch.corrcoef(torch.stack([stored.flatten(), image.flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / stored.numel() ** 0.5


def test_large_outputs_are_stored_as_a_sample(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=32)).eval()
    compiled(model).save(tmp_path / "m.fxq")
    assert load_file(tmp_path / "m.fxq")["golden.output.0"].numel() <= 1024


def test_a_layer_that_is_called_twice_is_stored_once(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))

    q = compiled(module(forward, conv=nn.Conv2d(3, 3, 3)), target="reference")
    q.save(tmp_path / "m.fxq")
    stored = load_file(tmp_path / "m.fxq")
    assert sum(tensor.shape == (3, 3, 3, 3) for tensor in stored.values()) == 1
    x = images()
    assert torch.equal(fxquant.load(tmp_path / "m.fxq", "reference")(x), q(x))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w8a32"])
def test_the_size_in_the_report_is_that_of_the_file(recipe: str, tmp_path: Path) -> None:
    q = compiled(recipe=recipe)
    before = q.report.size_bytes
    q.save(tmp_path / "m.fxq")
    size = (tmp_path / "m.fxq").stat().st_size
    assert before == size
    assert fxquant.load(tmp_path / "m.fxq").report.size_bytes == size


def test_a_report_that_grew_has_the_size_of_its_file(tmp_path: Path) -> None:
    q = compiled()
    q.report = replace(q.report, notes=(*q.report.notes, "another note"))
    q.save(tmp_path / "m.fxq")
    assert q.report.size_bytes == (tmp_path / "m.fxq").stat().st_size


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        compiled().save(tmp_path / "m.fxq")
    finally:
        os.umask(before)
    assert (tmp_path / "m.fxq").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("target", list(fxquant.available_targets()))
def test_a_compiled_model_is_pickled_and_copied(target: str) -> None:
    q, x = compiled(target=target, check_inputs=False), images()
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(q)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(q),
    ]
    for copied in copies:
        assert (copied.target, copied.check_inputs) == (target, False)
        assert torch.equal(copied(x), q(x))


Pair = namedtuple("Pair", "first second")


class FloatInside(nn.Module):
    """A convolution, a layer that stays float, and a convolution."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.conv, self.inside, self.last = nn.Conv2d(3, 4, 3), inside, nn.Conv2d(4, 2, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.conv(x)))


class Recurrent(nn.Module):
    """A convolution whose columns a recurrent layer reads."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.conv, self.inside, self.last = nn.Conv2d(3, 4, 3), inside, nn.Linear(5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inside(self.conv(x).mean(2).transpose(1, 2))[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: FloatInside(nn.InstanceNorm2d(4, affine=True)),
        lambda: FloatInside(nn.InstanceNorm2d(4, track_running_stats=True)),
        lambda: FloatInside(nn.LocalResponseNorm(2)),
        lambda: FloatInside(nn.Sequential(nn.Unfold(2), nn.Fold((6, 6), 2))),
        lambda: Recurrent(nn.LSTM(4, 5, batch_first=True)),
        lambda: Recurrent(nn.GRU(4, 5, batch_first=True)),
        lambda: Recurrent(nn.RNN(4, 5, nonlinearity="relu", batch_first=True)),
        lambda: FloatInside(module(lambda self, x: torch.fft.rfft2(x).abs())),
    ],
)
def test_layers_that_stay_float_are_in_the_file(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    q = compiled(make(), target="reference")
    again = loaded(q, tmp_path / "m.fxq", "reference")
    assert torch.equal(again(images()), q(images()))
    assert torch.equal(loaded(again, tmp_path / "n.fxq", "reference")(images()), q(images()))


def test_a_named_tuple_comes_back_as_one(tmp_path: Path) -> None:
    model = module(lambda self, x: Pair(self.conv(x), second=x), conv=nn.Conv2d(3, 2, 3))
    q = compiled(model, target="reference")
    found = loaded(q, tmp_path / "m.fxq", "reference")(images())
    assert found._fields == Pair._fields
    assert torch.equal(found.first, q(images()).first)


def test_a_module_outside_of_the_table_is_never_built() -> None:
    entry = {"class": "Sequential", "arguments": {}, "why_float": None}
    with pytest.raises(KeyError, match="Sequential"):
        build_module(entry, {})


def test_a_file_of_format_1_is_read() -> None:
    """It was written when there were no later ones; its outputs are those of then."""
    q = fxquant.load(Path(__file__).parent / "version1.fxq", "reference")
    x = torch.linspace(-2, 2, 32).view(1, 2, 4, 4)
    assert q(x).tolist() == [[0.2917003631591797, -0.23942826688289642]]


def test_a_file_is_run_once_where_the_reference_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled().save(tmp_path / "m.fxq")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("the golden pair has shown what it computes")

    monkeypatch.setattr("fxquant.backends.checked.run_and_annotate", again)
    fxquant.load(tmp_path / "m.fxq", "reference")


@pytest.mark.parametrize(
    "behind",
    [
        lambda y: torch.cat([y, torch.zeros(y.shape[0], 1, 6, 6)], 1),
        lambda y: torch.fft.rfft2(y).abs(),
        lambda y: torch.linalg.vector_norm(y, 2, [1], True),
        lambda y: y[..., : math.ceil(y.shape[2] / 4)],
    ],
)
def test_saves_what_makes_tensors_and_functions_of_linalg_and_fft(
    behind: Any, tmp_path: Path
) -> None:
    model = module(lambda s, x: behind(s.conv(x)), conv=nn.Conv2d(3, 4, 3))
    x = images()[:, :, :8, :8]
    q = fxquant.compile(model.eval(), "w8a8", calibration=[x], target="reference")
    again = loaded(q, tmp_path / "m.fxq", "reference")
    assert torch.equal(again(x), q(x))
