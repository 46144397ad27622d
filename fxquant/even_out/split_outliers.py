"""Outlier channels in the middle of an MLP, computed apart so that each part has its own grid.

One channel of a hidden value that reaches 25 times as far as all others makes one grid for the
tensor 25 times as coarse (Dettmers et al., LLM.int8(), NeurIPS 2022, compute such channels apart
in float). Split by the rows W₁[i], b₁[i] of the first layer and the columns W₂[:, i] of the second,

    W₂ f(W₁ x + b₁) + b₂ = Σ_P  W₂[:, P] f(W₁[P] x + b₁[P])  + b₂

holds for every partition of the channels into sets P and every elementwise f, so that each set
is a pair of ordinary layers with scales of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import CalibrationError, RecipeError
from fxquant.plan.operations import Kind, classify, layer_of
from passes import FusedLayer, InferRanges, TensorInfo, add_relu, tensor_info
from passes.infra.rewrite import Rewriter

__all__ = ["split_outlier_channels"]

_DONE = "split_outliers"  # in the meta of the layers that a split made
_JOINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (torch.add, {"alpha": 1}),
    "relu": (add_relu, {}),
}


def split_outlier_channels(
    fused: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    *,
    ratio: float = 4.0,
    most: float = 0.05,
) -> list[str]:
    """Compute outlier channels between two linear layers apart; returns the notes.

        h = fc1(x)                         h = fc1(x)            o = fc1_outliers(x)
        h = F.gelu(h)                      h = F.gelu(h)         o = F.gelu(o)
        y = fc2(h)                         m = fc2(h)            p = fc2_outliers(o)
                                           y = torch.add(m, p)

    Between the layers may stand any elementwise functions of one value, or none, and nobody else
    may read what is in between. Of the channels by their largest magnitude in `data`, the fewest
    are taken whose removal shrinks the range at least `ratio` times; then again, into a pair of
    layers of their own (``fc1_outliers_2``), while their number in all is at most `most` of the
    channels (or one). The same function up to float rounding. The parts keep the layers' module
    path in their meta, so that selectors of a recipe pick them with the layer. Of two pairs that
    share a layer the one that shrinks more is split, and what was split once is left alone. Pairs
    of convolutions are not split.

    Args:
        fused: the annotated fused graph; its layers are replaced, not written into.
        data: tuples of the graph's arguments, read once, and not at all where no place is found.
        ratio: above 1.
        most: the share of the channels that may be computed apart, 0 to 1.

    Raises RecipeError for a ratio or a share out of bounds, CalibrationError for the data.
    """
    if not ratio > 1:
        raise RecipeError(f"split_outliers: a ratio of ranges is above 1, got {ratio!r}")
    if not 0 < most <= 1:
        raise RecipeError(f"split_outliers: a share of channels is in (0, 1], got {most!r}")
    places = _find(fused)
    maxima = _sweep(fused, data, places)
    chosen = {
        place: groups for place in places if (groups := _outliers(maxima[place.path], ratio, most))
    }
    rewriter = Rewriter(fused)
    notes: dict[_Place, str] = {}
    for place in sorted(chosen, key=lambda place: -_gain(maxima[place.path], chosen[place])):
        if not any({place.first, place.second} & {done.first, done.second} for done in notes):
            notes[place] = _note(place.path, maxima[place.path], chosen[place])
            _split(rewriter, place, chosen[place])
    if rewriter.finish():
        InferRanges().run(fused)
    return [notes[place] for place in places if place in notes]


# -- the search --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """Two linear layers and the elementwise functions between them."""

    first: fx.Node
    functions: tuple[fx.Node, ...]
    second: fx.Node
    path: str  # of the second layer


def _find(fused: fx.GraphModule) -> list[_Place]:
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")

    def is_linear(node: fx.Node) -> bool:
        # A layer that also reads a residual has two inputs.
        return (
            isinstance(layer_of(node, fused), nn.Linear)
            and calls[node.target] == 1
            and len(node.args) == len(node.all_input_nodes) == 1
            and _DONE not in node.meta
        )

    found = []
    for first in fused.graph.nodes:
        if not is_linear(first) or len(first.users) != 1:
            continue
        functions: list[fx.Node] = []
        (node,) = first.users
        while classify(node, fused).kind is Kind.TABLE and len(node.users) == 1:
            functions.append(node)
            (node,) = node.users
        values = (first, *functions, node)
        annotated = all(tensor_info(value) is not None for value in values)
        if is_linear(node) and annotated and _activation(fused, node) in _JOINS:
            found.append(_Place(first, tuple(functions), node, str(node.target)))
    return found


def _activation(fused: fx.GraphModule, node: fx.Node) -> str:
    module = fused.get_submodule(str(node.target))
    return module.activation if isinstance(module, FusedLayer) else "none"


def _sweep(
    fused: fx.GraphModule, data: Iterable[tuple[Any, ...]], places: list[_Place]
) -> dict[str, Tensor]:
    """The largest magnitude of each channel that each place's second layer reads, [C]."""
    maxima: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if x.numel():
                largest = x.detach().abs().reshape(-1, x.shape[-1]).amax(0)
                maxima[path] = torch.maximum(maxima.get(path, largest), largest)

        return see

    handles = [
        fused.get_submodule(place.path).register_forward_pre_hook(hook(place.path))
        for place in places
    ]
    try:
        with torch.no_grad():
            for index, batch in enumerate(data if places else ()):
                try:
                    fused(*batch)
                except RuntimeError as error:
                    raise CalibrationError(
                        f"calibration batch {index} does not run through the model: "
                        f"{str(error).partition(chr(10))[0]}"
                    ) from error
    finally:
        for handle in handles:
            handle.remove()
    for place in places:
        if place.path not in maxima:
            raise CalibrationError(
                f"the inputs of {place.path!r} were never seen: calibrate with some data"
            )
        if not bool(maxima[place.path].isfinite().all()):
            raise CalibrationError(
                f"the inputs of {place.path!r} hold NaN or infinite values: look at the inputs"
            )
    return maxima


