"""`fxquant.compile`: the way of the data, on one page."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.artifact import load_artifact
from fxquant.backends import TARGETS, check_target, lower
from fxquant.backends.check import TargetCheck
from fxquant.calibrate import CalibrationSet, calibrate
from fxquant.compiled import CompiledModel
from fxquant.correct_bias import InputMeans, correct_bias
from fxquant.coverage import CoverageRow, coverage
from fxquant.dump import dump_stage
from fxquant.dynamic import QuantizeRecurrentWeights, recurrent_quantizers
from fxquant.equalize import equalize
from fxquant.errors import CalibrationError, CompileError, ModelError, TargetError, nearest
from fxquant.observers import weight_qparams
from fxquant.operations import layer_of
from fxquant.plan import Plan, make_plan
from fxquant.quantizers import ActivationQuantizer, WeightQuantizer
from fxquant.recipe import Recipe
from fxquant.report import QuantizerRow, Refusal, Report, format_diff
from fxquant.saturation import fit_pair_sums
from fxquant.stages import check_integer_graph
from fxquant.to_integer import to_integer
from fxquant.trace import Traced, trace
from passes import (
    AssignOneSided,
    Canonicalize,
    EliminateNoops,
    FoldBatchNorm,
    FuseConvBnRelu,
    InferRanges,
    InsertQuantDequant,
    InsideBlocks,
    Pass,
    PassError,
    PassRecord,
    Pipeline,
    QuantizerSite,
    SplitSharedModules,
    UnsupportedGraphError,
    add_relu,
    copy_sharing_tensors,
)
from passes.infra.listing import operation
from passes.infra.verify import run_and_annotate

__all__ = ["compile", "load"]


def compile(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    calibration: Any = None,
    target: str = "x86",
    verbose: bool = False,
    diff_passes: Sequence[str] = (),
    dump: str | Path | None = None,
    progress: bool = False,
) -> CompiledModel:
    """Quantize a float model and lower it to a target's kernels.

    `model` is in eval mode and stays as it is. `recipe` is a Recipe or the name of one.
    `calibration` is a tensor, a DataLoader, or an iterable of tensors or of tuples of tensors
    (labels behind the inputs are ignored); without it the recipe's own source is read. The
    first batch also gives the example inputs. `target` is "x86" or "reference".

    `verbose` prints the diff of every pass that changed something, `diff_passes` of the named
    ones; `dump` is a folder for every stage as text, JSON and DOT; `progress` shows bars.

    Raises ModelError and TraceError for the model, RecipeError for the recipe, CalibrationError
    for the data, TargetError for the target, CompileError where a pass broke its contract.
    """
    if target not in TARGETS:
        raise TargetError(
            f"unknown target {target!r}: known are {', '.join(TARGETS)}{nearest(target, TARGETS)}"
        )
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    data = _open(model, recipe, calibration)
    stages: dict[str, fx.GraphModule] = {}
    records: list[PassRecord] = []

    def run(stage: str, graph: fx.GraphModule, steps: Sequence[Pass]) -> fx.GraphModule:
        records.extend(_run(stage, graph, steps, probe))
        stages[stage] = graph
        if dump is not None:
            dump_stage(Path(dump), stage, graph)
        return graph

    traced = trace(model, len(data.first))
    probe = _probe(traced.graph_module, data.first)
    float_graph = run("float", traced.graph_module, _FLOAT_PASSES())
    recipe.check_selectors(*_modules(float_graph))

    fused = run("fused", copy_sharing_tensors(float_graph), _fusing_passes(recipe))
    notes = equalize(fused) if recipe.equalize else []
    plan = make_plan(fused, recipe)
    rows = coverage(fused, plan)
    _check_anything_quantized(rows)

    weights, saturation_notes = _weight_quantizers(fused, plan, target)
    sites = [QuantizerSite(s.path, ActivationQuantizer(s.spec, channelwise=s.channelwise), s.nodes) for s in plan.values]
    insert = InsertQuantDequant(sites, weights, _reads_quantized(plan))
    recurrent, recurrent_notes = recurrent_quantizers(fused, plan.weights, target)
    simulated = run(
        "simulated",
        copy_sharing_tensors(fused),
        [insert, *([QuantizeRecurrentWeights(recurrent)] if recurrent else []), AssignOneSided()],
    )
    means = InputMeans(simulated)
    with means.collecting() if recipe.bias_correction else nullcontext():
        calibrate(
            simulated,
            data if sites or recipe.bias_correction else [],
            batches=data.batches,
            progress=progress,
        )
    if recipe.bias_correction:
        notes += correct_bias(simulated, means)

    integer = stages["integer"] = to_integer(simulated, plan)
    run_and_annotate(integer, probe, name="integer graph")
    check_integer_graph(integer)
    check: TargetCheck | None = None
    if target != "integer":
        lowered, check, lowering_notes = _lower_and_check(integer, target, probe)
        stages[target] = lowered
        notes += lowering_notes
    if dump is not None:
        dump_stage(Path(dump), "integer", integer)
        dump_stage(Path(dump), target, stages[target])
    if verbose or diff_passes:
        _print_diffs(records, diff_passes)

    report = Report(
        model=type(model).__name__,
        recipe=recipe.name,
        target=target,
        coverage=rows,
        quantizers=_quantizer_rows(simulated, records),
        declines=_refusals(traced, records),
        notes=(*saturation_notes, *recurrent_notes, *notes),
        float_size_bytes=_bytes(float_graph),
        size_bytes=_bytes(integer),
        target_check=_check_summary(check),
        passes=tuple(records),
    )
    return CompiledModel(stages, target=target, recipe=recipe, report=report, example=probe)


def load(path: str | Path, target: str = "x86") -> CompiledModel:
    """Load a file that `CompiledModel.save` wrote, check it, and lower it to `target`.

    Raises ArtifactError for a file that is missing, damaged, foreign or too new.
    """
    artifact = load_artifact(Path(path))
    stages = {"integer": artifact.integer}
    stages[target] = lower(artifact.integer, target)
    return CompiledModel(
        stages,
        target=target,
        recipe=artifact.recipe,
        report=artifact.report,
        example=artifact.example,
    )


# -- the steps ---------------------------------------------------------------------------


def _FLOAT_PASSES() -> list[Pass]:  # noqa: N802
    return [Canonicalize(), SplitSharedModules(), EliminateNoops()]


def _fusing_passes(recipe: Recipe) -> list[Pass]:
    """`fusion` says where batch norms are folded and activations and residuals are fused."""
    if recipe.fusion == "none":
        return [InferRanges()]
    inside = InsideBlocks()

    def where(node: fx.Node) -> bool:
        return recipe.fusion == "all" or inside(node)

    def fusible(node: fx.Node) -> bool:
        return where(node) and not _joins_linear(node)

    folding: list[Pass] = [FoldBatchNorm(where)] if recipe.fold_batch_norm else []
    return [*folding, FuseConvBnRelu(fusible), InferRanges()]


def _joins_linear(node: fx.Node) -> bool:
    # A residual that a linear layer takes in would put a transformer's residual stream, which
    # needs more than 8 bits, on an 8-bit grid.
    if node.target not in (torch.add, add_relu):
        return False
    root = node.graph.owning_module
    assert root is not None
    return any(isinstance(layer_of(source, root), nn.Linear) for source in node.all_input_nodes)


def _run(
    stage: str, graph: fx.GraphModule, steps: Sequence[Pass], probe: tuple[Any, ...]
) -> list[PassRecord]:
    try:
        return Pipeline(steps).run(graph, probe)
    except UnsupportedGraphError as error:
        raise ModelError(f"the model cannot be compiled as it is: {error}") from error
    except PassError as error:
        if stage == "float" and str(error).startswith("before the first pass"):
            raise ModelError(
                f"the model does not run on the first calibration batch: {error}"
            ) from error
        raise CompileError(f"{stage} graph: {error}") from error


def _open(model: nn.Module, recipe: Recipe, calibration: Any) -> CalibrationSet:
    source = calibration
    if source is None:
        if not recipe.calibration.source:
            raise CalibrationError(
                "no calibration data: pass calibration=batches, or name a folder in the "
                "recipe's calibration.source"
            )
        from fxquant.data import open_batches

        source = open_batches(
            recipe.calibration.source,
            images=recipe.calibration.images or None,
            preprocessing=recipe.calibration.preset,
            batch_size=recipe.calibration.batch_size,
        )
    return CalibrationSet(source, model=model, images=recipe.calibration.images or None)


def _probe(traced: fx.GraphModule, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """One sample, because passes are verified on it again and again.

    The whole batch where the model does not run on that: the first dimension of a recurrent
    layer's state is no batch.
    """
    one = tuple(
        value[:1].contiguous() if isinstance(value, Tensor) and value.dim() else value
        for value in batch
    )
    try:
        with torch.no_grad():
            traced(*one)
    except Exception:
        return batch
    return one


def _modules(graph: fx.GraphModule) -> tuple[list[str], dict[str, str]]:
    """What selectors may name: the modules of the model, with the types of those called."""
    types = {
        str(node.target): type(graph.get_submodule(str(node.target))).__name__
        for node in graph.graph.nodes
        if node.op == "call_module"
    }
    paths = {node.meta.get("module_path") or "" for node in graph.graph.nodes} | set(types)
    parents = {
        ".".join(path.split(".")[:depth]) for path in paths for depth in range(path.count(".") + 1)
    }
    return sorted((paths | parents) - {""}), types


def _check_anything_quantized(rows: Sequence[CoverageRow]) -> None:
    if any(row.runs_in != "float" for row in rows):
        return
    reasons = sorted({row.reason for row in rows if row.reason})
    raise CompileError(
        f"nothing would be quantized: {'; '.join(reasons[:3]) or 'the graph has no operations'}"
    )


def _weight_quantizers(
    fused: fx.GraphModule, plan: Plan, target: str
) -> tuple[dict[str, nn.Module], list[str]]:
    quantizers: dict[str, nn.Module] = {}
    notes: list[str] = []
    for node in fused.graph.nodes:
        spec = plan.weights.get(node.name)
        layer: Any = layer_of(node, fused)
        if spec is None or layer is None:
            continue
        axis = 1 if type(layer).__name__.startswith("ConvTranspose") else 0
        if axis == 1 and layer.groups > 1:
            spec = spec.per_tensor()
        qparams = weight_qparams(layer.weight.detach(), spec, axis)
        if target == "x86" and plan.runs_on_integers(node):
            qparams, note = fit_pair_sums(str(node.target), layer.weight.detach(), spec, qparams)
            notes += [note] if note else []
        # Weights stay float until the activations have been observed.
        quantizers[node.name] = WeightQuantizer(qparams, enabled=False)
    return quantizers, notes


def _reads_quantized(plan: Plan) -> Callable[[fx.Node, fx.Node], bool]:
    """Integer operations read quantized values; what stays float reads a float source as it is."""

    def reads(value: fx.Node, user: fx.Node) -> bool:
        return plan.runs_on_integers(value) or plan.runs_on_integers(user)

    return reads


def _lower_and_check(
    integer: fx.GraphModule, target: str, probe: tuple[Any, ...]
) -> tuple[fx.GraphModule, TargetCheck | None, list[str]]:
    """Lower, compare operation by operation, and keep the reference where a kernel is off."""
    lowered = lower(integer, target)
    if target == "reference":
        return lowered, None, []
    run_and_annotate(lowered, probe, name=f"{target} graph")
    check = check_target(integer, lowered, probe)
    wrong = {entry.node: entry for entry in check.operations if entry.largest > 1}
    if not wrong:
        return lowered, check, _kept_reference(lowered, target)
    notes = [
        f"{name}: torch's {entry.operation} is up to {entry.largest} steps off; the reference "
        "operator runs instead"
        for name, entry in wrong.items()
    ]
    lowered = lower(integer, target, keep=frozenset(wrong))
    run_and_annotate(lowered, probe, name=f"{target} graph")
    notes += _kept_reference(lowered, target)
    return lowered, check_target(integer, lowered, probe), notes


def _kept_reference(lowered: fx.GraphModule, target: str) -> list[str]:
    """Which operators had no kernel of the target's: exact, but not fast."""
    kept = Counter(
        operation(node).removeprefix("fxquant.")
        for node in lowered.graph.nodes
        if node.meta.get("kernel") == "reference" and operation(node).startswith("fxquant.")
    )
    return [
        f"{target} has no kernel for {count} x {name}: the reference operator runs, exact but slow"
        for name, count in sorted(kept.items())
    ]


