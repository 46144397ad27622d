"""What to quantize and how: `Recipe`, frozen, strictly validated, TOML in and out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fxquant.errors import RecipeError, nearest
from fxquant.recipe import keys as recipe_keys
from fxquant.recipe.keys import check_keys, join, unknown_key
from fxquant.recipe.reconstruction import PUBLISHED, RECONSTRUCTION_KEYS, ReconstructionRecipe
from fxquant.recipe.selector import Selector
from fxquant.recipe.tables import (
    ActivationRecipe,
    CalibrationRecipe,
    OperationRecipe,
    Override,
    Table,
    WeightRecipe,
    merge,
    plain,
    shallow,
)
from fxquant.spec import QuantSpec

__all__ = [
    "GRAMMAR",
    "METHODS",
    "ActivationRecipe",
    "CalibrationRecipe",
    "OperationRecipe",
    "Override",
    "Recipe",
    "ReconstructionRecipe",
    "Selector",
    "WeightRecipe",
]

METHODS = ("gptq", *PUBLISHED)
"""What may stand at the end of a recipe's name: how weights are rounded."""

_FORM = r"w([2-8])a([2-8]|16|32)(|_head_stem8|_first_last8)"
GRAMMAR = "w{2..8}a{2..8|16|32}[_head_stem8|_first_last8]"
"""The names that need no file, before the method."""

