"""An ONNX file as a module that runs in ONNX Runtime, to measure it beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import InputError
from fxquant.export.onnx.runtimes import onnxruntime_session

__all__ = ["OnnxNetwork"]


class OnnxNetwork(nn.Module):
    """Runs the network of a file on the CPU, with as many threads as torch uses when it is made.

    Tensors in, tensors out: one output is a tensor, several are a tuple. Raises InputError for a
    file that ONNX Runtime cannot load, and for inputs that it does not take.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            session: Any = onnxruntime_session(Path(path), threads=torch.get_num_threads())
        # ONNX Runtime has a class of its own for every cause.
        except Exception as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        self.path = Path(path)
        self.__dict__["_session"] = session
        self._names = [value.name for value in session.get_inputs()]
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        """The outputs for tensors in the order of the file's inputs."""
        if len(inputs) != len(self._names):
            raise InputError(
                f"{self.path} takes {', '.join(self._names)}, found {len(inputs)} inputs"
            )
        feeds = {name: x.detach().numpy() for name, x in zip(self._names, inputs, strict=True)}
        try:
            found = self.__dict__["_session"].run(None, feeds)
        except Exception as error:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise InputError(f"{self.path} does not take {shapes}: {error}") from error
        outputs = tuple(torch.from_numpy(value) for value in found)
        return outputs[0] if len(outputs) == 1 else outputs
