from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fxquant.errors import CalibrationError, ModelError, TraceError
from fxquant.frontend.inputs import arguments, bind
from fxquant.frontend.prepare import FloatLeaf
from fxquant.frontend.trace import trace
from passes import Canonicalize, EliminateNoops, SplitSharedModules
from passes.infra.verify import run_and_annotate
from tests.fxquant.tracing import IMAGE, same, targets
from tests.passes.checking import Function


def test_traces_through_containers_down_to_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    traced = same(model, IMAGE)
    assert targets(traced) == ["0", "1.0", "1.1"]
    assert traced.leaf_reasons == {}


def test_a_single_layer_is_a_graph_of_one_layer() -> None:
    assert targets(same(nn.Linear(8, 3), IMAGE)) == ["layer"]
    attention = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 2, 4)
    assert targets(same(attention, x, x, x)) == ["layer"]


@pytest.mark.parametrize("layer", [nn.LSTM(8, 4), nn.GRU(8, 4)])
def test_recurrent_layers_are_leaves(layer: nn.Module) -> None:
    model = Function(lambda s, x: s.layer(x)[0], layer=layer)
    assert targets(same(model, torch.randn(5, 2, 8))) == ["layer"]


def test_nodes_know_where_they_come_from() -> None:
    block = Function(lambda s, x: F.relu(s.conv(x)), conv=nn.Conv2d(3, 3, 1))
    traced = trace(nn.Sequential(block).eval())
    conv, relu = list(traced.graph_module.graph.nodes)[1:3]
    assert (conv.meta["module_path"], relu.meta["module_path"]) == ("0.conv", "0")
    assert relu.meta["origin"] == ("relu",)
    assert "test_trace.py" in relu.meta["stack_trace"]
    assert "F.relu(s.conv(x))" in relu.meta["stack_trace"]


# -- the model handed in ---------------------------------------------------------------------


def test_the_model_is_never_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).eval()
    traced = trace(model)
    own = dict(traced.graph_module.named_modules())
    assert own["0"] is not model[0]
    assert own["0"].weight is model[0].weight
    assert model[1].inplace


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.DataParallel(nn.DataParallel(m))])
def test_unwraps_data_parallel(wrap: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    assert targets(trace(wrap(model))) == ["0", "1"]


def test_unwraps_data_parallel_inside_of_a_model() -> None:
    model = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 1))), nn.ReLU()).eval()
    assert targets(trace(model)) == ["0.0", "1"]


def test_refuses_training_mode() -> None:
    with pytest.raises(ModelError, match=r"the model is in training mode: call model.eval\(\)"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_refuses_a_part_in_training_mode() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))).eval()
    model[0][0].train()
    with pytest.raises(ModelError, match=r"0\.0 \(BatchNorm2d\) is in training mode"):
        trace(model)


def test_a_part_that_does_not_care_may_be_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    model.append(nn.ReLU())
    trace(model)


def test_refuses_nan_and_infinite_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var[1] = float("inf")
    with pytest.raises(ModelError, match=r"1\.running_var holds infinite"):
        trace(model)
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ModelError, match=r"0\.weight holds NaN"):
        trace(model)


def test_a_mask_may_hold_infinities() -> None:
    model = Function(lambda s, x: x + s.mask)
    model.register_buffer("mask", torch.full((8, 8), float("-inf")))
    same(model, IMAGE)


def test_refuses_uninitialised_and_scripted_models() -> None:
    with pytest.raises(ModelError, match=r"0\.weight is not initialised"):
        trace(nn.Sequential(nn.LazyLinear(3)).eval())
    with pytest.raises(TraceError, match="TorchScript"):
        trace(torch.jit.script(nn.Sequential(nn.ReLU())).eval())


def test_refuses_dropout_that_always_drops() -> None:
    model = Function(lambda s, x: F.dropout(x)).eval()
    with pytest.raises(ModelError, match=r"drops at random even in eval mode.*test_trace\.py"):
        trace(model)


