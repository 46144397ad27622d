"""What an aten operator is in torch's Python functions: the table of `torch.export`'s graphs.

Where torch has a function or a method of the operator's name it takes the operator's arguments;
the tables hold the rest. Sources: ATen's native_functions.yaml and the signatures of
`torch.nn.functional`.

More than 300 lines, because it is one table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["AtenCall", "spell_aten"]

_END = 2**63 - 1
"""What aten writes for a slice without an end."""


@dataclass(frozen=True)
class AtenCall:
    """A call in torch's Python: a function, or where `target` is a string a method.

    `first`: it gives the first of the operator's results alone, the others are not read.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    first: bool = False


_Named = dict[str, Any]
_Rule = Callable[[_Named, fx.Node], "AtenCall | fx.Node | None"]


def spell_aten(
    node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AtenCall | fx.Node | None:
    """The call that `node`, a call of an aten operator, is; `args` and `kwargs` are its operands.

    A node where the operator gives back that operand; None where it only checks something.
    Shapes and dtypes are those of ``node.meta["val"]``, as `torch.export` notes them.
    """
    target: Any = node.target
    _, _, name = target._schema.name.partition("::")
    if target.namespace != "aten":
        return AtenCall(target, args, kwargs)
    given = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | dict(kwargs)
    for argument in target._schema.arguments:
        if argument.name not in given and argument.has_default_value():
            given[argument.name] = argument.default_value
    plain = name.removesuffix("_")
    writes = name != plain and not name.endswith("__")
    if (name if name in _RULES else plain) in _RULES:
        found = _RULES[name if name in _RULES else plain](given, node)
    else:
        found = _same_name(plain if writes else name, given, args, kwargs)
    if writes and isinstance(found, AtenCall) and name not in _RULES:
        return _written(found, plain)
    return found


def _written(call: AtenCall, name: str) -> AtenCall:
    """The call, which gives a new value, as one that writes into its first operand."""
    if hasattr(Tensor, f"{name}_"):
        return AtenCall(f"{name}_", call.args, call.kwargs)
    return AtenCall(call.target, call.args, {**call.kwargs, "inplace": True})


def _same_name(
    name: str, given: _Named, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AtenCall:
    kwargs = _without_placement(kwargs)
    if name in _FUNCTIONAL:
        parameters = [given[key] for key in _FUNCTIONAL[name]]
        return AtenCall(getattr(F, name), tuple(parameters))
    function = getattr(torch, name, None)
    if callable(function) and not isinstance(function, type):
        return AtenCall(function, args, kwargs)
    if hasattr(Tensor, name) and callable(getattr(Tensor, name)):
        return AtenCall(name, args, kwargs)
    function = getattr(F, name, None)
    if callable(function):
        return AtenCall(function, args, kwargs)
    overloads = getattr(torch.ops.aten, name)
    return AtenCall(getattr(overloads, overloads.overloads()[0]), args, kwargs)


def _without_placement(kwargs: Mapping[str, Any]) -> _Named:
    """Where a tensor lies is no part of what it is: graphs run on the CPU."""
    dropped = ("layout", "device", "pin_memory", "memory_format", "non_blocking")
    return {key: value for key, value in kwargs.items() if key not in dropped and value is not None}


# Functions of torch.nn.functional, with the operator's arguments in their order.
_FUNCTIONAL: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "batch_norm": (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    "instance_norm": (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("use_input_stats", "momentum", "eps"),
    ),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "silu": ("self",),
    "mish": ("self",),
    "relu6": ("self",),
    "hardswish": ("self",),
    "hardsigmoid": ("self",),
    "leaky_relu": ("self", "negative_slope"),
    "hardtanh": ("self", "min_val", "max_val"),
    "softplus": ("self", "beta", "threshold"),
    "log_sigmoid": ("self",),
    "glu": ("self", "dim"),
    "avg_pool2d": (
        *("self", "kernel_size", "stride", "padding", "ceil_mode"),
        *("count_include_pad", "divisor_override"),
    ),
    "avg_pool3d": (
        *("self", "kernel_size", "stride", "padding", "ceil_mode"),
        *("count_include_pad", "divisor_override"),
    ),
    "adaptive_avg_pool2d": ("self", "output_size"),
    "adaptive_avg_pool3d": ("self", "output_size"),
    "pad": ("self", "pad", "mode", "value"),
    "one_hot": ("self", "num_classes"),
}


def _operand(given: _Named, node: fx.Node) -> fx.Node:
    found = given["self"] if "self" in given else given["input"]
    assert isinstance(found, fx.Node)
    return found


def _nothing(given: _Named, node: fx.Node) -> None:
    return None


def _call(target: Callable[..., Any] | str, *names: str, **more: Any) -> _Rule:
    """A call of `target` with the operator's arguments `names`, and with `more`."""
    return lambda given, node: AtenCall(target, tuple(given[name] for name in names), more)


def _variadic(target: Any, name: str) -> _Rule:
    """A method whose arguments behind the tensor are the items of the operator's list."""
    return lambda given, node: AtenCall(target, (given["self"], *given[name]))


def _item(given: _Named, node: fx.Node, index: Any) -> AtenCall:
    """``x[..., index, ...]`` with `index` at the operator's dim."""
    dim = given["dim"]
    if dim < 0:
        dim += node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return AtenCall(operator.getitem, (given["self"], (*[slice(None)] * dim, index)))


def _slice(given: _Named, node: fx.Node) -> AtenCall | fx.Node:
    start, end, step = given["start"], given["end"], given["step"]
    # A slice that begins at 0 and has no end says so by None, as Python code would.
    start = None if isinstance(start, int) and start == 0 else start
    end = None if isinstance(end, int) and end == _END else end
    if start is None and end is None and step == 1:
        return _operand(given, node)
    return _item(given, node, slice(start, end, None if step == 1 else step))


def _index(given: _Named, node: fx.Node) -> AtenCall:
    indices = tuple(slice(None) if index is None else index for index in given["indices"])
    return AtenCall(operator.getitem, (given["self"], indices))


def _index_put(given: _Named, node: fx.Node) -> AtenCall:
    indices = tuple(slice(None) if index is None else index for index in given["indices"])
    if given["accumulate"]:
        return AtenCall("index_put_", (given["self"], indices, given["values"], True))
    return AtenCall(operator.setitem, (given["self"], indices, given["values"]))


def _elu(given: _Named, node: fx.Node) -> AtenCall:
    if given["scale"] != 1 or given["input_scale"] != 1:
        return AtenCall(torch.ops.aten.elu.default, tuple(given.values()))
    return AtenCall(F.elu, (given["self"], given["alpha"]))


def _resize(mode: str) -> _Rule:
    def rule(given: _Named, node: fx.Node) -> AtenCall:
        factors = given.get("scale_factors")
        options: _Named = {"mode": mode}
        # The factors decide by what the coordinates are divided, where both are known.
        options |= {"scale_factor": tuple(factors)} if factors else {"size": given["output_size"]}
        if given.get("align_corners") is not None:
            options["align_corners"] = given["align_corners"]
        if "_aa" in node.target._schema.name:  # type: ignore[union-attr]
            options["antialias"] = True
        return AtenCall(F.interpolate, (given.get("self", given.get("input")),), options)

    return rule


def _padding(mode: str) -> _Rule:
    return lambda given, node: AtenCall(F.pad, (given["self"], given["padding"]), {"mode": mode})


def _to(given: _Named, node: fx.Node) -> AtenCall | fx.Node:
    if given.get("dtype") is None and "other" not in given:
        return _operand(given, node)
    return AtenCall("to", (given["self"], node.meta["val"].dtype))


def _new(function: Callable[..., Any], *names: str) -> _Rule:
    """``x.new_zeros(size)``: of x only the type matters, which the graph knows."""

    def rule(given: _Named, node: fx.Node) -> AtenCall:
        parameters = tuple(given[name] for name in names)
        return AtenCall(function, parameters, {"dtype": node.meta["val"].dtype})

    return rule


def _sub_from(given: _Named, node: fx.Node) -> AtenCall:
    if given.get("alpha", 1) != 1:
        return AtenCall(torch.rsub, (given["self"], given["other"]), {"alpha": given["alpha"]})
    return AtenCall(torch.sub, (given["other"], given["self"]))


def _convolution(given: _Named, node: fx.Node) -> AtenCall:
    axes = len(given["stride"])
    first = [given[name] for name in ("input", "weight", "bias", "stride", "padding")]
    if given["transposed"]:
        rest = [given[name] for name in ("output_padding", "groups", "dilation")]
        return AtenCall(getattr(F, f"conv_transpose{axes}d"), (*first, *rest))
    return AtenCall(getattr(F, f"conv{axes}d"), (*first, given["dilation"], given["groups"]))


def _pooled(function: Callable[..., Any], *names: str) -> _Rule:
    """A pooling whose operator always gives indices, too."""

    def rule(given: _Named, node: fx.Node) -> AtenCall:
        indices = any(user.args[1] == 1 and user.users for user in node.users)
        args = tuple(given[name] for name in names)
        return AtenCall(function, args, {"return_indices": indices}, first=not indices)

    return rule


def _first_of(name: str, function: Callable[..., Any], *names: str) -> dict[str, _Rule]:
    """An operator that gives statistics, too, which inference does not read."""
    return {
        name: lambda given, node: AtenCall(function, tuple(given[n] for n in names), first=True)
    }


def _batch_norm(given: _Named, node: fx.Node) -> AtenCall:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    tensors = tuple(given[name] for name in names)
    return AtenCall(F.batch_norm, (*tensors, False, given["momentum"], given["eps"]), first=True)


def _addmm(given: _Named, node: fx.Node) -> AtenCall:
    """A linear layer that a decomposition took apart has its weight transposed."""
    bias, x, weight = given["self"], given["mat1"], given["mat2"]
    if _swaps(weight) and given["beta"] == 1 and given["alpha"] == 1:
        return AtenCall(F.linear, (x, weight.args[0], bias))
    options = {"beta": given["beta"], "alpha": given["alpha"]}
    return AtenCall(torch.addmm, (bias, x, weight), options)


def _swaps(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    swapped = value.target is torch.permute and tuple(value.args[1]) == (1, 0)  # type: ignore[arg-type]
    return swapped or value.target in (torch.t, torch.transpose)


_MAX_POOL = ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_VIEWS = ("alias", "detach", "lift_fresh", "detach_", "contiguous", "_conj", "resolve_conj")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_VIEWS, _operand),
    **dict.fromkeys((*_CHECKS, "sym_constrain_range_for_size"), _nothing),
    **dict.fromkeys(("lift_fresh_copy", "clone"), _call(torch.clone, "self")),
    "dropout": _call(F.dropout, "input", "p", "train"),
    # At inference it writes nothing.
    "dropout_": _call(F.dropout, "self", "p", "train"),
    "feature_dropout": _call(F.dropout, "input", "p", "train"),
    "gelu": lambda given, node: AtenCall(
        F.gelu, (given["self"],), {"approximate": given["approximate"]}
    ),
    "elu": _elu,
    "_softmax": _call(torch.softmax, "self", "dim"),
    "_log_softmax": _call(torch.log_softmax, "self", "dim"),
    "_adaptive_avg_pool2d": _call(F.adaptive_avg_pool2d, "self", "output_size"),
    "scaled_dot_product_attention": lambda given, node: AtenCall(
        F.scaled_dot_product_attention,
        tuple(given[name] for name in ("query", "key", "value")),
        {
            name: given[name]
            for name in ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        },
    ),
    **{
        f"adaptive_max_pool{n}d": _pooled(
            getattr(F, f"adaptive_max_pool{n}d"), "self", "output_size"
        )
        for n in (1, 2, 3)
    },
    **{
        f"max_pool{n}d_with_indices": _pooled(getattr(F, f"max_pool{n}d"), *_MAX_POOL)
        for n in (1, 2, 3)
    },
    **_first_of(
        "native_layer_norm", F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"
    ),
    **_first_of("native_dropout", F.dropout, "input", "p", "train"),
    "_native_batch_norm_legit_no_training": _batch_norm,
    "convolution": _convolution,
    "addmm": _addmm,
    "rsub": _sub_from,
    "slice": _slice,
    "select": lambda given, node: _item(given, node, given["index"]),
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_unsafe_view": _variadic("view", "size"),
    "_unsafe_index": _index,
    "view": lambda given, node: AtenCall(
        "view", (given["self"], given["dtype"] if "dtype" in given else given["size"])
    ),
    "expand": _variadic("expand", "size"),
    "repeat": _variadic("repeat", "repeats"),
    "split": _call(torch.split, "self", "split_size", "dim"),
    "split_with_sizes": _call(torch.split, "self", "split_sizes", "dim"),
    "to": _to,
    "_to_copy": _to,
    "type_as": _to,
    "sym_size": _call("size", "self", "dim"),
    "sym_numel": _call("numel", "self"),
    "new_zeros": _new(torch.zeros, "size"),
    "new_ones": _new(torch.ones, "size"),
    "new_full": _new(torch.full, "size", "fill_value"),
    "new_empty": _new(torch.zeros, "size"),
    "empty": _new(torch.zeros, "size"),
    "scalar_tensor": _call(torch.scalar_tensor, "s"),
    "arange": lambda given, node: AtenCall(
        torch.arange,
        tuple(given[name] for name in ("start", "end", "step") if name in given),
        {"dtype": node.meta["val"].dtype},
    ),
    "meshgrid": lambda given, node: AtenCall(
        torch.meshgrid, tuple(given["tensors"]), {"indexing": given.get("indexing", "ij")}
    ),
    "einsum": lambda given, node: AtenCall(torch.einsum, (given["equation"], *given["tensors"])),
    "im2col": _call(F.unfold, "self", "kernel_size", "dilation", "padding", "stride"),
    "col2im": _call(F.fold, "self", "output_size", "kernel_size", "dilation", "padding", "stride"),
    "embedding": _call(F.embedding, "indices", "weight"),
    "constant_pad_nd": _call(F.pad, "self", "pad", mode="constant"),
    "__and__": _call(torch.bitwise_and, "self", "other"),
    "__or__": _call(torch.bitwise_or, "self", "other"),
    "__xor__": _call(torch.bitwise_xor, "self", "other"),
    "linalg_vector_norm": lambda given, node: AtenCall(
        torch.linalg.vector_norm,
        (given["self"], given["ord"], given["dim"], given["keepdim"]),
    ),
    **{f"reflection_pad{n}d": _padding("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _padding("replicate") for n in (1, 2, 3)},
    **{
        f"{prefix}upsample_{kind}{suffix}": _resize(mode)
        for kind, mode in (
            ("nearest1d", "nearest"),
            ("nearest2d", "nearest"),
            ("nearest3d", "nearest"),
            ("linear1d", "linear"),
            ("bilinear2d", "bilinear"),
            ("bicubic2d", "bicubic"),
            ("trilinear3d", "trilinear"),
        )
        for prefix, suffix in (("", ""), ("_", "_aa"))
    },
    **{f"_upsample_nearest_exact{n}d": _resize("nearest-exact") for n in (1, 2, 3)},
}
