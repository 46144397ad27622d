"""What does a deployed MobileNetV2 take, beside ONNX Runtime and OpenVINO?

    python -m benchmarks.deployment [--network mobilenet_v2] [--images 100] [--write]

The network with real weights is compiled, exported and built with an empty environment; a fresh
virtual environment that holds numpy alone runs it on real images; its outputs are compared with
those of `reference`, bit for bit. The peers (extra ``[peers]``) quantize the same network on its
calibration images, and run in processes that import their runtime and numpy alone. Shown are
the size of what is deployed, the time from the start of the process to the first result, and
resident memory: medians over processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxquant
from benchmarks import real, results

CHILD = Path(__file__).with_name("deployed.py")
CALIBRATION, BATCH = 250, 25
PEER_IMAGES = 100
MEDIANS = ("first_result_s", "resident", "peak", "anonymous", "mapped")


@dataclass(frozen=True)
class Deployed:
    """What a process is told, and what it needs to be there: packages, and the file of weights."""

    library: str
    model: str
    bytes: dict[str, int]
    weights: Path | None = None

    @property
    def model_bytes(self) -> int:
        """Of the weights; OpenVINO has them beside the graph."""
        if self.weights is None:
            return 0
        paths = {self.weights, self.weights.with_suffix(".bin")}
        return sum(path.stat().st_size for path in paths if path.exists())


def clean() -> dict[str, str]:
    """An environment that says where programs are and nothing else."""
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


def build(folder: Path) -> dict[str, float]:
    """Build and self-test an exported folder; the seconds of each."""
    seconds = {}
    commands = {
        "configure": ["cmake", "-B", "build"],
        "compile": ["cmake", "--build", "build"],
        "selftest": ["./build/selftest"],
    }
    for name, command in commands.items():
        before = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=clean(), check=True, capture_output=True, text=True
        )
        seconds[name] = time.perf_counter() - before
        if name == "selftest":
            print(done.stdout.strip(), flush=True)
    return seconds


def numpy_alone(folder: Path) -> str:
    """The interpreter of a fresh environment with numpy; torch cannot be imported there."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = f"numpy=={metadata.version('numpy')}"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
    for name in ("torch", "fxquant"):
        tried = subprocess.run(
            [python, "-c", f"import {name}"], cwd=folder, env=clean(), capture_output=True
        )
        if tried.returncode == 0:
            raise RuntimeError(f"{python} can import {name}: it is no clean environment")
    return python


