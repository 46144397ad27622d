"""What a reconstruction is asked to do: `ReconstructionRecipe`, and the published values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from fxquant.errors import RecipeError
from fxquant.recipe.keys import Check, Keys, check_keys
from fxquant.recipe.selector import Selector

__all__ = ["RECONSTRUCTION_KEYS", "ReconstructionRecipe"]

Method = Literal["none", "gptq", "adaround", "brecq", "qdrop", "pdquant"]
Granularity = Literal["", "layer", "block", "stage", "model"]
Steps = Literal["", "none", "jointly", "after"]
Start = Literal["float", "gptq"]


@dataclass(frozen=True)
class _Published:
    """What a method's paper uses for ResNets."""

    granularity: Granularity = "block"
    iterations: int = 20_000
    images: int = 1024
    batch_size: int = 32
    learning_rate: float = 1e-3
    scale_learning_rate: float = 4e-5
    regularizer: float = 0.01
    beta_start: float = 20.0
    beta_end: float = 2.0
    warmup: float = 0.2
    steps: Steps = "jointly"
    step_share: float = 0.0  # iterations behind the weights, as a share of theirs
    drop: float = 0.0
    temperature: float = 0.0  # of the prediction difference; 0: there is none
    prediction_weight: float = 0.0
    correction_steps: int = 0
    correction_learning_rate: float = 1e-3
    correction_weight: float = 0.02


PUBLISHED = MappingProxyType(
    {
        # Nagel et al., ICML 2020: weights only.
        "adaround": _Published(
            granularity="layer", iterations=10_000, learning_rate=1e-3, steps="none"
        ),
        # Li et al., ICLR 2021: 20k iterations for the weights, 5k for the step sizes behind them.
        "brecq": _Published(scale_learning_rate=4e-4, steps="after", step_share=0.25),
        # Wei et al., ICLR 2022.
        "qdrop": _Published(drop=0.5),
        # Liu et al., CVPR 2023; λ of the prediction difference is 1 / 0.1.
        "pdquant": _Published(
            learning_rate=3e-3,
            drop=0.5,
            temperature=4.0,
            prediction_weight=10.0,
            correction_steps=500,
        ),
    }
)
"""Methods whose rounding is learned, and what their papers use."""

# BRECQ, QDrop and PD-Quant for MobileNetV2. The adaptive schedule keeps the ResNets' values, with
# which MobileNetV2 loses 0.85 points at W4A8.
_PUBLISHED_DEPTHWISE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "brecq": {"regularizer": 0.1},
        "qdrop": {"regularizer": 0.1},
        "pdquant": {"regularizer": 0.1, "temperature": 1.0, "correction_weight": 0.005},
    }
)


def _one_of(*values: str) -> Check:
    def check(value: object) -> str | None:
        return None if value in values else f"must be {', '.join(map(repr, values))}"

    return check


def _number(low: float, high: float, *, integer: bool = False) -> Check:
    kinds = (int,) if integer else (int, float)
    article = "an integer" if integer else "a number"

    def check(value: object) -> str | None:
        right = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"must be {article} from {low:g} to {high:g}"

    return check


def _boolean(value: object) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _texts(value: object) -> str | None:
    right = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    return None if right else "must be a list of texts"


RECONSTRUCTION_KEYS: Keys = {
    "method": _one_of("none", "gptq", *PUBLISHED),
    "granularity": _one_of("", "layer", "block", "stage", "model"),
    "start": _one_of("float", "gptq"),
    "schedule": _one_of("adaptive", "published"),
    "steps": _one_of("", "none", "jointly", "after"),
    "iterations": _number(0, 10**7, integer=True),
    "images": _number(0, 10**7, integer=True),
    "batch_size": _number(0, 10**5, integer=True),
    "learning_rate": _number(0, 10),
    "scale_learning_rate": _number(0, 10),
    "regularizer": _number(0, 1e6),
    "beta_start": _number(0, 1000),
    "beta_end": _number(0, 1000),
    "warmup": _number(0, 0.99),
    "drop": _number(0, 1),
    "temperature": _number(0, 1000),
    "correction_weight": _number(0, 1000),
    "fisher": _boolean,
    "damping": _number(0, 10),
    "memory_gib": _number(0.01, 10**5),
    "scale_images": _number(0, 10**7, integer=True),
    "seed": _number(0, 2**31 - 1, integer=True),
    "blocks": _texts,
}

