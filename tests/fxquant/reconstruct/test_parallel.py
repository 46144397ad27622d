from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fxquant.recipe import ReconstructionRecipe
from fxquant.reconstruct.loop import reconstruct
from fxquant.reconstruct.parallel import Share
from tests.fxquant.reconstruct.graphs import graphs, state


def _settings(method: str) -> ReconstructionRecipe:
    return ReconstructionRecipe(
        method=method,  # type: ignore[arg-type]
        iterations=6,
        batch_size=8,
        scale_learning_rate=1e-3,
        fisher=method == "qdrop",
        precision="float32",  # bfloat16 gradients of half a batch are rounded each
    )


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for method in ("qdrop", "pdquant"):
        found = graphs()
        file = Path(folder) / method
        reconstruct(
            found.simulated,
            found.fused,
            found.data,
            _settings(method),
            float_graph=found.float_graph,
            checkpoint=file,
        )
        torch.save(state(found.simulated), f"{folder}/{method}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(made),), nprocs=2)  # type: ignore[no-untyped-call]
    return made


@pytest.mark.parametrize("method", ["qdrop", "pdquant"])
def test_two_processes_learn_what_one_does(method: str, folder: Path) -> None:
    found = graphs()
    reconstruct(
        found.simulated,
        found.fused,
        found.data,
        _settings(method),
        float_graph=found.float_graph,
    )
    alone = state(found.simulated)
    first, second = (torch.load(folder / f"{method}-{rank}") for rank in (0, 1))
    assert (folder / method).exists()
    for path, value in alone.items():
        assert torch.equal(first[path], second[path])
        if value.is_floating_point():
            # Sums in another order: Adam divides by their size, so that an update whose sign
            # they decide moves a scale by at most its learning rate.
            torch.testing.assert_close(first[path], value, rtol=1e-4, atol=0)
        else:
            assert int((first[path] != value).sum()) <= 0.01 * value.numel()


def test_every_image_belongs_to_one_process() -> None:
    shares = [Share(rank, 3) for rank in range(3)]
    held = torch.cat([share.holds(4, 9) for share in shares])
    assert sorted(held.tolist()) == list(range(9))
    drawn = torch.tensor([7, 2, 11, 5, 0])
    images = {}
    for share in shares:
        positions, rows = share.own(drawn)
        images |= dict(zip(positions.tolist(), (rows * 3 + share.rank).tolist(), strict=True))
    assert images == dict(enumerate(drawn.tolist()))
