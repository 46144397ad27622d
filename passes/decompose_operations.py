"""Operations that have an integer form in parts: sub, glu, addmm, PReLU, padded convolutions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes.canonicalize import Canonicalize
from passes.fold_constants import FoldConstants
from passes.infra.base import Decline, Pass, PassResult, shape_of, tensor_info
from passes.infra.expansion import Expansion
from passes.infra.meta import copy_meta
from passes.infra.rewrite import Rewriter
from passes.infra.stored import call_sites, constant_value, free_path, is_plain, module_of
from passes.layers.replace import make_linear, without_padding
from passes.split_shared_modules import SplitSharedModules

__all__ = ["DecomposeOperations"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADAPTIVE: dict[Any, Any] = {
    F.adaptive_max_pool1d: F.max_pool1d,
    F.adaptive_max_pool2d: F.max_pool2d,
    F.adaptive_max_pool3d: F.max_pool3d,
}


_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the number of dimensions."""


class DecomposeOperations(Pass):
    """Write out what has no integer form as a whole, and has one in parts.

        before                                   after
        y = sub(a, b)                            y = add(a, neg(b))
        y = glu(x, dim=1)                        a, b = chunk(x, 2, dim=1); y = mul(a, sigmoid(b))
        y = addmm(b, x, w)                       y = linear(x)      (where w and b are stored)
        y = prelu(x)    (one slope)              y = leaky_relu(x, negative_slope=0.25)
        y = prelu(x)    (one a channel)          y = add(relu(x), bn(clamp(x, max=0)))
        y = conv(x)     (padding by reflection)  p = pad(x, mode="reflect"); y = conv(p)
        y = adaptive_max_pool2d(x, 7)            y = max_pool2d(x, …)   (windows of one size)

    The batch norm of a PReLU multiplies each channel by its slope, and adds nothing. Declines a
    difference to the mean, a product added with factors, and windows of several sizes.
    """

    exact = True
    after = (Canonicalize, SplitSharedModules, FoldConstants)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        rewriter = Rewriter(graph_module)
        declines = []
        for node in list(graph_module.graph.nodes):
            expand = _rule(node)
            reason = expand(rewriter, node) if expand is not None else None
            if reason:
                declines.append(Decline.at(node, reason))
        return PassResult(rewriter.finish(), tuple(declines))


_Rule = Callable[[Rewriter, fx.Node], str | None]


def _rule(node: fx.Node) -> _Rule | None:
    module = module_of(node)
    if is_plain(module, nn.PReLU):
        return _prelu
    if is_plain(module, _CONVOLUTIONS) and module.padding_mode != "zeros":
        return _padded_convolution
    return _RULES.get(node.target) if node.op == "call_function" else None


def _sub(rewriter: Rewriter, node: fx.Node) -> str | None:
    infos = [tensor_info(operand) for operand in node.args]
    floats = all(info is not None and info.dtype == torch.float32 for info in infos)
    if not floats or node.kwargs.get("alpha", 1) != 1:
        return None
    taken: Any = node.args[1]
    if taken.target is torch.mean and taken.args[0] is node.args[0]:
        # The variance is made of what is left: 8 bits of it are too few.
        return "it takes a mean out of what it is the mean of, as a norm does"
    expansion = Expansion(rewriter, node)
    negative = expansion.call(torch.neg, taken)
    expansion.finish(expansion.call(torch.add, node.args[0], negative), keep_name=True)
    return None


def _glu(rewriter: Rewriter, node: fx.Node) -> str | None:
    expansion = Expansion(rewriter, node)
    shape, dim = shape_of(node.args[0]), node.kwargs["dim"]
    if shape is None or not isinstance(dim, int):
        return "the shape of its input is not known"
    half = shape[dim] // 2
    all_before = [slice(None)] * (dim % len(shape))
    value, gate = (
        expansion.call(operator.getitem, node.args[0], (*all_before, part))
        for part in (slice(None, half), slice(half, None))
    )
    gate = expansion.call(torch.sigmoid, gate)
    expansion.finish(expansion.call(torch.mul, value, gate), keep_name=True)
    return None


