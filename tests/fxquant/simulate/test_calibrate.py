"""Calibration data as batches, and one streaming sweep over them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError
from fxquant.simulate.calibration_set import CalibrationSet
from fxquant.simulate.quantizers import ActivationQuantizer
from tests.fxquant.small_networks import Residual, compiled, conv_net, images, module

ONE_INPUT = nn.Conv2d(3, 4, 1)


def sizes(data: CalibrationSet) -> list[int]:
    return [len(batch[0]) for batch in data]


def test_a_tensor_is_fed_in_batches() -> None:
    assert sizes(CalibrationSet(images(70), model=ONE_INPUT)) == [32, 32, 6]


def test_a_list_is_read_again_and_again() -> None:
    data = CalibrationSet([images(2), images(3)], model=ONE_INPUT)
    assert len(data.first[0]) == 2
    assert sizes(data) == sizes(data) == [2, 3]
    assert data.batches == 2


def test_an_iterator_is_read_once_and_loses_nothing() -> None:
    data = CalibrationSet(iter([images(2), images(3)]), model=ONE_INPUT)
    assert sizes(data) == [2, 3]
    assert data.batches is None
    with pytest.raises(CalibrationError, match="read to its end"):
        list(data)


def test_labels_are_ignored() -> None:
    data = CalibrationSet([(images(), torch.zeros(4), "names")], model=ONE_INPUT)
    assert [len(batch) for batch in data] == [1]


def test_all_inputs_are_taken() -> None:
    model = module(lambda self, x, y: x + y)
    assert len(CalibrationSet([(images(), images(), 7)], model=model).first) == 2


def test_only_so_many_images_are_read() -> None:
    read = 0

    def batches() -> Iterator[Tensor]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield images(4)

    assert sizes(CalibrationSet(batches(), model=ONE_INPUT, images=10)) == [4, 4, 2]
    assert read <= 4


def test_ranges_come_from_all_batches() -> None:
    model = conv_net()
    narrow = compiled(model, {"activations.observer": "min_max"}, calibration=[images()])
    wide = compiled(
        model, {"activations.observer": "min_max"}, calibration=[images(), images() * 9]
    )
    grids = [
        q.stages["simulated"].get_submodule(q.report.quantizers[0].path) for q in (narrow, wide)
    ]
    scales = [float(grid.qparams.scale) for grid in grids]  # type: ignore[union-attr,operator]
    assert scales[1] == pytest.approx(9 * scales[0], rel=1e-4)


def test_batches_of_another_size_give_the_same_ranges() -> None:
    model = Residual()
    changes = {"activations.observer": "min_max", "bias_correction": False}
    a = compiled(model, changes, calibration=images(8))
    b = compiled(model, changes, calibration=images(8).split(3))
    assert torch.equal(a(images()), b(images()))


def test_quantizers_are_frozen_and_keep_no_statistics() -> None:
    for module_ in compiled().stages["simulated"].modules():
        if isinstance(module_, ActivationQuantizer):
            assert module_.has_qparams
            assert not module_.observing


def test_a_value_that_is_always_zero_has_a_grid() -> None:
    q = compiled(calibration=torch.zeros(4, 3, 8, 8))
    assert q(torch.zeros(2, 3, 8, 8)).isfinite().all()


def test_an_iterator_is_kept_where_it_is_read_again() -> None:
    batches = [torch.full((2, 3), float(index)) for index in range(3)]
    data = CalibrationSet(iter(batches), model=nn.Linear(3, 3), images=5, sweeps=2)
    first, second = ([len(batch[0]) for batch in data] for _ in range(2))
    assert first == second == [2, 2, 1]


def test_the_head_of_the_data_ends_within_a_batch() -> None:
    data = CalibrationSet([images(4), images(4), images(4)], model=ONE_INPUT)
    assert [len(batch[0]) for batch in data.head(6)] == [4, 2]
    assert [len(batch[0]) for batch in data.head(0)] == [4, 4, 4]


def test_learned_rounding_takes_the_ranges_from_the_first_images() -> None:
    calibration = torch.cat([images(4), images(4) * 9])

    def scale(images_for_scales: int) -> float:
        q = compiled(
            conv_net(),
            {
                "activations.observer": "min_max",
                "reconstruction.method": "adaround",
                "reconstruction.iterations": 1,
                "reconstruction.scale_images": images_for_scales,
            },
            calibration=calibration,
        )
        grid = q.stages["simulated"].get_submodule(q.report.quantizers[0].path)
        return float(grid.qparams.scale)  # type: ignore[union-attr,operator]

    assert scale(0) == pytest.approx(9 * scale(4), rel=1e-4)
