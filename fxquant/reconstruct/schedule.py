"""How long a reconstruction runs and how fast it learns, for the size of a network."""

from __future__ import annotations

from dataclasses import fields, replace

from fxquant.recipe import ReconstructionRecipe

__all__ = ["beta", "iterations_for", "resolve"]

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


def iterations_for(macs: float) -> int:
    """Iterations of each block in the adaptive schedule.

    All blocks together cost about ``iterations · batch · 3 · macs``. The rule
    ``1000 · (41 million / macs)^(1/4)``, at least 250, lets the time grow more slowly than the
    network: minutes for CIFAR's ResNet-20 on 2 cores, less than half an hour for ResNet-18.
    """
    wanted: float = _REFERENCE_ITERATIONS * (_REFERENCE_MACS / max(macs, 1.0)) ** _EXPONENT
    return max(_FEWEST, round(wanted))


def resolve(
    settings: ReconstructionRecipe, paper: ReconstructionRecipe, macs: float
) -> ReconstructionRecipe:
    """The settings with no value left open: what is set, else the paper's, else the schedule's.

    Args:
        settings: what the recipe says.
        paper: every value as the method was published.
        macs: multiply-accumulates of an iteration for an image, in units of a block's output.
    """
    made = replace(
        settings,
        **{
            entry.name: getattr(settings, entry.name) or getattr(paper, entry.name)
            for entry in fields(settings)
        },
    )
    if settings.schedule == "published":
        return made
    iterations = settings.iterations or min(paper.iterations, iterations_for(macs))
    boost = min(max(paper.iterations / iterations, 1.0), _LARGEST_BOOST)
    fast = max(paper.learning_rate, min(_TRAVEL / iterations, _FASTEST))
    return replace(
        made,
        iterations=iterations,
        learning_rate=settings.learning_rate or fast,
        scale_learning_rate=settings.scale_learning_rate or paper.scale_learning_rate * boost,
    )


def beta(settings: ReconstructionRecipe, iteration: int) -> float | None:
    """β of an iteration; None during the warm-up, which has no regularizer."""
    start = settings.warmup * settings.iterations
    if iteration < start:
        return None
    progress = (iteration - start) / max(1.0, settings.iterations - start)
    return settings.beta_end + (settings.beta_start - settings.beta_end) * (1.0 - progress)
