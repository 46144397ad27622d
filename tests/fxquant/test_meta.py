from __future__ import annotations

from fxquant.meta import NODE_KEYS
from passes.infra.meta import KEYS
from tests.meta_uses import meta_uses

# What torch's tracer writes; the front end takes it out.
OTHERS = {"nn_module_stack"}


def test_the_table_holds_every_key_that_is_used() -> None:
    used = meta_uses("fxquant")
    unknown = {key: where for key, where in used.items() if key not in {*NODE_KEYS, *OTHERS}}
    assert not unknown, "enter these in fxquant/meta.py"


def test_every_key_of_the_table_is_used() -> None:
    used = {*meta_uses("fxquant"), *meta_uses("passes")}
    assert NODE_KEYS.keys() <= used


def test_passes_do_not_know_the_keys_of_fxquant() -> None:
    assert not (NODE_KEYS.keys() - KEYS.keys()) & meta_uses("passes").keys()
