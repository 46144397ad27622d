"""What a model takes and gives keeps its shape: dicts, tuples, dataclasses, named tuples."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, InputError
from fxquant.frontend.structure import Names, Structure, names_of, structure_of
from tests.fxquant.small_networks import module


@dataclass
class Sample:
    image: Tensor
    scale: Tensor


class Found(NamedTuple):
    logits: Tensor
    doubled: Tensor


@dataclass
class Result:
    logits: Tensor
    doubled: Tensor


Pair = namedtuple("Pair", ["image", "scale"])
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SCALE = torch.rand(8, 4, generator=torch.Generator().manual_seed(1))


def network(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return module(forward, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4))


def logits(self: Any, x: Tensor) -> Tensor:
    found: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
    return found


def of_dict(self: Any, batch: dict[str, Tensor]) -> Tensor:
    return logits(self, batch["image"]) * batch["scale"]


def of_fields(self: Any, batch: Any) -> Tensor:
    return logits(self, batch.image) * batch.scale


def of_tuple(self: Any, batch: Any) -> Tensor:
    image, [scale] = batch
    return logits(self, image) * scale


INPUTS = [
    (of_dict, {"image": X, "scale": SCALE}),
    (of_fields, Pair(X, SCALE)),
    (of_fields, Sample(X, SCALE)),
    (of_tuple, (X, [SCALE])),
]


@pytest.mark.parametrize("target", list(fxquant.available_targets()))
@pytest.mark.parametrize(("forward", "batch"), INPUTS)
def test_an_input_is_a_container_on_every_target_and_from_a_file(
    forward: Callable[..., Any], batch: Any, target: str, tmp_path: Path
) -> None:
    q = fxquant.compile(network(forward), "w8a8", calibration=[(batch,)], target=target)
    q.save(tmp_path / "m.fxq")
    found = q(batch)
    for again in (
        fxquant.load(tmp_path / "m.fxq", target),
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
    ):
        assert torch.equal(again(batch), found)
        assert torch.equal(again(batch=batch), found)
    exact = q.to_target("reference")
    # The scaling of the logits stays float, so that no target may differ by more than a step.
    assert torch.allclose(exact(X, SCALE), found, atol=0.1)
    assert torch.equal(exact(batch), exact(X, SCALE))


@pytest.mark.parametrize("made", [Found, Result])
@pytest.mark.parametrize("target", list(fxquant.available_targets()))
def test_an_output_is_what_the_model_makes(made: Any, target: str, tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        found = logits(self, x)
        return made(logits=found, doubled=2 * found)

    q = fxquant.compile(network(forward), "w8a8", calibration=X, target=target)
    found = q(x=X)
    assert type(found) is made
    q.save(tmp_path / "m.fxq")
    again = fxquant.load(tmp_path / "m.fxq", target)(X)
    assert type(again).__name__ == made.__name__
    assert torch.equal(again.doubled, found.doubled)


def test_the_graph_takes_the_tensors_by_name() -> None:
    q = fxquant.compile(network(of_dict), "w8a8", calibration=[{"batch": INPUTS[0][1]}])
    assert q.input_names == ["batch_image", "batch_scale"]


def test_the_order_of_keys_does_not_matter() -> None:
    q = fxquant.compile(network(of_dict), "w8a8", calibration=[(INPUTS[0][1],)])
    assert torch.equal(q({"scale": SCALE, "image": X}), q({"image": X, "scale": SCALE}))


def test_another_shape_of_input_is_named() -> None:
    q = fxquant.compile(network(of_dict), "w8a8", calibration=[(INPUTS[0][1],)])
    with pytest.raises(InputError, match="input batch holds 'image', expected a dict of image, sc"):
        q({"image": X})
    with pytest.raises(InputError, match="input batch is a Tensor, expected a dict"):
        q(X)
    with pytest.raises(InputError, match="takes batch, found 0 inputs by position and x by name"):
        q(x=X)


def test_a_batch_of_another_shape_is_named() -> None:
    batches = [(INPUTS[0][1],), ({"image": X},)]
    with pytest.raises(CalibrationError, match="batch 1: input batch holds 'image'"):
        fxquant.compile(network(of_dict), "w8a8", calibration=batches)


def test_what_is_no_container_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"'image'\] is a object: give"):
        fxquant.compile(network(of_dict), "w8a8", calibration=[({"image": object()},)])


def test_labels_may_stand_behind_a_container() -> None:
    model, batch = network(of_dict), INPUTS[0][1]
    labels = model(batch).argmax(1)
    q = fxquant.compile(
        model,
        "w4a8",
        calibration=[(batch, labels)],
        accuracy_target=fxquant.Drop(30, confidence=0.5),
    )
    assert q.report.accuracy is not None
    assert fxquant.evaluate(q, [(batch, labels)]).top1 is not None


def test_a_constant_beside_tensors_is_held_to() -> None:
    names = names_of({"batch": {"image": X, "flag": True}})
    assert names == ("batch_image",)
    with pytest.raises(InputError, match=r"input batch\['flag'\] is False, it was True when"):
        names.flat({"batch": {"image": X, "flag": False}})


def test_names_are_not_given_twice() -> None:
    assert len(set(names_of({"a": {"b_c": X, "b": {"c": X}}}))) == 2


@pytest.mark.parametrize("value", [batch for _, batch in INPUTS])
def test_a_structure_comes_back_from_plain_data(value: Any) -> None:
    structure = structure_of(value, "x")
    again = Structure.from_json(structure.to_json())
    assert again == structure
    leaves = list(structure.flat(value, "x"))
    assert list(again.flat(value, "x")) == leaves
    assert list(again.flat(again.built(iter(leaves)), "x")) == leaves


def test_names_are_pickled() -> None:
    names = names_of({"batch": (X, {"scale": SCALE})})
    again = pickle.loads(pickle.dumps(names))
    assert isinstance(again, Names)
    assert again == names
    assert again.structures == names.structures
