from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxquant.errors import CompileError
from fxquant.reconstruct.caches import Caches, room_for_values

KIBIBYTE, MEBIBYTE = 2**10, 2**20


def test_what_does_not_fit_into_memory_goes_to_a_file() -> None:
    like = torch.zeros(4, 1000)
    with Caches(5 * KIBIBYTE) as small, Caches(MEBIBYTE) as large:
        on_disk, in_memory = (caches.make(50, 4, like, "x") for caches in (small, large))
        assert not on_disk.in_memory
        assert in_memory.in_memory
        for first in range(0, 50, 10):
            values = torch.randn(10, 1000)
            on_disk.write(first, values)
            in_memory.write(first, values)
        drawn = torch.randperm(50)[:20]
        assert torch.equal(on_disk.take(drawn), in_memory.take(drawn))
        assert torch.equal(on_disk.take(slice(7, 19)), in_memory.take(slice(7, 19)))


def test_room_that_is_given_back_is_used_again() -> None:
    like = torch.zeros(1, 1024)
    with Caches(MEBIBYTE) as caches:
        first = caches.make(200, 1, like, "x")
        assert first.in_memory
        assert not caches.make(200, 1, like, "x").in_memory
        caches.drop(first)
        assert caches.make(200, 1, like, "x").in_memory


def test_files_are_gone_afterwards() -> None:
    with Caches(0) as caches:
        rows = caches.make(10, 1, torch.zeros(1, 8), "x")
        (path,) = caches._files.values()
        folder = Path(path).parent
        assert path.stat().st_size == 320
        caches.drop(rows)
        assert not path.exists()
    assert not folder.exists()


def test_pages_of_a_file_are_given_back_and_keep_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fxquant.reconstruct.caches._RELEASE", 1)
    values = torch.randn(16, 64)
    with Caches(0) as caches:
        rows = caches.make(16, 1, values[:1], "x")
        rows.write(0, values)
        assert torch.equal(rows.take(slice(0, 16)), values)


def test_several_rows_of_an_image_stay_together() -> None:
    windows = torch.randn(6, 5)  # three images of two windows
    with Caches(MEBIBYTE) as caches:
        rows = caches.make(3, 3, windows, "x")
        rows.write(0, windows)
        assert torch.equal(rows.take(torch.tensor([2, 0])), windows[[4, 5, 0, 1]])


def test_refuses_values_without_images_along_the_first_dimension() -> None:
    with (
        Caches(MEBIBYTE) as caches,
        pytest.raises(CompileError, match=r"the value cls of shape \[3\]"),
    ):
        caches.make(10, 2, torch.zeros(3), "cls")


def test_cached_values_have_what_the_process_and_the_work_leave() -> None:
    held = 87.5 * 2**30 - room_for_values(100, 0)  # an eighth is kept back
    assert 100 * MEBIBYTE < held < 2**34  # torch alone takes more than the one
    assert held + room_for_values(100, 2**30) == pytest.approx(86.5 * 2**30, rel=0.01)
    assert room_for_values(1, 2**40) == 2**30 // 16
