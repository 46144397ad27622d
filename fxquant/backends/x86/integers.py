"""Graphs on integers alone: sums and their rescaling in one kernel call, ratios as floats.

A multiplier m / 2^e is a float32 up to 2^-24 of itself, so the kernels' one multiplication gives
the reference's integer, or next to a tie its neighbour. What would round twice, and could be two
steps off, is computed in float64, where a 16-bit code times a 31-bit multiplier is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.backends.x86 import kernels
from fxquant.backends.x86.layers import raw_conv
from fxquant.backends.x86.linear import RAW_LINEAR, raw_linear
from fxquant.backends.x86.lowering import Lowered, Lowering, Plain
from fxquant.backends.x86.matmul import centered, fits_float32, product
from fxquant.integer import exp_table, layer_norm_scale
from fxquant.kernels.calls import operator_arguments
from fxquant.to_integer import Grid
from passes import tensor_info

__all__ = ["lower_add_rescaled", "lower_rescale", "lower_softmax_table"]

OPS: Any = torch.ops.fxquant
# Less than any variance of integers in rows of any length, and more than none.
_EPSILON = 1e-12


def lower_rescale(lowering: Lowering, node: fx.Node) -> Lowered:
    """Accumulators to codes, with the operator that sums them where nothing else reads its sums."""
    a = operator_arguments(node)
    source = a["x"]
    fused = _FUSED.get(source.target)
    if fused is None or len(source.users) > 1 or source.name in lowering.keep:
        return None
    multiplier, shift = lowering.tensor(a["multiplier"]), lowering.tensor(a["shift"])
    assert multiplier is not None
    assert shift is not None
    operands = [n for n in source.all_input_nodes if "grid" in n.meta]
    if a["x_zero_point"] or a["dtype"] not in (torch.uint8, torch.int16):
        return None
    if any(n.meta["grid"].dtype not in (torch.uint8, torch.int16) for n in operands):
        return None
    ratio = multiplier.double() / torch.pow(2.0, shift.double())
    lowered: Lowered = fused(lowering, source, ratio, a)
    return lowered


def _linear(lowering: Lowering, node: fx.Node, ratio: Tensor, output: dict[str, Any]) -> Lowered:
    a = operator_arguments(node)
    if a["weight_zero_point"] is not None or not _has_8_bits(a["x"]) or bool((ratio < 0).any()):
        return None
    arguments = raw_linear(
        lowering, node, {**a, "x_scale": 1.0}, _kernel_output(output), weight_scale=ratio.float()
    )
    return _finish(lowering, lowering.emit(RAW_LINEAR, *arguments), output, from_kernel=True)


def _conv(lowering: Lowering, node: fx.Node, ratio: Tensor, output: dict[str, Any]) -> Lowered:
    a = operator_arguments(node)
    if a["weight_zero_point"] is not None or not _has_8_bits(a["x"]) or bool((ratio < 0).any()):
        return None
    sums = raw_conv(lowering, node, {**a, "x_scale": 1.0}, ratio.float(), _kernel_output(output))
    return None if sums is None else _finish(lowering, sums, output, from_kernel=True)


def _matmul(lowering: Lowering, node: fx.Node, ratio: Tensor, output: dict[str, Any]) -> Lowered:
    arguments = operator_arguments(node)
    a, b = arguments["a"], arguments["b"]
    if not fits_float32(a, b) or ratio.numel() > 1:
        return None
    factor = float(ratio)
    products = lowering.emit(product, centered(lowering, a), centered(lowering, b), factor)
    return _finish(lowering, products, output)


def _layer_norm(
    lowering: Lowering, node: fx.Node, ratio: Tensor, output: dict[str, Any]
) -> Lowered:
    a = operator_arguments(node)
    info = tensor_info(node)
    if a["dims"] != 1 or info is None:
        return None
    size = info.shape[-1]
    bias = lowering.tensor(a["bias"])

    def make() -> dict[str, Tensor]:
        weight = (ratio / layer_norm_scale("integer", size)).expand(size)
        offset = torch.zeros(size, dtype=torch.float64) if bias is None else bias.double() * ratio
        return {"weight": weight.float(), "bias": offset.float()}

    x = floats(lowering, a["x"])
    if node.target is OPS.layer_norm_power_of_two.default:
        shift = lowering.tensor(a["channel_shift"])
        assert shift is not None
        powers = lowering.attribute(f"{node.name}_powers", torch.pow(2.0, shift.float()))
        x = lowering.emit(kernels.coarser, x, powers)
    weight, offset = lowering.shared(node.name, make)
    normalized = lowering.emit(F.layer_norm, x, (size,), weight, offset, _EPSILON)
    return _finish(lowering, normalized, output)


def lower_softmax_table(lowering: Lowering, node: fx.Node) -> Lowered:
    """A softmax whose table is that of the exponential: torch's float softmax between codes.

    The table's rounding moves an exponential by up to 2^-17, and a row's sum, which is at least 1,
    by up to N / 2^17. A code, at most 255, moves by less than a step while both sum to less.
    """
    a = operator_arguments(node)
    table = lowering.tensor(a["table"])
    assert table is not None
    grid: Grid = a["x"].meta["grid"]
    info = tensor_info(node)
    if a["mask"] is not None or a["dtype"] != torch.uint8 or info is None:
        return None
    if grid.dtype != torch.uint8 or not torch.equal(table, exp_table(grid.scale)):
        return None
    if 255 * info.shape[-1] + a["numerator"] / 256 >= 2.0**17:
        return None
    scores = lowering.graph.call_method("dequantize", (lowering.quantized(a["x"]),))
    exact = lowering.emit(F.softmax, scores, -1)
    step = 256 / a["numerator"]
    q = lowering.emit(torch.quantize_per_tensor, exact, step, 0, torch.quint8)
    return lowering.clamp_plain(lowering.emit(kernels.codes, q), a["qmin"], a["qmax"])


def lower_add_rescaled(lowering: Lowering, node: fx.Node) -> Lowered:
    """Two branches, each rounded on its own, in float64: the reference's integers exactly."""
    a = operator_arguments(node)
    branches = []
    for name in ("a", "b"):
        factor = a[f"{name}_multiplier"] / 2 ** a[f"{name}_shift"]
        branches += [lowering.plain(a[name]), a[f"{name}_zero_point"], factor]
    bounds = (a["zero_point"], a["qmin"], a["qmax"], a["dtype"])
    return Plain(lowering.emit(kernels.add_rounded, *branches, *bounds))


