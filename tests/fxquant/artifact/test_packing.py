"""Two four-bit codes to a byte, and back."""

from __future__ import annotations

import pytest
import torch

import fxquant
from fxquant.artifact.packing import fits_four_bits, pack_four_bits, stored_bytes, unpack_four_bits


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 5), (2, 3, 3, 3)])
def test_unpacking_gives_back_what_was_packed(shape):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert torch.equal(unpack_four_bits(pack_four_bits(codes), shape), codes)


def test_a_packed_byte_holds_the_first_code_low():
    assert pack_four_bits(torch.tensor([1, -1], dtype=torch.int8)).tolist() == [0xF1]


def test_eight_bit_codes_do_not_fit():
    assert not fits_four_bits(torch.tensor([8], dtype=torch.int8))
    assert not fits_four_bits(torch.tensor([1], dtype=torch.uint8))


def test_bytes_that_do_not_hold_the_shape_are_refused():
    with pytest.raises(ValueError, match="2 bytes do not hold 7 codes"):
        unpack_four_bits(torch.zeros(2, dtype=torch.uint8), (7,))


def test_four_bit_weights_take_half_a_byte_in_the_file(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.ReLU()).eval()
    x = torch.randn(2, 8, 8, 8)
    q8, q4 = (fxquant.compile(model, name, calibration=x) for name in ("w8a8", "w4a8"))
    weight = 8 * 64 * 9
    assert stored_bytes(q4.stages["integer"].state_dict()["0.weight"]) == weight // 2
    assert q8.report.size_bytes - q4.report.size_bytes == weight // 2
    q4.save(tmp_path / "m.fxq")
    loaded = fxquant.load(tmp_path / "m.fxq", target="reference")
    assert torch.equal(loaded(x), q4.to_target("reference")(x))
