"""The tables of a recipe: weights, activations, operations, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fxquant.errors import RecipeError
from fxquant.recipe.keys import Table, is_table, join, key
from fxquant.spec import Granularity, Options, QuantSpec, Scheme, check_options, split_observer

__all__ = ["ActivationRecipe", "CalibrationRecipe", "OperationRecipe", "WeightRecipe"]


_AFFINE_BITS = 4
"""Up to how many bits weights are affine unless a recipe says otherwise."""


def _is_observer(value: object) -> str | None:
    if not isinstance(value, str):
        return "must be a text"
    try:
        split_observer(value)
    except RecipeError as error:
        return f"is an {error}"
    return None


@dataclass(frozen=True)
class WeightRecipe(Table):
    """How weights are quantized; see `QuantSpec`."""

    where: ClassVar[str] = "weights"

    bits: Literal[2, 3, 4, 5, 6, 7, 8, "float"] = key(8, 'of a code; "float": they stay float.')
    scheme: Literal["auto", "symmetric", "affine"] = key(
        "auto",
        "whether the zero point is fixed. auto: symmetric above 4 bits, at up to 4 bits affine, "
        "whose 2^b levels a channel are one more and lie where the weights do.",
    )
    granularity: Granularity = key("per_channel", "what has a scale of its own.")
    observer: str = key("mse", "the range estimator, see `OBSERVERS`.", check=_is_observer)
    options: Options = key((), "the estimator's parameters.", check=is_table)
    reduce_range: bool = key(False, "use one bit less.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_options(self)
        self.spec()

    def spec(self) -> QuantSpec | None:
        """The spec of a weight, or None where weights stay float."""
        if isinstance(self.bits, str):
            return None
        return QuantSpec(
            bits=self.bits,
            scheme=self._scheme(self.bits),
            granularity=self.granularity,
            observer=self.observer,
            options=self.options,
            reduce_range=self.reduce_range,
            kind="weight",
        )

    def _scheme(self, bits: int) -> Scheme:
        if self.scheme != "auto":
            return self.scheme
        return "affine" if bits <= _AFFINE_BITS else "symmetric"


@dataclass(frozen=True)
class ActivationRecipe(Table):
    """How activations are quantized; see `QuantSpec`."""

    where: ClassVar[str] = "activations"

    bits: Literal[2, 3, 4, 5, 6, 7, 8, 16, "float"] = key(
        8, 'of a code; "float": they stay float. 16 bits are always symmetric.'
    )
    scheme: Scheme = key("affine", "whether the zero point is fixed.")
    observer: str = key("mse", "the range estimator, see `OBSERVERS`.", check=_is_observer)
    options: Options = key((), "the estimator's parameters.", check=is_table)
    one_sided: bool = key(
        True, "leave the zero point out where a value is proved to be never negative."
    )
    depthwise: Granularity = key(
        "per_tensor",
        "per_channel gives values a scale a channel where only depthwise convolutions read them, "
        "which costs nothing: both layers rescale each channel anyway.",
    )
    reduce_range: bool = key(False, "fit the scale to one bit less.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_options(self)
        self.spec()

    def spec(self) -> QuantSpec | None:
        """The spec of an activation, not one-sided yet, or None where activations stay float."""
        if isinstance(self.bits, str):
            return None
        return QuantSpec(
            bits=self.bits,
            scheme="symmetric" if self.bits == 16 else self.scheme,
            observer=self.observer,
            options=self.options,
            reduce_range=self.reduce_range,
        )


@dataclass(frozen=True)
class OperationRecipe(Table):
    """Which form the operations of transformers and the functions of one value take."""

    where: ClassVar[str] = "operations"

    softmax: Literal["float", "table", "i-vit", "log2"] = key(
        "float",
        "float; table: a table of exp and integer sums; i-vit: Shiftmax; log2: powers of two, "
        "FQ-ViT's log-int-softmax.",
    )
    softmax_bits: Literal[8, 16] = key(8, "of Shiftmax's output.")
    probabilities: Literal["per_tensor", "per_row"] = key(
        "per_row",
        "the grid of a float softmax that a product reads: one for the tensor, or per_row the "
        "row's largest is the largest code, and the division by the sum follows the product.",
    )
    gelu: Literal["float", "table", "i-vit"] = key(
        "float", "float; table: 256 entries; i-vit: ShiftGELU."
    )
    functions: Literal["float", "table"] = key(
        "table",
        "SiLU, hardswish, sigmoid, tanh and every other function of one value but GELU: float, or "
        "a table of 256 entries.",
    )
    layer_norm: Literal["float", "i-vit", "integer", "power_of_two"] = key(
        "float",
        "float; i-vit: the published ten steps; integer: a converging integer square root; "
        "power_of_two: FQ-ViT's power-of-two factor a channel.",
    )
    residual: Literal["float", 8, 16] = key(
        "float",
        "bits of a transformer's residual stream, or float. Residual blocks of convolutions take "
        "part like any other value.",
    )


@dataclass(frozen=True)
class CalibrationRecipe(Table):
    """Where calibration data comes from when none is handed over."""

    where: ClassVar[str] = "calibration"

    source: str = key("", 'a folder or archive of images, or "".')
    images: int = key(0, "how many images are used at most; 0 means all.", low=0, high=10**9)
    batch_size: int = key(32, "images a batch.", low=1, high=10**6)
    preset: str = key("imagenet", "the preprocessing, by name.")


def _settle_options(table: WeightRecipe | ActivationRecipe) -> None:
    options = dict(table.options)
    check_options(table.observer, options, join(table.where, "options"))
    object.__setattr__(table, "options", tuple(sorted(options.items())))
