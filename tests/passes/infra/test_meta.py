from __future__ import annotations

from torch import fx

from passes.infra.meta import KEYS, copy_meta, key_table, origins
from tests.meta_uses import meta_uses

# What torch's tracer writes and passes never read.
OTHERS = {"nn_module_stack"}


def nodes() -> tuple[fx.Node, fx.Node]:
    graph = fx.Graph()
    return graph.placeholder("x"), graph.placeholder("y")


def test_the_table_holds_every_key_that_passes_use() -> None:
    used = meta_uses("passes")
    unknown = {key: where for key, where in used.items() if key not in {*KEYS, *OTHERS}}
    assert not unknown, "enter these in passes/infra/meta.py"
    assert {"tensor", "range", "origin", "module_path"} <= used.keys()


def test_copies_the_kinds_asked_for() -> None:
    source, target = nodes()
    source.meta.update(module_path="conv", stack_trace="line 1", tensor="shape", range="bounds")
    target.meta.update(range="other")
    copy_meta(source, target, "place")
    assert target.meta == {"module_path": "conv", "stack_trace": "line 1", "range": "other"}
    copy_meta(source, target, "shape", "range")
    assert target.meta == source.meta


def test_what_the_source_lacks_stays() -> None:
    source, target = nodes()
    target.meta["tensor"] = "shape"
    copy_meta(source, target, "shape")
    assert target.meta == {"tensor": "shape"}


def test_another_table_adds_keys() -> None:
    source, target = nodes()
    source.meta.update(tensor="shape", grid="scale")
    key = next(iter(KEYS.values()))
    table = {**KEYS, **key_table(type(key)("grid", "integers", "", "", ""))}
    copy_meta(source, target, "integers", table=table)
    assert target.meta == {"grid": "scale"}


def test_origins_are_joined_in_order_and_once() -> None:
    first, second = nodes()
    second.meta["origin"] = ("conv", "x", "bn")
    assert origins((first, second)) == ("x", "conv", "bn")