def test_frozen_batch_norm_is_a_batch_norm() -> None:
    norm = FrozenBatchNorm2d(3)
    norm.running_var.uniform_(1, 2)
    norm.running_mean.normal_()
    model = nn.Sequential(norm).eval()
    traced = trace(model)
    assert isinstance(traced.graph_module.get_submodule("0"), nn.BatchNorm2d)
    torch.testing.assert_close(traced.graph_module(IMAGE), model(IMAGE))


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_normalized_weights_become_plain_weights(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 1)))
    model(IMAGE)
    model.eval()
    names = list(model.state_dict())
    traced = same(model, IMAGE)
    layer = traced.graph_module.get_submodule("0")
    assert type(layer) is nn.Conv2d
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert list(model.state_dict()) == names


def test_layers_with_hooks_stay_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    traced = same(model, IMAGE)
    assert isinstance(traced.graph_module.get_submodule("0"), FloatLeaf)
    assert "forward hooks" in traced.leaf_reasons["0"]


class SamePadded(nn.Conv2d):
    """What the class is not described by: padding that depends on the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [0, int(x.shape[-1] % 2 == 0)] * 2))


class NegatedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.sum() < 0 else x)


class NegatedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.sum() < 0 else x)


@pytest.mark.parametrize(
    "layer", [SamePadded(3, 4, 2, stride=2), NegatedLinear(8, 4), NegatedNorm(3)]
)
def test_a_subclass_with_a_forward_of_its_own_is_not_the_layer(layer: nn.Module) -> None:
    traced = same(nn.Sequential(layer), IMAGE)
    assert isinstance(traced.graph_module.get_submodule("0"), FloatLeaf)
    assert "cannot be traced" in traced.leaf_reasons["0"]
    odd = torch.randn(2, 3, 7, 8)
    assert torch.equal(traced.graph_module(odd), layer(odd))


def test_a_layer_whose_forward_was_replaced_is_not_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    convolve = model[0].forward
    model[0].forward = lambda x: convolve(x) * 2
    assert "a forward of its own" in same(model, IMAGE).leaf_reasons["0"]


def test_hooks_of_the_root_are_part_of_the_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output + 1)
    assert targets(same(model, IMAGE)) == ["0"]


def test_a_call_that_is_overridden_is_part_of_the_graph() -> None:
    class Doubled(nn.Sequential):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x) * 2

    assert targets(same(Doubled(nn.Conv2d(3, 4, 1)), IMAGE)) == ["0"]
    assert targets(same(nn.Sequential(Doubled(nn.Conv2d(3, 4, 1))), IMAGE)) == ["0.0"]


# -- inputs and outputs ----------------------------------------------------------------------


class Optional(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None, *, negate: bool = False) -> Tensor:
        x = -x if negate else x
        return x if scale is None else x * scale


def test_unfed_parameters_keep_their_defaults() -> None:
    traced = same(Optional(), IMAGE)
    assert [n.name for n in traced.graph_module.graph.nodes] == ["x", "output"]
    same(Optional(), IMAGE, torch.ones(1), fed=2)


class Variadic(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] + tensors[-1]


def test_inputs_by_position() -> None:
    same(Variadic(), IMAGE, IMAGE, IMAGE, fed=3)


@pytest.mark.parametrize(
    ("model", "item", "names"),
    [
        (nn.ReLU(), IMAGE, ["input"]),
        (nn.DataParallel(nn.ReLU()), (IMAGE, torch.zeros(2)), ["input"]),
        (Optional(), IMAGE, ["x"]),
        (Optional(), (IMAGE, ["cat", "dog"]), ["x"]),
        (Optional(), {"scale": IMAGE, "x": IMAGE}, ["x", "scale"]),
        (Optional(), {"x": IMAGE, "negate": IMAGE}, ["x", "negate"]),
        (Variadic(), (IMAGE, IMAGE), ["tensors_0", "tensors_1"]),
    ],
)
def test_a_batch_feeds_the_parameters_of_forward(
    model: nn.Module, item: Any, names: list[str]
) -> None:
    assert list(bind(model, item, "batch 0")) == names


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ((IMAGE, torch.zeros(2)), r"the optional 'scale': .* an input or a label.*'scale': \.\.\."),
        ({"image": IMAGE}, "has the key 'image', forward has no such parameter, it has x, scale"),
        ({"scale": IMAGE}, "batch 0 lacks x"),
        ((), "batch 0 holds 0 values, the model takes 1"),
    ],
)
def test_asks_what_a_batch_means(item: Any, problem: str) -> None:
    with pytest.raises(CalibrationError, match=problem):
        bind(Optional(), item, "batch 0")


def test_inputs_by_name_skip_an_optional_one() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
            return x if a is not None or b is None else x - b

    graph = trace(Three().eval(), ["x", "b"]).graph_module
    positional, named = arguments(Three(), ["x", "b"], [IMAGE, 2 * IMAGE])
    assert (len(positional), list(named)) == (1, ["b"])
    assert torch.equal(graph(IMAGE, 2 * IMAGE), Three()(*positional, **named))


def test_refuses_another_number_of_inputs() -> None:
    with pytest.raises(CalibrationError, match="forward of Optional takes 1 to 2 inputs, 3 are"):
        trace(Optional().eval(), 3)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (x, [x + 1, x * 2]),
        lambda s, x: {"out": x.relu(), "aux": (x,)},
        lambda s, x: [x.mean()],
    ],
)
def test_outputs_keep_their_structure(forward: Any) -> None:
    same(Function(forward), IMAGE)


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    same(Sum(), IMAGE, IMAGE)


# -- what Python code can do -----------------------------------------------------------------


def _augmented(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    y += x
    h = x.shape[2]
    h += 0
    return z.reshape(-1, h)


def _assigned(s: Any, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 1
    return y


def _checked(s: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4
    assert x.shape[2] >= 2, "too small"
    assert not x.shape[2] < 2
    if x.shape[1] != 3 or x.shape[2] < 2:
        raise ValueError("three channels")
    if not x.size(0) > 0:
        raise ValueError("empty")
    return x.relu()


def _sliced_sizes(s: Any, x: Tensor) -> Tensor:
    return F.interpolate(x.view(*x.shape[:2], -1).view(x.shape), size=list(x.shape[-2:]))


PYTHON = {
    "augmented assignment": _augmented,
    "item assignment": _assigned,
    "checks": _checked,
    "slices of sizes": _sliced_sizes,
    "loop over chunks": lambda s, x: torch.cat([p.relu() for p in x.chunk(2, 2)]),
    "star of split": lambda s, x: torch.cat([*x.split([1, 2], 1)], 1),
    "torch._assert": lambda s, x: (torch._assert(x.size(1) == 3, "channels"), x + 1)[1],
    "layer made in forward": lambda s, x: nn.Softmax(dim=1)(nn.ReLU()(x)),
}


@pytest.mark.parametrize("case", PYTHON)
def test_follows(case: str) -> None:
    same(Function(PYTHON[case]), IMAGE)


def test_refuses_batch_norm_that_eval_does_not_reach() -> None:
    model = Function(lambda s, x: nn.BatchNorm2d(3)(x)).eval()
    with pytest.raises(ModelError, match="BatchNorm2d that is no registered submodule"):
        trace(model)


# -- real networks ---------------------------------------------------------------------------


def without_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The network on the meta device: its structure alone."""
    widths = torchvision.models.regnet.BlockParams.from_init_params

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):  # RegNet computes its widths with tensors
            return widths(*args, **kwargs)

    monkeypatch.setattr(torchvision.models.regnet.BlockParams, "from_init_params", on_cpu)
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf", "googlenet", "vit_b_32", "swin_t"]
)
def test_traces_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace(without_weights(name, monkeypatch)).leaf_reasons == {}


def test_the_graph_of_a_network_gives_what_the_network_gives() -> None:
    same(torchvision.models.shufflenet_v2_x0_5(num_classes=10), torch.randn(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_of_torchvision_traces_and_has_a_canonical_form(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = trace(without_weights(name, monkeypatch))
    assert traced.leaf_reasons == {}
    images = [torch.empty(2, 3, 224, 224, device="meta")]
    run_and_annotate(traced.graph_module, images, name=name)
    for step in (Canonicalize(), SplitSharedModules(), EliminateNoops()):
        step.run(traced.graph_module)
        run_and_annotate(traced.graph_module, images, name=name)
        assert not step.run(traced.graph_module).modified
