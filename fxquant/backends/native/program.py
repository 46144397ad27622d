"""A plan as the bytes of a file: what `kernels/runtime.h` maps and runs."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy

from fxquant.backends.native.arena import Arena
from fxquant.backends.native.params import params_layout, params_type
from fxquant.backends.native.planner import ProgramPlan
from fxquant.backends.native.schedule import split_batch
from fxquant.backends.native.steps import Count, Pointer, type_number

__all__ = ["to_bytes"]

_MAGIC = 0x32544E5158465E
_HEADER_SIZE = 20 * 8
_STEP = struct.Struct("<IIQ")
_RELOCATION = struct.Struct("<IIQqq")
_PORT = struct.Struct("<iiq8q")
_CARRIED = struct.Struct("<QQ")
_SERIAL, _BARRIER = 1, 2
_WHOLE_BATCH = 1
_TO_ARENA, _TO_CONSTANT, _TO_INPUT, _TO_OUTPUT, _COUNT_64, _COUNT_32 = range(6)
_PLACES = {"arena": _TO_ARENA, "constant": _TO_CONSTANT, "input": _TO_INPUT, "output": _TO_OUTPUT}
_ALIGNMENT = 64


def to_bytes(plan: ProgramPlan, arena: Arena) -> bytes:
    """The whole file; buffers must have their places."""
    constants = _constants(plan)
    kernels = sorted({step.kernel for step in plan.steps})
    params = bytearray()
    relocations: list[bytes] = []
    steps: list[bytes] = []
    for step in plan.steps:
        flags = (_SERIAL if step.serial else 0) | (_BARRIER if step.barrier else 0)
        steps.append(_STEP.pack(kernels.index(step.kernel), flags, len(params)))
        kind = params_type(step.kernel)
        block = kind()
        known = {entry[0]: entry[1] for entry in kind._fields_}
        for name, value in step.fields.items():
            _set(block, known, name, value, len(params), relocations, plan)
        params += bytes(block)
        params += bytes(-len(params) % 8)
    ports = b"".join(_port(port, plan.batch) for port in (*plan.inputs, *plan.outputs))
    names = b"".join(f"{kernel}:{params_layout(kernel)}\0".encode() for kernel in kernels)
    body = bytearray()
    offsets = []
    split = split_batch(plan)
    carried = b"".join(_CARRIED.pack(b.offset, b.size // (plan.batch or 1)) for b in split.carried)
    parts = (
        b"".join(steps),
        bytes(params),
        b"".join(relocations),
        names,
        ports,
        carried,
        constants,
    )
    for part in parts:
        body += bytes(-(len(body) + _HEADER_SIZE) % _ALIGNMENT)
        offsets.append(len(body) + _HEADER_SIZE)
        body += part
    at_steps, at_params, at_relocations, at_names, at_ports, at_carried, at_constants = offsets
    whole_batch = _WHOLE_BATCH if plan.whole_batch or plan.batch is None else 0
    header = (
        at_steps,
        len(steps),
        at_params,
        len(params),
        at_relocations,
        len(relocations),
        at_names,
        len(kernels),
        at_ports,
        len(plan.inputs),
        len(plan.outputs),
        at_constants,
        arena.size,
        whole_batch,
        split.at,
        at_carried,
        len(split.carried),
    )
    checked = struct.pack("<17Q", *header) + bytes(body)
    return struct.pack("<3Q", _MAGIC, _HEADER_SIZE + len(body), _checksum(checked)) + checked


def _constants(plan: ProgramPlan) -> bytes:
    data = bytearray()
    for buffer, raw in plan.constants:
        data += bytes(-len(data) % _ALIGNMENT)
        buffer.offset = len(data)
        data += raw
    return bytes(data)


def _set(
    block: ctypes.Structure,
    known: dict[str, Any],
    name: str,
    value: Any,
    start: int,
    relocations: list[bytes],
    plan: ProgramPlan,
) -> None:
    if name not in known:
        raise KeyError(f"{type(block).__name__} has no field {name}")
    if value is None:
        return
    field = start + getattr(type(block), name).offset
    if isinstance(value, Pointer):
        buffer = value.buffer
        kind = _PLACES[buffer.place]
        each = 0
        base = value.offset
        if buffer.place == "constant":
            base += buffer.offset
        elif buffer.place == "arena":
            # With a fixed batch the program counts as one sample.
            each = buffer.offset
        elif plan.batch is not None:
            each = buffer.size // plan.batch
        relocations.append(_RELOCATION.pack(kind, max(buffer.port, 0), field, base, each))
    elif isinstance(value, Count):
        wide = known[name] is ctypes.c_int64
        kind = _COUNT_64 if wide else _COUNT_32
        relocations.append(_RELOCATION.pack(kind, 0, field, 0, value.each))
    else:
        setattr(block, name, value)


def _port(port: Any, batch: int | None) -> bytes:
    shape = list(port.shape)
    each = 0
    if batch is not None:
        shape[0] //= batch
        each = shape[0]
    return _PORT.pack(type_number(port.dtype), len(shape), each, *shape, *([0] * (8 - len(shape))))


def _checksum(data: bytes) -> int:
    """As `checksum` of `kernels/runtime.h`."""
    words = numpy.frombuffer(data + bytes(-len(data) % 8), dtype="<u8")
    places = numpy.arange(1, len(words) + 1, dtype="<u8")
    plain, weighted = int(words.sum(dtype="<u8")), int((words * places).sum(dtype="<u8"))
    return _mix((_mix(plain) + weighted) % 2**64)


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)
