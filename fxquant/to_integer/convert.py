"""The sweep over the simulated graph that emits the integer graph."""

from __future__ import annotations

import torch
from torch import fx

from fxquant.plan.operations import Kind
from fxquant.plan.plan import Plan
from fxquant.simulate.nonlinear import SimulatedForm
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.to_integer.conversion import OPS, Conversion, Integers
from fxquant.to_integer.dyadic import DYADIC_EMITTERS
from fxquant.to_integer.dynamic import dynamic_operation
from fxquant.to_integer.floats import float_operation
from fxquant.to_integer.grid import Grid
from fxquant.to_integer.layers import activate, emit_layer
from fxquant.to_integer.nonlinear import emit_nonlinear
from fxquant.to_integer.operations import EMITTERS, Emit, emit_matmul, emit_movement
from passes.layers.questions import activation_of

__all__ = ["to_integer"]


def to_integer(simulated: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Build the integer graph of a calibrated simulated graph.

    Every integer node carries its `Grid` in ``meta["grid"]`` and the simulated node that it
    stands for in ``meta["simulated"]``. Raises CompileError where the plan is another graph's.
    """
    plan.check(simulated.graph)
    conversion = Conversion(simulated, plan)
    for node in simulated.graph.nodes:
        conversion.current = node
        if node.op == "placeholder":
            conversion.floats[node] = conversion.graph.node_copy(node)
        elif node.op == "get_attr":
            value = conversion.tensor(node)
            conversion.floats[node] = conversion.constant(str(node.target), value)
        elif node.op == "output":
            conversion.graph.output(fx.map_arg(node.args[0], conversion.float_or_plain))
        elif conversion.is_quantizer(node):
            _emit_behind(conversion, node)
        elif node.name in plan.dynamic:
            conversion.floats[node] = dynamic_operation(conversion, node)
        elif not plan.runs_on_integers(node):
            float_operation(conversion, node)
        elif plan.kinds[node.name] in (Kind.MOVE, Kind.SELECT):
            emit_movement(conversion, node)
        elif not any(conversion.is_quantizer(user) for user in node.users):
            conversion.floats[node] = _float_out(conversion, node)
        # Everything else is emitted when its quantizer comes.
    graph = conversion.graph
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    graph.lint()
    return fx.GraphModule(conversion.root, graph, "IntegerGraph")


def _emit_behind(conversion: Conversion, node: fx.Node) -> None:
    """What a quantizer quantizes is emitted now that its grid is known."""
    value = node.all_input_nodes[0]
    module = conversion.source.get_submodule(str(node.target))
    assert isinstance(module, ActivationQuantizer)
    qparams = module.qparams
    channels = None if qparams.axis is None else qparams.scale
    grid = Grid(
        float(qparams.scale.amax()),
        int(qparams.zero_point[0]),
        qparams.qmin,
        qparams.qmax,
        qparams.dtype,
    )
    plan = conversion.plan
    if value.op == "get_attr":
        codes = qparams.quantize(conversion.tensor(value))
        emitted = conversion.constant(f"{value.target}_codes", codes)
        emitted.meta["grid"] = grid
    elif value.op != "placeholder" and plan.runs_on_integers(value):
        conversion.current = value
        conversion.output_channels = channels
        emitted = _emitter(conversion, value)(conversion, value, grid)
        conversion.output_channels = None
    else:
        operands = (conversion.floats[value], *grid.output())
        emitted = conversion.emit(OPS.quantize.default, operands, grid)
    if channels is not None:
        emitted.meta["channel_scale"] = channels
    conversion.integers[node] = Integers(emitted, grid, channels)


def _emitter(conversion: Conversion, node: fx.Node) -> Emit:
    if node.op == "call_module":
        module = conversion.source.get_submodule(str(node.target))
        if isinstance(module, SimulatedForm):
            return emit_nonlinear
    plan = conversion.plan
    table = DYADIC_EMITTERS if plan.requantization == "dyadic" else EMITTERS
    return table.get(plan.kinds[node.name]) or table[node.target]


def _float_out(conversion: Conversion, node: fx.Node) -> fx.Node:
    """What only float operations read: its accumulators are dequantized directly."""
    to_float = (1.0, 0, 0, 0, torch.float32)
    if conversion.plan.kinds[node.name] is Kind.MATMUL:
        return emit_matmul(conversion, node, to_float, None)
    y = emit_layer(conversion, node, to_float, None)
    return activate(conversion, y, activation_of(node))
