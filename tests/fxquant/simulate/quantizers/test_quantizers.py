from __future__ import annotations

import copy
import io

import pytest
import torch

from fxquant.errors import CalibrationError
from fxquant.simulate.observers import weight_qparams
from fxquant.simulate.quantizers import ActivationQuantizer, AffineQuantizer, WeightQuantizer
from fxquant.spec import QParams, QuantSpec


def u8() -> QParams:
    zero_point = torch.tensor([10], dtype=torch.int32)
    return QParams(torch.tensor([0.1]), zero_point, 0, 255, torch.uint8)


def calibrated(spec: QuantSpec | None = None) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(spec or QuantSpec())
    quantizer.observing = True
    quantizer(torch.randn(4, 100).relu())
    quantizer.freeze()
    return quantizer


# -- fixed parameters ----------------------------------------------------------------------------


def test_forward_equals_fake_quantize_bit_for_bit() -> None:
    x = torch.randn(1000) * 30
    assert torch.equal(AffineQuantizer(u8())(x), u8().fake_quantize(x))
    assert torch.equal(AffineQuantizer(u8())(x.requires_grad_()), u8().fake_quantize(x))


def test_gradient_passes_inside_the_range_only() -> None:
    # The codes reach from -1.0 to 24.5.
    x = torch.tensor([-1.2, -1.04, -0.3, 0.0, 24.54, 24.6], requires_grad=True)
    AffineQuantizer(u8())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_gradient_has_the_range_of_its_channel() -> None:
    zeros = torch.zeros(2, dtype=torch.int32)
    qparams = QParams(torch.tensor([1.0, 10.0]), zeros, -127, 127, torch.int8, axis=0)
    x = torch.full((2, 1), 200.0, requires_grad=True)
    WeightQuantizer(qparams)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 1]


def test_disabled_quantizer_lets_values_pass() -> None:
    x = torch.randn(10)
    assert AffineQuantizer(u8(), enabled=False)(x) is x


def test_keeps_the_dtype_of_its_input() -> None:
    assert AffineQuantizer(u8())(torch.randn(3, dtype=torch.float64)).dtype == torch.float64


def test_conversion_to_double_leaves_the_parameters_alone() -> None:
    quantizer = AffineQuantizer(u8()).double()
    assert quantizer.qparams.scale.dtype == torch.float32


def test_quantize_gives_codes() -> None:
    assert AffineQuantizer(u8()).quantize(torch.tensor([0.0, 0.2])).tolist() == [10, 12]


def test_state_round_trips() -> None:
    weight = torch.randn(3, 4)
    spec = QuantSpec(scheme="symmetric", granularity="per_channel", kind="weight", bits=4)
    quantizer = WeightQuantizer(weight_qparams(weight, spec))
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = AffineQuantizer()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(weight), quantizer(weight))
    assert (other.qparams.qmin, other.qparams.axis) == (-7, 0)


# -- activations ---------------------------------------------------------------------------------


def test_fresh_quantizer_lets_values_pass() -> None:
    x = torch.randn(10)
    assert ActivationQuantizer(QuantSpec())(x) is x


def test_observing_lets_values_pass() -> None:
    quantizer = ActivationQuantizer(QuantSpec())
    quantizer.observing = True
    x = torch.randn(10)
    assert quantizer(x) is x
    assert not quantizer.has_qparams


def test_frozen_quantizer_quantizes() -> None:
    quantizer = calibrated()
    x = torch.randn(20)
    assert not quantizer.observing
    assert torch.equal(quantizer(x), quantizer.qparams.fake_quantize(x))
    assert not torch.equal(quantizer(x), x)


def test_one_sided_quantizer_has_no_zero_point() -> None:
    quantizer = ActivationQuantizer(QuantSpec())
    quantizer.make_one_sided()
    quantizer.observing = True
    quantizer(torch.rand(100) + 1)
    quantizer.freeze()
    assert quantizer.one_sided
    assert int(quantizer.qparams.zero_point) == 0


def test_one_sided_quantizer_refuses_negative_values() -> None:
    quantizer = ActivationQuantizer(QuantSpec(), name="relu")
    quantizer.make_one_sided()
    quantizer.observing = True
    quantizer(torch.randn(100))
    with pytest.raises(CalibrationError, match="'relu'"):
        quantizer.freeze()


def test_becomes_one_sided_before_it_is_frozen_only() -> None:
    with pytest.raises(ValueError, match="frozen"):
        calibrated().make_one_sided()


def test_freezing_without_data_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="never seen"):
        ActivationQuantizer(QuantSpec()).freeze()


def test_asking_a_fresh_quantizer_for_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameters yet"):
        _ = ActivationQuantizer(QuantSpec()).qparams


def test_freezing_lets_go_of_the_statistics() -> None:
    with pytest.raises(CalibrationError, match="never seen"):
        calibrated().freeze()


def test_state_of_an_activation_quantizer_round_trips() -> None:
    quantizer, other = calibrated(), ActivationQuantizer(QuantSpec())
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(20)
    assert torch.equal(other(x), quantizer(x))
    other.load_state_dict(ActivationQuantizer(QuantSpec()).state_dict())
    assert other(x) is x


def test_copies_are_independent() -> None:
    quantizer = ActivationQuantizer(QuantSpec())
    twin = copy.deepcopy(quantizer)
    twin.observing = True
    twin(torch.randn(10))
    twin.freeze()
    assert not quantizer.has_qparams


def test_detail_says_form_and_codes() -> None:
    assert ActivationQuantizer(QuantSpec(bits=4)).detail == "u4 affine"
    assert "u8 [0, 255]" in calibrated().detail
    assert (
        "per channel"
        in WeightQuantizer(
            weight_qparams(
                torch.randn(3, 4),
                QuantSpec(scheme="symmetric", granularity="per_channel", kind="weight"),
            )
        ).detail
    )
