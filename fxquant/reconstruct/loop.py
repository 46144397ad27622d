"""Reconstruction: block by block, each made to yield what the float network does.

More than 300 lines, because one object goes through all steps of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxquant.errors import CompileError, ModelError
from fxquant.recipe import ReconstructionRecipe, Selector
from fxquant.reconstruct.block_in_training import BlockInTraining
from fxquant.reconstruct.caches import Caches, Rows, room_for_values
from fxquant.reconstruct.checkpoint import Checkpoint, digest
from fxquant.reconstruct.memory import give_back_memory, reused_memory
from fxquant.reconstruct.method import Goal, Method, find_method, granularity
from fxquant.reconstruct.objectives import channel_dim, is_token_block
from fxquant.reconstruct.subgraph import (
    BlockStep,
    Subgraph,
    cut,
    has_depthwise,
    macs_of,
    network_output,
    order_steps,
    work_bytes,
)
from fxquant.reconstruct.targets import fisher_weights
from fxquant.reconstruct.train import BlockData, train_block
from fxquant.reconstruct.values import Values
from fxquant.simulate.quantizers import ActivationQuantizer, RoundedWeightQuantizer, WeightQuantizer
from fxquant.simulate.quantizers.learned_step import can_learn, set_scale
from passes import FusedLayer, tensor_info
from passes.blocks.partition import Block, partition_blocks
from passes.infra.errors import UnsupportedGraphError

__all__ = ["find_blocks", "reconstruct"]


def find_blocks(fused: fx.GraphModule, settings: ReconstructionRecipe) -> tuple[Block, ...]:
    """The blocks that `settings` reconstruct one by one, see `passes.partition_blocks`.

    Raises:
        ModelError: a selector of ``settings.blocks`` picks no block.
    """
    named = [Selector.parse(text).matches for text in settings.blocks]
    try:
        return partition_blocks(fused, granularity(settings), named)
    except UnsupportedGraphError as error:
        raise ModelError(f"reconstruction: {error}") from error


def reconstruct(
    simulated: fx.GraphModule,
    fused: fx.GraphModule,
    data: Iterable[tuple[Any, ...]],
    settings: ReconstructionRecipe,
    *,
    float_graph: fx.GraphModule | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[str]:
    """Learn the roundings, and where asked the step sizes, of a calibrated simulated graph.

    Block by block, in execution order: the block's inputs are those of the network quantized so
    far, its target is what the same block yields in the float network. Both are cached; no block
    is computed from the images again. Afterwards every quantized weight of a block passes through
    a `RoundedWeightQuantizer`, and activation quantizers have the learned steps. An activation
    quantizer belongs to the first block that reads its values.

    Args:
        simulated: the calibrated graph; its quantizers change, its tensors stay.
        fused: the float graph with the same node names.
        data: batches of positional arguments; the first `settings.images` images count.
        settings: the method and its numbers.
        float_graph: with its batch norms, for methods that look at their statistics.
        checkpoint: a file that is written after each block, and read where `resume` is true.
        resume: go on behind the blocks that `checkpoint` holds: the same bits as without a break.
        device: where blocks are computed.
        progress: show a bar for each block.

    Returns:
        Notes for the report, one for each block.

    Raises:
        CompileError: a loss is not finite, or a block cannot be cached; names it. What was
            reconstructed before stays in `simulated` and in the checkpoint.
        CalibrationError: there are no images. ModelError: a named block is none.
        ArtifactError: the checkpoint belongs to something else.
    """
    if not settings.learned:
        return []
    parts = find_blocks(fused, settings)
    learns = find_method(settings.method)
    method = learns(settings, macs_of(fused), depthwise=has_depthwise(fused))
    run = _Run(simulated, fused, parts, method)
    room = room_for_values(settings.memory_gib, run.work())
    with reused_memory(), Caches(room) as caches:
        values = Values(caches, method.settings.images, torch.device(device))
        run.read(values, data, float_graph, progress=progress)
        mark = digest(simulated, settings, [part.name for part in parts], values.sums)
        if resume and checkpoint is not None and checkpoint.exists():
            done = Checkpoint.resume(checkpoint, mark)
        else:
            done = Checkpoint(mark, checkpoint)
        run.go(done)
    return run.notes


class _Run:
    def __init__(
        self,
        simulated: fx.GraphModule,
        fused: fx.GraphModule,
        blocks: Sequence[Block],
        method: Method,
    ) -> None:
        self.simulated, self.fused, self.method = simulated, fused, method
        self.settings = method.settings
        self.done = Checkpoint("")
        self.notes: list[str] = []
        trained = [block for block in blocks if self._is_trained(block)]
        self.output = network_output(fused)
        tokens = self.output is not None and self._has_tokens(blocks, trained)
        self.sees_prediction = method.sees_prediction or self.settings.fisher or tokens
        if self.sees_prediction and self.output is None:
            raise CompileError(
                "reconstruction: the network returns more than one tensor, so that its prediction "
                "cannot be compared: choose brecq or qdrop without fisher"
            )
        self.rules = {block.name: block.rule for block in trained}
        names = set(self.rules)
        self.steps = order_steps(fused, blocks, names, end=self.sees_prediction)
        self.boundary = {step.output for step in self.steps} | {
            name for step in self.steps for name in step.inputs
        }
        self.seen: set[str] = set()

    def _is_trained(self, block: Block) -> bool:
        return any(self._layer(path) is not None for path in block.layers)

    def _layer(self, path: str) -> FusedLayer | None:
        """The layer of the simulated graph, if its weight is quantized to fixed codes."""
        layer = self.simulated.get_submodule(path)
        if not isinstance(layer, FusedLayer):
            return None
        return layer if isinstance(layer.weight_quantizer, WeightQuantizer) else None

    def _has_tokens(self, blocks: Sequence[Block], trained: Sequence[Block]) -> bool:
        nodes = {node.name: node for node in self.fused.graph.nodes}
        boundary = {block.output for block in blocks} | {n for b in blocks for n in b.inputs}
        for block in trained:
            info = tensor_info(nodes[block.output])
            if info is not None and len(info.shape) > 2:
                part = cut(self.fused, block.output, boundary)
                if is_token_block(part.module, len(info.shape)):
                    return True
        return False

    def work(self) -> float:
        """Bytes that computing takes beside the cached values, as the largest block needs them."""
        sizes = [
            work_bytes(cut(self.fused, step.output, self.boundary).module)
            for step in self.steps
            if step.block is not None
        ]
        whole = work_bytes(self.fused) if self.sees_prediction else 0.0
        return self.settings.batch_size * (max(sizes, default=0.0) + whole)

    def read(
        self,
        values: Values,
        data: Iterable[tuple[Any, ...]],
        float_graph: fx.GraphModule | None,
        *,
        progress: bool,
    ) -> None:
        """Cache the images and what the float network makes of them."""
        self.values = values
        self.progress = progress and values.share.rank == 0
        names = [node.name for node in self.fused.graph.nodes if node.op == "placeholder"]
        wanted = {name for step in self.steps for name in step.inputs}
        self.values.read(data, names, wanted)
        if self.sees_prediction:
            assert self.output is not None
            self.values.keep_logits(cut(self.fused, self.output, ()), self.output)
        self.notes += self.method.prepare(float_graph)

    def go(self, done: Checkpoint) -> None:
        """Work through all steps, behind those that are done."""
        self.done = done
        for index, step in enumerate(self.steps):
            if step.block is None and step.output == self.output:
                break  # nothing reads the network's output
            later = self.steps[index + 1 :]
            self._advance(step, {name for other in later for name in other.inputs})

    def _advance(self, step: BlockStep, read_later: set[str]) -> None:
        values = self.values
        target = cut(self.fused, step.output, self.boundary)
        values.floats[step.output] = values.compute(target, values.floats, step.output)
        if step.block is not None:
            if step.block in self.done.notes:
                self._restore(step.block)
            else:
                self._reconstruct(step, step.block, target)
            self.notes.append(self.done.notes[step.block])
        part = cut(self.simulated, step.output, self.boundary)
        self.seen.update(_quantizers(part))
        if step.output in read_later:
            values.sims[step.output] = values.compute(part, values.sims, step.output)
        values.keep(read_later)
        give_back_memory()

    def _reconstruct(self, step: BlockStep, name: str, target: Subgraph) -> None:
        values, settings = self.values, self.settings
        part = cut(self.simulated, step.output, self.boundary)
        own = [path for path in _quantizers(part) if path not in self.seen]
        block = BlockInTraining(
            part,
            own if settings.steps != "none" else [],
            settings.drop,
            values.device,
            bfloat16=settings.precision == "auto",
        )
        example = values.floats[step.output].take(slice(0, 1))
        channels = channel_dim(target.module, example.dim())
        tokens = is_token_block(target.module, example.dim())
        before = values.error(part, step.output, channels)
        rest = self._rest(step)
        weights = None
        if rest is not None and (tokens or settings.fisher):
            weights = fisher_weights(values, part, rest, step.output, average=tokens)
        floats, wanted, temporary = self.method.targets(values, target, step.output)
        if isinstance(weights, Rows):
            temporary.append(weights)
        goal = Goal(values, floats, step.output, wanted, channels, weights, rest)
        objective, prediction = self.method.objective(goal), self.method.prediction_objective(goal)
        try:
            result = train_block(
                name,
                block,
                BlockData(values.images, values.sims, floats, objective, prediction),
                self.method,
                values.share,
                device=values.device,
                seed=_seed(settings.seed, name),
                progress=self.progress,
            )
        finally:
            for rows in temporary:
                values.caches.drop(rows)
        codes = {path: rounding.harden().codes for path, rounding in block.roundings.items()}
        scales = {path: learned.learned_qparams().scale for path, learned in block.steps.items()}
        self._apply(codes, scales)
        part = cut(self.simulated, step.output, self.boundary)
        after = values.error(part, step.output, channels)
        note = (
            f"reconstruction of {name} ({self.rules[name]}): {result.iterations} iterations, "
            f"error {before:.3g} to {after:.3g}, {result.settled:.1%} of the roundings settled"
        )
        self.done.add(name, codes, scales, note, write=values.share.rank == 0)

    def _rest(self, step: BlockStep) -> Subgraph | None:
        """What follows a block in the float network, where its prediction is asked for."""
        if not self.sees_prediction or self.output is None or step.output == self.output:
            return None
        return cut(self.fused, self.output, set(self.values.floats))

    def _apply(self, codes: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
        for path, found in codes.items():
            layer = self._layer(path)
            assert layer is not None
            quantizer = cast(WeightQuantizer, layer.weight_quantizer)
            layer.weight_quantizer = RoundedWeightQuantizer(quantizer.qparams, found)
        for path, scale in scales.items():
            # The module stays: operations with an integer form hold on to it.
            set_scale(cast(ActivationQuantizer, self.simulated.get_submodule(path)), scale)

    def _restore(self, block: str) -> None:
        members = self.done.members[block]
        self._apply(
            {path: self.done.codes[path] for path in members if path in self.done.codes},
            {path: self.done.scales[path] for path in members if path in self.done.scales},
        )


def _quantizers(part: Subgraph) -> list[str]:
    """Paths of the activation quantizers of a part that can be learned."""
    paths = [str(node.target) for node in part.module.graph.nodes if node.op == "call_module"]
    return [path for path in dict.fromkeys(paths) if can_learn(part.module.get_submodule(path))]


def _seed(seed: int, block: str) -> int:
    """Of a block, so that what ran before it does not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{block}".encode()).digest()[:7], "big")
