"""What is done of a reconstruction, kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from fxquant.errors import ArtifactError
from fxquant.recipe import ReconstructionRecipe
from fxquant.simulate.quantizers import AffineQuantizer, RoundedWeightQuantizer
from passes import FusedLayer

__all__ = ["Checkpoint", "digest"]

_FORMAT = "fxquant-reconstruction-1"


@dataclass
class Checkpoint:
    """The finished blocks: codes by layer path, scales by quantizer path, notes by block name."""

    digest: str
    path: Path | None = None
    codes: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)

    def add(
        self,
        block: str,
        codes: dict[str, Tensor],
        scales: dict[str, Tensor],
        note: str,
        *,
        write: bool = True,
    ) -> None:
        """Record a finished block and write the file, if there is one and this process may."""
        self.codes.update(codes)
        self.scales.update(scales)
        self.notes[block] = note
        self.members[block] = [*codes, *scales]
        if write and self.path is not None:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        tensors = {f"codes:{name}": value.contiguous() for name, value in self.codes.items()}
        tensors |= {f"scale:{name}": value.contiguous() for name, value in self.scales.items()}
        about = {
            "format": _FORMAT,
            "digest": self.digest,
            "notes": json.dumps(self.notes),
            "members": json.dumps(self.members),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # A reader never sees half a file: what is interrupted leaves the old one.
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, unfinished, metadata=about)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def resume(cls, path: Path, expected: str) -> Checkpoint:
        """Read what was written for the same graph and settings.

        Raises:
            ArtifactError: the file is damaged, or belongs to something else.
        """
        made = cls(expected, path)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != _FORMAT:
                raise ArtifactError(f"{path} is no checkpoint of a reconstruction")
            made.notes, made.members = json.loads(about["notes"]), json.loads(about["members"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as a checkpoint ({error})") from error
        if about["digest"] != expected:
            raise ArtifactError(
                f"{path} was written for another model, recipe or calibration: remove it, or "
                "repeat what was interrupted exactly"
            )
        for name, tensor in tensors.items():
            kind, _, target = name.partition(":")
            (made.codes if kind == "codes" else made.scales)[target] = tensor
        return made


def digest(
    simulated: fx.GraphModule,
    settings: ReconstructionRecipe,
    blocks: Sequence[str],
    images: Sequence[float],
) -> str:
    """Of what decides the result: settings, blocks, graph, weights, grids, sums of the images.

    What only says where and how it is computed (the memory) is left out.
    """
    found = hashlib.sha256()

    def add(*values: object) -> None:
        for value in values:
            found.update(repr(value).encode() + b"\0")

    add(_FORMAT, list(blocks), list(images))
    add(*(item for item in sorted(vars(settings).items()) if item[0] != "memory_gib"))
    for node in simulated.graph.nodes:
        add(node.op, node.name, getattr(node.target, "__name__", node.target))
        add([source.name for source in node.all_input_nodes])
    for name, module in sorted(simulated.named_modules()):
        if isinstance(module, FusedLayer):
            for tensor in module.layer.parameters():
                found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        if isinstance(module, AffineQuantizer) and module.has_qparams:
            grid = module.qparams
            add(name, grid.qmin, grid.qmax, grid.scale.tolist(), grid.zero_point.tolist())
        if isinstance(module, RoundedWeightQuantizer):
            found.update(module.codes.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
