"""Which networks compile, by which front end, and how much of them runs in int8?

    python -m benchmarks.coverage [NAME ...] [--save] [--again] [--seconds 300] [--memory 10]

All of torchvision's networks, and timm's of every family; NAME is torchvision:NAME or timm:NAME.
Random weights, batch norms warmed by one batch in training mode, random images of few pixels.
int8 is the share of the multiply-accumulates; SQNR is of all float outputs against float, on
images that were not calibrated on, by the target x86; of a detector, whose boxes are chosen by
their order, that of the values that the integers hand to the float part. `--save`: the file is
loaded by a process that has compiled nothing, and has to give the outputs of `reference` to the
bit.

Each network has a process of its own, whose time and data are limited. Its row is in
benchmarks/results/ as soon as it is done; what is there already is measured `--again` only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxquant
from benchmarks import networks_covered, results
from fxquant.frontend.inputs import arguments, bind
from fxquant.metrics import Closeness
from fxquant.report.values import run_both
from passes.infra.verify import flatten

NAME = "coverage"


def measure(spelling: str, saved: Path | None) -> dict[str, Any]:
    """One row: what became of the network."""
    warnings.simplefilter("ignore")
    network = networks_covered.of(spelling)
    model = network.warmed()
    names = bind(model, network.batch(0), "the batch")
    row: dict[str, Any] = {"network": spelling, "recipe": network.recipe_of(model)}
    start = time.process_time()
    try:
        q = fxquant.compile(model, row["recipe"], calibration=[network.batch(0)])
    except fxquant.FxquantError as error:
        return row | {"error": _anywhere(f"{type(error).__name__}: {error}")}
    row |= {
        "seconds": round(time.process_time() - start, 1),
        "front_end": q.report.front_end,
        "int8": q.report.int8_share,
        "macs": q.report.macs,
        "float because": _reasons(q),
    }
    positional, named = arguments(model, tuple(names), network.batch(1))
    with torch.no_grad():
        if network.kind == "detection":
            row["sqnr_db"] = _sqnr_of_integers(q, network.batch(1))
        else:
            row["sqnr_db"] = _sqnr(model(*positional, **named), q(*network.batch(1)))
    if saved is not None:
        row["saved"] = _save(q, saved, network.batch(1))
    return row


def _reasons(q: fxquant.CompiledModel) -> str:
    """Why operations with multiply-accumulates are float, the largest share first."""
    shares: dict[str, int] = {}
    for row in q.report.coverage:
        if row.reason and row.macs != 0:
            shares[row.reason] = shares.get(row.reason, 0) + (row.macs or 0)
    return _anywhere("; ".join(sorted(shares, key=lambda reason: -shares[reason])[:3]))


def _anywhere(text: str) -> str:
    """Without folders, which are this machine's."""
    text = re.sub(r"; how to run it again is in \S+", "", text)
    return re.sub(r"\S*/(site-packages/|(?=m\.fxq))", "", text)


def _sqnr(want: Any, found: Any) -> float | None:
    """Of all float outputs; None where they are equal, or where their number differs."""
    closeness = Closeness()
    for (_, a), (_, b) in zip(flatten(want), flatten(found), strict=False):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape:
            closeness.add(a, b)
    return closeness.sqnr_db if math.isfinite(closeness.sqnr_db) else None


def _sqnr_of_integers(q: fxquant.CompiledModel, batch: tuple[Any, ...]) -> float | None:
    """Of what the integers hand to the float part, where that chooses boxes by their order."""
    integer = q.stages["integer"]
    want, found = run_both(q.stages["fused"], integer, batch)
    closeness = Closeness()
    for node in integer.graph.nodes:
        if "dequantize" not in str(node.target):
            continue
        name = node.args[0].meta.get("simulated", node.args[0].name)
        if name in want and name in found and want[name].shape == found[name].shape:
            closeness.add(want[name], found[name])
    return closeness.sqnr_db if math.isfinite(closeness.sqnr_db) else None


def _save(q: fxquant.CompiledModel, path: Path, batch: tuple[Any, ...]) -> str:
    try:
        q.save(path)
    except fxquant.FxquantError as error:
        return _anywhere(f"{type(error).__name__}: {error}")
    torch.save((batch, q.to_target("reference")(*batch)), path.with_suffix(".pt"))
    return "written"


