"""Any layer, on the plain kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxquant.backends.native.layer import CODES, FLOATS, SUMS, Layer, residual_value
from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import type_number
from fxquant.backends.native.values import Value

__all__ = ["lower_plain"]

_PLAIN_FINISH = {CODES: 0, FLOATS: 1, SUMS: 2}


def lower_plain(planner: Planner, layer: Layer, x: Value) -> Value:
    """Codes of any width, transposed or not, of any strides."""
    arguments = layer.arguments
    is_linear = "stride" not in arguments
    y = planner.allocate(None if is_linear else x)
    residual = residual_value(planner, layer)
    groups = int(arguments.get("groups", 1))
    weight = layer.weight
    if is_linear:
        views = [_rows_as_image(v, planner.batched) for v in (x, y, residual) if v is not None]
        weight = weight[:, :, None, None, None]
        spatial = [[1] * 3, [0] * 3, [1] * 3]
    else:
        dims = weight.dim() - 2
        if x.tensor.dim() != weight.dim():
            raise UnsupportedError(planner.current, "an image without a batch")
        views = [_volume(v.tensor) for v in (x, y, residual) if v is not None]
        weight = weight.reshape(*weight.shape[:2], *([1] * (3 - dims)), *weight.shape[2:])
        spatial = [
            [fill] * (3 - dims) + [int(v) for v in arguments[key]]
            for key, fill in (("stride", 1), ("padding", 0), ("dilation", 1))
        ]
    if layer.transposed:
        inner = weight.shape[0] // groups
        outer = weight.shape[1]
        taps = weight.reshape(groups, inner, outer, *weight.shape[2:])
        ordered = taps.permute(0, 2, 3, 4, 5, 1)
    else:
        inner, outer = weight.shape[1], weight.shape[0] // groups
        ordered = weight.permute(0, 2, 3, 4, 1)
    image, out = views[0], views[1]
    order = (0, 1, 2, 3, 4)
    geometry = [
        *out.shape[2:],
        *image.shape[2:],
        *weight.shape[2:],
        *spatial[0],
        *spatial[1],
        *spatial[2],
        *(image.stride(d) for d in order),
        *(out.stride(d) for d in order),
        *(views[2].stride(d) if residual is not None else 0 for d in order),
        inner,
        outer,
        groups,
        int(layer.transposed),
    ]
    fields: dict[str, Any] = {
        "x": planner.at(x),
        "y": planner.at(y),
        "weight": planner.data(ordered.contiguous()),
        "bias": planner.data(layer.bias),
        "multiplier": planner.data(layer.multiplier),
        "geometry": planner.numbers(geometry),
        "samples": planner.count(out.shape[0]),
        "finish": _PLAIN_FINISH[layer.kind],
        "x_type": type_number(x.dtype),
        "y_type": type_number(y.dtype),
        "x_zero_point": layer.zero_point,
    }
    if layer.kind == CODES:
        fields |= {"lo": arguments["qmin"], "hi": arguments["qmax"]}
        fields["zero_point"] = arguments["zero_point"]
    reads = [x]
    if residual is not None:
        fields |= {
            "residual": planner.at(residual),
            "residual_type": type_number(residual.dtype),
            "residual_zero_point": arguments["residual_zero_point"],
            "residual_multiplier": layer.residual_multiplier,
        }
        reads.append(residual)
    work = 3.0 * out.numel() * weight[0].numel()
    planner.emit("plain_conv", fields, reads, (y,), work)
    return y


def _volume(tensor: Tensor) -> Tensor:
    """[N, C, ...] with three spatial dimensions."""
    while tensor.dim() < 5:
        tensor = tensor.unsqueeze(2)
    return tensor


def _rows_as_image(value: Value, batched: bool) -> Tensor:
    """[..., K] as [N, K, 1, rows, 1] or with as many dimensions between as it has."""
    tensor = value.tensor
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    inner = tensor.movedim(-1, 1)
    while inner.dim() < 5:
        inner = inner.unsqueeze(2)
    return inner
