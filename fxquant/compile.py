"""`fxquant.compile`: the way of the data, on one page.

More than 300 lines, because the six steps are read in a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxquant.arguments import checked
from fxquant.artifact.graph_json import why_not_saved
from fxquant.artifact.packing import tensor_bytes
from fxquant.backends import AUTO, candidates, compare_with_float
from fxquant.compilation import (
    AccuracyTarget,
    Compilation,
    Request,
    begin,
    calibration_source,
    reproducible,
)
from fxquant.compiled import (
    CompiledModel,
    in_float_dtype,
    load_compiled,
    lower_compiled,
    with_size,
)
from fxquant.errors import CompileError, InputError, ModelError, TargetError
from fxquant.even_out import measured_rewrites
from fxquant.frontend.capture import as_module, capture
from fxquant.frontend.faithful import (
    check_repeatable,
    check_same_outputs,
    outputs_of,
    run_traced,
)
from fxquant.frontend.structure import Names
from fxquant.plan.coverage import coverage
from fxquant.plan.node_recipe import selectable
from fxquant.plan.plan import make_plan
from fxquant.plan.stage_passes import canonical_passes, fusing_passes
from fxquant.recipe import Recipe
from fxquant.reconstruct import gptq, reconstruct
from fxquant.report.diffs import print_diffs
from fxquant.report.layers import LayerSource
from fxquant.report.provenance import Provenance, versions
from fxquant.report.report import Report
from fxquant.report.summary import proofs, quantizer_rows, refusals
from fxquant.simulate.calibrate import calibrate
from fxquant.simulate.correct_bias import CorrectBias, InputMeans
from fxquant.simulate.nonlinear import link_forms
from fxquant.simulate.simulation_passes import simulation_passes
from fxquant.to_integer import to_checked_integer
from fxquant.to_integer.invariants import check_float_graph, check_simulated_graph

__all__ = ["compile", "load"]


@checked(but=("recipe",), model=ModelError, target=TargetError)
def compile(
    model: nn.Module | torch.export.ExportedProgram,
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
    check_inputs: bool = True,
    accuracy_target: AccuracyTarget | None = None,
    metric: Callable[..., Any] | None = None,
    validation: Any = None,
) -> CompiledModel:
    """Quantize a float model and lower it to a target's kernels.

    `model` is in eval mode and stays as it is; an ExportedProgram and its `module()` are taken
    too. `recipe` is a Recipe or the name of one.
    `calibration` is a tensor, a DataLoader, or an iterable of tensors, of tuples of tensors
    (labels behind the inputs are ignored) or of dicts by the names of forward's parameters;
    without it the recipe's own source is read. The first batch also gives the example inputs.
    `target` is one of `available_targets()`, or "auto": the fastest here, measured.

    `verbose` prints the diff of every pass that changed something, `diff_passes` of the named
    ones; `dump` is a folder for every finished stage as text, JSON and DOT; `progress` shows bars.

    Where the recipe learns roundings: `device` computes them; `checkpoint` is a file that is
    written after each block, behind whose blocks `resume` goes on, to the same bits. Under
    torchrun every process computes its share of the images and returns the same model.

    `check_inputs`: the compiled model raises InputError for NaN and infinite values.

    `accuracy_target`: `fxquant.Drop(0.5)` raises what costs most until `metric` is at most so
    much below float's on the batches `validation`, by default those of the calibration. `metric`
    is ``(model, batches) -> float`` or ``(outputs, targets) -> Tensor``, see `fxquant.Metric`, by
    default top-1 in percent. Report what came of it on other images: these were chosen by.

    Raises ModelError and TraceError for the model, RecipeError for the recipe, CalibrationError
    for the data, TargetError for the target, InputError for the device and for the name of a pass,
    AccuracyError where the accuracy target is not reached, whose `best` came nearest, and
    CompileError where a pass broke its contract: the message names the folder of a reproducer.
    """
    if isinstance(model, CompiledModel):
        raise ModelError("the model is compiled already: compile the float model")
    request = Request(
        as_module(model),
        Recipe.named(recipe) if isinstance(recipe, str) else recipe,
        target,
        verbose=verbose,
        diff_passes=tuple(diff_passes),
        dump=None if dump is None else Path(dump),
        progress=progress,
        device=device,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        resume=resume,
    )
    if accuracy_target is None:
        if metric is not None or validation is not None:
            raise InputError("metric and validation belong to accuracy_target=fxquant.Drop(...)")
        q = _compile(request, calibration)
    else:
        _check_target(accuracy_target, request)
        batches = _readable_again(calibration_source(request, calibration))
        q = accuracy_target.meet(
            lambda recipe: _compile(replace(request, recipe=recipe), batches),
            request.recipe,
            model=request.model,
            batches=batches if validation is None else validation,
            metric=metric,
            progress=progress,
        )
    q.check_inputs = check_inputs
    if verbose or diff_passes:
        print_diffs((*q.report.passes, *q.report.target_passes), request.diff_passes)
    return q


def _compile(request: Request, calibration: Any) -> CompiledModel:
    with reproducible(request):
        c = begin(request, calibration)
        c = front_end(c)
        c = fuse(c)
        c = even_out(c)
        c = plan_and_simulate(c)
        c = round_weights(c)
        return lower(c)


@checked(target=TargetError)
def load(path: str | Path, target: str = "x86", *, check_inputs: bool = True) -> CompiledModel:
    """Load a file that `CompiledModel.save` wrote, check it, and lower it to `target`.

    `check_inputs`: see `compile`.

    Raises ArtifactError for a file that is missing, damaged, foreign or too new, TargetError for
    a target that is unknown or not available here.
    """
    q = load_compiled(Path(path), target)
    q.check_inputs = check_inputs
    return q


# -- the steps ---------------------------------------------------------------------------


def front_end(c: Compilation) -> Compilation:
    """nn.Module → float graph, which computes what the model computes."""
    model, names = c.request.model, c.data.names
    traced = capture(model, names, c.data.first)
    c = replace(c, leaf_reasons=traced.leaf_reasons, front_end=traced.front_end)
    c = c.noting(traced.notes)
    if traced.compared is not None:
        c, expected = c.from_state(traced.compared.state), traced.compared.expected
    else:
        c = c.from_state(run_traced(traced.graph_module, c.data.first))
        expected = outputs_of(model, names, c.probe)
        check_same_outputs(model, names, c.probe, expected, c.outputs)
    try:
        c = c.run("float", canonical_passes(), check_float_graph)
    except CompileError:
        # A model that counts its calls fails the first pass that is verified.
        check_repeatable(model, names, c.probe, expected)
        raise
    check_same_outputs(model, names, c.probe, expected, c.outputs)
    c.recipe.check_selectors(*selectable(c.stages["float"]))
    if reason := why_not_saved(c.stages["float"]):
        # Before minutes of work: whoever wants a file should not learn it at the end.
        warnings.warn(f"the compiled model cannot be saved: {reason}", stacklevel=4)
        c = c.noting([f"cannot be saved: {reason}"])
    return c.finished("float")


def fuse(c: Compilation) -> Compilation:
    """Float graph → fused graph: batch norms folded, activations in their producers."""
    return c.next_stage().run("fused", fusing_passes(c.recipe), check_float_graph)


def even_out(c: Compilation) -> Compilation:
    """The fused graph with channels of like range, each rewrite measured on the one before."""
    for rewrite in measured_rewrites(c.recipe):
        before = len(c.records)
        c = c.run("fused", rewrite.make(c.stages["fused"], c.data), check_float_graph)
        c = c.noting(
            [n for r in c.records[before:] if r.name == rewrite.kind.name for n in r.notes]
        )
    return c.finished("fused")


def plan_and_simulate(c: Compilation) -> Compilation:
    """Fused graph → simulated graph, calibrated: what runs in integers is quantized in float."""
    fused, recipe = c.stages["fused"], c.recipe
    plan = make_plan(fused, recipe)
    c = replace(c, plan=plan, coverage=coverage(fused, plan, c.probe))
    _check_anything_quantized(c)
    passes, notes = simulation_passes(
        fused,
        plan,
        candidates(c.request.target)[0].weight_refusal(),
        one_sided=recipe.activations.one_sided,
    )
    invariant = partial(check_simulated_graph, plan=plan)
    c = c.next_stage().run("simulated", passes, invariant).noting(notes)
    simulated = c.stages["simulated"]
    link_forms(simulated)
    means = InputMeans(simulated)
    corrects = recipe.bias_correction and not recipe.reconstruction.learned
    images = recipe.reconstruction.scale_images if recipe.reconstruction.learned else 0
    calibrate(
        simulated,
        c.data.head(images) if plan.values or corrects else [],
        inputs=means.inputs if corrects else None,
        batches=c.data.batches if not images else None,
        progress=c.request.progress,
    )
    return replace(c, means=means if corrects else None)


def round_weights(c: Compilation) -> Compilation:
    """The simulated graph with something better than nearest rounding, where it is asked for."""
    settings, progress = c.recipe.reconstruction, c.request.progress
    notes: list[str] = []
    if settings.starts_closed_form:
        notes += gptq(
            c.stages["simulated"],
            c.data,
            damping=settings.damping,
            memory_gib=settings.memory_gib,
            fused=c.stages["fused"],
            move_biases=c.recipe.bias_correction,
            progress=progress,
        )
    if settings.learned:
        notes += reconstruct(
            c.stages["simulated"],
            c.stages["fused"],
            c.data,
            settings,
            float_graph=c.stages["float"],
            checkpoint=c.request.checkpoint,
            resume=c.request.resume,
            device=c.request.device,
            progress=progress,
        )
    c = c.noting(notes)
    if c.means is not None:
        assert c.plan is not None
        invariant = partial(check_simulated_graph, plan=c.plan)
        c = c.changed("simulated").run("simulated", [CorrectBias(c.means)], invariant)
        c = c.noting(c.records[-1].notes)
    return c.finished("simulated")


def lower(c: Compilation) -> CompiledModel:
    """Simulated graph → integer graph → the target's kernels, and the report."""
    assert c.plan is not None
    integer = to_checked_integer(c.stages["simulated"], c.plan, c.probe)
    integer, notes = in_float_dtype(integer, c.recipe, c.probe)
    c = c.noting(notes)
    integer.meta["names"] = c.data.names if isinstance(c.data.names, Names) else None
    c = replace(c, stages={**c.stages, "integer": integer}).finished("integer")
    report = Report(
        model=type(c.request.model).__name__,
        front_end=c.front_end,
        recipe=c.recipe.name,
        target=c.request.target,
        coverage=c.coverage,
        quantizers=quantizer_rows(c.stages["simulated"], proofs(c.records)),
        declines=refusals(c.leaf_reasons, c.records),
        notes=c.notes,
        float_size_bytes=tensor_bytes(c.stages["float"]),
        passes=c.records,
        layers=LayerSource.of_batch(c.data.first),
        provenance=Provenance(
            c.data.seen,
            tuple(tuple(x.shape) for x in c.data.first),
            c.data.preprocessing,
            versions=versions(),
        ),
    )
    q = lower_compiled(
        c.stages,
        c.request.target,
        recipe=c.recipe,
        report=report,
        example=c.probe,
        plan=c.plan,
    )
    replace(c, stages=q.stages).finished(q.target)
    if c.request.target == AUTO:
        ratio, circumstances = compare_with_float(q, c.request.model, c.probe, c.data.names)
        q.report = replace(q.report, time_over_float=ratio, timed_on=circumstances)
    return with_size(q)


# -- their details -----------------------------------------------------------------------


def _check_target(target: Any, request: Request) -> None:
    if not callable(getattr(target, "meet", None)):
        raise InputError(
            f"accuracy_target is a {type(target).__name__}: give fxquant.Drop(0.5), the most that "
            "may be lost"
        )
    if request.checkpoint is not None:
        raise InputError(
            "a checkpoint is of one recipe, and an accuracy target tries several: give one of both"
        )


def _readable_again(calibration: Any) -> Any:
    one_shot = isinstance(calibration, Iterable) and iter(calibration) is calibration
    return list(calibration) if one_shot else calibration


def _check_anything_quantized(c: Compilation) -> None:
    if c.recipe.float_dtype != "float32" or any(row.runs_in != "float" for row in c.coverage):
        return
    reasons = sorted({row.reason for row in c.coverage if row.reason})
    raise CompileError(
        f"nothing would be quantized: {'; '.join(reasons[:3]) or 'the graph has no operations'}"
    )
