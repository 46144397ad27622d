"""Integer forms in the simulated graph: modules that compute in float what the integers will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxquant.plan.nonlinear import Builder, IntegerForm, Produced, execute
from fxquant.plan.plan import Plan
from fxquant.simulate.quantizers import ActivationQuantizer

__all__ = ["SimulatedForm", "link_forms", "simulated_forms"]


class SimulatedForm(nn.Module):
    """An operation with an integer form, in float in and float out.

    Until the quantizer of what it reads is calibrated it is the float operation; from then on it
    executes its integer operators on the codes. The gradient is the float operation's.
    """

    def __init__(
        self,
        form: IntegerForm,
        function: Callable[..., Tensor],
        *,
        norm: nn.LayerNorm | None = None,
        dim: int = -1,
    ) -> None:
        super().__init__()
        self.form = form
        self.function = function
        self.norm = norm
        self.dim = dim
        self.observing = False
        self._largest: Tensor | None = None
        self.unlink()

    @property
    def source(self) -> ActivationQuantizer | None:
        """The quantizer that its input has passed; None where it computes in float."""
        source: ActivationQuantizer | None = self.__dict__["_source"]
        return source

    def link(self, source: ActivationQuantizer) -> None:
        """Execute the integer operators on the grid of `source`, once that is calibrated."""
        # No child: the graph calls it by its own path.
        self.__dict__["_source"] = source

    def unlink(self) -> None:
        """Compute in float."""
        self.__dict__["_source"] = None

    @property
    def operation(self) -> str:
        """The name in listings."""
        return f"{self.form.operation.lower()}_{self.form.method}"

    def channel_shift(self, x_scale: float) -> Tensor:
        """The power-of-two factor of each channel that holds its largest value in 8 bits."""
        assert self._largest is not None
        steps = (self._largest.double() / (127 * x_scale)).clamp(min=1.0)
        return steps.log2().ceil().to(torch.int64)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the operation gives for float values on the grid of its input."""
        extra = () if mask is None else (mask,)
        y = self.function(x, *extra)
        source = self.source
        if source is None or not source.has_qparams or not source.enabled:
            if self.observing and self.form.method == "power_of_two":
                largest = x.detach().abs().flatten(0, -2).amax(0)
                seen = self._largest
                self._largest = largest if seen is None else torch.maximum(seen, largest)
            return y
        qparams = source.qparams
        produced = self.produce(
            execute,
            qparams.quantize(x),
            float(qparams.scale),
            int(qparams.zero_point),
            rows=x.shape[-1],
            mask=mask,
        )
        exact: Tensor = produced.value.double().mul_(produced.scale).to(y.dtype)
        return exact + (y - y.detach()) if y.requires_grad else exact

    def produce(
        self, build: Builder, x: Any, scale: float, zero_point: int, *, rows: int, mask: Any = None
    ) -> Produced:
        """The integers of the result for the codes `x`: see `IntegerForm.produce`."""
        shift = self.channel_shift(scale) if self.form.method == "power_of_two" else None
        return self.form.produce(
            build,
            x,
            scale,
            zero_point,
            rows=rows,
            mask=mask,
            norm=self.norm,
            dim=self.dim,
            channel_shift=shift,
        )


def simulated_forms(fused: fx.GraphModule, plan: Plan) -> dict[str, nn.Module]:
    """A module for every operation that the plan gives an integer form, by node name."""
    modules: dict[str, nn.Module] = {}
    for node in fused.graph.nodes:
        form = plan.forms.get(node.name)
        # A function of one 8-bit value by its table is its float function, rounded.
        if form is None or node.name in plan.reasons or form == IntegerForm("GELU", "table"):
            continue
        if node.op == "call_module":
            norm = cast(nn.LayerNorm, fused.get_submodule(str(node.target)))
            modules[node.name] = SimulatedForm(form, norm.forward, norm=norm)
        else:
            dim = cast(int, node.kwargs.get("dim", -1))
            modules[node.name] = SimulatedForm(form, _bound(node), dim=dim)
    return modules


def _bound(node: fx.Node) -> Callable[..., Tensor]:
    target: Any = node.target
    kwargs = dict(node.kwargs)
    return lambda *tensors: target(*tensors, **kwargs)


def link_forms(simulated: fx.GraphModule) -> None:
    """Tell every form which quantizer its input has passed, behind all movement."""
    for node in simulated.graph.nodes:
        module = _called(simulated, node)
        if not isinstance(module, SimulatedForm):
            continue
        source = node.all_input_nodes[0]
        while not isinstance(quantizer := _called(simulated, source), ActivationQuantizer):
            source = source.all_input_nodes[0]
        module.link(quantizer)


def _called(root: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None
