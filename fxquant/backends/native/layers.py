"""Convolutions and linear layers: the fast kernels where they fit, else plain ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.backends.native.packing import pack_conv, pack_depthwise, pack_lanes, pad_outputs
from fxquant.backends.native.patterns import gelu_behind
from fxquant.backends.native.planner import Planner, UnsupportedError
from fxquant.backends.native.steps import Pointer, type_number
from fxquant.backends.native.values import Border, Loops, Value
from fxquant.integer.bounds import products_bound, shifted_weight, weight_reach
from fxquant.integer.rounding import channel_factors, float32_scalar, rescale_factor
from fxquant.kernels.calls import operator_arguments

__all__ = ["lower_layer"]

OPS: Any = torch.ops.fxquant
_CODES, _FLOATS, _SUMS, _GELU = 0, 2, 1, 3
_PLAIN_FINISH = {_CODES: 0, _FLOATS: 1, _SUMS: 2}
_LARGEST_REAL = 2.0**30
_INT32 = 2.0**31 - 1


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's call, its weight as integers without a zero point, and what follows its sums."""

    arguments: dict[str, Any]
    weight: Tensor
    bias: Tensor
    multiplier: Tensor
    kind: int
    transposed: bool

    @classmethod
    def of(cls, planner: Planner, node: fx.Node) -> Layer:
        arguments = planner.arguments(node)
        transposed = node.target is OPS.conv_transpose.default
        groups = int(arguments.get("groups", 1))
        zero = arguments["weight_zero_point"]
        weight = shifted_weight(
            planner.tensor(arguments["weight"]),
            None if zero is None else planner.tensor(zero),
            transposed=transposed,
            groups=groups,
        ).to(torch.int16)
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        bias = arguments["bias"]
        wide = torch.zeros(outputs, dtype=torch.int64)
        if bias is not None:
            wide = planner.tensor(bias).to(torch.int64)
        kind = _SUMS
        multiplier = torch.ones(outputs)
        if "scale" in arguments:
            kind = _FLOATS if arguments["dtype"] == torch.float32 else _CODES
            scale = None if kind == _FLOATS else arguments["scale"]
            factors = channel_factors(
                arguments["x_scale"], planner.tensor(arguments["weight_scale"]), scale
            )
            multiplier = factors.reshape(-1).expand(outputs).contiguous()
        return cls(arguments, weight, wide, multiplier, kind, transposed)

    @property
    def zero_point(self) -> int:
        return int(self.arguments["x_zero_point"])

    def fits_int32(self) -> bool:
        """Whether sums of the codes themselves stay in int32, and reals where they round."""
        rows = self.weight.to(torch.float64).flatten(1)
        shift = self.bias - self.zero_point * rows.sum(1).to(torch.int64)
        if float((rows.abs().sum(1) * 255 + shift.abs()).max()) > _INT32:
            return False
        reach = products_bound(torch.uint8, self.zero_point, weight_reach(rows))
        real = (reach + self.bias.abs()) * self.multiplier.abs()
        extra = 0.0
        if self.arguments.get("residual") is not None and self.kind == _CODES:
            extra = 255 * self.residual_multiplier
        return self.kind != _CODES or float(real.max()) + extra < _LARGEST_REAL

    @property
    def residual_multiplier(self) -> float:
        arguments = self.arguments
        return float(rescale_factor(arguments["residual_scale"], arguments["scale"]))

    def start(self) -> Tensor:
        """What accumulators begin with: ``b_q − z_x · Σ w`` as int32."""
        sums = self.weight.to(torch.int64).flatten(1).sum(1)
        return (self.bias - self.zero_point * sums).to(torch.int32)

    def halves(self) -> list[Tensor] | None:
        """The weight as int8 tensors that sum up to it: two where it had a zero point."""
        low = self.weight.clamp(-128, 127)
        rest = self.weight - low
        if not bool(rest.any()):
            return [low.to(torch.int8)]
        if int(rest.max()) > 127 or int(rest.min()) < -128:
            return None
        return [low.to(torch.int8), rest.to(torch.int8)]


