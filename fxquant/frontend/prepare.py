"""The model before tracing: what is wrong with it, and a copy that holds plain layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.errors import ModelError, TraceError
from passes import overrides_forward

__all__ = [
    "FloatLeaf",
    "LayerRoot",
    "check_kind",
    "check_mode",
    "check_weights",
    "drops_or_learns",
    "is_aten_graph",
    "is_leaf",
    "prepare",
    "unwrap",
]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *_WRAPPERS)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
_CHANGES_WITH_MODE = (
    *_BATCH_NORMS,
    nn.InstanceNorm3d,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
)


class FloatLeaf(nn.Module):
    """Keeps a module as it is, out of reach of every pass, because of `why_float`."""

    def __init__(self, module: nn.Module, why_float: str) -> None:
        super().__init__()
        self.module = module
        self.why_float = why_float
        self.operation = type(module).__name__.lower()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        return self.module(*args, **kwargs)


class LayerRoot(nn.Module):
    """Gives a single layer a name inside a root, so that it is a layer of a graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives."""
        return self.layer(*args, **kwargs)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing stops at this module: the layers of `torch.nn`, not its containers."""
    if isinstance(module, (FloatLeaf, torch.jit.ScriptModule)):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, _TRANSPARENT)


def is_aten_graph(model: Any) -> bool:
    """Whether `model` is a GraphModule of aten operators, as torch.export makes it."""
    return isinstance(model, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
        for node in model.graph.nodes
    )


def check_kind(model: Any) -> None:
    """Raise ModelError, TraceError for what is not a float module of Python code and float32."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is an nn.Module, found a {type(model).__name__}")
    model = unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a TorchScript module: hand in the nn.Module it came from")
    for path, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise ModelError(
                f"{path or 'the model'} is a {type(module).__name__} that torch has quantized: "
                "hand in the float model"
            )
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes and not dtypes & {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(f"the model's weights are {names}: call model.float() before compiling")


def check_mode(model: nn.Module) -> None:
    """Raise ModelError where the model, or a part that behaves differently then, is training."""
    advice = "in training mode: call model.eval() before compiling"
    if model.training:
        raise ModelError(f"the model is {advice}")
    for path, module in model.named_modules():
        if drops_or_learns(module):
            raise ModelError(f"{path} ({type(module).__name__}) is {advice}")


def drops_or_learns(module: nn.Module) -> bool:
    """Whether this module, its parts aside, is in training mode and behaves differently in it."""
    if not module.training:
        return False
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return bool(module.dropout)
    changes = isinstance(module, _CHANGES_WITH_MODE) or _is_of_torchvision(
        module, "StochasticDepth"
    )
    if changes or type(module).__module__.startswith("torch.nn"):
        return changes
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names


def check_weights(model: nn.Module) -> None:
    """Raise ModelError, naming the tensor, where a weight or statistic is not finite."""
    for path, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise ModelError(f"{path} is not initialised: run the model once before compiling")
        if value.is_meta or not value.is_floating_point() or value.isfinite().all():
            continue
        if value.isnan().any():
            raise ModelError(f"{path} holds NaN: load other weights or retrain")
        # A mask of -inf is a fine buffer; an infinite weight or statistic is not.
        if isinstance(value, nn.Parameter) or path.endswith(("running_mean", "running_var")):
            raise ModelError(f"{path} holds infinite values: load other weights or retrain")


def prepare(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy that shares all tensors with `model` and holds plain layers; reasons for leaves.

    Wrappers and weight parametrizations are gone, frozen batch norms are batch norms, and a layer
    with hooks or a forward of its own is a FloatLeaf.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            if value is not None:
                shared[id(value)] = value
        shared |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    try:
        root = copy.deepcopy(model, shared)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}") from error
    root = LayerRoot(root).eval() if is_leaf(root) else root
    reasons: dict[str, str] = {}
    _replace_parts(root, "", {}, reasons)
    return root, reasons


def _replace_parts(
    module: nn.Module, path: str, done: dict[nn.Module, nn.Module], reasons: dict[str, str]
) -> None:
    for name, part in list(module._modules.items()):
        if part is None:
            continue
        inner = f"{path}.{name}" if path else name
        if part not in done:
            plain = done[part] = _plain(part)
            if isinstance(plain, FloatLeaf):
                reasons[inner] = plain.why_float
            elif not is_leaf(plain):
                _replace_parts(plain, inner, done, reasons)
        module._modules[name] = done[part]


def _plain(module: nn.Module) -> nn.Module:
    module = unwrap(module)
    if _is_of_torchvision(module, "FrozenBatchNorm2d"):
        frozen: Any = module
        norm = nn.BatchNorm2d(frozen.weight.numel(), eps=frozen.eps, device="meta").eval()
        norm.weight, norm.bias = nn.Parameter(frozen.weight), nn.Parameter(frozen.bias)
        norm.running_mean, norm.running_var = frozen.running_mean, frozen.running_var
        norm.num_batches_tracked = None
        return norm
    if nn.utils.parametrize.is_parametrized(module):
        _compute_parametrized(module)
    _compute_normalized(module)
    if not is_leaf(module) or not overrides_forward(module):
        return module
    own = "has a forward of its own" if "forward" in vars(module) else "has forward hooks"
    return FloatLeaf(module, f"{own}, which a compiled layer would not run")


def _is_of_torchvision(module: nn.Module, name: str) -> bool:
    """Whether it is such a layer; torchvision, which takes long to import, stays out of it."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("torchvision.ops")
        for kind in type(module).__mro__
    )


def _compute_parametrized(module: Any) -> None:
    with torch.no_grad():
        values = {name: getattr(module, name).detach() for name in module.parametrizations}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _compute_normalized(module: nn.Module) -> None:
    # weight_norm and spectral_norm of the old kind compute the weight in a hook of the layer.
    for key, hook in list(module._forward_pre_hooks.items()):
        if not type(hook).__module__.startswith("torch.nn.utils"):
            continue
        norm: Any = hook
        options = {"do_power_iteration": False} if hasattr(norm, "n_power_iterations") else {}
        with torch.no_grad():
            weight = norm.compute_weight(module, **options).detach()
        del module._forward_pre_hooks[key]
        for name in ("", "_g", "_v", "_u", "_orig"):
            for held in (vars(module), module._parameters, module._buffers):
                held.pop(f"{norm.name}{name}", None)
        module.register_parameter(norm.name, nn.Parameter(weight))
