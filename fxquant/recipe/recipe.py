"""What to quantize and how: `Recipe`, frozen, strictly validated, TOML in and out."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fxquant.arguments import checked
from fxquant.errors import RecipeError
from fxquant.recipe import changes as recipe_changes
from fxquant.recipe import names
from fxquant.recipe.keys import Number, Table, key
from fxquant.recipe.override import Changed, Override, merge
from fxquant.recipe.reconstruction import ReconstructionRecipe
from fxquant.recipe.selector import Selector
from fxquant.recipe.tables import (
    ActivationRecipe,
    CalibrationRecipe,
    OperationRecipe,
    WeightRecipe,
)
from fxquant.recipe.toml import to_toml
from fxquant.spec import QuantSpec

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe(Table):
    """What to quantize and how."""

    name: str = key("custom", "for reports.")
    fusion: Literal["all", "blocks", "two-step", "none"] = key(
        "all",
        "where activations and residuals are fused into layers: all, only inside residual blocks, "
        "or none; two-step: activations everywhere, but a layer is quantized before a residual is "
        "added to it.",
    )
    fold_batch_norm: bool = key(True, "fold batch norms into their layer.")
    requantization: Literal["float", "dyadic"] = key(
        "float",
        "between integers, float multipliers or dyadic ones, f / 2^e. With dyadic ones no float "
        "tensor is left between the input's quantizer and the output.",
    )
    equalize: bool = key(False, "cross-layer equalization before quantization.")
    bias_correction: bool = key(
        False, "correct biases by what rounding the weights does to each output's mean."
    )
    reparameterize: bool = key(
        False,
        "fold a scale and zero point for each channel of a LayerNorm's output into the linear "
        "layers that read it (RepQ-ViT).",
    )
    smooth_quant: Number = key(
        0.0,
        "the share of the activations' range that moves into the weights of the layers behind a "
        "LayerNorm (SmoothQuant's alpha); 0: none.",
        low=0.0,
        high=1.0,
    )
    split_outliers: Number = key(
        0.0,
        "compute a few hidden channels of an MLP apart where the others' range is this many times "
        "smaller without them; 0: never.",
        low=0.0,
        high=1e6,
    )
    start_at: str = key(
        "", 'a module path or glob: what runs before it stays float. "": everything.'
    )
    float: tuple[str, ...] = key((), "selectors of modules that stay float; see `Selector.parse`.")
    float_dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "what the products that stay float compute in. bfloat16 is taken on a CPU that multiplies "
        "it, with the float operations that are connected to a product; elsewhere it is float32.",
    )
    quantize_output: bool = key(False, "quantize the model's outputs too.")
    dynamic: bool = key(
        False, "quantize the inputs of linear and recurrent layers at run time, nothing else."
    )
    recurrent: Literal["float", "dynamic"] = key(
        "float",
        "what LSTMs and GRUs of a static recipe are: dynamic, which quantizes what they read at "
        "run time, as `dynamic` does.",
    )
    input_bits: Literal[8, 16, "float"] = key(8, "of the model's inputs.")
    weights: WeightRecipe = key(WeightRecipe, "see `WeightRecipe`.")
    activations: ActivationRecipe = key(ActivationRecipe, "see `ActivationRecipe`.")
    operations: OperationRecipe = key(OperationRecipe, "see `OperationRecipe`.")
    reconstruction: ReconstructionRecipe = key(ReconstructionRecipe, "see `ReconstructionRecipe`.")
    calibration: CalibrationRecipe = key(CalibrationRecipe, "see `CalibrationRecipe`.")
    overrides: tuple[Override, ...] = key((), "per-module changes; later ones win.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.requantization == "dyadic" and self.dynamic:
            raise RecipeError('requantization = "dyadic" is static: set dynamic = false')
        for text in self.float:
            Selector.parse(text)
        if self.start_at:
            Selector("modules", self.start_at)
        for index, override in enumerate(self.overrides):
            try:
                merge(self.weights, override.weights)
                merge(self.activations, override.activations)
                merge(self.activations, override.inputs)
                replace(self.operations, **dict(override.operations))
            except RecipeError as error:
                raise RecipeError(f"overrides[{index}]: {error}") from error

    # -- reading and writing -----------------------------------------------------------------

    @classmethod
    @checked(name=RecipeError)
    def named(cls, name: str) -> Recipe:
        """A recipe that comes with fxquant; `fxquant.recipe.names` lists those that have a file.

        Others follow from their names: ``w3a32``, ``w2a4_head_stem8``, ``w4a4_first_last8`` are
        the file of the same form with other bits; a method of rounding at the end, as in
        ``w4a8_adaround``, sets `reconstruction.method`, and without one it is nearest.

        Raises:
            RecipeError: there is none of this name; says the nearest.
        """
        table, changes = names.resolve(name)
        return replace(cls.from_dict(table).replace(changes), name=name)

    @classmethod
    @checked(path=RecipeError)
    def from_toml(cls, path: str | Path) -> Recipe:
        """A recipe from a TOML file; without a ``name`` it is called as the file.

        Raises:
            RecipeError: the file cannot be read, is no TOML, or a key or value is wrong.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: is no TOML: {error}") from error
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from error
        try:
            return cls.from_dict({"name": Path(path).stem, **table})
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """All keys as TOML; `from_toml` gives an equal recipe back."""
        return to_toml(self.to_dict())

    @checked(changes=RecipeError)
    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """A new recipe with some keys changed.

        Args:
            changes: values by dotted path, as ``{"weights.bits": 4}``. A table as a value changes
                the keys that it holds. A new observer drops the options of the old one.

        Raises:
            RecipeError: a path is unknown, with the nearest ones, or a value is wrong.
        """
        table = self.to_dict()
        recipe_changes.apply_changes(table, changes)
        return type(self).from_dict(table)

    parse_assignment = staticmethod(recipe_changes.parse_assignment)

    # -- what it says about a module ---------------------------------------------------------

    def keeps_float(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> bool:
        """Whether `float` names the module; for the arguments see `Selector.matches`."""
        return any(Selector.parse(text).matches(path, type_name, position) for text in self.float)

    def starts_at(self, path: str) -> bool:
        """Whether `start_at` names the module: quantization begins at the first such one."""
        return bool(self.start_at) and Selector("modules", self.start_at).matches(path)

    def spec_for_weight(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> QuantSpec | None:
        """The spec of a module's weight, or None where it stays float."""
        return self._spec(self.weights, "weights", path, type_name, position)

    def spec_for_output(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> QuantSpec | None:
        """The spec of a module's output, or None where it stays float."""
        return (
            None
            if self.dynamic
            else self._spec(self.activations, "activations", path, type_name, position)
        )

    def spec_for_input(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> QuantSpec | None:
        """The spec of what a module reads, or None where it reads float."""
        return (
            None
            if self.dynamic
            else self._spec(self.activations, "inputs", path, type_name, position)
        )

    def _spec(
        self,
        table: Changed,
        changes: Literal["weights", "activations", "inputs"],
        path: str,
        type_name: str,
        position: str | Collection[str],
    ) -> QuantSpec | None:
        """The spec of a table with what the overrides of a module change in it."""
        if self.keeps_float(path, type_name, position):
            return None
        for override in self.overrides:
            if override.selector.matches(path, type_name, position):
                table = merge(table, getattr(override, changes))
        return table.spec()

    def input_override(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> QuantSpec | None:
        """`spec_for_input` where an override sets the module's `inputs`, else None."""
        explicit = any(
            override.inputs and override.selector.matches(path, type_name, position)
            for override in self.overrides
        )
        return self.spec_for_input(path, type_name, position) if explicit else None

    def overrides_output(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> bool:
        """Whether an override sets the bits of the module's output."""
        return any(
            "bits" in dict(override.activations)
            and override.selector.matches(path, type_name, position)
            for override in self.overrides
        )

    def operations_for(
        self, path: str, type_name: str = "", position: str | Collection[str] = ""
    ) -> OperationRecipe:
        """The forms that a module's operations take."""
        table = self.operations
        for override in self.overrides:
            if override.selector.matches(path, type_name, position):
                table = replace(table, **dict(override.operations))
        return table

    def spec_for_network_input(self) -> QuantSpec | None:
        """The spec of the model's inputs, or None where they stay float."""
        if self.dynamic or isinstance(self.input_bits, str) or self.activations.bits == "float":
            return None
        return replace(self.activations, bits=self.input_bits).spec()

    def check_selectors(self, names: Sequence[str], types: Mapping[str, str]) -> None:
        """Refuse selectors that match no module.

        Args:
            names: the paths of the modules.
            types: the class names of those that have one, by path.

        Raises:
            RecipeError: names the key, the selector and the nearest names.
        """
        if self.start_at:
            Selector("modules", self.start_at).check("start_at", names, types)
        for index, text in enumerate(self.float):
            Selector.parse(text).check(f"float[{index}]", names, types)
        for index, text in enumerate(self.reconstruction.blocks):
            Selector.parse(text).check(f"reconstruction.blocks[{index}]", names, types)
        for index, override in enumerate(self.overrides):
            override.selector.check(f"overrides[{index}]", names, types)
