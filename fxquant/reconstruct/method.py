"""What a method of learned rounding is: the object that the loop over the blocks asks."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.recipe import METHODS, ReconstructionRecipe, learned_methods
from fxquant.reconstruct.caches import Rows
from fxquant.reconstruct.objectives import block_error
from fxquant.reconstruct.schedule import resolve
from fxquant.reconstruct.subgraph import Subgraph
from fxquant.reconstruct.values import Values

__all__ = ["PAPERS", "Goal", "Method", "Objective", "find_method", "granularity"]

PAPERS = ReconstructionRecipe(
    granularity="block",
    iterations=20_000,
    images=1024,
    batch_size=32,
    learning_rate=1e-3,
    scale_learning_rate=4e-5,
    regularizer=0.01,
    beta_start=20.0,
    beta_end=2.0,
    warmup=0.2,
    steps="jointly",
)
"""What most papers use for ResNets."""

Granularity = Literal["layer", "block", "stage", "model"]

Objective = Callable[[Tensor, Tensor], Tensor]
"""The error of a block's output for some images, summed over them: `objective(y, rows)`."""


@dataclass(frozen=True)
class Goal:
    """What a block is held against, as cached rows of the images of this process.

    Attributes:
        values: of both networks.
        floats: values of the float network by name, as the method wants them.
        output: the name of the block's output; `target`: the float block's.
        channels: the output's channel dimension.
        weights: of the squared errors: of every image (Rows), of all alike, or None.
        rest: what follows the block in the float network, where `Method.sees_prediction`.
    """

    values: Values
    floats: Mapping[str, Rows]
    output: str
    target: Rows
    channels: int
    weights: Rows | Tensor | None = None
    rest: Subgraph | None = None

    def error(self, y: Tensor, rows: Tensor) -> Tensor:
        """The squared error of the block's output; an `Objective`."""
        weights = self.weights
        if isinstance(weights, Rows):
            weights = self.take(weights, rows)
        return block_error(y, self.take(self.target, rows), self.channels, weights)

    def take(self, part: Rows, rows: Tensor) -> Tensor:
        """The cached values of some images where the block is computed."""
        return part.take(rows).to(self.values.device)


class Method:
    """How roundings are learned. Each paper is a subclass, in `fxquant.reconstruct.methods`.

    This one holds the output of every block to that of the float network.

    Args:
        settings: what the recipe says.
        macs: multiply-accumulates of the network for an image.
        depthwise: it has depthwise convolutions.

    Attributes:
        settings: with every value resolved: what the loop and the training read.
        published: what the paper uses for ResNets; `published_depthwise`: for MobileNetV2. The
            adaptive schedule keeps the ResNets' values, with which MobileNetV2 loses 0.85 points
            at W4A8.
        step_share: iterations for the step sizes alone, as a share of those of the roundings,
            where step sizes are learned after them.
        sees_prediction: it asks what the rest of the float network makes of a block's output.
    """

    published: ClassVar[ReconstructionRecipe] = PAPERS
    published_depthwise: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    step_share: ClassVar[float] = 0.25
    sees_prediction: ClassVar[bool] = False

    def __init__(
        self,
        settings: ReconstructionRecipe,
        macs: float,
        *,
        depthwise: bool = False,
    ) -> None:
        paper = self.published
        if depthwise and settings.schedule == "published":
            paper = replace(paper, **self.published_depthwise)
        self.settings = resolve(settings, paper, macs)

    @property
    def step_iterations(self) -> int:
        """How many iterations follow for the step sizes alone."""
        after = self.settings.steps == "after"
        return int(self.settings.iterations * self.step_share) if after else 0

    def prepare(self, float_graph: fx.GraphModule | None) -> list[str]:
        """Look at the float network before the first block; returns notes for the report."""
        return []

    def targets(
        self, values: Values, target: Subgraph, output: str
    ) -> tuple[dict[str, Rows], Rows, list[Rows]]:
        """The float values and the target of a block, and what was cached for them alone."""
        return dict(values.floats), values.floats[output], []

    def objective(self, goal: Goal) -> Objective:
        """What the training of a block minimizes, beside the regularizer."""
        return goal.error

    def prediction_objective(self, goal: Goal) -> Objective | None:
        """What is added, of an output that is computed again with nothing dropped."""
        return None


def find_method(name: str) -> type[Method]:
    """The method of a name in `fxquant.recipe.METHODS`.

    Raises:
        RecipeError: it learns nothing.
    """
    if name not in learned_methods():
        raise RecipeError(
            f"reconstruction.method {name!r} learns no rounding: {', '.join(learned_methods())} do"
        )
    found = pkgutil.resolve_name(METHODS[name].learner)
    assert isinstance(found, type)
    assert issubclass(found, Method)
    return found


def granularity(settings: ReconstructionRecipe) -> Granularity:
    """What is reconstructed as one, the paper's where none is set; "block" without a method."""
    paper = find_method(settings.method).published.granularity if settings.learned else ""
    return settings.granularity or paper or "block"
