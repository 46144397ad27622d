"""What share of the multiply units' peak does a whole network reach on target native?

    python -m benchmarks.multiply_share [NAME ...] [--isa avx512vnni] [--write]

One thread, batch 1, random weights. The peak is what a loop of nothing but the instruction reaches
(`benchmarks/native_kernels.cpp`), measured before and after the network; the table by layer is that
of ``fxquant bench --profile``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fxquant
from benchmarks import results
from benchmarks.native_kernels import build
from benchmarks.peers import randomized
from fxquant.measure.profile import profile

INSTRUCTIONS = {"avx512vnni": "vpdpbusd", "amx": "tdpbusd"}


def peak(driver: Path, isa: str) -> float:
    """Multiply-accumulates a second of one core, in 10⁹."""
    text = subprocess.run([driver, "peaks"], check=True, capture_output=True).stdout
    rate: float = json.loads(text)["peaks"][INSTRUCTIONS[isa]]
    return rate


def measure(name: str, isa: str, driver: Path, seconds: float) -> dict[str, Any]:
    """Shares of the peak by the median and by the fastest call, and the layers."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    x = torch.randn(1, 3, 224, 224)
    q = fxquant.compile(randomized(name), "w8a8", calibration=x, target="native")
    q(x)
    peaks = [peak(driver, isa)]
    times: list[float] = []
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        start = time.perf_counter()
        q(x)
        times.append(time.perf_counter() - start)
    layers = profile(q, x)
    peaks.append(peak(driver, isa))
    macs = sum(layer.macs for layer in layers.layers)
    return {
        "network": name,
        "isa": layers.isa,
        "multiply_adds": macs,
        "peaks": peaks,
        "share_median": macs / statistics.median(times) / 1e9 / max(peaks),
        "share_fastest": macs / min(times) / 1e9 / max(peaks),
        "calls": len(times),
        "layers": layers.to_json(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["resnet50"], metavar="NAME")
    parser.add_argument("--isa", default="avx512vnni", choices=list(INSTRUCTIONS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of calls of each network")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    os.environ["FXQUANT_ISA"] = arguments.isa
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder))
        for name in arguments.names:
            rows.append(measure(name, arguments.isa, driver, arguments.seconds))
            row = rows[-1]
            print(
                f"{name}: {row['share_median']:.0%} of {max(row['peaks']):g} G MAC/s (median), "
                f"{row['share_fastest']:.0%} (fastest call)"
            )
    if arguments.write:
        print(results.write(f"multiply-share-{arguments.isa}", rows))


if __name__ == "__main__":
    main()
