"""The cached values of both networks, float and quantized so far, of one process's images."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, CompileError
from fxquant.reconstruct.block_in_training import on_device
from fxquant.reconstruct.caches import Caches, Rows
from fxquant.reconstruct.objectives import block_error
from fxquant.reconstruct.parallel import Share
from fxquant.reconstruct.subgraph import Subgraph

__all__ = ["CHUNK", "SAMPLE", "Values"]

CHUNK = 32  # images that are run through a block at a time
SAMPLE = 128  # images, of all processes together, that tell what all images are like


class Values:
    """What is known of every calibration image, by node name.

    Args:
        caches: where the values are kept.
        most: images that are read at most.
        device: where blocks are computed.

    Attributes:
        images: the number of images of all processes together; `held`: of this one.
        floats: values of the float network. sims: of the network quantized so far, before the
            quantizers of those who read them.
        logits: the float network's output, where it is kept.
        sums: of each batch of images that was read, by which others are told apart.
    """

    def __init__(self, caches: Caches, most: int, device: torch.device) -> None:
        self.caches, self.most, self.device = caches, most, device
        self.share = Share.of_this_process()
        self.images = self.held = 0
        self.floats: dict[str, Rows] = {}
        self.sims: dict[str, Rows] = {}
        self.logits: Rows | None = None
        self.sums: list[float] = []

    def read(
        self, data: Iterable[tuple[Any, ...]], names: Sequence[str], wanted: Collection[str]
    ) -> None:
        """Cache this process's share of the inputs `wanted` of those that a batch holds.

        Raises:
            CalibrationError: there are no images.
            CompileError: an input does not hold one image a row.
        """
        room = math.ceil(self.most / self.share.size)
        for batch in data:
            count = min(len(batch[0]), self.most - self.images)
            if count <= 0:
                break
            kept = self.share.holds(self.images, count)
            self.sums += [float(part[:count].double().sum()) for part in batch if _is_rows(part)]
            for name, value in zip(names, batch, strict=False):
                if name not in wanted:
                    continue
                if not _is_rows(value) or len(value) < count:
                    raise CompileError(
                        f"reconstruction: the input {name} does not hold one image a row, so that "
                        "it cannot be cached"
                    )
                if name not in self.floats:
                    like = value.detach()
                    self.floats[name] = self.caches.make(room, len(value), like, name)
                if len(kept):
                    self.floats[name].write(self.held, value.detach()[kept].cpu())
            self.images += count
            self.held += len(kept)
        if not self.images:
            raise CalibrationError("reconstruction: the calibration data holds no images")
        if self.images < self.share.size:
            raise CalibrationError(
                f"reconstruction: {self.share.size} processes share {self.images} images: each "
                "needs at least one"
            )
        for rows in self.floats.values():
            self.caches.trim(rows, self.held)
        # What the network is given is the same in both.
        self.sims.update(self.floats)

    def keep_logits(self, network: Subgraph, name: str) -> None:
        """Cache the float network's output."""
        self.logits = self.compute(network, self.floats, name)

    def compute(self, part: Subgraph, sources: Mapping[str, Rows], name: str) -> Rows:
        """A part's value of every image that this process holds."""
        module = on_device(part.module, self.device)
        made: Rows | None = None
        for chunk in self.chunks():
            with torch.no_grad():
                values = [sources[n].take(chunk).to(self.device) for n in part.inputs]
                result: Tensor = module(*values).cpu()
            if made is None:
                made = self.caches.make(self.held, chunk.stop - chunk.start, result, name)
            made.write(chunk.start, result)
        assert made is not None
        return made

    def error(self, part: Subgraph, output: str, channels: int) -> float:
        """The mean error of a part of the simulated graph on the first images."""
        module = on_device(part.module, self.device)
        count = self.sample()
        total = torch.zeros(1, device=self.device)
        for chunk in self.chunks(count):
            with torch.no_grad():
                y = module(*(self.sims[n].take(chunk).to(self.device) for n in part.inputs))
                target = self.floats[output].take(chunk).to(self.device)
                total += block_error(y, target, channels)
        self.share.sum([total])
        return float(total) / self.share.total(count)

    def sample(self) -> int:
        """How many of this process's images belong to the first `SAMPLE` of all."""
        return len(self.share.holds(0, min(SAMPLE, self.images)))

    def chunks(self, count: int | None = None) -> Iterable[slice]:
        """The images of this process (or the first ones) in parts."""
        end = self.held if count is None else count
        return [slice(first, min(first + CHUNK, end)) for first in range(0, end, CHUNK)]

    def keep(self, names: Collection[str]) -> None:
        """Let go of the values that nobody reads any more."""
        for name in [name for name in self.floats if name not in names]:
            rows, simulated = self.floats.pop(name), self.sims.pop(name, None)
            self.caches.drop(rows)
            if simulated is not None and simulated is not rows:
                self.caches.drop(simulated)


def _is_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
