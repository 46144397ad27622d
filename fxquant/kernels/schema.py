"""The operators ``torch.ops.fxquant.*``: one table of schemas, implementations and fake kernels.

The implementation on the CPU is the reference in `fxquant.integer`. There is none for other
devices on purpose: float64 convolutions elsewhere need not be plain sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxquant import integer
from fxquant.kernels import fakes

NAMESPACE = "fxquant"

_X = "Tensor x, float x_scale, int x_zero_point"
_WEIGHT = "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias"
_OUTPUT = "float scale, int zero_point, int qmin, int qmax, ScalarType dtype"
_RESIDUAL = "Tensor? residual=None, float residual_scale=1.0, int residual_zero_point=0"
_A_B = "Tensor a, float a_scale, int a_zero_point, Tensor b, float b_scale, int b_zero_point"
# Integers only: accumulators in, codes out.
_CODES_X = "Tensor x, int x_zero_point"
_CODES_A_B = "Tensor a, int a_zero_point, Tensor b, int b_zero_point"
_INTEGER_WEIGHT = "Tensor weight, Tensor? weight_zero_point, Tensor? bias"
_CODES = "int zero_point, int qmin, int qmax, ScalarType dtype"
_NORM = "Tensor? bias, int dims"


@dataclass(frozen=True)
class Operator:
    """One operator: its schema, what it computes, and what it returns for fake tensors.

    Without ``fake`` the implementation itself runs on fake tensors: it looks at shapes only.
    """

    schema: str
    implementation: Callable[..., Any]
    fake: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name inside the namespace."""
        return self.schema.partition("(")[0]


_CONV = "int[] stride, int[] padding, int[] dilation, int groups"
_CONV_TRANSPOSE = f"{_CONV}, int[] output_padding"
_RECURRENT = (
    "Tensor x, Tensor[] hx, Tensor[] weights, Tensor[] scales, Tensor[] biases, int num_layers, "
    "bool bidirectional, bool batch_first"
)
_POOL = (
    "int[] kernel_size, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override"
)