# The adaptive schedule. A step of Adam moves V by about the learning rate, so that a shorter run
# needs a larger one to settle the same roundings: their product is 10k times 1e-2, which AdaRound
# reaches higher accuracies with than with 1e-3. ResNet-20 at W2A4, 500 iterations, SQNR of the
# logits: 8.7 dB at 0.02, 9.5 at 0.05, 10.0 at 0.1, 10.1 at 0.2, and 7.9 at 0.4, where roundings are
# settled before they are learned.
_REFERENCE_ITERATIONS = 1000
_REFERENCE_MACS = 41e6
_EXPONENT = 0.25
_FEWEST, _LARGEST_BOOST = 250, 10.0
_TRAVEL, _FASTEST = 100.0, 0.2  # learning rate times iterations, and the largest learning rate


@dataclass(frozen=True)
class ReconstructionRecipe:
    """How weights are rounded beyond nearest.

    A value of 0 or ``""`` means what the method's paper has (`PUBLISHED`).

    Attributes:
        method: ``none`` (nearest), ``gptq`` (closed form), ``adaround`` (layer outputs),
            ``brecq`` (block outputs), ``qdrop`` (randomly dropped activation quantization),
            ``pdquant`` (the network's prediction as well).
        granularity: what is reconstructed as one: ``layer``, ``block``, ``stage``, ``model``.
        start: what learned roundings start at: the ``float`` weights, as the papers have it, or
            the codes of ``gptq``.
        schedule: ``adaptive``: iterations by `iterations_for`; ``published``: the paper's, for
            networks with depthwise convolutions those for MobileNetV2.
        steps: when activation step sizes are learned: ``none``, ``jointly`` with the weights,
            ``after`` them.
        iterations: of each block; set, it overrules the schedule.
        images, batch_size: calibration images used, and how many an iteration draws.
        learning_rate, scale_learning_rate: Adam's for the roundings, and for the step sizes
            (cosine to 0).
        regularizer, beta_start, beta_end, warmup: λ, and β from one value linearly to the other
            after a warm-up (a share of the iterations) without regularizer.
        drop: probability that an activation stays float (`qdrop`, `pdquant`).
        temperature: of the prediction difference (`pdquant`).
        correction_weight: of the distribution correction (`pdquant`).
        fisher: weight block errors by the diagonal Fisher information. Blocks of transformers
            always do, averaged over the images (see `fxquant.reconstruct.objectives`).
        damping: of GPTQ's Hessian, as a share of its mean diagonal.
        memory_gib: what the process may hold. Cached values have what the process and the
            training of a block leave of seven eighths; the rest of them go to temporary files.
        scale_images: calibration images that the ranges of the activations come from, where a
            rounding is learned; 0: all.
        seed: of everything random.
        blocks: selectors of modules that are a block each; the rest is partitioned by itself.

    Raises:
        RecipeError: a value is wrong; names its key and what was expected.
    """

    method: Method = "none"
    granularity: Granularity = ""
    start: Start = "float"
    schedule: Literal["adaptive", "published"] = "adaptive"
    steps: Steps = ""
    iterations: int = 0
    images: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    scale_learning_rate: float = 0.0
    regularizer: float = 0.0
    beta_start: float = 0.0
    beta_end: float = 0.0
    warmup: float = 0.0
    drop: float = 0.0
    temperature: float = 0.0
    correction_weight: float = 0.0
    fisher: bool = False
    damping: float = 0.01
    memory_gib: float = 4.0
    scale_images: int = 256
    seed: int = 0
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_keys(vars(self), RECONSTRUCTION_KEYS, "reconstruction")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for text in self.blocks:
            Selector.parse(text)

    @property
    def learned(self) -> bool:
        """Whether the method learns roundings by gradient descent."""
        return self.method in PUBLISHED

    @property
    def starts_closed_form(self) -> bool:
        """Whether GPTQ rounds the weights, at the end or for a learned rounding to start from."""
        return self.method == "gptq" or (self.learned and self.start == "gptq")

    @property
    def unit(self) -> Granularity:
        """The granularity, the paper's where none is set; "block" where nothing is learned."""
        paper = PUBLISHED.get(self.method)
        return self.granularity or (paper.granularity if paper else "block")

    def schedule_for(self, macs: float, blocks: int = 1, *, depthwise: bool = False) -> Schedule:
        """Every value resolved for a network of `macs` multiply-accumulates an image.

        `depthwise`: the network has depthwise convolutions.

        Where the prediction counts, every iteration also runs the rest of the network, on
        average half of it: with `blocks` blocks an iteration of all costs ``1 + blocks / 2``
        times as much. The adaptive schedule makes up for half of that in the exponent.

        Raises:
            RecipeError: the method learns nothing.
        """
        if not self.learned:
            raise RecipeError(
                f"reconstruction.method {self.method!r} learns no rounding: "
                f"{', '.join(PUBLISHED)} do"
            )
        paper = PUBLISHED[self.method]
        if depthwise and self.schedule == "published":
            paper = replace(paper, **_PUBLISHED_DEPTHWISE.get(self.method, {}))
        own = {key: value for key, value in vars(self).items() if hasattr(paper, key) and value}
        made = replace(paper, **own)
        cost = (1 + blocks / 2) ** 2 if made.temperature else 1.0
        iterations = self.iterations or (
            made.iterations
            if self.schedule == "published"
            else min(made.iterations, iterations_for(macs * cost))
        )
        boost, learning_rate = 1.0, made.learning_rate
        if self.schedule == "adaptive":
            boost = min(max(paper.iterations / iterations, 1.0), _LARGEST_BOOST)
            learning_rate = max(learning_rate, min(_TRAVEL / iterations, _FASTEST))
        return Schedule(
            iterations=iterations,
            step_iterations=int(iterations * made.step_share) if made.steps == "after" else 0,
            learning_rate=self.learning_rate or learning_rate,
            scale_learning_rate=self.scale_learning_rate or made.scale_learning_rate * boost,
            limits_steps=self.schedule == "adaptive",
            images=made.images,
            batch_size=made.batch_size,
            regularizer=made.regularizer,
            beta_start=made.beta_start,
            beta_end=made.beta_end,
            warmup=made.warmup,
            steps=made.steps,
            drop=made.drop,
            temperature=made.temperature,
            prediction_weight=made.prediction_weight,
            correction_steps=_scaled(made.correction_steps, iterations / paper.iterations),
            correction_learning_rate=made.correction_learning_rate,
            correction_weight=made.correction_weight,
            fisher=self.fisher,
            seed=self.seed,
        )