def write_onnx(model: nn.Module, batches: Sequence[Tensor], folder: Path) -> Path:
    """Static QDQ quantization, u8 × s8 per channel, by ONNX Runtime."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([image[None] for batch in batches for image in batch])

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"x": image.numpy()}

    paths = [str(folder / f"{stage}.onnx") for stage in ("float", "prepared", "int8")]
    torch.onnx.export(
        model, (batches[0][:1],), paths[0], input_names=["x"], opset_version=17, dynamo=False
    )
    quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)
    quantization.quantize_static(paths[1], paths[2], Reader(), per_channel=True)
    return Path(paths[2])


def write_openvino(model: nn.Module, batches: Sequence[Tensor], folder: Path) -> Path:
    """NNCF's post-training quantization with its defaults."""
    import nncf
    import openvino as ov

    images = [image[None] for batch in batches for image in batch]
    converted = ov.convert_model(model, example_input=images[0], input=[images[0].shape])
    quantized = nncf.quantize(
        converted,
        nncf.Dataset([image.numpy() for image in images]),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    path = folder / "int8.xml"
    ov.save_model(quantized, path)
    return path


def package_bytes(name: str) -> int:
    """What a distribution has installed."""
    files = metadata.distribution(name).files or []
    return sum(
        Path(str(f.locate())).stat().st_size for f in files if Path(str(f.locate())).exists()
    )


WRITERS = {"onnxruntime": write_onnx, "openvino": write_openvino}


def run_child(python: str, kind: str, what: Deployed, folder: Path) -> dict[str, Any]:
    """One process of `deployed.py`; its outputs go to KIND.npy."""
    files = [str(folder / "images.npy"), str(folder / f"{kind}.npy")]
    arguments = [kind, what.library, what.model, *files]
    done = subprocess.run(
        [python, str(CHILD), *arguments, str(time.time())],
        cwd=folder,
        env=clean(),
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything about one network; `folder` is for what is written on the way."""
    network = real.NETWORKS[arguments.network]
    model = network.load()
    calibration = network.calibration_batches(CALIBRATION, BATCH)
    q = fxquant.compile(model, "w8a8", calibration=calibration, target="reference")
    images = torch.cat([x for x, _ in network.validation_batches(arguments.images, BATCH)])
    with torch.no_grad():
        expected = torch.cat([q(image[None]) for image in images])
    numpy.save(folder / "images.npy", images.numpy())
    source = folder / "source"
    q.export_cpp(source)
    source_bytes = sum(path.stat().st_size for path in source.rglob("*"))
    seconds = build(source)
    library = source / "build" / "libmodel.so"
    deployed = {
        "numpy": Deployed("", "", {}),
        "exported": Deployed(
            str(library), str(source), {"package": library.stat().st_size}, source / "weights.bin"
        ),
    }
    batches = [x for x, _ in network.calibration_batches(PEER_IMAGES, BATCH)]
    for name in arguments.peers:
        room = folder / name
        room.mkdir()
        path = WRITERS[name](model, batches, room)
        deployed[name] = Deployed("", str(path), {"package": package_bytes(name)}, path)
    python = numpy_alone(folder / "venv")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in deployed}
    for turn in range(arguments.processes + 1):
        for name, what in deployed.items():
            interpreter = sys.executable if name in arguments.peers else python
            found = run_child(interpreter, name, what, folder)
            if found["loaded"]:
                raise RuntimeError(f"{name} has imported {found['loaded']}")
            if turn:  # The first one finds its files on the disk.
                runs[name].append(found)
    outputs = torch.from_numpy(numpy.load(folder / "exported.npy"))
    return {
        "network": network.name,
        "images": len(images),
        "equal_to_reference": torch.equal(outputs, expected),
        "exported_folder_bytes": source_bytes,
        "torch_bytes": package_bytes("torch"),
        "build_s": seconds,
        "deployed": {
            name: {
                "bytes": {**what.bytes, "model": what.model_bytes},
                **{key: statistics.median(run[key] for run in runs[name]) for key in MEDIANS},
            }
            for name, what in deployed.items()
        },
    }


def table(measured: dict[str, Any]) -> str:
    """Sizes in MB, and times and memory as multiples of the exported network's."""
    rows = []
    base, ours = (measured["deployed"][name] for name in ("numpy", "exported"))
    for name, row in measured["deployed"].items():
        if name == "numpy":
            continue
        sizes = [row["bytes"]["package"], row["mapped"] - base["mapped"], row["bytes"]["model"]]
        ratios = [row["first_result_s"] / ours["first_result_s"]]
        ratios += [
            (row[key] - base[key]) / (ours[key] - base[key]) for key in ("resident", "anonymous")
        ]
        rows.append([name, *(size / 1e6 for size in sizes), *ratios])
    headers = ("", "package MB", "loaded MB", "model MB", "first result", "resident", "anonymous")
    text = tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="github")
    return (
        f"{measured['network']}, {measured['images']} images, outputs "
        f"{'equal those' if measured['equal_to_reference'] else 'DIFFER from those'} of reference\n"
        f"\n{text}\n\nFirst result: time from the start of Python; memory: over what Python takes "
        "with numpy alone; both divided by the exported network's."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", default="mobilenet_v2", choices=list(real.NETWORKS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, Path(folder))
    print(table(measured))
    if arguments.write:
        versions = {name: metadata.version(name) for name in ("numpy", *arguments.peers)}
        print(results.write(f"deployment-{arguments.network}", {**measured, "versions": versions}))


if __name__ == "__main__":
    main()
