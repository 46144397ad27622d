"""What a compile was asked for, checked, and the value that goes through its steps.

More than 300 lines, because the steps of `fxquant.compile` read from this one value alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxquant.backends import candidates
from fxquant.errors import (
    CalibrationError,
    CompileError,
    DataError,
    InputError,
    ModelError,
    RecipeError,
    nearest,
)
from fxquant.even_out import measured_rewrites
from fxquant.frontend.capture import SYMBOLIC
from fxquant.frontend.example import guess_example
from fxquant.frontend.prepare import check_kind
from fxquant.plan.coverage import CoverageRow
from fxquant.plan.plan import Plan
from fxquant.plan.stage_passes import canonical_passes, fusing_passes
from fxquant.recipe import Recipe, learned_methods
from fxquant.report.dump import dump_stage
from fxquant.simulate.calibration_set import CalibrationSet
from fxquant.simulate.correct_bias import CorrectBias, InputMeans
from fxquant.simulate.simulation_passes import SIMULATION_PASSES
from passes import Pass, PassError, PassRecord, Pipeline, UnsupportedGraphError
from passes.infra.pipeline import State
from passes.infra.reproducer import write_reproducer

__all__ = [
    "AccuracyTarget",
    "Compilation",
    "Request",
    "begin",
    "calibration_source",
    "check_device",
    "check_request",
    "reproducible",
]

Invariant = Callable[[fx.GraphModule], None]


@dataclass(frozen=True)
class Request:
    """The arguments of `fxquant.compile`, of which every one is checked before any work.

    Raises TargetError, ModelError, RecipeError or InputError for the argument that is wrong.
    """

    model: nn.Module
    recipe: Recipe
    target: str
    verbose: bool = False
    diff_passes: tuple[str, ...] = ()
    dump: Path | None = None
    progress: bool = False
    device: str = "cpu"
    checkpoint: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_kind(self.model)
        for path, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise ModelError(f"{path} is on the meta device, without values: load the weights")
        if not isinstance(self.recipe, Recipe):
            raise RecipeError(
                f"a recipe is a Recipe or the name of one, found a {type(self.recipe).__name__}: "
                "Recipe.from_dict and Recipe.from_toml make one"
            )
        check_request(
            self.recipe,
            self.target,
            diff_passes=self.diff_passes,
            device=self.device,
            checkpoint=self.checkpoint,
            resume=self.resume,
        )


@dataclass(frozen=True)
class Compilation:
    """What the steps of a compile have made so far.

    `stages` are the graphs by name, the last of which may be unfinished; `state` is where passes
    go on, `records` are those of all that ran, `notes` are for the report. `probe` is one sample
    of the data, on which passes are verified. `means` are the inputs' means of layers whose biases
    are to be corrected once their weights are rounded.
    """

    request: Request
    data: CalibrationSet
    probe: tuple[Any, ...]
    stages: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    state: State | None = None
    records: tuple[PassRecord, ...] = ()
    notes: tuple[str, ...] = ()
    leaf_reasons: Mapping[str, str] = field(default_factory=dict)
    front_end: str = SYMBOLIC
    plan: Plan | None = None
    means: InputMeans | None = None
    coverage: tuple[CoverageRow, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """What the user asked for."""
        return self.request.recipe

    @property
    def outputs(self) -> Any:
        """What the graph that passes have reached yields on the probe."""
        assert self.state is not None
        return self.state.outputs

    def from_state(self, state: State) -> Compilation:
        """Passes go on from `state`, and are verified on its probe."""
        return replace(self, state=state, probe=state.probe)

    def next_stage(self) -> Compilation:
        """Passes go on from a copy: the stage that they have reached stays as it is."""
        assert self.state is not None
        return replace(self, state=self.state.next_stage())

    def changed(self, stage: str) -> Compilation:
        """Passes go on from `stage`, whose modules were changed by what is no pass."""
        return replace(self, state=State.changed(self.stages[stage], self.probe))

    def run(self, stage: str, passes: Sequence[Pass], invariant: Invariant) -> Compilation:
        """Run `passes` on the graph that they have reached, which becomes `stage`.

        Raises ModelError for a graph that is the user's matter, CompileError for one of ours.
        """
        assert self.state is not None
        try:
            state, records = Pipeline(passes, invariant=invariant).go_on(self.state)
        except UnsupportedGraphError as error:
            raise ModelError(f"the model cannot be compiled as it is: {error}") from error
        except PassError as error:
            raise CompileError(f"{stage} graph: {error}") from error
        stages = {**self.stages, stage: state.graph_module}
        return replace(self, state=state, stages=stages, records=(*self.records, *records))

    def noting(self, notes: Sequence[str]) -> Compilation:
        """With more notes for the report."""
        return replace(self, notes=(*self.notes, *notes))

    def finished(self, stage: str) -> Compilation:
        """Dump a stage that nothing changes any more, where the user asked for it."""
        if self.request.dump is not None:
            dump_stage(self.request.dump, stage, self.stages[stage])
        return self


class AccuracyTarget(Protocol):
    """What a compiled model has to reach, and who sees to it: `fxquant.Drop`."""

    def meet(
        self,
        compiled: Callable[[Recipe], Any],
        recipe: Recipe,
        *,
        model: nn.Module,
        batches: Iterable[Any],
        metric: Any = None,
        progress: bool = False,
    ) -> Any:
        """A CompiledModel that `compiled` makes of `recipe`, or of one with more bits."""


def check_request(
    recipe: Recipe,
    target: str,
    *,
    diff_passes: Sequence[str] = (),
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> None:
    """What can be said of the arguments of `fxquant.compile` before there is a model.

    Raises TargetError, RecipeError or InputError for the argument that is wrong.
    """
    candidates(target)
    check_device(device)
    if (resume or checkpoint is not None) and not recipe.reconstruction.learned:
        raise RecipeError(
            f"recipe {recipe.name} learns nothing that checkpoint and resume could hold: "
            f"{', '.join(learned_methods())} at the end of its name do"
        )
    if resume and checkpoint is None:
        raise InputError("resume goes on from a file: name it by checkpoint")
    known = _pass_names(recipe, target)
    for name in diff_passes:
        if name not in known:
            raise InputError(
                f"no pass {name!r} runs for recipe {recipe.name} and target {target}: "
                f"{', '.join(known)}{nearest(name, known)}"
            )


def check_device(device: str) -> None:
    """Raise InputError for what is no device's name, and for one that is not here."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device}: give cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device}: give cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )


