"""What a reconstruction is asked to do: `ReconstructionRecipe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fxquant.recipe.keys import Number, Table, key
from fxquant.recipe.methods import METHODS
from fxquant.recipe.selector import Selector

__all__ = ["ReconstructionRecipe"]


@dataclass(frozen=True)
class ReconstructionRecipe(Table):
    """How weights are rounded beyond nearest.

    A value of 0 or "" means what the method's paper has, see `fxquant.reconstruct.methods`.
    """

    where: ClassVar[str] = "reconstruction"

    method: str = key(
        "none",
        "none (nearest), gptq (closed form), or a rounding that is learned: of layer outputs "
        "(adaround), of block outputs (brecq), with randomly dropped activation quantization "
        "(qdrop), with the network's prediction as well (pdquant).",
        choices=lambda: ("none", *METHODS),
    )
    granularity: Literal["", "layer", "block", "stage", "model"] = key(
        "", "what is reconstructed as one."
    )
    start: Literal["float", "gptq"] = key(
        "float",
        "what learned roundings start at: the float weights, as the papers have it, or the codes "
        "of gptq.",
    )
    schedule: Literal["adaptive", "published"] = key(
        "adaptive",
        "adaptive: iterations by `fxquant.reconstruct.schedule.iterations_for`; published: the "
        "paper's, for networks with depthwise convolutions those for MobileNetV2.",
    )
    steps: Literal["", "none", "jointly", "after"] = key(
        "",
        "when activation step sizes are learned: not at all, jointly with the weights, after them.",
    )
    iterations: int = key(0, "of each block; set, it overrules the schedule.", low=0, high=10**7)
    images: int = key(0, "calibration images used.", low=0, high=10**7)
    batch_size: int = key(0, "images that an iteration draws.", low=0, high=10**5)
    learning_rate: Number = key(0.0, "Adam's for the roundings.", low=0, high=10)
    scale_learning_rate: Number = key(
        0.0, "Adam's for the step sizes (cosine to 0).", low=0, high=10
    )
    regularizer: Number = key(0.0, "λ, of the regularizer of the roundings.", low=0, high=1e6)
    beta_start: Number = key(0.0, "β of the regularizer after the warm-up.", low=0, high=1000)
    beta_end: Number = key(0.0, "β at the end; linear between.", low=0, high=1000)
    warmup: Number = key(
        0.0, "a share of the iterations, the first, without regularizer.", low=0, high=0.99
    )
    drop: Number = key(0.0, "probability that an activation stays float.", low=0, high=1)
    temperature: Number = key(
        0.0, "of the prediction difference (pdquant alone).", low=0, high=1000
    )
    correction_weight: Number = key(
        0.0, "of the distribution correction (pdquant alone).", low=0, high=1000
    )
    fisher: bool = key(
        False,
        "weight block errors by the diagonal Fisher information. Blocks of transformers always "
        "do, averaged over the images (see `fxquant.reconstruct.objectives`).",
    )
    damping: Number = key(
        0.01, "of GPTQ's Hessian, as a share of its mean diagonal.", low=0, high=10
    )
    precision: Literal["auto", "float32"] = key(
        "auto",
        "of the convolutions of a block in training; auto: bfloat16 where the CPU multiplies it "
        "(AVX-512 BF16, AMX).",
    )
    memory_gib: Number = key(
        4.0,
        "what the process may hold. Cached values have what the process and the training of a "
        "block leave of seven eighths; the rest of them go to temporary files.",
        low=0.01,
        high=10**5,
    )
    scale_images: int = key(
        256,
        "calibration images that the ranges of the activations come from, where a rounding is "
        "learned; 0: all.",
        low=0,
        high=10**7,
    )
    seed: int = key(0, "of everything random.", low=0, high=2**31 - 1)
    blocks: tuple[str, ...] = key(
        (), "selectors of modules that are a block each; the rest is partitioned by itself."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.blocks:
            Selector.parse(text)

    @property
    def learned(self) -> bool:
        """Whether the method learns roundings by gradient descent."""
        return self.method in METHODS and bool(METHODS[self.method].learner)

    @property
    def starts_closed_form(self) -> bool:
        """Whether GPTQ rounds the weights, at the end or for a learned rounding to start from."""
        return self.method == "gptq" or (self.learned and self.start == "gptq")