def lower_layer(planner: Planner, node: fx.Node) -> Value:
    """A convolution, transposed or not, or a linear layer."""
    layer = Layer.of(planner, node)
    x = planner.value(layer.arguments["x"])
    if node.target in (OPS.linear.default, OPS.linear_accumulate.default):
        result = _linear(planner, layer, x)
    elif layer.transposed or layer.weight.dim() == 5 or x.tensor.dim() != layer.weight.dim():
        result = None
    else:
        result = _convolution(planner, layer, x)
    return result or _plain(planner, layer, x)


# -- the fast kernels ----------------------------------------------------------------------


def _output_fields(planner: Planner, layer: Layer) -> dict[str, Any]:
    arguments = layer.arguments
    if layer.kind != _CODES:
        return {"zero_point": 0, "lo": 0, "hi": 0}
    table = planner.table_behind()
    fields: dict[str, Any] = {
        "zero_point": int(arguments["zero_point"]),
        "lo": int(arguments["qmin"]),
        "hi": int(arguments["qmax"]),
        "table": None if table is None else planner.data(table),
    }
    if arguments["residual"] is not None:
        fields["residual_zero_point"] = int(arguments["residual_zero_point"])
        fields["residual_multiplier"] = layer.residual_multiplier
    return fields


def _may_be_fast(planner: Planner, layer: Layer, x: Value) -> bool:
    residual = layer.arguments.get("residual")
    codes = layer.kind != _CODES or layer.arguments["dtype"] == torch.uint8
    return (
        x.dtype == torch.uint8
        and codes
        and (layer.kind != _SUMS or planner.shapes[planner.current].dtype == torch.int32)
        and (residual is None or planner.value(residual).dtype == torch.uint8)
        and math.prod(planner.shapes[planner.current].shape) > 0
        and layer.fits_int32()
    )