OPERATORS: tuple[Operator, ...] = (
    Operator(f"quantize(Tensor x, {_OUTPUT}) -> Tensor", integer.quantize),
    Operator("dequantize(Tensor q, float scale, int zero_point) -> Tensor", integer.dequantize),
    Operator(
        "dequantize_weight(Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
        "int axis) -> Tensor",
        integer.dequantize_weight,
    ),
    Operator(f"requantize({_X}, {_OUTPUT}) -> Tensor", integer.requantize),
    Operator(
        f"conv({_X}, {_WEIGHT}, {_CONV}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.conv,
        fakes.conv,
    ),
    Operator(
        f"conv_transpose({_X}, {_WEIGHT}, {_CONV_TRANSPOSE}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.conv_transpose,
        fakes.conv_transpose,
    ),
    Operator(
        f"linear({_X}, {_WEIGHT}, {_OUTPUT}, {_RESIDUAL}) -> Tensor",
        integer.linear,
        fakes.linear,
    ),
    Operator(f"add({_A_B}, {_OUTPUT}) -> Tensor", integer.add),
    Operator(f"mul({_A_B}, {_OUTPUT}) -> Tensor", integer.mul),
    Operator(
        f"channel_affine({_X}, Tensor weight, Tensor bias, {_OUTPUT}) -> Tensor",
        integer.channel_affine,
    ),
    Operator("lookup(Tensor x, Tensor table) -> Tensor", integer.lookup),
    Operator(f"avg_pool({_X}, {_POOL}, {_OUTPUT}) -> Tensor", integer.avg_pool, fakes.avg_pool),
    Operator(
        f"adaptive_avg_pool({_X}, int[] output_size, {_OUTPUT}) -> Tensor",
        integer.adaptive_avg_pool,
    ),
    Operator(
        "max_pool(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
        "bool ceil_mode) -> Tensor",
        integer.max_pool,
        fakes.max_pool,
    ),
    Operator(f"mean({_X}, int[] dim, bool keepdim, {_OUTPUT}) -> Tensor", integer.mean),
    Operator(
        "linear_dynamic(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
        integer.linear_dynamic,
        fakes.linear_dynamic,
    ),
    Operator(
        f"lstm_dynamic({_RECURRENT}) -> (Tensor, Tensor, Tensor)",
        integer.lstm_dynamic,
        fakes.lstm_dynamic,
    ),
    Operator(
        f"gru_dynamic({_RECURRENT}) -> (Tensor, Tensor)", integer.gru_dynamic, fakes.gru_dynamic
    ),
    Operator(f"matmul({_A_B}, float alpha, {_OUTPUT}) -> Tensor", integer.matmul, fakes.matmul),
    Operator(
        "weighted_mean(Tensor a, int a_zero_point, Tensor b, float b_scale, int b_zero_point, "
        f"{_OUTPUT}) -> Tensor",
        integer.weighted_mean,
        fakes.weighted_mean,
    ),
    Operator(
        f"linear_accumulate({_CODES_X}, {_INTEGER_WEIGHT}) -> Tensor",
        integer.linear_accumulate,
        fakes.linear_accumulate,
    ),
    Operator(
        f"conv_accumulate({_CODES_X}, {_INTEGER_WEIGHT}, {_CONV}) -> Tensor",
        integer.conv_accumulate,
        fakes.conv_accumulate,
    ),
    Operator(
        f"matmul_accumulate({_CODES_A_B}) -> Tensor",
        integer.matmul_accumulate,
        fakes.matmul_accumulate,
    ),
    Operator(f"mul_accumulate({_CODES_A_B}) -> Tensor", integer.mul_accumulate),
    Operator(
        f"sum_accumulate({_CODES_X}, int[] dim, bool keepdim) -> Tensor", integer.sum_accumulate
    ),
    Operator(
        f"rescale({_CODES_X}, Tensor multiplier, Tensor shift, int axis, {_CODES}) -> Tensor",
        integer.rescale,
        fakes.rescale,
    ),
    Operator(
        "add_rescaled(Tensor a, int a_zero_point, int a_multiplier, int a_shift, Tensor b, "
        f"int b_zero_point, int b_multiplier, int b_shift, {_CODES}) -> Tensor",
        integer.add_rescaled,
        fakes.add_rescaled,
    ),
    Operator(
        f"softmax_i_vit({_CODES_X}, int x0, int n, int bits, Tensor? mask) -> Tensor",
        integer.softmax_i_vit,
        fakes.softmax_i_vit,
    ),
    Operator(
        "softmax_table(Tensor x, Tensor table, int numerator, int qmin, int qmax, "
        "ScalarType dtype, Tensor? mask) -> Tensor",
        integer.softmax_table,
        fakes.softmax_table,
    ),
    Operator(
        f"softmax_log2({_CODES_X}, int x0, int b, int c, int n, int bits, Tensor? mask) -> Tensor",
        integer.softmax_log2,
        fakes.softmax_log2,
    ),
    Operator(
        f"gelu_i_vit({_CODES_X}, int x0, int n, int bits) -> Tensor",
        integer.gelu_i_vit,
        fakes.gelu_i_vit,
    ),
    Operator(
        f"layer_norm_i_vit({_CODES_X}, {_NORM}) -> Tensor",
        integer.layer_norm_i_vit,
        fakes.layer_norm,
    ),
    Operator(
        f"layer_norm_integer({_CODES_X}, {_NORM}) -> Tensor",
        integer.layer_norm_integer,
        fakes.layer_norm,
    ),
    Operator(
        f"layer_norm_power_of_two({_CODES_X}, Tensor channel_shift, {_NORM}) -> Tensor",
        integer.layer_norm_power_of_two,
        fakes.layer_norm_power_of_two,
    ),
    Operator(
        f"normalize_integer({_CODES_X}, int dim) -> Tensor",
        integer.normalize_integer,
        fakes.normalize_integer,
    ),
)


def register() -> None:
    """Make every operator of the table known to torch; those that it knows already stay."""
    for operator in OPERATORS:
        if hasattr(getattr(torch.ops, NAMESPACE), operator.name):
            continue
        qualified = f"{NAMESPACE}::{operator.name}"
        # torch.library's functions keep what they register alive for the whole process, which a
        # Library object of this module would not: reloading the module would unregister it.
        torch.library.define(
            qualified, operator.schema.removeprefix(operator.name), tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(qualified, "cpu", operator.implementation)
        torch.library.register_fake(qualified, operator.fake or operator.implementation)


register()
