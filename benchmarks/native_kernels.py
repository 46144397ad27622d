"""How close do the native kernels come to the multiply units' peak on each layer shape?

python -m benchmarks.native_kernels           the table, and its JSON in benchmarks/results
python -m benchmarks.native_kernels --check   every kernel against its plain version, sanitized
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import fxquant
from benchmarks.results import write

KERNELS = Path(fxquant.__file__).parent / "backends/native/kernels"
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{KERNELS}")
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def build(folder: Path, *flags: str) -> Path:
    """The driver's executable. Raises CalledProcessError where the compiler fails."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "c++")
    target = folder / "native_kernels"
    subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", str(target)], check=True)
    return target


def table(measured: dict[str, object]) -> str:
    """One row a layer: its size and what share of the peak each instruction set reaches."""
    peaks: dict[str, float] = measured["peaks"]  # type: ignore[assignment]
    lines = [f"peak: {', '.join(f'{name} {rate:g} G MAC/s' for name, rate in peaks.items())}"]
    for layer in measured["layers"]:  # type: ignore[attr-defined]
        shares = (
            f"{name} {rate / peaks['tdpbusd' if name == 'amx' else 'vpdpbusd']:.0%}"
            for name, rate in layer["rate"].items()
        )
        size = f"{layer['multiply_adds'] / 1e6:7.1f} M"
        lines.append(f"{layer['network']:10} {layer['layer']:14} {size}  {', '.join(shares)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--isa", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.check:
            subprocess.run([build(Path(folder), *SANITIZE), "check"], check=True)
            return
        command = [build(Path(folder)), "measure", options.isa]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    write("native-kernels", measured)
    print(table(measured))


if __name__ == "__main__":
    main()
