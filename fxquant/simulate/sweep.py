"""One way to look at values while data run through a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from fxquant.errors import CalibrationError

__all__ = ["See", "seeing", "sweep"]

See = Callable[[Tensor], None]
"""What is done with each value; it must not change it."""


def sweep(
    graph_module: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    *,
    inputs: Mapping[str, See] | None = None,
    outputs: Mapping[str, See] | None = None,
    label: str = "",
    batches: int | None = None,
    progress: bool = False,
) -> None:
    """Run `graph_module` on every batch of `data`, tuples of its arguments, without gradients.

    Args:
        inputs: who sees the first argument of each call of a module, by its path.
        outputs: who sees the output of each call of a module, by its path.
        label, batches, progress: of the bar.

    Raises CalibrationError for a batch that does not run through the graph.
    """
    bar = tqdm(data, desc=label, total=batches, delay=2, disable=not progress, unit="batch")
    with seeing(graph_module, inputs=inputs, outputs=outputs), torch.no_grad():
        for index, batch in enumerate(bar):
            try:
                graph_module(*batch)
            except RuntimeError as error:
                raise CalibrationError(
                    f"calibration batch {index} ({_shapes(batch)}) does not run through the model: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error


@contextmanager
def seeing(
    graph_module: fx.GraphModule,
    *,
    inputs: Mapping[str, See] | None = None,
    outputs: Mapping[str, See] | None = None,
) -> Iterator[None]:
    """While the context lasts, `inputs` and `outputs` see what `sweep` says, with gradients."""

    def reads(see: See) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])

        return hook

    def yields(see: See) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            see(output)

        return hook

    modules = graph_module.get_submodule
    handles = [
        modules(path).register_forward_pre_hook(reads(see)) for path, see in (inputs or {}).items()
    ]
    handles += [
        modules(path).register_forward_hook(yields(see)) for path, see in (outputs or {}).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shapes(batch: tuple[Any, ...]) -> str:
    return ", ".join(
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for value in batch
        if isinstance(value, Tensor)
    )
