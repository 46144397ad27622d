"""The tables of a recipe: weights, activations, operations, calibration, overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from fxquant.errors import RecipeError
from fxquant.recipe import keys as recipe_keys
from fxquant.recipe.keys import check_keys, join
from fxquant.recipe.selector import SELECTOR_KINDS, Selector
from fxquant.spec import Granularity, Options, QuantSpec, Scheme

Partial = tuple[tuple[str, Any], ...]
"""Some keys of a table and their values, sorted by key; an ``options`` value is one too."""


@dataclass(frozen=True)
class WeightRecipe:
    """How weights are quantized; `bits` may be ``"float"``. The other keys are QuantSpec's."""

    bits: int | Literal["float"] = 8
    scheme: Scheme = "symmetric"
    granularity: Granularity = "per_channel"
    observer: str = "mse"
    options: Options = ()
    reduce_range: bool = False

    def __post_init__(self) -> None:
        _check_and_freeze(self, recipe_keys.WEIGHT_KEYS, "weights")
        self.spec()

    def spec(self) -> QuantSpec | None:
        """The spec of a weight, or None where weights stay float."""
        if isinstance(self.bits, str):
            return None
        return QuantSpec(
            bits=self.bits,
            scheme=self.scheme,
            granularity=self.granularity,
            observer=self.observer,
            options=self.options,
            reduce_range=self.reduce_range,
            kind="weight",
        )


@dataclass(frozen=True)
class ActivationRecipe:
    """How activations are quantized; `bits` may be ``"float"``.

    `one_sided` allows zero-point-free quantizers for values that are proved non-negative.
    `depthwise` = "per_channel" gives such values a scale a channel where only depthwise
    convolutions read them, which costs nothing: both layers rescale each channel anyway. 16 bits
    are always symmetric, whatever `scheme` says. The other keys are QuantSpec's.
    """

    bits: int | Literal["float"] = 8
    scheme: Scheme = "affine"
    observer: str = "mse"
    options: Options = ()
    one_sided: bool = True
    depthwise: Granularity = "per_tensor"
    reduce_range: bool = False

    def __post_init__(self) -> None:
        _check_and_freeze(self, recipe_keys.ACTIVATION_KEYS, "activations")
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
class OperationRecipe:
    """Which form the operations of transformers and the functions of one value take.

    Attributes:
        softmax: ``float``; ``table``: a table of exp and integer sums; ``i-vit``: Shiftmax;
            ``log2``: powers of two, FQ-ViT's log-int-softmax.
        softmax_bits: of Shiftmax's output, 8 or 16.
        probabilities: the grid of a float softmax that a product reads: one for the tensor, or
            ``per_row`` the row's largest is the largest code, and the division by the sum follows
            the product.
        gelu: ``float``; ``table``: 256 entries; ``i-vit``: ShiftGELU.
        functions: SiLU, hardswish, sigmoid, tanh and every other function of one value but GELU:
            ``float``, or a ``table`` of 256 entries.
        layer_norm: ``float``; ``i-vit``: the published ten steps; ``integer``: a converging
            integer square root; ``power_of_two``: FQ-ViT's power-of-two factor a channel.
        residual: bits of a transformer's residual stream, or ``float``. Residual blocks of
            convolutions take part like any other value.
    """

    softmax: Literal["float", "table", "i-vit", "log2"] = "float"
    softmax_bits: Literal[8, 16] = 8
    probabilities: Literal["per_tensor", "per_row"] = "per_row"
    gelu: Literal["float", "table", "i-vit"] = "float"
    functions: Literal["float", "table"] = "table"
    layer_norm: Literal["float", "i-vit", "integer", "power_of_two"] = "float"
    residual: Literal["float", 8, 16] = "float"

    def __post_init__(self) -> None:
        check_keys(shallow(self), recipe_keys.OPERATION_KEYS, "operations")


@dataclass(frozen=True)
class CalibrationRecipe:
    """Where calibration data comes from when none is handed over.

    Attributes:
        source: a folder or archive of images, or ``""``.
        images: how many images are used at most; 0 means all.
        batch_size: images a batch.
        preset: the preprocessing, by name.
    """

    source: str = ""
    images: int = 0
    batch_size: int = 32
    preset: str = "imagenet"

    def __post_init__(self) -> None:
        check_keys(shallow(self), recipe_keys.CALIBRATION_KEYS, "calibration")


@dataclass(frozen=True)
class Override:
    """What is different for some modules.

    Exactly one of `modules` (glob), `regex`, `type` and `position` is set; see `Selector`.
    `weights`, `activations` (the modules' outputs), `inputs` (what the modules read) and
    `operations` hold the keys of those tables that change. An observer that is named without
    options takes its defaults.
    """

    modules: str = ""
    regex: str = ""
    type: str = ""
    position: str = ""
    weights: Partial = ()
    activations: Partial = ()
    inputs: Partial = ()
    operations: Partial = ()

    def __post_init__(self) -> None:
        given = [kind for kind in SELECTOR_KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise RecipeError(
                f"overrides: each needs exactly one of {', '.join(SELECTOR_KINDS)}, "
                f"got {', '.join(given) or 'none'}"
            )
        for table in ("weights", "activations", "inputs", "operations"):
            values = dict(getattr(self, table))
            if "options" in values:
                values["options"] = tuple(sorted(dict(values["options"]).items()))
            object.__setattr__(self, table, tuple(sorted(values.items())))
        _ = self.selector

    @property
    def selector(self) -> Selector:
        """What the override applies to."""
        return next(
            Selector(kind, getattr(self, kind)) for kind in SELECTOR_KINDS if getattr(self, kind)
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], where: str = "overrides") -> Override:
        """An override from its keys.

        Raises:
            RecipeError: a key is unknown or its value is wrong.
        """
        check_keys(table, recipe_keys.OVERRIDE_KEYS, where)
        for name, keys in (
            ("weights", recipe_keys.WEIGHT_KEYS),
            ("activations", recipe_keys.ACTIVATION_KEYS),
            ("inputs", recipe_keys.ACTIVATION_KEYS),
            ("operations", recipe_keys.OPERATION_KEYS),
        ):
            check_keys(table.get(name, {}), keys, join(where, name))
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """The keys that are set."""
        table = {key: value for key, value in shallow(self).items() if value}
        return {
            key: plain(value) if isinstance(value, tuple) else value for key, value in table.items()
        }


Table = TypeVar("Table", WeightRecipe, ActivationRecipe)


def merge(table: Table, partial: Partial) -> Table:
    """A table with the changes of an override; a new observer drops the old one's options."""
    changes = dict(partial)
    if not changes:
        return table
    if changes.get("observer", table.observer) != table.observer:
        changes.setdefault("options", ())
    elif "options" in changes:
        changes["options"] = tuple({**dict(table.options), **dict(changes["options"])}.items())
    return replace(table, **changes)


def _check_and_freeze(
    table: WeightRecipe | ActivationRecipe, keys: recipe_keys.Keys, where: str
) -> None:
    options = dict(table.options)
    check_keys({**shallow(table), "options": options}, keys, where)
    object.__setattr__(table, "options", tuple(sorted(options.items())))


def shallow(table: Any) -> dict[str, Any]:
    """The fields of a dataclass by name."""
    return {entry.name: getattr(table, entry.name) for entry in fields(table)}


def plain(table: Any) -> dict[str, Any]:
    """A table of this module, or a partial one, as dictionaries of plain values."""
    values = dict(table) if isinstance(table, tuple) else shallow(table)
    if "options" in values:
        values["options"] = dict(values["options"])
    return values
