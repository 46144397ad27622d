"""The operators ``torch.ops.fxquant.*``: one table of implementations and fake kernels.

An operator's signature is that of its implementation; the schema and what the fake kernel is
called with derive from it. The implementation on the CPU is the reference in `fxquant.integer`.
There is none for other devices on purpose: float64 convolutions elsewhere need not be plain sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fxquant import integer
from fxquant.kernels import fakes
from fxquant.kernels.calls import bind

NAMESPACE = "fxquant"


@dataclass(frozen=True)
class Operator:
    """One operator: what it computes, and what it returns for fake tensors.

    Without ``fake`` the implementation itself runs on fake tensors: it looks at shapes only.
    """

    implementation: Callable[..., Any]
    fake: Callable[[fakes.Call], Any] | None = None

    @property
    def name(self) -> str:
        """The name inside the namespace."""
        return self.implementation.__name__

    @property
    def schema(self) -> str:
        """The arguments and results as torch writes them: ``(Tensor q, float scale) -> Tensor``."""
        inferred = torch.library.infer_schema(self.implementation, mutates_args=())
        # A graph is compiled for its numbers: none of them is a symbol.
        return inferred.replace("SymInt", "int")


OPERATORS: tuple[Operator, ...] = (
    Operator(integer.quantize),
    Operator(integer.dequantize),
    Operator(integer.dequantize_weight),
    Operator(integer.conv, fakes.conv),
    Operator(integer.conv_transpose, fakes.conv_transpose),
    Operator(integer.linear, fakes.linear),
    Operator(integer.add),
    Operator(integer.mul),
    Operator(integer.channel_affine),
    Operator(integer.lookup),
    Operator(integer.avg_pool, fakes.avg_pool),
    Operator(integer.adaptive_avg_pool),
    Operator(integer.max_pool, fakes.max_pool),
    Operator(integer.mean),
    Operator(integer.linear_dynamic, fakes.linear_dynamic),
    Operator(integer.lstm_dynamic, fakes.lstm_dynamic),
    Operator(integer.gru_dynamic, fakes.gru_dynamic),
    Operator(integer.matmul, fakes.matmul),
    Operator(integer.weighted_mean, fakes.matmul),
    Operator(integer.linear_accumulate, fakes.linear_accumulate),
    Operator(integer.conv_accumulate, fakes.conv_accumulate),
    Operator(integer.matmul_accumulate, fakes.matmul_accumulate),
    Operator(integer.mul_accumulate),
    Operator(integer.sum_accumulate),
    Operator(integer.rescale, fakes.rescale),
    Operator(integer.add_rescaled, fakes.add_rescaled),
    Operator(integer.softmax_i_vit, fakes.softmax_i_vit),
    Operator(integer.softmax_table, fakes.softmax_table),
    Operator(integer.softmax_log2, fakes.softmax_log2),
    Operator(integer.gelu_i_vit, fakes.gelu_i_vit),
    Operator(integer.layer_norm_i_vit, fakes.layer_norm),
    Operator(integer.layer_norm_integer, fakes.layer_norm),
    Operator(integer.layer_norm_power_of_two, fakes.layer_norm),
    Operator(integer.normalize_integer, fakes.normalize_integer),
)


def register(operators: Iterable[Operator] = OPERATORS) -> None:
    """Make operators known to torch; those that it knows already stay."""
    for operator in operators:
        if hasattr(getattr(torch.ops, NAMESPACE), operator.name):
            continue
        qualified = f"{NAMESPACE}::{operator.name}"
        # torch.library's functions keep what they register alive for the whole process, which a
        # Library object of this module would not: reloading the module would unregister it.
        torch.library.define(qualified, operator.schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(qualified, "cpu", operator.implementation)
        torch.library.register_fake(qualified, _fake(operator))


def _fake(operator: Operator) -> Callable[..., Any]:
    fake = operator.fake
    if fake is None:
        return operator.implementation

    def call(*args: Any, **kwargs: Any) -> Any:
        target = getattr(getattr(torch.ops, NAMESPACE), operator.name).default
        return fake(fakes.Call(**bind(target, args, kwargs)))

    return call


register()
