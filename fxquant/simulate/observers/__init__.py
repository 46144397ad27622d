"""Range estimators: what scale and zero point a stream of values deserves."""

from fxquant.simulate.observers.base import Observer
from fxquant.simulate.observers.factory import make_observer, weight_qparams
from fxquant.simulate.observers.histogram import Histogram

__all__ = ["Histogram", "Observer", "make_observer", "weight_qparams"]