_TABLES: dict[str, tuple[Any, recipe_keys.Keys]] = {
    "weights": (WeightRecipe, recipe_keys.WEIGHT_KEYS),
    "activations": (ActivationRecipe, recipe_keys.ACTIVATION_KEYS),
    "operations": (OperationRecipe, recipe_keys.OPERATION_KEYS),
    "reconstruction": (ReconstructionRecipe, RECONSTRUCTION_KEYS),
    "calibration": (CalibrationRecipe, recipe_keys.CALIBRATION_KEYS),
}


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how.

    Attributes:
        name: for reports.
        fusion: where activations and residuals are fused into layers: ``all``, only inside
            residual ``blocks``, or ``none``.
        fold_batch_norm: fold batch norms into their layer.
        requantization: between integers, ``float`` multipliers or ``dyadic`` ones, f / 2^e. With
            dyadic ones no float tensor is left between the input's quantizer and the output.
        equalize: cross-layer equalization before quantization.
        bias_correction: correct biases by what rounding the weights does to each output's mean.
        reparameterize: fold a scale and zero point for each channel of a LayerNorm's output into
            the linear layers that read it (RepQ-ViT).
        smooth_quant: the share of the activations' range that moves into the weights of the
            layers behind a LayerNorm (SmoothQuant's alpha); 0: none.
        split_outliers: compute a few hidden channels of an MLP apart where the others' range is
            this many times smaller without them; 0: never.
        start_at: a module path or glob: what runs before it stays float. ``""``: everything.
        float: selectors of modules that stay float; see `Selector.parse`.
        quantize_output: quantize the model's outputs too.
        dynamic: quantize the inputs of linear and recurrent layers at run time, nothing else.
        input_bits: 8, 16 or ``"float"`` for the model's inputs.
        weights, activations, operations, reconstruction, calibration: their tables.
        overrides: per-module changes; later ones win.

    Raises:
        RecipeError: a value is wrong; names its key and what was expected.
    """

    name: str = "custom"
    fusion: Literal["all", "blocks", "none"] = "all"
    fold_batch_norm: bool = True
    requantization: Literal["float", "dyadic"] = "float"
    equalize: bool = False
    bias_correction: bool = False
    reparameterize: bool = False
    smooth_quant: float | int = 0.0
    split_outliers: float | int = 0.0
    start_at: str = ""
    float: tuple[str, ...] = ()
    quantize_output: bool = False
    dynamic: bool = False
    input_bits: int | Literal["float"] = 8
    weights: WeightRecipe = field(default_factory=WeightRecipe)
    activations: ActivationRecipe = field(default_factory=ActivationRecipe)
    operations: OperationRecipe = field(default_factory=OperationRecipe)
    reconstruction: ReconstructionRecipe = field(default_factory=ReconstructionRecipe)
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        scalars = {
            key: value for key, value in shallow(self).items() if key not in (*_TABLES, "overrides")
        }
        check_keys(scalars, recipe_keys.RECIPE_KEYS, "")
        if self.requantization == "dyadic" and self.dynamic:
            raise RecipeError('requantization = "dyadic" is static: set dynamic = false')
        object.__setattr__(self, "float", tuple(self.float))
        object.__setattr__(self, "overrides", tuple(self.overrides))
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
    def named(cls, name: str) -> Recipe:
        """A recipe that comes with fxquant; `fxquant.recipe.named.names` lists the files.

        Others follow from their names: ``w3a32``, ``w2a4_head_stem8``, ``w4a4_first_last8`` are
        the file of the same form with other bits; a method of rounding at the end, as in
        ``w4a8_adaround``, sets `reconstruction.method`, and without one it is nearest.

        Raises:
            RecipeError: there is none of this name; says the nearest.
        """
        base, method = name, ""
        for ending in METHODS:
            if name.endswith(f"_{ending}"):
                base, method = name.removesuffix(f"_{ending}"), ending
        recipe = cls._from_file_or_grammar(base)
        if recipe is None:
            known = _file_names()
            start = name.rpartition("_")[0]
            begun = start if cls._from_file_or_grammar(start) is not None else ""
            offered = [*known, *(f"{begun}_{method}" for method in METHODS if begun)]
            raise RecipeError(
                f"unknown recipe {name!r}: known are {', '.join(known)} and {GRAMMAR}, each also "
                f"with {', '.join(f'_{method}' for method in METHODS)} behind it"
                f"{nearest(name, offered)}"
            )
        changes = {"reconstruction.method": method} if method else {}
        return replace(recipe.replace(changes), name=name)

    @classmethod
    def _from_file_or_grammar(cls, name: str) -> Recipe | None:
        known = _file_names()
        bits: dict[str, Any] = {}
        file = name
        form = re.fullmatch(_FORM, name)
        if name not in known and form is not None:
            floats = form[2] == "32"
            bits = {"weights.bits": int(form[1])}
            bits |= {} if floats else {"activations.bits": int(form[2])}
            file = f"w4a4{form[3]}" if form[3] else "w4a32" if floats else "w4a8"
        if file not in known:
            return None
        text = (resources.files("fxquant.recipe.named") / f"{file}.toml").read_text("utf-8")
        return cls.from_dict({"name": name, **tomllib.loads(text)}).replace(bits)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """A recipe from a TOML file; without a ``name`` it is called as the file.

        Raises:
            RecipeError: the file cannot be read, is no TOML, or a key or value is wrong.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{path}: is no TOML: {error}") from error
        try:
            return cls.from_dict({"name": Path(path).stem, **table})
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """A recipe from nested dictionaries; keys that are missing take their defaults.

        Raises:
            RecipeError: a key is unknown or its value is wrong.
        """
        check_keys(table, recipe_keys.RECIPE_KEYS, "")
        values = dict(table)
        for name, (kind, keys) in _TABLES.items():
            if name in values:
                check_keys(values[name], keys, name)
                values[name] = kind(**values[name])
        if "overrides" in values:
            values["overrides"] = tuple(
                Override.from_dict(item, f"overrides[{index}]")
                for index, item in enumerate(values["overrides"])
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All keys as nested dictionaries of plain values, ready for JSON."""
        table = shallow(self)
        table["float"] = list(self.float)
        for name in _TABLES:
            table[name] = plain(getattr(self, name))
        table["reconstruction"]["blocks"] = list(self.reconstruction.blocks)
        table["overrides"] = [override.to_dict() for override in self.overrides]
        return table

    def to_toml(self) -> str:
        """All keys as TOML; `from_toml` gives an equal recipe back."""
        return recipe_keys.to_toml(self.to_dict())

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """A new recipe with some keys changed.

        Args:
            changes: values by dotted path, as ``{"weights.bits": 4}``. A table as a value changes
                the keys that it holds. A new observer drops the options of the old one.

        Raises:
            RecipeError: a path is unknown, with the nearest ones, or a value is wrong.
        """
        table = self.to_dict()
        known = _dotted_paths(table)
        for path, value in _flatten(changes):
            *parents, last = path.split(".")
            target: Any = table
            for part in parents:
                target = target.get(part) if isinstance(target, dict) else None
            in_options = bool(parents) and parents[-1] == "options"
            if not isinstance(target, dict) or (last not in target and not in_options):
                raise RecipeError(unknown_key(path, known, "the recipe"))
            if last == "observer" and value != target["observer"]:
                target["options"] = {}
            if path == "overrides" and isinstance(value, (list, tuple)):
                value = [v.to_dict() if isinstance(v, Override) else v for v in value]
            target[last] = value
        return type(self).from_dict(table)

    @staticmethod
    def parse_assignment(text: str) -> tuple[str, Any]:
        """``"weights.bits=4"`` as ``("weights.bits", 4)``.

        The value is read as TOML; what is no TOML value is a text, so ``fusion=all`` needs no
        quotes.

        Raises:
            RecipeError: there is no ``=`` or no key.
        """
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"{text!r} is no KEY=VALUE, such as weights.bits=4")
        try:
            return key.strip(), tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            return key.strip(), value.strip()

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
        table: Table,
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


def _file_names() -> list[str]:
    folder = resources.files("fxquant.recipe.named")
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _flatten(changes: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in changes.items():
        path = join(where, key)
        if isinstance(value, Mapping) and path.split(".")[-1] != "options":
            flat += _flatten(value, path)
        else:
            flat.append((path, value))
    # An observer drops the options of the one before it, so it must come before its own.
    return sorted(flat, key=lambda item: not item[0].endswith(".observer"))


def _dotted_paths(table: Mapping[str, Any], where: str = "") -> list[str]:
    paths: list[str] = []
    for key, value in table.items():
        path = join(where, key)
        paths.append(path)
        if isinstance(value, dict):
            paths += _dotted_paths(value, path)
    return paths
