"""The command that writes files for other programs: export."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxquant.cli import options
from fxquant.cli.outcome import Outcome
from fxquant.export.onnx.options import CONSUMERS, FORMS, WEIGHTS


def add_export(parser: argparse.ArgumentParser) -> None:
    """The options of ``fxquant export``."""
    parser.add_argument("file", metavar="FILE", help="a file that `fxquant compile --save` wrote")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--cpp", metavar="FOLDER", help="write C++ that builds and runs by itself")
    kind.add_argument("--onnx", metavar="FILE", help="write an ONNX file, e.g. m.onnx")
    group = parser.add_argument_group("C++")
    group.add_argument(
        "--name",
        default="model",
        metavar="NAME",
        help="of the library, and the prefix of its functions; default model",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier export has written"
    )
    group = parser.add_argument_group("ONNX")
    group.add_argument(
        "--form",
        choices=FORMS,
        default="qdq",
        help="operators between Q and DQ (default), or operators on codes",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="the integers of the reference in ONNX Runtime, in the whole network",
    )
    group.add_argument(
        "--for",
        dest="for_",
        choices=CONSUMERS,
        default="onnxruntime",
        help="who reads the file; default onnxruntime",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="int8",
        help="the type that they are stored in; uint8 for kernels that multiply u8 by u8",
    )
    options.add_common(parser)


def run_export(arguments: argparse.Namespace) -> Outcome:
    """Load a file, which checks it, and write the ONNX file or the folder of C++."""
    if arguments.onnx is not None:
        options.check_destination("--onnx", arguments.onnx)
        report = options.open_artifact(arguments.file, "reference").export_onnx(
            arguments.onnx,
            form=arguments.form,
            exact=arguments.exact,
            for_=arguments.for_,
            weights=arguments.weights,
        )
        return Outcome(str(report), report.to_json())
    compiled = options.open_artifact(arguments.file, "native")
    folder = Path(arguments.cpp)
    compiled.export_cpp(folder, name=arguments.name, overwrite=arguments.overwrite)
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    text = (
        f"wrote {folder}, {size / 1e6:.2f} MB; there:\n"
        "cmake -B build && cmake --build build && ./build/selftest"
    )
    return Outcome(text, {"folder": str(folder), "bytes": size, "name": arguments.name})
