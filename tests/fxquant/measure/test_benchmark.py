import json
import time

import pytest
import torch

from fxquant.errors import InputError
from fxquant.measure.benchmark import benchmark


def test_ratios_are_to_the_first() -> None:
    result = benchmark(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)}, rounds=3, calls=2
    )
    assert [timing.name for timing in result.timings] == ["short", "long"]
    assert result["short"].ratio == 1.0
    assert result["long"].ratio > 1.5
    assert result["long"].calls == 6
    assert result["long"].lower_quartile_ms <= result["long"].median_ms


def test_turns_are_interleaved_and_rotate() -> None:
    called: list[str] = []
    benchmark(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")},
        warmup=0,
        rounds=2,
        calls=1,
    )
    assert "".join(called) == "aabbbbaa"


def test_threads_and_inference_mode_hold_only_inside() -> None:
    before = torch.get_num_threads()
    seen: list[tuple[int, bool]] = []
    result = benchmark(
        {"x": lambda x: seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))},
        torch.zeros(1),
        threads=1,
        rounds=1,
    )
    assert set(seen) == {(1, True)}
    assert result.machine.threads == 1
    assert torch.get_num_threads() == before


def test_says_machine_and_versions() -> None:
    result = benchmark({"add": torch.add}, (torch.ones(2), torch.ones(2)), rounds=1)
    data = json.loads(json.dumps(result.to_json()))
    assert data["machine"]["cpu"]
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["timings"][0]["name"] == "add"
    assert torch.__version__ in str(result)


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ({}, {}, "nothing to benchmark"),
        ({"x": 3}, {}, "'x' is a int"),
        ({"x": abs}, {"rounds": 0}, "rounds is 0"),
        ({"x": abs}, {"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_use_is_an_error(candidates: dict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        benchmark(candidates, **options)