def _outliers(largest: Tensor, ratio: float, most: float) -> list[Tensor]:
    """The outlier channels, in sets of like range, the farthest first; each in ascending order."""
    values, order = largest.double().sort(descending=True, stable=True)
    limit = min(max(1, int(most * len(values))), len(values) - 1)
    groups: list[Tensor] = []
    start = 0
    while True:
        # Beside zeros, which every grid holds, nothing is an outlier.
        near = values[start : limit + 1]
        beyond = torch.nonzero((near > 0) & (near * ratio <= values[start]))
        if not len(beyond):
            return groups
        end = start + int(beyond[0])
        groups.append(order[start:end].sort().values)
        start = end


def _others(largest: Tensor, groups: list[Tensor]) -> float:
    return float(largest.index_fill(0, torch.cat(groups), 0.0).amax())


def _gain(largest: Tensor, groups: list[Tensor]) -> float:
    return float(largest.amax()) / _others(largest, groups)


# -- the rewrite -------------------------------------------------------------------------


def _split(rewriter: Rewriter, place: _Place, groups: list[Tensor]) -> None:
    root = rewriter.graph_module
    first: Any = layer_of(place.first, root)
    second: Any = layer_of(place.second, root)
    before, behind = (_activation(root, node) for node in (place.first, place.second))
    main = torch.ones(first.out_features, dtype=torch.bool)
    main[torch.cat(groups)] = False
    rest = torch.nonzero(main).flatten()

    sums = []
    for group in groups:
        with rewriter.before(place.second):
            value = rewriter.call_module(
                _free_path(root, str(place.first.target)),
                _rows(first, group, before),
                place.first.args,
                like=place.first,
            )
            _annotate(value, place.first, len(group))
            for function in place.functions:
                value = _copy_call(rewriter, function, value)
                _annotate(value, function, len(group))
            total = rewriter.call_module(
                _free_path(root, place.path),
                _columns(second, group, None),
                (value,),
                like=place.second,
            )
        total.meta[_DONE] = True
        sums.append(total)

    rewriter.set_module(str(place.first.target), _rows(first, rest, before))
    for node in (place.first, *place.functions):
        _annotate(node, node, len(rest))
    # The layer comes last, so that what a recipe says of the last layer holds for it.
    with rewriter.before(place.second):
        total = rewriter.call_module(
            place.path,
            _columns(second, rest, second.bias),
            place.second.args,
            like=place.second,
            name=f"{place.second.name}_main",
        )
        total.meta[_DONE] = True
        for other in sums[1:]:
            total = rewriter.call_function(
                torch.add, (total, other), {"alpha": 1}, like=place.second
            )
    join, kwargs = _JOINS[behind]
    rewriter.replace_call(place.second, join, (total, sums[0]), kwargs, sources=(place.first,))


def _rows(layer: nn.Linear, channels: Tensor, activation: str) -> nn.Module:
    bias = None if layer.bias is None else layer.bias.detach()[channels]
    rows = _linear(layer.weight.detach()[channels], bias)
    return rows if activation == "none" else FusedLayer(rows, activation).eval()


def _columns(layer: nn.Linear, channels: Tensor, bias: Tensor | None) -> nn.Linear:
    return _linear(layer.weight.detach()[:, channels], bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta").eval()
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _copy_call(rewriter: Rewriter, node: fx.Node, operand: fx.Node) -> fx.Node:
    args: Any = fx.map_arg(node.args, lambda source: operand)
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: operand)
    target: Any = node.target
    return rewriter.call_function(target, args, kwargs, like=node, name=f"{node.name}_outliers")


def _annotate(node: fx.Node, like: fx.Node, channels: int) -> None:
    info = tensor_info(like)
    assert info is not None
    node.meta["tensor"] = TensorInfo((*info.shape[:-1], channels), info.dtype)
    node.meta[_DONE] = True


def _free_path(root: nn.Module, path: str) -> str:
    parent, _, leaf = path.rpartition(".")
    owner = root.get_submodule(parent)
    name, number = f"{leaf}_outliers", 2
    while hasattr(owner, name):
        name, number = f"{leaf}_outliers_{number}", number + 1
    return f"{parent}.{name}" if parent else name


def _note(path: str, largest: Tensor, groups: list[Tensor]) -> str:
    others = _others(largest, groups)
    parts = []
    for index, group in enumerate(groups):
        of = "" if index else f" of {len(largest)} channels"
        verb = "reaches" if len(group) == 1 else "reach"
        parts.append(f"{len(group)}{of} {verb} {float(largest[group].amax()):.3g}")
    return f"{path}: {', '.join(parts)}, the others {others:.3g}: computed apart"
