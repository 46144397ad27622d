"""However many threads run a model, and on whatever instruction set, its integers are the same."""

from __future__ import annotations

import multiprocessing
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.native.build import compiler
from fxquant.backends.native.params import KERNELS_FOLDER
from fxquant.backends.native.schedule import split_batch
from fxquant.compiled import CompiledModel
from fxquant.errors import TargetError
from tests.fxquant.backends.native.kernels import instruction_sets
from tests.fxquant.small_networks import Residual, compiled, images

pytestmark = pytest.mark.usefixtures("native")


class Wide(nn.Module):
    """Steps that are worth splitting: an image of 96 x 96 with 48 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, padding=1)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.last = nn.Conv2d(48, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.last(torch.relu(self.depthwise(x))) + x)


def wide() -> tuple[CompiledModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 96, 96)
    return fxquant.compile(Wide().eval(), "w8a8", calibration=x, target="native"), x


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = wide()
    expected = q.to_target("reference")(x)
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("FXQUANT_NUM_THREADS", threads)
        for batch in (1, 2, 5):
            assert torch.equal(q(x[:batch]), expected[:batch])


def test_several_callers_at_once() -> None:
    q, x = wide()
    expected = q.to_target("reference")(x)
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(lambda i: q(x[i % 5 : i % 5 + 1]), range(40))):
            assert torch.equal(found, expected[index % 5 : index % 5 + 1])


def _answer(q: Any, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(q(x).tolist())


def test_a_forked_process_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_NUM_THREADS", "2")
    q, x = wide()
    expected = q(x).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(q, x, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join()


@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set_gives_the_same_integers(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXQUANT_ISA", isa)
    q, x = wide()
    (program,) = [s for m in q.stages["native"].children() for s in m.segments]
    assert program.program.isa == isa
    assert torch.equal(q(x), q.to_target("reference")(x))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_ISA", "abacus")
    with pytest.raises(TargetError, match="FXQUANT_ISA=abacus"):
        compiled(Residual(), target="native")
    monkeypatch.delenv("FXQUANT_ISA")
    assert compiled(Residual(), target="native")(images()).shape[0] == len(images())


def test_samples_are_taken_one_by_one_while_values_outweigh_the_weights() -> None:
    large, _ = wide()
    heavy = nn.Sequential(nn.Flatten(), nn.Linear(48, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    small = compiled(heavy, calibration=images(size=4), target="native")
    assert _split(large) > 0
    assert _split(small) < 2


def _split(q: CompiledModel) -> int:
    (program,) = q.stages["native"].children()
    (segment,) = program.segments  # type: ignore[union-attr]
    return split_batch(segment.plan).at


def test_a_thread_with_several_samples_gives_the_reference_s_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, x = wide()
    expected = q.to_target("reference")(x)
    monkeypatch.setenv("FXQUANT_NUM_THREADS", "2")
    for batch in (4, 5, 2, 3):
        assert torch.equal(q(x[:batch]), expected[:batch])


SHARES = """
#include "threads.h"
#include <cstdio>

int main() {
    fxquant::Phases shares;
    for (int call = 0; call < 2; ++call) {
        shares.start({2, 1}, 2);
        for (int thread : {0, 1}) {
            const auto run = [&](int unit, int owner) {
                std::printf("%d/%d by %d, ", unit, owner, thread);
            };
            shares.work(0, 0, 2, thread, run);
            shares.work(1, 2, 1, thread, run);
        }
        std::printf("\\n");
    }
    int64_t sums[3] = {};
    for (int call = 0; call < 10000; ++call)
        fxquant::with_threads(3, [&](int thread, fxquant::Team&) { sums[thread] += thread + 1; });
    std::printf("%ld %ld %ld\\n", (long)sums[0], (long)sums[1], (long)sums[2]);
}
"""


def test_what_a_thread_has_not_begun_is_done_by_another_and_once(tmp_path: Path) -> None:
    """Thread 1 comes when all is done: unit/owner of two phases went to thread 0, its own first."""
    (tmp_path / "shares.cpp").write_text(SHARES)
    program = tmp_path / "shares"
    found = compiler()
    assert found is not None
    command = [found, "-std=c++17", "-O1", "-pthread", f"-I{KERNELS_FOLDER}"]
    subprocess.run([*command, str(tmp_path / "shares.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    order = "0/0 by 0, 1/0 by 0, 0/1 by 0, 1/1 by 0, 2/0 by 0, 2/1 by 0, "
    assert done.stdout.splitlines() == [order, order, "10000 20000 30000"]
