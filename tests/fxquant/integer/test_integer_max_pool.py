from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fxquant.kernels  # noqa: F401  (registers torch.ops.fxquant)
from fxquant import integer
from fxquant.errors import CompileError
from tests.fxquant.integer import plain

FLOAT = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_max_pool_equals_the_float_maximum(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(spatial)]

    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = [d * (k - 1) + 1 + e for k, d, e in zip(kernel, dilation, per_axis(0, 4), strict=True)]
    ceil_mode = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    x = plain.uint8([2, 2, *size])
    if data.draw(st.booleans()):
        x = (x.to(torch.int16) - 128) * 255
    if data.draw(st.booleans()):
        x = x[1]
    found = integer.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    # Codes of 16 bits are exact in float64, and so is their maximum.
    expected = FLOAT[spatial - 1](
        x.double(), kernel, stride, padding, dilation=dilation, ceil_mode=ceil_mode
    )
    assert found.dtype == x.dtype
    assert torch.equal(found.double(), expected)


def test_an_empty_stride_means_the_kernel_size() -> None:
    x = plain.uint8([1, 3, 9])
    found = integer.max_pool(x, [3], [], [0], [1], False)
    assert torch.equal(found, x.unflatten(2, (3, 3)).amax(3))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 33])
def test_channels_last_and_slices_give_the_same_maxima(size: int) -> None:
    x = plain.uint8([2, 6, size, size])
    last = x.contiguous(memory_format=torch.channels_last)
    args = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    expected = F.max_pool2d(x.float(), 3, 2, 1).byte()
    for layout in (x, last):
        assert torch.equal(integer.max_pool(layout, *args), expected)
        assert torch.equal(integer.max_pool(layout[:, 2:], *args), expected[:, 2:])
    if size > 2:
        assert integer.max_pool(last, *args).is_contiguous(memory_format=torch.channels_last)


def test_max_pool_takes_codes_only() -> None:
    with pytest.raises(CompileError, match=r"fxquant\.max_pool: the input is"):
        integer.max_pool(torch.ones(1, 1, 4), [2], [2], [0], [1], False)


def test_a_window_may_be_read_from_the_input_of_a_graph() -> None:
    def whole(x: torch.Tensor) -> torch.Tensor:
        size = [x.size(2), x.size(3)]
        return torch.ops.fxquant.max_pool.default(x, size, [], [0, 0], [1, 1], False)

    x = plain.uint8([2, 3, 5, 7])
    assert torch.equal(torch.fx.symbolic_trace(whole)(x), x.amax((2, 3), keepdim=True))