def reload(path: Path) -> str:
    """Whether the file at `path` gives on `reference` what the compiled model gave."""
    batch, want = torch.load(path.with_suffix(".pt"), weights_only=False)
    found = fxquant.load(path, target="reference")(*batch)
    pairs = list(zip(flatten(want), flatten(found), strict=True))
    same = all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for (_, a), (_, b) in pairs)
    return "equal" if same else "differs"


def in_own_process(function: Callable[..., Any], *args: Any, seconds: int, memory: float) -> Any:
    """What `function` gives; a string that begins with ``failed`` where its process ends early."""
    # A fork has imported what it needs and has compiled nothing.
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run(connection: Connection) -> None:
        torch.set_num_threads(1)  # a fork has none of the threads that its parent waits with
        limit = int(memory * 1024**3)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        try:
            connection.send(function(*args))
        except BaseException as error:
            text = _anywhere(" ".join(str(error).split()))[:300]
            connection.send(f"failed: {type(error).__name__}: {text}")

    process = context.Process(target=run, args=(there,))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = f"failed: its process ended, after {seconds} s of CPU time or for another reason"
    process.kill()
    process.join()
    return found


def row_of(spelling: str, *, save: bool, seconds: int, memory: float) -> dict[str, Any]:
    limits: dict[str, Any] = {"seconds": seconds, "memory": memory}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.fxq" if save else None
        row = in_own_process(measure, spelling, path, **limits)
        if isinstance(row, str):
            return {"network": spelling, "error": row.removeprefix("failed: ")}
        if row.get("saved") == "written":
            row["saved"] = in_own_process(reload, path, **limits)
    return dict(row)


def rows_of_file() -> dict[str, dict[str, Any]]:
    """The rows of the newest result file, by network."""
    files = sorted(results.FOLDER.glob(f"????-??-??-{NAME}.json"))
    rows = json.loads(files[-1].read_text())["results"] if files else []
    return {row["network"]: row for row in rows}


def summary(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    compiled = [row for row in rows if "error" not in row]
    whole = [row for row in compiled if row["int8"] >= 0.99]
    same = [row for row in compiled if row.get("saved") == "equal"]
    return (
        f"{len(rows)} of {len(networks_covered.NETWORKS)} networks are measured: "
        f"{len(compiled)} compile, {len(whole)} of these with at least "
        f"99 % of the multiply-accumulates in int8; {len(same)} files are equal when loaded"
    )


def table() -> str:
    """A sentence that counts the networks, and a row for each, as Markdown."""
    rows = rows_of_file()
    headers = ("network", "recipe", "front end", "MACs in int8", "SQNR", "file")
    cells = [headers, ["---"] * len(headers), *(_cells(rows[name]) for name in sorted(rows))]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{summary(rows.values())}.\n\n{lines}"


def _cells(row: dict[str, Any]) -> list[str]:
    name = f"`{row['network']}`"
    if "error" in row:
        return [name, row.get("recipe", ""), "", "", "", _short(row["error"])]
    sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    int8 = f"{100 * row['int8']:.1f} %"
    return [name, row["recipe"], row["front_end"], int8, sqnr, _short(row.get("saved", ""))]


def _short(text: str) -> str:
    # A path of the machine that measured says nothing, and a bar would end the cell.
    text = " ".join(word.rpartition("/")[2] for word in text.split()).replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=networks_covered.known)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument(
        "--seconds", type=int, default=300, help="of CPU time for a network; default 300"
    )
    parser.add_argument("--memory", type=float, default=10, help="GB; default 10")
    arguments = parser.parse_args()
    rows = rows_of_file()
    for name in arguments.names or networks_covered.NETWORKS:
        if name in rows and not arguments.again:
            continue
        rows[name] = row_of(
            name, save=arguments.save, seconds=arguments.seconds, memory=arguments.memory
        )
        rows[name]["commit"] = results.commit()
        print(json.dumps(rows[name]), flush=True)
        results.write(NAME, [rows[key] for key in sorted(rows)])
    print(summary(rows.values()))


if __name__ == "__main__":
    main()
