"""The parser, and the way from an exception to an exit code.

0: done. 1: done, and a check that was asked for failed. 2: wrong use or wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence

import torch

import fxquant
from fxquant.cli import benching, choosing, compiling, exporting, measuring
from fxquant.cli.outcome import Outcome
from fxquant.errors import FxquantError
from fxquant.measure.tables import finite

Command = tuple[
    str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Outcome]
]

COMMANDS: dict[str, Command] = {
    "compile": (
        "compile a float model; report, evaluate and save it",
        compiling.add_compile,
        compiling.run_compile,
    ),
    "bench": ("time models in turns", benching.add_bench, benching.run_bench),
    "evaluate": (
        "accuracy of a float model or of a saved file",
        measuring.add_evaluate,
        measuring.run_evaluate,
    ),
    "inspect": ("what is in a saved file", compiling.add_inspect, compiling.run_inspect),
    "export": (
        "a saved file as ONNX, or as C++ that stands alone",
        exporting.add_export,
        exporting.run_export,
    ),
    "compare": (
        "error of each layer against float",
        compiling.add_compare,
        compiling.run_compare,
    ),
    "sweep": (
        "the tables of a post-training study",
        measuring.add_sweep,
        measuring.run_sweep,
    ),
    "sensitivity": (
        "what each layer alone costs at each bit width",
        choosing.add_sensitivity,
        choosing.run_sensitivity,
    ),
    "blocks": (
        "what a recipe reconstructs as one, as a tree",
        choosing.add_blocks,
        choosing.run_blocks,
    ),
    "models": (
        "the models that have names, or those that fit a pattern",
        choosing.add_models,
        choosing.run_models,
    ),
    "recipes": (
        "the named recipes, one of them as TOML, or one made for a model",
        choosing.add_recipes,
        choosing.run_recipes,
    ),
    "quickstart": (
        "compile and measure a small network that comes along",
        measuring.add_quickstart,
        measuring.run_quickstart,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``fxquant`` with a subparser for each of `COMMANDS`."""
    parser = argparse.ArgumentParser(
        "fxquant",
        description="Compile float PyTorch vision models to integer kernels for CPUs.",
        epilog="Exit codes: 0 done; 1 a check failed; 2 wrong use or input.",
    )
    parser.add_argument("--version", action="version", version=f"fxquant {fxquant.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        add(command)
        command.set_defaults(run=run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to stderr on one line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parsed = build_parser().parse_args(words)
    parsed.words = words
    before = torch.get_num_threads()
    try:
        if parsed.threads:
            torch.set_num_threads(parsed.threads)
        # Stdout belongs to the JSON alone; whatever a command prints on its way goes to stderr.
        with contextlib.redirect_stdout(sys.stderr if parsed.json else sys.stdout):
            outcome: Outcome = parsed.run(parsed)
        if not outcome.silent:
            print(json.dumps(finite(outcome.data), indent=2) if parsed.json else outcome.text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FxquantError, OSError) as error:
        print(f"fxquant: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fxquant: interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
    for failure in outcome.failures:
        print(f"fxquant: check failed: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0
