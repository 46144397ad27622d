"""Several codes of two or four bits to a byte, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.artifact.packing import Packed, pack, stored_bytes, unpack


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 5), (2, 3, 3, 3)])
def test_unpacking_gives_back_what_was_packed(shape: tuple[int, ...], bits: int) -> None:
    reach = 2 ** (bits - 1)
    codes = torch.randint(-reach, reach, shape, dtype=torch.int8)
    codes.view(-1)[0] = -reach
    packed = pack(codes)
    assert packed is not None
    assert packed.bits == bits
    assert packed.bytes == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, shape), codes)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_channels_whose_codes_lie_apart_are_packed_with_an_offset_each(
    bits: int, axis: int
) -> None:
    codes = torch.randint(0, 2**bits, (6, 6, 3, 3), dtype=torch.int8)
    offsets = torch.randint(-100, 100, (6,), dtype=torch.int8)
    codes += offsets.view([-1 if dim == axis else 1 for dim in range(4)])
    packed = pack(codes)
    assert packed is not None
    assert (packed.bits, packed.bytes) == (bits, codes.numel() * bits // 8 + 6)
    assert torch.equal(unpack(packed, codes.shape), codes)


def test_a_packed_byte_holds_the_first_code_low() -> None:
    packed = pack(torch.tensor([1, -3], dtype=torch.int8))
    assert packed is not None
    assert packed.codes.tolist() == [0xD1]
    packed = pack(torch.tensor([1, -1, 0, -2], dtype=torch.int8))
    assert packed is not None
    assert packed.codes.tolist() == [0b10_00_11_01]


def test_eight_bit_codes_do_not_fit() -> None:
    assert pack(torch.tensor([8, -8], dtype=torch.int8)) is None
    assert pack(torch.tensor([1], dtype=torch.uint8)) is None


def test_bytes_that_do_not_hold_the_shape_are_refused() -> None:
    codes = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 bytes do not hold 7 codes of 4 bits"):
        unpack(Packed(4, codes, None), (7,))
    with pytest.raises(ValueError, match="offsets"):
        unpack(Packed(4, codes, torch.zeros(3, 1, dtype=torch.int8)), (2, 2))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ["", "_gptq"])
def test_weights_of_few_bits_take_as_many_in_the_file(
    tmp_path: Path, bits: int, method: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.ReLU()).eval()
    # Weights far from balanced: the channels' zero points differ.
    model[0].weight.data += torch.linspace(-0.05, 0.05, 64).view(-1, 1, 1, 1)
    x = torch.randn(2, 8, 8, 8)
    wide, narrow = (
        fxquant.compile(model, name, calibration=x) for name in ("w8a8", f"w{bits}a8{method}")
    )
    packed = 8 * 64 * 9 * bits // 8 + 64
    assert stored_bytes(narrow.stages["integer"].state_dict()["0.weight"]) == packed
    # Names and grids are text in both; what the weights take is nearly all of the difference.
    assert wide.report.size_bytes - narrow.report.size_bytes == pytest.approx(
        8 * 64 * 9 - packed, rel=0.2
    )
    narrow.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq", target="reference")
    assert torch.equal(loaded(x), narrow.to_target("reference")(x))
