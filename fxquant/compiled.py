"""A compiled model: an nn.Module that runs the graph of its target.

More than 300 lines, because what each public method promises is written where it stands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxquant.arguments import checked
from fxquant.artifact.file import load_artifact, save_artifact
from fxquant.artifact.size import file_bytes
from fxquant.backends import AUTO, lower_fastest
from fxquant.errors import CompileError, InputError, TargetError, nearest
from fxquant.export import export_cpp
from fxquant.export.onnx import OnnxOptions, export_onnx
from fxquant.frontend.run_inputs import check_finite, is_float, mismatch, shapes
from fxquant.frontend.structure import Names
from fxquant.plan.plan import Plan
from fxquant.recipe import Recipe
from fxquant.reconstruct.convolutions import has_fast_bfloat16
from fxquant.report.report import Report
from fxquant.report.sizes import written
from fxquant.report.summary import quantizer_rows, refusals
from fxquant.to_integer import narrow_floats, to_checked_integer
from passes import PassError

if TYPE_CHECKING:
    from fxquant.export.onnx.report import OnnxReport

__all__ = [
    "CompiledModel",
    "in_float_dtype",
    "load_compiled",
    "lower_compiled",
    "with_simulated",
    "with_size",
]


class CompiledModel(nn.Module):
    """Runs like the model that it was compiled from: the same inputs, the same output structure.

    `stages` holds the GraphModules of the compile by name ("float", "fused", "simulated",
    "integer", and the target's); a loaded artefact has the last two, and no `plan`. `report` tells
    what was done, `recipe` and `plan` with what; `run` executes the target's graph. Calls raise
    InputError for inputs that do not fit, and for NaN and infinite values in them: where
    `check_inputs` is False, a NaN counts as 0 and an infinite value as the largest finite one.
    """

    check_inputs: bool = True

    def __init__(
        self,
        stages: Mapping[str, fx.GraphModule],
        *,
        target: str,
        recipe: Recipe,
        report: Report,
        example: tuple[Any, ...],
        run: Callable[..., Any],
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        # Stages share tensors with the caller's model: as children they would move and be saved
        # with this module although only one of them runs.
        self.__dict__["stages"] = _Stages(stages)
        self.target = target
        self.recipe = recipe
        self.report = report
        self.example = example
        self.plan = plan
        self.__dict__["_run"] = run
        self._names: Names | None = self.stages["integer"].meta.get("names")
        self._signature = tuple(
            (value.dtype, value.dim()) if isinstance(value, Tensor) else None for value in example
        )
        self.eval()

    stages: dict[str, fx.GraphModule]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the target's graph; the batch size is free, inputs may go by name."""
        if self._names is not None:
            inputs = self._taken_apart(self._names, inputs, named)
        elif named:
            inputs = self._by_position(inputs, named)
        signature = tuple([(x.dtype, x.dim()) if isinstance(x, Tensor) else None for x in inputs])
        if signature != self._signature:
            raise InputError(mismatch(inputs, self.example))
        if self.check_inputs:
            check_finite(inputs)
        else:
            # What a kernel makes of a NaN differs: torch's take it for the largest code.
            inputs = tuple(torch.nan_to_num(x) if is_float(x) else x for x in inputs)
        try:
            with torch.no_grad():
                return self.__dict__["_run"](*inputs)
        except RuntimeError as error:
            if shapes(inputs) != shapes(self.example):
                raise InputError(
                    f"{mismatch(inputs, self.example)} ({_first_line(error)})"
                ) from error
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A copy that shares the graphs: nothing writes into them, and packed weights stay put."""
        copied = CompiledModel(
            self.stages,
            target=self.target,
            recipe=self.recipe,
            report=self.report,
            example=self.example,
            run=self.__dict__["_run"],
            plan=self.plan,
        )
        copied.check_inputs = self.check_inputs
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """What `save` writes; a pickle is read as `load` reads, without the float stages."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m.fxq"
            self.save(path)
            return _from_bytes, (path.read_bytes(), self.target, self.check_inputs)

    @checked(target=TargetError)
    def to_target(self, target: str) -> CompiledModel:
        """The same integer graph lowered to another target.

        Raises TargetError for one that is unknown or not available here.
        """
        if target == self.target:
            return self
        stages = {key: stage for key, stage in self.stages.items() if key != self.target}
        lowered = lower_compiled(
            stages,
            target,
            recipe=self.recipe,
            report=self.report,
            example=self.example,
            plan=self.plan,
        )
        lowered.check_inputs = self.check_inputs
        return lowered

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file: integer graph and weights, recipe, golden pair.

        The file is written beside `path` and then renamed: an interrupted save leaves nothing
        half-written. Raises ArtifactError where the graph holds modules that have no functional
        form.
        """
        save_artifact(
            Path(path),
            integer=self.stages["integer"],
            recipe=self.recipe,
            report=self.report,
            example=self.example,
        )
        self.report = replace(self.report, size_bytes=Path(path).stat().st_size)

    @checked()
    def export_cpp(
        self, folder: str | Path, *, name: str = "model", overwrite: bool = False
    ) -> None:
        """Write a folder of C++ that stands alone: it builds and runs where there is no torch.

        It holds the network on the kernels of the target native for inputs of the example's
        shape (with any batch, where samples are independent), its weights, a C interface, a self
        test with the outputs of `reference` for seeded noise, and a Python module that needs
        numpy alone. `name` is that of the library and the prefix of its functions.

        The folder is written under another name and then renamed. Raises InputError where it has
        something in it, unless that is an exported network and `overwrite` says so, and
        TargetError where native has no kernel for an operation or is not available here.
        """
        export_cpp(
            Path(folder),
            integer=self.stages["integer"],
            lowered=self.to_target("native").stages["native"],
            example=self.example,
            name=name,
            overwrite=overwrite,
        )

    def export_onnx(
        self,
        path: str | Path,
        *,
        form: str = "qdq",
        exact: bool = False,
        for_: str = "onnxruntime",
        weights: str = "int8",
    ) -> OnnxReport:
        """Write an ONNX file of opset 21 from the integer graph, checked in ONNX Runtime.

        `form`: float operators between DequantizeLinear and QuantizeLinear ("qdq"), or operators
        on codes ("qoperator"). With `exact` ONNX Runtime computes the integers of `reference`, in
        the whole network; else each operator is at most one step from them. `for_` is
        "onnxruntime" or "openvino". `weights` are stored as "int8", or as "uint8" with a zero point
        of 128: the same values, for kernels that multiply u8 by u8. The batch size is free where
        the network leaves it free.

        The file appears when every check has passed; the result says what was compared, and
        prints as a table. Raises InputError for options that do not go together, TargetError
        where the extra ``[onnx]`` is missing, where an operation has no form in ONNX, and where a
        check fails.
        """
        return export_onnx(
            Path(path),
            integer=self.stages["integer"],
            example=self.example,
            options=OnnxOptions(form, exact, for_, weights),
            metadata={"fxquant.model": self.report.model, "fxquant.recipe": self.recipe.to_toml()},
        )

    def extra_repr(self) -> str:
        """What ``print`` shows: the model, recipe, target, share on integers and size."""
        report = self.report
        return (
            f"{report.model}, recipe {report.recipe}, target {self.target}, "
            f"int8 {report.int8_share:.2%}, {written(report.size_bytes)}"
        )

    @property
    def names(self) -> Names | None:
        """What the inputs are made of where one of them is no tensor, else None."""
        return self._names

    @property
    def input_names(self) -> list[str]:
        """The parameters of the model's forward that are its inputs."""
        graph = self.stages["integer"].graph
        return [str(node.target) for node in graph.nodes if node.op == "placeholder"]

    def _taken_apart(
        self, names: Names, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The tensors of what forward's parameters are given, which may be these tensors."""
        are_tensors = all(isinstance(value, Tensor) for value in inputs)
        if not named and len(inputs) == len(names) and are_tensors:
            return inputs
        known = list(names.structures)
        given = dict(zip(known, inputs, strict=False)) | named
        if len(inputs) + len(named) != len(known) or set(given) != set(known):
            raise InputError(
                f"the model takes {', '.join(known)}, found {len(inputs)} inputs by position"
                f"{' and ' * bool(named)}{', '.join(named)}{' by name' * bool(named)}"
            )
        return tuple(names.flat(given))

    def _by_position(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        names = self.input_names
        rest = names[len(inputs) :]
        if sorted(rest) != sorted(named):
            raise InputError(
                f"the model takes {', '.join(names)}, found {len(inputs)} inputs by position and "
                f"{', '.join(named)} by name"
            )
        return (*inputs, *(named[name] for name in rest))


class _Stages(dict[str, fx.GraphModule]):
    """The graphs by name; asking for one that is not there says which are."""

    def __missing__(self, name: str) -> fx.GraphModule:
        raise InputError(
            f"there is no stage {name!r}, there are {', '.join(self)}{nearest(name, self)}; a "
            "loaded file holds the integer graph alone"
        )


def lower_compiled(
    stages: Mapping[str, fx.GraphModule],
    target: str,
    *,
    recipe: Recipe,
    report: Report,
    example: tuple[Any, ...],
    plan: Plan | None = None,
) -> CompiledModel:
    """The integer graph of `stages`, annotated, lowered to `target` and compared with it.

    "auto" stands for the fastest. The target's graph becomes the last stage, and what the target
    has to say part of the report.
    Raises TargetError for a target that is unknown or not available here.
    """
    try:
        chosen, lowered, why = lower_fastest(stages["integer"], target, example)
    except PassError as error:
        raise CompileError(f"{target} graph: {error}") from error
    target = chosen.name
    stages = {**stages, target: lowered.graph_module}
    report = replace(
        report,
        target=target,
        layers=report.layers and report.layers.on(stages, target, exact=chosen.tolerance == 0),
        target_passes=lowered.records,
        target_declines=refusals({}, lowered.records),
        target_notes=(*why, *lowered.notes),
        # The reference has none: it is its own measure.
        target_check=lowered.check.summary() if lowered.check else {},
    )
    return CompiledModel(
        stages,
        target=target,
        recipe=recipe,
        report=report,
        example=example,
        run=lowered.run,
        plan=plan,
    )


def load_compiled(path: Path, target: str) -> CompiledModel:
    """The file at `path`, lowered to `target`. Raises ArtifactError and TargetError."""
    # The others keep nothing on the disk.
    artifact = load_artifact(path, remember=target in ("native", AUTO))
    return lower_compiled(
        {"integer": artifact.integer},
        target,
        recipe=artifact.recipe,
        report=artifact.report,
        example=artifact.example,
    )


def _from_bytes(data: bytes, target: str, check_inputs: bool) -> CompiledModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxq"
        path.write_bytes(data)
        q = load_compiled(path, target)
    q.check_inputs = check_inputs
    return q


def in_float_dtype(
    integer: fx.GraphModule, recipe: Recipe, probe: Sequence[Any]
) -> tuple[fx.GraphModule, list[str]]:
    """An integer graph whose float products are in the recipe's type, and notes for the report."""
    if recipe.float_dtype == "float32":
        return integer, []
    if not has_fast_bfloat16(torch.device("cpu")):
        return integer, ["this CPU multiplies no bfloat16: what stays float is float32"]
    narrowed, products = narrow_floats(integer, torch.bfloat16, probe)
    return narrowed, [f"{products} products that stay float compute in bfloat16"]


def with_simulated(
    q: CompiledModel, simulated: fx.GraphModule, notes: Sequence[str] = ()
) -> CompiledModel:
    """`q` lowered again from another simulated graph of the same nodes; `notes` for its report."""
    assert q.plan is not None
    integer = to_checked_integer(simulated, q.plan, q.example)
    integer, _ = in_float_dtype(integer, q.recipe, q.example)
    integer.meta["names"] = q.stages["integer"].meta.get("names")
    report = replace(
        q.report,
        quantizers=quantizer_rows(simulated, {row.path: row.proof for row in q.report.quantizers}),
        notes=(*q.report.notes, *notes),
    )
    stages = {key: q.stages[key] for key in ("float", "fused")}
    stages |= {"simulated": simulated, "integer": integer}
    return with_size(
        lower_compiled(
            stages, q.target, recipe=q.recipe, report=report, example=q.example, plan=q.plan
        )
    )


def with_size(q: CompiledModel) -> CompiledModel:
    """`q`, whose report now says how long its file will be."""
    size = file_bytes(q.stages["integer"], q.recipe, q.report, q.example)
    q.report = replace(q.report, size_bytes=size)
    return q


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
