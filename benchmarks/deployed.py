"""One deployed network in a process of its own: first result, memory, outputs.

    python deployed.py KIND LIBRARY MODEL IMAGES OUTPUTS

`benchmarks.deployment` starts it, with nothing imported that KIND does not need.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[Any], Any]
THREADS = 2


def status() -> dict[str, int]:
    """Bytes of this process: resident now, most so far, and what no file backs."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
    return {name: int(rows[row].split()[0]) * 1024 for name, row in names.items()}


def mapped() -> int:
    """Bytes of the shared libraries that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if ".so" in line}
    return sum(Path(path).stat().st_size for path in paths)


def exported(library: str, model: str) -> Run:
    sys.path.insert(0, str(Path(model)))
    from model import Model  # type: ignore[import-not-found]

    run: Run = Model(Path(library), threads=THREADS)
    return run


def onnxruntime(library: str, model: str) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def openvino(library: str, model: str) -> Run:
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": THREADS,
        "NUM_STREAMS": 1,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x})[0].copy()


KINDS: dict[str, Callable[[str, str], Run]] = {
    "numpy": lambda library, model: lambda x: x[:, :1, 0],
    "exported": exported,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def main() -> None:
    if "--help" in sys.argv:
        print(f"usage: {(__doc__ or '').split('    python ')[1]}")
        raise SystemExit(0)
    kind, library, model, images, outputs, began = sys.argv[1:]
    import numpy

    run = KINDS[kind](library, model)
    x = numpy.load(images)
    first = run(x[:1])
    seconds = time.time() - float(began)
    for _ in range(20):
        run(x[:1])
    memory = status()
    numpy.save(outputs, numpy.concatenate([first, *(run(x[i : i + 1]) for i in range(1, len(x)))]))
    loaded = sorted(name for name in ("torch", "fxquant", "passes") if name in sys.modules)
    print(json.dumps({"first_result_s": seconds, **memory, "mapped": mapped(), "loaded": loaded}))


if __name__ == "__main__":
    main()