def _linear(planner: Planner, layer: Layer, x: Value) -> Value | None:
    halves = layer.halves()
    if halves is None or not _may_be_fast(planner, layer, x):
        return None
    if x.shape[-1] > 1 and x.strides[-1] != 1:
        dense = planner.dense(x.tensor)
        planner.copy(x, dense)
        x = dense
    behind = gelu_behind(planner.current) if layer.kind == _FLOATS else None
    if behind is None:
        y = planner.allocate()
    else:
        with planner.standing_for(behind[1]):
            y = planner.allocate(planner.dense(planner.shapes[behind[1]]))
    residual = _residual(planner, layer)
    if y.strides[-1] != 1 and y.shape[-1] > 1:
        return None
    values = [y, x] if residual is None else [y, x, residual]
    if residual is not None and residual.shape[-1] > 1 and residual.strides[-1] != 1:
        return None
    loops = Loops.of(y.shape[:-1], [value.strides[:-1] for value in values], planner.batched)
    padded = loops.padded(3, planner.batched)
    if padded is None:
        return None
    if planner.batched and len(y.shape) == 1:
        return None
    outputs, inputs = layer.weight.shape
    quads = -(-inputs // 4)
    weights = torch.cat([pack_conv(half[:, :, None, None]) for half in halves], 2)
    sizes, strides = padded.sizes, padded.strides
    size = y.dtype.itemsize
    fields = {
        **(_output_fields(planner, layer) if behind is None else _gelu_fields(behind[1])),
        "x": planner.at(x),
        "segment_offset": planner.numbers([0] * len(halves), torch.int32),
        "weight": planner.data(weights),
        "bias": planner.data(pad_outputs(layer.start())),
        "multiplier": planner.data(pad_outputs(layer.multiplier)),
        "y": planner.at(y),
        **_image_fields("x", strides[1]),
        **_image_fields("y", [stride * size for stride in strides[0]]),
        "batch": planner.count(sizes[0]) if planner.batched else sizes[0],
        "height": sizes[1],
        "width": sizes[2],
        "groups": 1,
        "outputs": outputs,
        "segments": len(halves),
        "segment_quads": quads,
        "kind": layer.kind if behind is None else _GELU,
    }
    if planner.batched and _is_one_row(padded):
        # Tokens of all samples side by side: tiles need not end with a sample.
        fields |= {"batch": 1, "height": 1, "width": planner.count(math.prod(sizes))}
    fields["x_column"] = fields.pop("x_pixel")
    reads = [x]
    if residual is not None:
        fields |= {"residual": planner.at(residual), **_image_fields("residual", strides[2])}
        reads.append(residual)
    rows = math.prod(sizes) / (planner.batch or 1)
    fields["by_panels"] = int(rows < 16 and outputs > 64)
    work = rows * outputs * inputs / 200 + rows * outputs / 10
    planner.emit("conv", fields, reads, (y,), work * (planner.batch or 1))
    if behind is not None:
        planner.absorbed[behind[0]] = planner.current
        planner.ready[behind[1]] = y
    return y


def _gelu_fields(quantize: fx.Node) -> dict[str, Any]:
    arguments = operator_arguments(quantize)
    return {
        "inverse": float(float32_scalar(1.0) / float32_scalar(arguments["scale"])),
        "zero_point": arguments["zero_point"],
        "lo": arguments["qmin"],
        "hi": arguments["qmax"],
    }


def _is_one_row(loops: Loops) -> bool:
    """Whether the rows of all samples lie at equal distances in every tensor."""
    batch, height, width = loops.sizes
    return (
        all(
            (height == 1 or row[1] == width * row[2]) and row[0] == height * width * row[2]
            for row in loops.strides
        )
        and batch > 1
    )


def _image_fields(name: str, strides: list[int]) -> dict[str, int]:
    batch, row, pixel = strides
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_pixel": pixel}


def _residual(planner: Planner, layer: Layer) -> Value | None:
    node = layer.arguments.get("residual")
    return None if node is None else planner.value(node)


def _as_image(value: Value) -> Value:
    return Value(value.tensor.unsqueeze(2), value.buffer) if value.tensor.dim() == 3 else value


def _four(values: Any) -> list[int]:
    """Hyper-parameters of a convolution of two dimensions."""
    return [int(v) for v in values]


def _convolution(planner: Planner, layer: Layer, x: Value) -> Value | None:
    halves = layer.halves()
    if halves is None or not _may_be_fast(planner, layer, x):
        return None
    is_line = layer.weight.dim() == 3
    arguments = layer.arguments
    stride, padding, dilation = (_four(arguments[key]) for key in ("stride", "padding", "dilation"))
    if is_line:
        x = _as_image(x)
        halves = [half.unsqueeze(2) for half in halves]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    x = with_border(planner, x, Border(*padding), layer.zero_point)
    result = planner.allocate()
    y = _as_image(result)
    residual = _residual(planner, layer)
    if residual is not None:
        residual = _as_image(residual)
        if residual.shape[1] > 1 and residual.strides[1] != 1:
            moved = planner.bordered(residual.shape, residual.dtype, Border(), 0)
            planner.copy(residual, moved)
            residual = moved
    if y.shape[1] > 1 and y.strides[1] != 1:
        return None
    batch, _, row, pixel = x.strides
    start = planner.at(x)
    start = Pointer(start.buffer, start.offset - padding[0] * row - padding[1] * pixel)
    size = y.dtype.itemsize
    fields: dict[str, Any] = {
        **_output_fields(planner, layer),
        "x": start,
        "y": planner.at(y),
        **_image_fields("y", [size * y.strides[d] for d in (0, 2, 3)]),
        "x_batch": batch,
        "batch": planner.count(y.shape[0]),
        "height": y.shape[2],
        "width": y.shape[3],
    }
    reads = [x]
    if residual is not None:
        fields |= {
            "residual": planner.at(residual),
            **_image_fields("residual", [residual.strides[d] for d in (0, 2, 3)]),
        }
        reads.append(residual)
    groups, outputs = int(arguments["groups"]), layer.weight.shape[0]
    kernel = halves[0].shape[2:]
    is_depthwise = (
        groups == outputs == x.shape[1]
        and groups > 1
        and len(halves) == 1
        and dilation == [1, 1]
        and max(kernel) <= 7
        and layer.kind != _SUMS
    )
    per_sample = math.prod(y.shape) / y.shape[0] * (y.shape[0] / (planner.batch or 1))
    if is_depthwise:
        fields |= {
            "x_row": row,
            "x_pixel": pixel,
            "weight": planner.data(pack_depthwise(halves[0])),
            "bias": planner.data(pack_lanes(layer.start())),
            "multiplier": planner.data(pack_lanes(layer.multiplier)),
            "channels": groups,
            "kernel_height": kernel[0],
            "kernel_width": kernel[1],
            "stride_height": stride[0],
            "stride_width": stride[1],
            "kind": layer.kind,
        }
        work = per_sample * math.prod(kernel) / 40 + per_sample / 10
        planner.emit("depthwise_conv", fields, reads, (y,), work * (planner.batch or 1))
        return result
    segments, quads, weights = _segments(halves, groups, x, dilation)
    fields |= {
        "x_row": stride[0] * row,
        "x_column": stride[1] * pixel,
        "x_group": x.shape[1] // groups,
        "segment_offset": planner.numbers(segments, torch.int32),
        "weight": planner.data(weights),
        "bias": planner.data(pad_outputs(layer.start(), groups)),
        "multiplier": planner.data(pad_outputs(layer.multiplier, groups)),
        "groups": groups,
        "outputs": outputs // groups,
        "segments": len(segments),
        "segment_quads": quads,
        "kind": layer.kind,
    }
    pixels = y.shape[2] * y.shape[3]
    fields["by_panels"] = int(pixels < 16 and outputs > 64)
    work = per_sample * layer.weight[0].numel() / 200 + per_sample / 10
    planner.emit("conv", fields, reads, (y,), work * (planner.batch or 1))
    return result


def _segments(
    halves: list[Tensor], groups: int, x: Value, dilation: list[int]
) -> tuple[list[int], int, Tensor]:
    """Where the runs of bytes under a window begin, their length in quads, and the weight."""
    channels = halves[0].shape[1]
    height, width = halves[0].shape[2:]
    _, _, row, pixel = x.strides
    dense = pixel == channels or (pixel == 4 and channels < 4 and x.buffer.image is not None)
    by_rows = groups == 1 and dilation[1] == 1 and pixel % 4 == 0 and dense
    if by_rows:
        segments = [ky * dilation[0] * row for ky in range(height)]
        quads = width * pixel // 4
    else:
        segments = [
            ky * dilation[0] * row + kx * dilation[1] * pixel
            for ky in range(height)
            for kx in range(width)
        ]
        quads = -(-channels // 4)
    packed = [pack_conv(half, groups, pixel if by_rows else None) for half in halves]
    return segments * len(halves), quads, torch.cat(packed, 2)


def with_border(planner: Planner, x: Value, border: Border, zero: int) -> Value:
    """`x`, or a copy of it, with its channels innermost and a border that holds `zero`."""
    channels_inside = x.shape[1] == 1 or x.strides[1] == 1
    if channels_inside and (not border or _has_border(x, border, zero)):
        return x
    moved = planner.bordered(x.shape, x.dtype, border, zero)
    planner.copy(x, moved)
    return moved


def _has_border(x: Value, border: Border, zero: int) -> bool:
    buffer = x.buffer
    image = buffer.image
    if image is None or buffer.filled != zero:
        return False
    same = x.shape[2:] == tuple(image.shape[2:]) and x.strides[2:] == tuple(image.stride())[2:]
    # A slice of channels begins in the image's first pixel.
    first = x.tensor.storage_offset() - image.storage_offset()
    inside = 0 <= first < image.stride(3)
    return bool(same and inside and border | buffer.border == buffer.border)


# -- the plain one -------------------------------------------------------------------------


def _plain(planner: Planner, layer: Layer, x: Value) -> Value:
    arguments = layer.arguments
    is_linear = "stride" not in arguments
    y = planner.allocate(None if is_linear else x)
    residual = _residual(planner, layer)
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
    if layer.kind == _CODES:
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