# -- the report --------------------------------------------------------------------------


def _print_diffs(records: Iterable[PassRecord], names: Sequence[str]) -> None:
    known = {record.name for record in records}
    for name in names:
        if name not in known:
            raise CompileError(
                f"no pass {name!r} ran: {', '.join(sorted(known))}{nearest(name, known)}"
            )
    for record in records:
        if record.diff and (not names or record.name in names):
            print(format_diff(record, color=sys.stdout.isatty()))


def _quantizer_rows(
    simulated: fx.GraphModule, records: Sequence[PassRecord]
) -> tuple[QuantizerRow, ...]:
    proofs = dict(
        note.split(": ", 1)
        for record in records
        if record.name == "assign_one_sided"
        for note in record.notes
    )
    return tuple(
        QuantizerRow(name, module.detail, proofs.get(name, ""))
        for name, module in simulated.named_modules()
        if isinstance(module, ActivationQuantizer)
    )


def _refusals(traced: Traced, records: Sequence[PassRecord]) -> tuple[Refusal, ...]:
    leaves = [Refusal("trace", path, path, why) for path, why in traced.leaf_reasons.items()]
    declined = [
        Refusal(record.name, decline.node, decline.path, decline.reason)
        for record in records
        for decline in record.declines
    ]
    return (*leaves, *declined)


def _check_summary(check: TargetCheck | None) -> dict[str, Any]:
    if check is None:
        return {}
    return {
        "largest_difference": check.largest,
        "share_differing": check.share_differing,
        "values": sum(entry.values for entry in check.operations),
        "output_differing": check.output_differing,
        # JSON has no infinity: None says that the outputs are equal to the bit.
        "output_sqnr_db": check.output_sqnr_db if math.isfinite(check.output_sqnr_db) else None,
        "operations": [asdict(entry) for entry in check.operations if entry.differing],
    }


def _bytes(graph: fx.GraphModule) -> int:
    tensors = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
