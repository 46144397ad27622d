"""`fxquant.compile`: the way of the data, on one page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.artifact.file import load_artifact
from fxquant.artifact.packing import tensor_bytes
from fxquant.backends import find_target
from fxquant.compiled import CompiledModel, lower_compiled
from fxquant.errors import (
    CalibrationError,
    CompileError,
    InputError,
    ModelError,
    RecipeError,
    nearest,
)
from fxquant.even_out.equalize import equalize
from fxquant.even_out.migrate import reparameterize, smooth_quant
from fxquant.even_out.split_outliers import split_outlier_channels
from fxquant.frontend.trace import trace
from fxquant.plan.coverage import CoverageRow, coverage
from fxquant.plan.plan import Plan, make_plan
from fxquant.plan.stage_passes import canonical_passes, fusing_passes
from fxquant.recipe import Recipe
from fxquant.reconstruct import gptq, reconstruct
from fxquant.report.dump import dump_stage
from fxquant.report.report import Report, format_diff
from fxquant.report.summary import quantizer_rows, refusals
from fxquant.simulate.calibrate import CalibrationSet, calibrate
from fxquant.simulate.correct_bias import InputMeans, correct_bias
from fxquant.simulate.nonlinear import link_forms, simulated_forms
from fxquant.simulate.quantize_weights import weight_quantizers
from fxquant.simulate.quantizers import ActivationQuantizer
from fxquant.simulate.recurrent import QuantizeRecurrentWeights, recurrent_quantizers
from fxquant.to_integer import to_checked_integer
from passes import (
    AssignOneSided,
    InsertQuantDequant,
    Pass,
    PassError,
    PassRecord,
    Pipeline,
    QuantizerSite,
    ReplaceIntegerOps,
    UnsupportedGraphError,
    copy_sharing_tensors,
)

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
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> CompiledModel:
    """Quantize a float model and lower it to a target's kernels.

    `model` is in eval mode and stays as it is. `recipe` is a Recipe or the name of one.
    `calibration` is a tensor, a DataLoader, or an iterable of tensors or of tuples of tensors
    (labels behind the inputs are ignored); without it the recipe's own source is read. The
    first batch also gives the example inputs. `target` is one of `available_targets()`.

    `verbose` prints the diff of every pass that changed something, `diff_passes` of the named
    ones; `dump` is a folder for every stage as text, JSON and DOT; `progress` shows bars.

    Where the recipe learns roundings: `device` computes them; `checkpoint` is a file that is
    written after each block, behind whose blocks `resume` goes on, to the same bits. Under
    torchrun every process computes its share of the images and returns the same model.

    Raises ModelError and TraceError for the model, RecipeError for the recipe, CalibrationError
    for the data, TargetError for the target, InputError for the device, CompileError where a
    pass broke its contract.
    """
    refusal = find_target(target).weight_refusal()
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is an nn.Module, found a {type(model).__name__}")
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"a recipe is a Recipe or the name of one, found a {type(recipe).__name__}: "
            "Recipe.from_dict and Recipe.from_toml make one"
        )
    _check_device(device)
    if (resume or checkpoint is not None) and not recipe.reconstruction.learned:
        raise RecipeError(
            f"checkpoint and resume are for learned roundings, and recipe {recipe.name} learns "
            "none: choose one that ends in _adaround, _brecq, _qdrop or _pdquant"
        )
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
    float_graph = run("float", traced.graph_module, canonical_passes())
    recipe.check_selectors(*_modules(float_graph))

    fused = run("fused", copy_sharing_tensors(float_graph), fusing_passes(recipe))
    notes = equalize(fused) if recipe.equalize else []
    notes += _migrate(fused, recipe, data)
    plan = make_plan(fused, recipe)
    rows = coverage(fused, plan)
    _check_anything_quantized(rows)

    weights, saturation_notes = weight_quantizers(fused, plan, refusal)
    sites = [
        QuantizerSite(
            site.path,
            ActivationQuantizer(site.spec, channelwise=site.channelwise, fixed=site.fixed),
            site.nodes,
        )
        for site in plan.values
    ]
    insert = InsertQuantDequant(sites, weights, _reads_quantized(plan))
    recurrent, recurrent_notes = recurrent_quantizers(fused, plan.weights, refusal)
    simulated = run(
        "simulated",
        copy_sharing_tensors(fused),
        [
            ReplaceIntegerOps(simulated_forms(fused, plan)),
            insert,
            *([QuantizeRecurrentWeights(recurrent)] if recurrent else []),
            *([AssignOneSided()] if recipe.activations.one_sided else []),
        ],
    )
    link_forms(simulated)
    means = InputMeans(simulated)
    # A rounding that looks at the outputs leaves their means where they are.
    corrects_bias = recipe.bias_correction and recipe.reconstruction.method == "none"
    scale_images = recipe.reconstruction.scale_images if recipe.reconstruction.learned else 0
    with means.collecting() if corrects_bias else nullcontext():
        calibrate(
            simulated,
            data.head(scale_images) if sites or corrects_bias else [],
            batches=data.batches if not scale_images else None,
            progress=progress,
        )
    if corrects_bias:
        notes += correct_bias(simulated, means)
    notes += _round_weights(
        stages, recipe, data, device=device, checkpoint=checkpoint, resume=resume, progress=progress
    )

    stages["integer"] = to_checked_integer(simulated, plan, probe)

    report = Report(
        model=type(model).__name__,
        recipe=recipe.name,
        target=target,
        coverage=rows,
        quantizers=quantizer_rows(simulated, records),
        declines=refusals(traced, records),
        notes=(*saturation_notes, *recurrent_notes, *notes),
        float_size_bytes=tensor_bytes(float_graph),
        size_bytes=tensor_bytes(stages["integer"]),
        passes=tuple(records),
    )
    q = lower_compiled(stages, target, recipe=recipe, report=report, example=probe)
    if dump is not None:
        for stage in ("integer", target):
            dump_stage(Path(dump), stage, q.stages[stage])
    if verbose or diff_passes:
        _print_diffs((*records, *q.report.target_passes), diff_passes)
    return q


def load(path: str | Path, target: str = "x86") -> CompiledModel:
    """Load a file that `CompiledModel.save` wrote, check it, and lower it to `target`.

    Raises ArtifactError for a file that is missing, damaged, foreign or too new, TargetError for
    a target that is unknown or not available here.
    """
    artifact = load_artifact(Path(path))
    return lower_compiled(
        {"integer": artifact.integer},
        target,
        recipe=artifact.recipe,
        report=artifact.report,
        example=artifact.example,
    )


# -- the steps ---------------------------------------------------------------------------


def _check_device(device: str) -> None:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f'device={device!r} is no device: give "cpu" or "cuda:N"') from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            'give "cpu"'
        )


def _migrate(fused: fx.GraphModule, recipe: Recipe, data: CalibrationSet) -> list[str]:
    """Move what 8 bits for a tensor cannot hold from the activations into the weights."""
    notes: list[str] = []
    if recipe.split_outliers:
        notes += split_outlier_channels(fused, data, ratio=float(recipe.split_outliers))
    if recipe.smooth_quant:
        notes += smooth_quant(fused, data, alpha=float(recipe.smooth_quant))
    if recipe.reparameterize:
        notes += reparameterize(fused, data)
    return notes


def _round_weights(
    stages: Mapping[str, fx.GraphModule],
    recipe: Recipe,
    data: CalibrationSet,
    *,
    device: str,
    checkpoint: str | Path | None,
    resume: bool,
    progress: bool,
) -> list[str]:
    """Something better than nearest rounding, where the recipe asks for it."""
    settings = recipe.reconstruction
    notes: list[str] = []
    if settings.starts_closed_form:
        notes += gptq(
            stages["simulated"],
            data,
            damping=settings.damping,
            memory_gib=settings.memory_gib,
            progress=progress,
        )
    if settings.learned:
        notes += reconstruct(
            stages["simulated"],
            stages["fused"],
            data,
            settings,
            float_graph=stages["float"],
            checkpoint=None if checkpoint is None else Path(checkpoint),
            resume=resume,
            device=device,
            progress=progress,
        )
    return notes


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
                "the model does not run on the first calibration batch: "
                f"{str(error).removeprefix('before the first pass: ')}"
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
    learns = recipe.reconstruction.method != "none"
    rewrites = (recipe.split_outliers, recipe.smooth_quant, recipe.reparameterize, learns)
    return CalibrationSet(
        source,
        model=model,
        images=recipe.calibration.images or None,
        sweeps=1 + sum(bool(value) for value in rewrites),
    )


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


def _reads_quantized(plan: Plan) -> Callable[[fx.Node, fx.Node], bool]:
    """Integer operations read quantized values; what stays float reads a float source as it is."""

    def reads(value: fx.Node, user: fx.Node) -> bool:
        return plan.runs_on_integers(value) or plan.runs_on_integers(user)

    return reads


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