def _scaled(steps: int, share: float) -> int:
    """Steps of the distribution correction: as many fewer as there are iterations, at least 10."""
    return min(steps, max(10, round(steps * share)))


@dataclass(frozen=True)
class Schedule:
    """A `ReconstructionRecipe` with every value resolved; what the loop reads.

    `step_iterations` follow the weights' iterations where steps are learned after them.
    `limits_steps`: one iteration moves a step size by at most 0.2 % of itself, which short runs
    with their larger learning rates need on finely quantized values.
    """

    iterations: int
    step_iterations: int
    learning_rate: float
    scale_learning_rate: float
    limits_steps: bool
    images: int
    batch_size: int
    regularizer: float
    beta_start: float
    beta_end: float
    warmup: float
    steps: Steps
    drop: float
    temperature: float
    prediction_weight: float
    correction_steps: int
    correction_learning_rate: float
    correction_weight: float
    fisher: bool
    seed: int

    def beta(self, iteration: int) -> float | None:
        """β of an iteration; None during the warm-up, which has no regularizer."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        progress = (iteration - start) / max(1.0, self.iterations - start)
        return self.beta_end + (self.beta_start - self.beta_end) * (1.0 - progress)


def iterations_for(macs: float) -> int:
    """Iterations of each block in the adaptive schedule.

    All blocks together cost about ``iterations · batch · 3 · macs``. The rule
    ``1000 · (41 million / macs)^(1/4)``, at least 250, lets the time grow more slowly than the
    network: minutes for CIFAR's ResNet-20 on 2 cores, less than half an hour for ResNet-18.
    """
    wanted: float = _REFERENCE_ITERATIONS * (_REFERENCE_MACS / max(macs, 1.0)) ** _EXPONENT
    return max(_FEWEST, round(wanted))
