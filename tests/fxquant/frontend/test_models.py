import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import real
from fxquant.errors import ModelError
from fxquant.frontend.models import load_model, load_weights

FACTORY = """
import torch
from torch import nn
module = nn.Linear(2, 3)
number = 3
def linear(num_classes=3):
    return nn.Sequential(nn.Linear(2, num_classes), nn.BatchNorm1d(num_classes))
def broken():
    raise RuntimeError("no luck")
def text():
    return "text"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory that is not on the path."""
    (tmp_path / "networks_of_test.py").write_text(FACTORY)
    (tmp_path / "needs_other.py").write_text("import not_installed_anywhere")
    (tmp_path / "raises.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "networks_of_test", raising=False)
    return "networks_of_test"


def linear_state() -> dict[str, torch.Tensor]:
    layer = nn.Linear(2, 3)
    return {key: tensor.clone() for key, tensor in layer.state_dict().items()}


def test_torchvision_model_in_eval_mode_is_the_same_each_time() -> None:
    first, second = (load_model("torchvision:squeezenet1_1", classes=7) for _ in range(2))
    assert not first.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert first(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model("torchvision:squeezenet1_1")
    assert torch.equal(torch.get_rng_state(), before)


def test_factory_or_module_from_the_working_directory(package: str) -> None:
    assert isinstance(load_model(f"{package}:linear"), nn.Sequential)
    assert load_model(f"{package}:linear", classes=5)[0].out_features == 5
    assert isinstance(load_model(f"{package}:module"), nn.Linear)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("mobilenet_v2", "write torchvision:NAME"),
        ("torchvision:mobilenetv2", "did you mean 'mobilenet_v2'"),
        ("nowhere.at.all:net", "no module 'nowhere'"),
        ("networks_of_test:linaer", "did you mean 'linear'"),
        ("networks_of_test:number", "is a int; expected a function"),
        ("networks_of_test:text", "returned a str"),
        ("networks_of_test:broken", "RuntimeError: no luck"),
        ("needs_other:net", "needs the module 'not_installed_anywhere'"),
        ("raises:net", "ZeroDivisionError"),
    ],
)
def test_wrong_model_is_an_error(package: str, spelling: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(spelling)


def test_weights_in_half_precision_are_cast(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in linear_state().items()}
    save_file(state, tmp_path / "w.safetensors")
    model = nn.Linear(2, 3)
    load_weights(model, tmp_path / "w.safetensors")
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, state["weight"].float())


def test_keys_of_data_parallel_are_understood(tmp_path: Path) -> None:
    state = linear_state()
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "w")
    model = nn.Linear(2, 3)
    load_weights(model, tmp_path / "w")
    assert torch.equal(model.bias, state["bias"])


def test_batch_counts_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in nn.BatchNorm2d(2).state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w")
    load_weights(nn.BatchNorm2d(2), tmp_path / "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, r"1 of 2 keys missing \(bias\)"),
        ({"extra": torch.zeros(1)}, r"1 keys that the model does not have \(extra\)"),
        ({"bias": torch.zeros(4)}, r"bias is \[4\] where the model has \[3\]"),
        ({"bias": torch.zeros(3, dtype=torch.int8)}, "torch.int8 where the model has"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    state = {key: value for key, value in (linear_state() | change).items() if value is not None}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")
    assert "w.safetensors" in str(caught.value)


@pytest.mark.skipif(not real.available(), reason="needs the real networks ($FXQUANT_DATA)")
@pytest.mark.parametrize("name", real.NETWORKS)
def test_real_weights_fit_their_networks(name: str) -> None:
    assert not real.NETWORKS[name].load().training


def test_a_file_that_is_no_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(ModelError, match=r"w\.pth: cannot be read as safetensors"):
        load_weights(nn.Linear(2, 3), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="no such weights file"):
        load_weights(nn.Linear(2, 3), tmp_path / "nowhere")


def test_networks_of_timm_go_by_name() -> None:
    pytest.importorskip("timm")
    model = load_model("timm:test_resnet.r160_in1k", classes=7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ModelError, match="did you mean 'resnet18'"):
        load_model("timm:resnet181")


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="pip install timm"):
        load_model("timm:resnet18")
