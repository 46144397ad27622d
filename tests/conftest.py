from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# Tensors are tiny here: on a busy machine more threads spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    # A test must not depend on which tests ran before it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
