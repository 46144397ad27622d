"""The table of range estimators, and the two ways to ask for one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from fxquant.simulate.observers.base import Observer
from fxquant.simulate.observers.running import (
    AbsMaxObserver,
    MinMaxObserver,
    MovingAverageAbsMaxObserver,
    MovingAverageMinMaxObserver,
)
from fxquant.simulate.observers.search import L2HistogramObserver, NormObserver
from fxquant.simulate.observers.statistical import EntropyObserver, PercentileObserver
from fxquant.spec import QParams, QuantSpec

_CLASSES: Mapping[str, type[Observer]] = MappingProxyType(
    {
        "abs_max": AbsMaxObserver,
        "min_max": MinMaxObserver,
        "moving_average_abs_max": MovingAverageAbsMaxObserver,
        "moving_average_min_max": MovingAverageMinMaxObserver,
        "histogram": L2HistogramObserver,
        "percentile": PercentileObserver,
        "entropy": EntropyObserver,
        "mse": NormObserver,
        "p_norm": NormObserver,
    }
)


def make_observer(
    spec: QuantSpec, channels: int | None = None, *, axis: int = 0, name: str = ""
) -> Observer:
    """A fresh range estimator for a spec.

    Args:
        spec: the form of the codes, the estimator's name and its options.
        channels: how many channels the values have; needed where the spec is per channel, and
            ignored elsewhere.
        axis: the dimension of the channels.
        name: whose values they are, for error messages.

    Raises:
        ValueError: the spec is per channel and `channels` is missing.
    """
    if spec.granularity == "per_tensor":
        return _CLASSES[spec.estimator](spec, None, name)
    if channels is None:
        raise ValueError("a per-channel spec needs the number of channels")
    return _CLASSES[spec.estimator](spec, axis, name)


def weight_qparams(weight: Tensor, spec: QuantSpec, axis: int = 0, name: str = "") -> QParams:
    """The parameters of a weight, whose channels lie along `axis`.

    Raises:
        CalibrationError: the weight holds NaN or infinite values.
    """
    observer = make_observer(spec, weight.shape[axis], axis=axis, name=name)
    observer.update(weight)
    return observer.qparams()
