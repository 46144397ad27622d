"""Dynamic quantization: which layers take part. Their inputs are quantized at run time."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxquant.errors import RecipeError
from fxquant.plan.operations import layer_of
from fxquant.recipe import Recipe
from fxquant.spec import QuantSpec
from passes import TensorInfo, overrides_forward, tensor_info

__all__ = ["check_dynamic", "dynamic_refusal", "recurrent_input", "recurrent_of"]


def recurrent_of(node: fx.Node, root: nn.Module) -> nn.LSTM | nn.GRU | None:
    """The LSTM or GRU that `node` calls; None for anything else."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.LSTM | nn.GRU) or overrides_forward(module):
        return None
    return module


def dynamic_refusal(node: fx.Node, root: nn.Module) -> str:
    """Why a node of an annotated graph is not quantized dynamically; "" where it is."""
    recurrent = recurrent_of(node, root)
    if recurrent is None and not isinstance(layer_of(node, root), nn.Linear):
        return "dynamic quantization keeps it in float"
    if recurrent is not None and recurrent.proj_size > 0:
        return "an LSTM with proj_size has no dynamic form"
    info = recurrent_input(node)
    if info is None:
        return "a packed sequence has no dynamic form"
    if info.dtype != torch.float32:
        return f"its input is {info.dtype}, dynamic quantization takes torch.float32"
    return ""


def check_dynamic(recipe: Recipe, weight: QuantSpec | None) -> None:
    """Raise RecipeError where `recipe`, or a layer's weight spec, has no dynamic form."""
    if recipe.activations.bits != 8:
        raise RecipeError(
            "dynamic quantization computes with 8-bit activations, found activations.bits = "
            f"{recipe.activations.bits}: set 8"
        )
    if weight is not None and weight.scheme != "symmetric" and weight.bits == 8:
        raise RecipeError(
            "dynamic quantization takes symmetric weights at 8 bits, found "
            f'{weight.scheme!r}: set weights.scheme = "symmetric"'
        )


def recurrent_input(node: fx.Node) -> TensorInfo | None:
    """What is known of the sequence that a layer reads; None for a packed one."""
    return tensor_info(node.args[0] if node.args else node.kwargs.get("input"))
