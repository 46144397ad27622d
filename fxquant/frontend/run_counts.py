"""Multiply-accumulates of operations that no formula describes, counted while they run."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.frontend.detection import NAMESPACE as DETECTION

__all__ = ["count_by_running"]

# Kernels that multiply and that torch's counter does not know: by the start of their names.
_UNCOUNTED = (
    "_cdist",
    "_embedding_bag",
    "_fft",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "_trilinear",
    "linalg_",
    "mkldnn_rnn_layer",
)


def count_by_running(
    graph: fx.GraphModule, names: Collection[str], inputs: Sequence[Any]
) -> dict[str, int | None]:
    """What each of the nodes `names` takes on `inputs`; None where torch cannot tell.

    Half of the floating point operations that `torch.utils.flop_counter` sees.
    """
    counts = _Counts(graph, names)
    counts.extra_traceback = False
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # Fused kernels hide what they multiply from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of GPUs that are not there
            with torch.backends.mkldnn.flags(enabled=False):
                counts.run(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counts.found


class _Counts(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, names: Collection[str]) -> None:
        super().__init__(graph)
        self.names = names
        self.found: dict[str, int | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.names:
            return super().run_node(n)
        from torch.utils.flop_counter import FlopCounterMode  # it imports triton

        with _Uncounted() as uncounted, FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.found[n.name] = None if uncounted.seen else counter.get_total_flops() // 2
        return result


class _Uncounted(TorchDispatchMode):
    """Whether anything ran whose multiply-accumulates the counter does not see."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        known = namespace in ("aten", "prim", "prims", "profiler", DETECTION)
        self.seen = self.seen or not known or name.startswith(_UNCOUNTED)
        return func(*args, **(kwargs or {}))
