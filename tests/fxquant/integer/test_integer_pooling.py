from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import integer
from tests.fxquant.integer import plain

BOUNDED = settings(max_examples=80, deadline=None)
OUTPUT: dict[str, Any] = {
    "scale": 0.03,
    "zero_point": 50,
    "qmin": 0,
    "qmax": 255,
    "dtype": torch.uint8,
}


def averaged(sums: Any, counts: Any) -> Any:
    factor = (0.02 / (0.03 * counts.astype(np.float64))).astype(np.float32)
    return plain.codes(sums.astype(np.float32) * factor, 50, 0, 255)


@BOUNDED
@given(data=st.data())
def test_avg_pool_equals_plain_integers(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    stride = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = [k + data.draw(st.integers(0, 3)) for k in kernel]
    ceil_mode, include = data.draw(st.booleans()), data.draw(st.booleans())
    divisor = data.draw(st.sampled_from([None, 3]))
    torch.manual_seed(data.draw(st.integers(0, 9999)))
    x = plain.uint8([2, 2, *size])
    found = integer.avg_pool(
        x, 0.02, 90, kernel, stride, padding, ceil_mode, include, divisor, **OUTPUT
    )
    q = x.numpy().astype(np.int64) - 90
    sums = np.zeros(tuple(found.shape), np.int64)
    counts = np.zeros(tuple(found.shape[2:]), np.int64)
    for position in itertools.product(*map(range, found.shape[2:])):
        starts = [p * s - a for p, s, a in zip(position, stride, padding, strict=True)]
        padded = [
            min(b + k, n + a) - b for b, k, n, a in zip(starts, kernel, size, padding, strict=True)
        ]
        inside = [
            slice(max(b, 0), min(b + k, n)) for b, k, n in zip(starts, kernel, size, strict=True)
        ]
        area = q[(slice(None), slice(None), *inside)]
        sums[(slice(None), slice(None), *position)] = area.sum(tuple(range(2, 2 + spatial)))
        counted = padded if include else [part.stop - part.start for part in inside]
        counts[position] = divisor or int(np.prod(counted))
    assert plain.same(found, averaged(sums, counts))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_avg_pool_counts_as_torch_counts(ceil_mode: bool, include: bool) -> None:
    x = plain.uint8([1, 2, 8, 7])  # the last windows reach past the padding
    found = integer.avg_pool(
        x, 0.02, 0, [3, 2], [2, 3], [1, 1], ceil_mode, include, None, 0.02, 0, 0, 255, torch.uint8
    )
    real = F.avg_pool2d(x.double(), (3, 2), (2, 3), (1, 1), ceil_mode, include)
    # Within half a step, and a float32 rounding of numbers up to 255.
    assert (found.double() - real).abs().max() <= 0.5 + 255 * 2**-23


def test_avg_pool_of_the_zero_point_is_the_zero_point() -> None:
    x = torch.full((1, 1, 4), 90, dtype=torch.uint8)
    found = integer.avg_pool(x, 0.02, 90, [3], [], [1], False, True, None, **OUTPUT)
    assert torch.equal(found, torch.full((1, 1, 2), 50, dtype=torch.uint8))


def test_avg_pool_without_batch_dimension() -> None:
    for spatial in (1, 2, 3):
        x = plain.uint8([2, 3, *[4] * spatial])
        args = ([2] * spatial, [2] * spatial, [0] * spatial, False, True, None)
        batched = integer.avg_pool(x, 0.02, 90, *args, **OUTPUT)
        assert torch.equal(integer.avg_pool(x[1], 0.02, 90, *args, **OUTPUT), batched[1])


@BOUNDED
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    seed=st.integers(0, 9999),
)
def test_adaptive_avg_pool_equals_plain_integers(sizes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    x = plain.uint8([2, 2, *(size for size, _ in sizes)])
    outputs = [output for _, output in sizes]
    found = integer.adaptive_avg_pool(x, 0.02, 90, outputs, **OUTPUT)
    q = x.numpy().astype(np.int64) - 90
    sums, counts = np.zeros((2, 2, *outputs), np.int64), np.zeros(tuple(outputs), np.int64)
    for position in itertools.product(*map(range, outputs)):
        window = tuple(
            slice(int(np.floor(i * n / o)), int(np.ceil((i + 1) * n / o)))
            for i, (n, o) in zip(position, sizes, strict=True)
        )
        area = q[(slice(None), slice(None), *window)]
        sums[(slice(None), slice(None), *position)] = area.sum(tuple(range(2, area.ndim)))
        counts[position] = area[0, 0].size
    assert plain.same(found, averaged(sums, counts))


def test_global_pool_equals_mean() -> None:
    x = plain.uint8([2, 5, 7, 7])
    pooled = integer.adaptive_avg_pool(x, 0.02, 90, [1, 1], **OUTPUT)
    assert torch.equal(pooled, integer.mean(x, 0.02, 90, [2, 3], True, **OUTPUT))
    assert torch.equal(pooled.flatten(1), integer.mean(x, 0.02, 90, [-1, -2], False, **OUTPUT))


def test_mean_equals_plain_integers() -> None:
    x = plain.uint8([3, 4, 5])
    for dim, axes in (([1], (1,)), ([0, 2], (0, 2)), ([], (0, 1, 2))):
        found = integer.mean(x, 0.02, 90, dim, False, **OUTPUT)
        sums = (x.numpy().astype(np.int64) - 90).sum(axes)
        count = np.array(np.prod([x.shape[a] for a in axes]))
        assert plain.same(found, averaged(np.asarray(sums), count))


def test_averages_in_sixteen_bits_are_exact() -> None:
    x = torch.full((1, 1, 300, 300), 32767, dtype=torch.int16)
    rest = (1.0, 0, -32767, 32767, torch.int16)
    for found in (
        integer.mean(x, 1.0, 0, [2, 3], False, *rest),
        integer.adaptive_avg_pool(x, 1.0, 0, [1, 1], *rest),
        integer.avg_pool(x, 1.0, 0, [300, 300], [], [0, 0], False, True, None, *rest),
    ):
        assert found.flatten().tolist() == [32767]


def test_pools_keep_channels_last() -> None:
    x = plain.uint8([2, 3, 6, 6])
    last = x.contiguous(memory_format=torch.channels_last)
    for run in (
        lambda q: integer.avg_pool(q, 0.02, 90, [2, 2], [], [0, 0], False, True, None, **OUTPUT),
        lambda q: integer.adaptive_avg_pool(q, 0.02, 90, [2, 3], **OUTPUT),
    ):
        found = run(last)
        assert torch.equal(found, run(x))
        assert found.is_contiguous(memory_format=torch.channels_last)
