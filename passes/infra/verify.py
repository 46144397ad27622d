"""What must hold of a graph after every pass: it is well formed, it runs, it means the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.infra.base import TensorInfo
from passes.infra.errors import VerificationError

__all__ = [
    "Invariant",
    "check_equivalent",
    "check_well_formed",
    "flatten",
    "rounding_error",
    "run_and_annotate",
]

Invariant = Callable[[fx.GraphModule], None]
"""Raises VerificationError where a stage's promise does not hold."""

# One float32 operation rounds by at most 2^-24; a thousand of them in a row, all erring the same
# way, reach 6e-5. An exact pass stays below that; a wrong one is off by orders of magnitude.
RELATIVE_ERROR = 1e-4


def check_well_formed(graph_module: fx.GraphModule, *, name: str) -> None:
    """Lint the graph and see that every module and tensor that it names exists."""
    try:
        graph_module.graph.lint()
    except Exception as error:
        raise VerificationError(f"{name}: left a graph that does not lint: {error}") from error
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            try:
                graph_module.get_submodule(str(node.target))
            except AttributeError as error:
                raise VerificationError(f"{name}: {node.name}: {error}") from error


class _Annotator(fx.Interpreter):
    """Runs a graph and writes the shape and dtype of every value into its node's meta."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            if not getattr(error, "fx_node", None):
                error.fx_node = n  # type: ignore[attr-defined]
            raise
        info = _describe(result)
        if info is None:
            n.meta.pop("tensor", None)
        else:
            n.meta["tensor"] = info
        return result


def run_and_annotate(graph_module: fx.GraphModule, inputs: Sequence[Any], *, name: str) -> Any:
    """Run the graph on `inputs`, note every value's shape and dtype, return the outputs.

    Raises VerificationError naming `name` and the node at which it failed.
    """
    interpreter = _Annotator(graph_module)
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            return interpreter.run(*inputs)
    except Exception as error:
        node = getattr(error, "fx_node", None)
        where = f"{node.name} ({node.meta.get('module_path') or 'root'})" if node else "the graph"
        raise VerificationError(f"{name}: running {where} failed: {error}") from error


def check_equivalent(
    expected: Any, found: Any, *, name: str, tolerance: float = RELATIVE_ERROR
) -> None:
    """Two outputs are the same structure of tensors up to float rounding.

    The error is measured against the size of the whole tensor (relative L2 norm), because
    reordered sums err by the size of their terms and not of their result.

    Raises VerificationError where it is larger than `tolerance`.
    """
    left, right = list(flatten(expected)), list(flatten(found))
    if [path for path, _ in left] != [path for path, _ in right]:
        raise VerificationError(
            f"{name}: is exact but changed the output structure from "
            f"{[path for path, _ in left]} to {[path for path, _ in right]}"
        )
    for (path, want), (_, got) in zip(left, right, strict=True):
        if isinstance(want, Tensor) != isinstance(got, Tensor):
            raise VerificationError(
                f"{name}: is exact but output{path} changed from a {type(want).__name__} to a "
                f"{type(got).__name__}"
            )
        if not isinstance(want, Tensor):
            if want != got:
                raise VerificationError(f"{name}: is exact but output{path} changed")
            continue
        if want.shape != got.shape or want.dtype != got.dtype:
            raise VerificationError(
                f"{name}: is exact but output{path} changed from {want.dtype}{list(want.shape)} "
                f"to {got.dtype}{list(got.shape)}"
            )
        if torch.equal(want, got):
            continue
        if want.is_complex():
            want, got = torch.view_as_real(want), torch.view_as_real(got)
        # Infinities and NaN that the model itself gives must stay where they are; they have no
        # distance, and hence no part in the norms.
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            if not torch.equal(special(want), special(got)):
                raise VerificationError(
                    f"{name}: is exact but output{path} differs in where it is not finite"
                )
        finite = want.isfinite()
        want, got = want[finite], got[finite]
        difference = (want.double() - got.double()).norm()
        size = want.double().norm()
        if not difference <= tolerance * size:
            raise VerificationError(
                f"{name}: is exact but output{path} differs by {float(difference / size):.2e} "
                f"of its norm (at most {tolerance:.0e})"
            )


def rounding_error(graph_module: fx.GraphModule, inputs: Sequence[Any], outputs: Any) -> float:
    """How far `outputs`, what the graph gives in float32, are from what it gives in float64.

    The largest relative L2 norm of all outputs; 0 where the graph does not run in float64.
    """
    double = copy.deepcopy(graph_module).double()
    try:
        with torch.no_grad():
            exact = fx.Interpreter(double).run(*(_double(value) for value in inputs))
    except Exception:
        return 0.0
    errors = [0.0]
    for (_, got), (_, want) in zip(flatten(outputs), flatten(exact), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point() and got.shape == want.shape:
            error = float((got.double() - want).norm() / want.norm())
            errors.append(error if math.isfinite(error) else 0.0)
    return max(errors)


def _double(value: Any) -> Any:
    own = copy.deepcopy(value)
    return own.double() if isinstance(own, Tensor) and own.is_floating_point() else own


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists, dicts and dataclasses, each with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from flatten(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from flatten(getattr(value, each.name), f"{path}.{each.name}")
    else:
        yield path, value


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorInfo(tuple(value.shape), value.dtype)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = tuple(_describe(item) for item in value)
        return items if any(item is not None for item in items) else None
    if isinstance(value, Mapping):
        return {key: _describe(item) for key, item in value.items()}
    return None