def _addmm(rewriter: Rewriter, node: fx.Node) -> str | None:
    names = ("input", "mat1", "mat2")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return "it has factors"
    weight, bias = constant_value(given["mat2"]), constant_value(given["input"])
    expansion = Expansion(rewriter, node)
    if weight is not None:
        own = bias is not None and bias.dim() == 1
        layer = make_linear(weight.T.contiguous(), bias if own else None)
        result = expansion.linear(node.name, layer, given["mat1"])
        if not own:
            result = expansion.call(torch.add, result, given["input"])
    else:
        result = expansion.call(torch.matmul, given["mat1"], given["mat2"])
        result = expansion.call(torch.add, result, given["input"])
    expansion.finish(result)
    return None


def _prelu(rewriter: Rewriter, node: fx.Node) -> str | None:
    module: Any = module_of(node)
    if module.weight.numel() > 1:
        return _prelu_by_channel(rewriter, node, module.weight.detach())
    options = {"negative_slope": float(module.weight.detach()), "inplace": False}
    rewriter.replace_call(node, F.leaky_relu, node.args[:1], options)
    return None


def _prelu_by_channel(rewriter: Rewriter, node: fx.Node, slopes: Tensor) -> str | None:
    shape = shape_of(node.args[0])
    kind = None if shape is None else _BATCH_NORMS.get(len(shape))
    if kind is None:
        return "the shape of its input is not known"
    norm = kind(len(slopes), eps=0.0).eval()
    norm.weight = nn.Parameter(slopes.clone())
    expansion = Expansion(rewriter, node)
    above = expansion.call(F.relu, node.args[0], inplace=False)
    below = expansion.call(torch.clamp, node.args[0], min=None, max=0)
    path = free_path(rewriter.graph_module, f"{node.target}_slopes")
    with rewriter.before(node):
        below = rewriter.call_module(path, norm, (below,), like=node, same_value=False)
    copy_meta(node, below, "shape")
    expansion.finish(expansion.call(torch.add, above, below), keep_name=True)
    return None


def _padded_convolution(rewriter: Rewriter, node: fx.Node) -> str | None:
    module: Any = module_of(node)
    if call_sites(node.graph)[str(node.target)] > 1:
        return "it is called at several places"
    info = tensor_info(node.args[0])
    if info is None or len(info.shape) != module.weight.dim():
        return "the shape of its input is not known"
    pads = tuple(module._reversed_padding_repeated_twice)
    with rewriter.before(node):
        padded = rewriter.call_function(
            F.pad,
            node.args[:1],
            {"pad": pads, "mode": module.padding_mode, "value": None},
            like=node,
        )
    padded.meta.pop("tensor", None)
    rewriter.set_module(str(node.target), without_padding(module))
    rewriter.set_call(node, (padded,))
    return None


def _adaptive_max_pool(rewriter: Rewriter, node: fx.Node) -> str | None:
    shape, size = shape_of(node.args[0]), node.kwargs["output_size"]
    if node.kwargs["return_indices"] or shape is None or not isinstance(size, tuple):
        return None
    inside = shape[len(shape) - len(size) :]
    sizes = [have if want is None else want for have, want in zip(inside, size, strict=True)]
    if any(have % want for have, want in zip(inside, sizes, strict=True)):
        return "its windows are of several sizes"
    window = tuple(have // want for have, want in zip(inside, sizes, strict=True))
    options = {
        "kernel_size": window,
        "stride": window,
        "padding": (0,) * len(size),
        "dilation": (1,) * len(size),
        "ceil_mode": False,
        "return_indices": False,
    }
    rewriter.replace_call(node, _ADAPTIVE[node.target], node.args, options)
    return None


_RULES: dict[Any, _Rule] = {
    torch.sub: _sub,
    F.glu: _glu,
    torch.addmm: _addmm,
    **dict.fromkeys(_ADAPTIVE, _adaptive_max_pool),
}
