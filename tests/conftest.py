"""What all tests share: one torch thread, seeded randomness, the real data."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Several test processes share few cores, and sums must not depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    """A torch generator with a fixed seed."""
    return torch.Generator().manual_seed(20170629)


@pytest.fixture
def np_rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(20170629)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; skips the test where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED
