from __future__ import annotations

from typing import Any

import pytest
import torch

from fxquant.errors import RecipeError
from fxquant.spec import OBSERVERS, QuantSpec


@pytest.mark.parametrize(
    ("spec", "codes", "dtype"),
    [
        (QuantSpec(bits=8), (0, 255), torch.uint8),
        (QuantSpec(bits=4), (0, 15), torch.uint8),
        (QuantSpec(bits=8, reduce_range=True), (0, 255), torch.uint8),
        (QuantSpec(bits=16, scheme="symmetric"), (-32767, 32767), torch.int16),
        (QuantSpec(bits=8, scheme="symmetric", kind="weight"), (-127, 127), torch.int8),
        (QuantSpec(bits=4, scheme="symmetric", kind="weight"), (-7, 7), torch.int8),
        (QuantSpec(bits=4, scheme="affine", kind="weight"), (-8, 7), torch.int8),
        (QuantSpec(scheme="symmetric", kind="weight", reduce_range=True), (-63, 63), torch.int8),
    ],
)
def test_codes_of_a_spec(spec: QuantSpec, codes: tuple[int, int], dtype: torch.dtype) -> None:
    assert (spec.qmin, spec.qmax) == codes
    assert spec.dtype == dtype


def test_reduce_range_fits_an_activation_to_one_bit_less() -> None:
    spec = QuantSpec(bits=8, reduce_range=True)
    assert (spec.fit_qmin, spec.fit_qmax) == (0, 127)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "activation bits must be 2 to 8 or 16, got 9"),
        ({"bits": 16, "kind": "weight"}, "weight bits must be 2 to 8, got 16"),
        ({"bits": True}, "bits must be"),
        ({"bits": 16}, "16-bit activations are symmetric"),
        ({"scheme": "linear"}, "scheme must be"),
        ({"granularity": "per_channel"}, "activations are quantized per_tensor"),
        ({"kind": "weight", "one_sided": True}, "one_sided is for activations"),
        ({"bits": 2, "reduce_range": True}, "reduce_range needs at least 3 bits"),
        ({"observer": "histgram"}, "did you mean 'histogram'"),
        ({"options": {"percentile": 99}}, "observer 'mse' has no option 'percentile'"),
        ({"observer": "p_norm", "options": {"p": 0}}, "options.p must lie between 0.1 and 16"),
        ({"observer": "p_norm_2.4", "options": {"p": 2.0}}, "already says p = 2.4"),
        ({"options": {"bins": 1000}}, "power of two"),
        ({"options": {"bins": 4096.0}}, "must be an integer"),
    ],
)
def test_refuses_a_spec(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantSpec(**changes)


def test_shorthand_says_the_exponent() -> None:
    spec = QuantSpec(observer="p_norm_2.4")
    assert spec.estimator == "p_norm"
    assert spec.option("p") == 2.4


def test_options_have_defaults_that_are_allowed() -> None:
    for name, options in OBSERVERS.items():
        for option, rule in options.items():
            assert rule.complaint(QuantSpec(observer=name).option(option)) is None


def test_equal_specs_have_equal_hashes() -> None:
    assert hash(QuantSpec(options={"bins": 1024, "candidates": 8})) == hash(  # type: ignore[arg-type]
        QuantSpec(options=(("candidates", 8), ("bins", 1024)))
    )