def floats(lowering: Lowering, node: fx.Node) -> fx.Node:
    """Codes of 8 or 16 bits as float32; where the zero point does not matter it stays in."""
    if _has_8_bits(node):
        return centered(lowering, node)
    return lowering.graph.call_method("to", (lowering.plain(node), torch.float32))


def _kernel_output(output: dict[str, Any]) -> tuple[float, int, torch.dtype]:
    """What a kernel writes itself: 8-bit codes, or in front of 16-bit codes the real steps."""
    if output["dtype"] == torch.uint8:
        return (1.0, output["zero_point"], torch.uint8)
    return (1.0, 0, torch.float32)


def _finish(
    lowering: Lowering, real: fx.Node, output: dict[str, Any], *, from_kernel: bool = False
) -> Lowered:
    """Values in steps of the output, or what `_kernel_output` says, as clamped codes."""
    zero_point, low, high = output["zero_point"], output["qmin"], output["qmax"]
    if output["dtype"] == torch.uint8 and from_kernel:
        return lowering.clamp_plain(real, low, high)
    if output["dtype"] == torch.uint8:
        q = lowering.emit(torch.quantize_per_tensor, real, 1.0, zero_point, torch.quint8)
        return lowering.clamp_plain(lowering.emit(kernels.codes, q), low, high)
    return Plain(lowering.emit(kernels.rounded, real, zero_point, low, high, output["dtype"]))


def _has_8_bits(node: fx.Node) -> bool:
    grid: Grid = node.meta["grid"]
    return grid.dtype == torch.uint8


_FUSED: dict[Any, Any] = {
    OPS.linear_accumulate.default: _linear,
    OPS.conv_accumulate.default: _conv,
    OPS.matmul_accumulate.default: _matmul,
    OPS.layer_norm_integer.default: _layer_norm,
    OPS.layer_norm_power_of_two.default: _layer_norm,
}