def begin(request: Request, calibration: Any) -> Compilation:
    """Open the data; raises CalibrationError and DataError."""
    recipe = request.recipe
    guessed = calibration is None and recipe.dynamic and not recipe.calibration.source
    calibration = calibration_source(request, calibration)
    sweeps = 1 + sum(rewrite.reads_data for rewrite in measured_rewrites(recipe))
    data = CalibrationSet(
        calibration,
        model=request.model,
        images=recipe.calibration.images or None,
        sweeps=sweeps + 5 * (recipe.reconstruction.method != "none"),
    )
    notes: tuple[str, ...] = ()
    if guessed:
        shape = list(data.first[0].shape)
        notes = (f"no example input was given: noise of {shape} stands for it (calibration=x)",)
    return Compilation(request, data, data.first, notes=notes)


def calibration_source(request: Request, calibration: Any) -> Any:
    """`calibration`, or the images that the recipe names; raises CalibrationError, DataError.

    For dynamic quantization, which estimates no ranges, noise will do on which the model runs.
    """
    recipe = request.recipe
    if calibration is not None:
        return calibration
    if not recipe.calibration.source:
        if recipe.dynamic:
            example = guess_example(request.model)
            if example is not None:
                return example
            raise CalibrationError(
                "no example input: the first layer does not tell what the model takes; pass "
                "calibration=x, one batch, on which it is traced and checked"
            )
        raise CalibrationError(
            "no calibration data: pass calibration=batches, or name a folder in the "
            "recipe's calibration.source"
        )
    from fxquant.data import open_batches

    return open_batches(
        recipe.calibration.source,
        images=recipe.calibration.images or None,
        preprocessing=recipe.calibration.preset,
        batch_size=recipe.calibration.batch_size,
    )


@contextmanager
def reproducible(request: Request) -> Iterator[None]:
    """A pass that breaks its contract leaves a reproducer, which the CompileError names.

    It lies in the dump folder, where there is one, or else in a new temporary folder, beside the
    recipe.
    """
    try:
        yield
    except CompileError as error:
        cause = error.__cause__
        if not isinstance(cause, PassError) or cause.failure is None:
            raise
        name = f"reproduce_{cause.failure.step.name}"
        parent = request.dump or Path(tempfile.mkdtemp(prefix="fxquant_"))
        try:
            write_reproducer(parent / name, cause)
            (parent / name / "recipe.toml").write_text(request.recipe.to_toml())
        except OSError as problem:
            raise DataError(
                f"cannot write into {parent}: {problem.strerror or problem}; what went there is "
                f"the reproducer of: {error}"
            ) from error
        raise CompileError(f"{error}; how to run it again is in {parent / name}") from cause


def _pass_names(recipe: Recipe, target: str) -> list[str]:
    """The passes that a compile may run, in their order."""
    kinds: list[type[Pass]] = [type(p) for p in (*canonical_passes(), *fusing_passes(recipe))]
    kinds += [rewrite.kind for rewrite in measured_rewrites(recipe)]
    kinds += [*SIMULATION_PASSES, CorrectBias]
    kinds += [kind for candidate in candidates(target) for kind in candidate.passes]
    return list(dict.fromkeys(kind.name for kind in kinds))
