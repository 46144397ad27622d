"""What do compiling and calibrating cost?

    python -m benchmarks.calibration [--write]

ResNet-50, random weights: seconds of a compile without its calibration; the time of calibration
over that of the float forward passes on the same batches, interleaved; and the peak memory of a
process that calibrates on 1,000 images over one that calibrates on 50.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision

import fxquant
from benchmarks import results

BATCH = 10


class Images:
    """Drawn batch by batch, so that the data itself takes no memory."""

    def __init__(self, count: int, size: int = 224) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count // BATCH

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(len(self)):
            yield torch.randn(BATCH, 3, self.size, self.size, generator=generator)


def compile_seconds() -> dict[str, float]:
    """Compile on one image, minus nothing: one image is what verification needs anyway."""
    model = torchvision.models.resnet50().eval()
    start = time.perf_counter()
    fxquant.compile(model, "w8a8", calibration=torch.randn(1, 3, 224, 224))
    return {"compile_seconds": time.perf_counter() - start}


def calibration_ratio(rounds: int = 5) -> dict[str, float]:
    from fxquant.simulate.calibrate import calibrate
    from fxquant.simulate.correct_bias import InputMeans
    from fxquant.simulate.quantizers import ActivationQuantizer

    model = torchvision.models.resnet50().eval()
    q = fxquant.compile(model, "w8a8", calibration=torch.randn(1, 3, 224, 224))
    simulated = q.stages["simulated"]
    batches = list(Images(2 * BATCH))
    floats, calibrations = [], []
    for _ in range(rounds):
        for site in q.plan.values:
            fresh = ActivationQuantizer(site.spec, channelwise=site.channelwise)
            if simulated.get_submodule(site.path).one_sided:
                fresh.make_one_sided()
            simulated.set_submodule(site.path, fresh)
        for module in simulated.modules():
            if hasattr(module, "weight_quantizer") and module.weight_quantizer is not None:
                module.weight_quantizer.enabled = False
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        floats.append(time.perf_counter() - start)
        start = time.perf_counter()
        calibrate(simulated, [(batch,) for batch in batches], inputs=InputMeans(simulated).inputs)
        calibrations.append(time.perf_counter() - start)
    ratio = statistics.median(calibrations) / statistics.median(floats)
    return {"calibration_over_float": ratio}


def peak_megabytes(images: int) -> float:
    """The peak memory of a fresh process that compiles ResNet-50 on so many images."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.calibration"]
    command += ["--child", str(images)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.splitlines()[-1]))


def child(images: int) -> None:
    fxquant.compile(torchvision.models.resnet50().eval(), "w8a8", calibration=Images(images))
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line[:6] == "VmHWM:")
    print(json.dumps(int(kilobytes) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    found = compile_seconds() | calibration_ratio()
    print(found, flush=True)
    few, many = peak_megabytes(50), peak_megabytes(1000)
    found |= {"peak_mb_50": few, "peak_mb_1000": many, "peak_ratio": many / few}
    print(found)
    if arguments.write:
        print(results.write("calibration", found))


if __name__ == "__main__":
    main()
