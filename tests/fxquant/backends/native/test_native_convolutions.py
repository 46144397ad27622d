"""Convolutions of every shape give the reference's integers, from and to any address."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.backends.native.executor import CompiledSegment, compile_segment
from tests.fxquant.backends.native.kernels import instruction_sets

pytestmark = pytest.mark.usefixtures("native")
OPS: Any = torch.ops.fxquant
each_isa = pytest.mark.parametrize("isa", instruction_sets())
X, Y, RESIDUAL = (0.02, 121), (0.05, 3), (0.03, 77)
GUARD = 64


class Convolution(nn.Module):
    """One integer convolution with what a network may hang on it."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        rank = draw.choice([2, 2, 2, 2, 1])
        groups = draw.choice([1, 1, 1, 1, draw.randint(2, 8), draw.randint(2, 70)])
        multiplier = draw.choice([1, 1, 2]) if groups > 8 else draw.randint(1, 70 // groups)
        inputs = 1 if groups > 8 else draw.randint(1, 70 // groups)
        kernel = draw.choice([[1, 1], [3, 3], [draw.randint(1, 7), draw.randint(1, 7)]])[:rank]
        self.shape = (groups * inputs, *self._size(draw, rank))
        outputs = groups * multiplier
        weight = torch.randint(-127, 128, (outputs, inputs, *kernel), dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.rand(outputs) * 0.003 + 0.001)
        bias = torch.randint(-3000, 3000, (outputs,), dtype=torch.int32)
        self.register_buffer("bias", bias if draw.random() < 0.8 else None)
        zero = torch.randint(-20, 20, (outputs,), dtype=torch.int8)
        self.register_buffer("zero_point", zero if draw.random() < 0.15 else None)
        self.register_buffer("table", torch.randint(0, 256, (256,), dtype=torch.uint8))
        stride = [draw.choice([1, 1, 2, 3]) for _ in kernel]
        dilation = [draw.choice([1, 1, 1, 2, 3]) for _ in kernel]
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        padding = [draw.randint(0, k - 1) for k in reach]
        # An image must be as large as a window.
        self.shape = (
            self.shape[0],
            *(
                max(size, k - 2 * pad)
                for size, k, pad in zip(self.shape[1:], reach, padding, strict=True)
            ),
        )
        self.geometry = (stride, padding, dilation, groups)
        low, high = draw.choice([(0, 255), (Y[1], 255), (Y[1], 200)])
        self.codes = (*Y, low, high, torch.uint8)
        self.with_residual, self.with_table = draw.random() < 0.3, draw.random() < 0.3

    @staticmethod
    def _size(draw: random.Random, rank: int) -> Sequence[int]:
        return [draw.choice([draw.randint(1, 9), draw.randint(1, 23)]) for _ in range(rank)]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        layer = (self.weight, self.scale, self.zero_point, self.bias)
        extra = (residual, *RESIDUAL) if self.with_residual else ()
        y: Tensor = OPS.conv.default(x, *X, *layer, *self.geometry, *self.codes, *extra)
        return OPS.lookup.default(y, self.table) if self.with_table else y

    def outputs(self, batch: int) -> torch.Size:
        x = torch.zeros(batch, *self.shape, dtype=torch.uint8)
        return OPS.conv.default(
            x, *X, self.weight, self.scale, None, None, *self.geometry, *self.codes
        ).shape


def graph_of(module: Convolution) -> fx.GraphModule:
    graph_module = fx.symbolic_trace(module)
    output = next(iter(reversed(graph_module.graph.nodes)))
    output.args = ((output.args[0],),)
    graph_module.recompile()
    return graph_module


def at_any_address(draw: random.Random, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random codes whose first byte lies anywhere, and the memory around them."""
    count = torch.Size(shape).numel()
    memory = torch.randint(0, 256, (count + 2 * GUARD,), dtype=torch.uint8)
    start = GUARD + draw.randint(0, 15)
    return memory[start : start + count].view(*shape), memory


def run_at_any_address(
    draw: random.Random,
    segment: CompiledSegment,
    batch: int,
    inputs: Sequence[Tensor],
    shape: torch.Size,
) -> Tensor:
    """The output, of which nothing but itself may be written."""
    y, memory = at_any_address(draw, shape)
    before = memory.clone()
    segment.program.run(batch, inputs, [y])
    found = y.clone()
    kept = before[y.storage_offset() : y.storage_offset() + y.numel()].view(y.shape)
    y.copy_(kept)
    assert torch.equal(memory, before)
    return found


def check_convolution(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    module = Convolution(draw)
    shapes = (module.shape, module.outputs(1)[1:])
    examples = [torch.zeros(2, *shape, dtype=torch.uint8) for shape in shapes]
    segment = compile_segment(graph_of(module), examples)
    assert segment.plan.batch is not None
    for batch in draw.sample(range(6), 2):
        inputs = [at_any_address(draw, (batch, *shape))[0] for shape in shapes]
        expected = module(*inputs)
        found = run_at_any_address(draw, segment, batch, inputs, expected.shape)
        assert torch.equal(expected, found)


@each_isa
def test_a_convolution_of_any_shape_gives_the_reference_integers(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_ISA", isa)
    for seed in range(40):
        check_convolution(seed)


@pytest.mark.slow
@each_isa
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_thousands_of_convolutions_give_the_reference_integers(
    isa: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_ISA", isa)
    for seed in range(start, start + 500):
        check_convolution(seed)
