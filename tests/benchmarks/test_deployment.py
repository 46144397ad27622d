"""The figures of a page are those that the script wrote."""

import json
from pathlib import Path

from benchmarks import results
from benchmarks.deployment import table

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_latest_result() -> None:
    latest = sorted(results.FOLDER.glob("*-deployment-mobilenet_v2.json"))[-1]
    measured = json.loads(latest.read_text())["results"]
    rows = [line for line in table(measured).splitlines() if line.startswith("|")]
    assert measured["equal_to_reference"]
    assert measured["images"] == 100
    assert "\n".join(rows) in (ROOT / "docs" / "native.md").read_text()
    # The README rounds it.
    package = measured["deployed"]["exported"]["bytes"]["package"]
    assert 0.3e6 < package < 0.5e6
