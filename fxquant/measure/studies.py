"""What a post-training study varies: the settings of every study, as data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxquant.recipe import Override, Recipe

__all__ = ["COLUMNS", "STUDIES", "Setting", "start_points"]


@dataclass(frozen=True)
class Setting:
    """One row of a study.

    Attributes:
        name: of the row.
        changes: to the recipe, as `Recipe.replace` takes them.
        calibration_share: the share of the calibration images.
        noise: calibrate on noise with the mean and the deviation of the calibration images'
            channels instead of on them.
        overrides: come behind those of the recipe.
        finetune: keywords of `fxquant.finetune`, which then follows the compile; None: it
            does not.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    calibration_share: float = 1.0
    noise: bool = False
    overrides: tuple[Override, ...] = ()
    finetune: Mapping[str, Any] | None = None


FUSION = tuple(Setting(fusion, {"fusion": fusion}) for fusion in ("none", "blocks", "all"))

WEIGHT_OBSERVERS: dict[str, dict[str, Any]] = {
    "abs-max": {"weights.observer": "abs_max"},
    "min-max": {"weights.observer": "min_max"},
    "histogram": {"weights.observer": "histogram"},
    "p-norm 2.4": {"weights.observer": "p_norm_2.4"},
    "MSE": {"weights.observer": "mse"},
}
OBSERVERS = tuple(
    Setting(
        f"{name} x histogram{', reduce_range' if reduce_range else ''}",
        {
            **changes,
            "activations.observer": "histogram",
            "activations.reduce_range": reduce_range,
        },
    )
    for name, changes in WEIGHT_OBSERVERS.items()
    for reduce_range in (False, True)
)

CALIBRATION_SIZE = tuple(
    Setting(f"{percentage} %", calibration_share=percentage / 100)
    for percentage in range(10, 101, 10)
)

RANDOM_CALIBRATION = (Setting("images"), Setting("noise", noise=True))

ACTIVATION_OBSERVERS = {
    "histogram": "histogram",
    "min-max": "min_max",
    "moving average": "moving_average_min_max",
    "abs-max": "abs_max",
    "percentile": "percentile",
    "entropy": "entropy",
    "MSE": "mse",
}
ACTIVATION_SCHEMES = tuple(
    Setting(
        f"A{bits}, {scheme}, {name}, weights by {granularity}",
        {
            "activations.bits": bits,
            "activations.scheme": scheme,
            "activations.observer": observer,
            "weights.granularity": f"per_{'tensor' if granularity == 'layer' else 'channel'}",
        },
    )
    for bits, scheme, (name, observer), granularity in itertools.product(
        (8, 4), ("affine", "symmetric"), ACTIVATION_OBSERVERS.items(), ("channel", "layer")
    )
)

ONE_SIDED = tuple(
    Setting(
        f"W{weights}A{activations}, {observer}, one-sided search {'on' if on else 'off'}",
        {
            "weights.bits": weights,
            "activations.bits": activations,
            "activations.observer": observer,
            "activations.one_sided": on,
        },
    )
    for (weights, activations), observer, on in itertools.product(
        ((8, 8), (4, 8), (4, 4)), ("p_norm_2.4", "mse"), (True, False)
    )
)

SCHEMES: dict[str, dict[str, Any]] = {
    "abs-max": {"weights.observer": "abs_max"},
    # With a symmetric grid, min-max would be abs-max once more.
    "min-max": {"weights.observer": "min_max", "weights.scheme": "affine"},
    "p-norm 2.0": {"weights.observer": "p_norm_2.0"},
    "p-norm 2.4": {"weights.observer": "p_norm_2.4"},
    "MSE": {"weights.observer": "mse"},
}
WEIGHT_SCHEMES = tuple(
    Setting(
        f"W{bits}A32, {'BN folded' if folded else 'BN unfolded'}, {granularity}, {scheme}",
        {
            "weights.scheme": "symmetric",
            **changes,
            "weights.bits": bits,
            "weights.granularity": f"per_{'tensor' if granularity == 'layer' else 'channel'}",
            "activations.bits": "float",
            "fold_batch_norm": folded,
        },
    )
    for bits, folded, granularity, (scheme, changes) in itertools.product(
        (8, 4), (True, False), ("layer", "channel"), SCHEMES.items()
    )
)


def start_points(model: nn.Module) -> tuple[Setting, ...]:
    """Quantization of everything, then from each stage on.

    Stages are the children that are called layer1, layer2, …; in a model that has none, four
    children evenly spaced over the longest sequence.
    """
    stages = [name for name, _ in model.named_children() if re.fullmatch(r"layer\d+", name)]
    if not stages:
        path, longest = max(model.named_modules(), key=lambda named: len(list(named[1].children())))
        names = [f"{path}.{name}".lstrip(".") for name, _ in longest.named_children()]
        spaced = (position * len(names) // 5 for position in range(1, 5))
        stages = [names[position] for position in dict.fromkeys(spaced)]
    return (Setting("all", {"start_at": ""}), *(Setting(at, {"start_at": at}) for at in stages))


# -- vision transformers ---------------------------------------------------------------------

_IN_FLOAT: dict[str, Any] = {
    "requantization": "float",
    "operations.softmax": "float",
    "operations.gelu": "float",
    "operations.functions": "float",
    "operations.layer_norm": "float",
    "operations.residual": "float",
}
I_VIT: dict[str, Any] = {
    "requantization": "dyadic",
    "operations.softmax": "i-vit",
    "operations.softmax_bits": 8,
    "operations.gelu": "i-vit",
    "operations.functions": "table",
    "operations.layer_norm": "i-vit",
    "operations.residual": 16,
}
"""Integers alone, with the operations of I-ViT (Li and Gu, ICCV 2023)."""

EXCHANGES: dict[str, dict[str, Any]] = {
    "softmax in 16 bits": {"operations.softmax_bits": 16},
    "softmax table": {"operations.softmax": "table"},
    "softmax log2": {"operations.softmax": "log2"},
    "GELU table": {"operations.gelu": "table"},
    "LayerNorm integer": {"operations.layer_norm": "integer"},
    "LayerNorm power of two": {"operations.layer_norm": "power_of_two"},
    "residual in 8 bits": {"operations.residual": 8},
    "tables, LayerNorm integer": {
        "operations.softmax": "table",
        "operations.gelu": "table",
        "operations.layer_norm": "integer",
    },
}


VIT = (
    *(
        Setting(
            f"W{weights}{name}",
            {**_IN_FLOAT, "weights.bits": weights, "activations.bits": activations},
        )
        for name, activations in {"A32": "float", "A8": 8}.items()
        for weights in (8, 4)
    ),
    *(
        Setting(
            f"W{weights}A8 I-ViT{f', {name}' if name else ''}",
            {**I_VIT, "weights.bits": weights, "activations.bits": 8, **changes},
        )
        for weights in (8, 4)
        for name, changes in {"": {}, **EXCHANGES}.items()
    ),
)
"""The rows of a study of ViT-B/16, then each of its operations exchanged."""

# -- learned rounding and training --------------------------------------------------------------

LEARNED_SCHEMES = {name: SCHEMES[name] for name in ("abs-max", "min-max", "p-norm 2.4", "MSE")}
LEARNING_RATES = (1e-3, 1e-2)
_HEAD_STEM8 = Recipe.named("w4a4_head_stem8").overrides
BIT_WIDTHS: dict[str, tuple[int, int | str, tuple[Override, ...]]] = {
    "W4A32": (4, "float", ()),
    "W4A8": (4, 8, ()),
    "W4A4": (4, 4, ()),
    "W4A4 head/stem 8": (4, 4, _HEAD_STEM8),
    "W3A32": (3, "float", ()),
    "W2A32": (2, "float", ()),
    "W2A4 head/stem 8": (2, 4, _HEAD_STEM8),
}
"""Bits of weights and of activations; head and stem as in the recipe w4a4_head_stem8."""


def learned_rounding(method: str) -> tuple[Setting, ...]:
    """The rows of a method of `reconstruction`, or of quantization-aware training (``qat``)."""
    return tuple(
        Setting(
            f"{bits}, BN {'folded' if folded else 'unfolded'}, {scheme}, lr {rate:g}",
            {
                "weights.scheme": "symmetric",
                **changes,
                "weights.bits": weights,
                "activations.bits": activations,
                "input_bits": "float" if activations == "float" else 8,
                "fold_batch_norm": folded,
                "reconstruction.method": "none" if method == "qat" else method,
                "reconstruction.learning_rate": 0.0 if method == "qat" else rate,
            },
            overrides=overrides,
            finetune={"learning_rate": rate} if method == "qat" else None,
        )
        for (bits, (weights, activations, overrides)), folded, (scheme, changes), rate in (
            itertools.product(
                BIT_WIDTHS.items(), (True, False), LEARNED_SCHEMES.items(), LEARNING_RATES
            )
        )
    )


GRANULARITY = tuple(
    Setting(
        f"W4A{activations}, by {'encoder' if granularity == 'stage' else granularity}",
        {
            "weights.bits": 4,
            "activations.bits": activations,
            "reconstruction.method": "adaround",
            "reconstruction.granularity": granularity,
        },
    )
    for activations, granularity in itertools.product((8, 4), ("layer", "block", "stage", "model"))
)
"""AdaRound by ever larger parts; a transformer's encoder is a stage."""

COLUMNS: dict[str, dict[str, str]] = {
    "vit": {
        "weights": "weights.bits",
        "activations": "activations.bits",
        "softmax": "operations.softmax",
        "GELU": "operations.gelu",
        "LayerNorm": "operations.layer_norm",
        "residual": "operations.residual",
    },
}
"""The settings that a study's table shows in columns of their own, by the recipe's keys."""


STUDIES: dict[str, Callable[[nn.Module], tuple[Setting, ...]]] = {
    "fusion": lambda model: FUSION,
    "observers": lambda model: OBSERVERS,
    "start_at": start_points,
    "calibration_size": lambda model: CALIBRATION_SIZE,
    "random_calibration": lambda model: RANDOM_CALIBRATION,
    "weight_schemes": lambda model: WEIGHT_SCHEMES,
    "activation_schemes": lambda model: ACTIVATION_SCHEMES,
    "one_sided": lambda model: ONE_SIDED,
    "granularity": lambda model: GRANULARITY,
    "vit": lambda model: VIT,
    "adaround": lambda model: learned_rounding("adaround"),
    "brecq": lambda model: learned_rounding("brecq"),
    "pdquant": lambda model: learned_rounding("pdquant"),
    "qat": lambda model: learned_rounding("qat"),
}
