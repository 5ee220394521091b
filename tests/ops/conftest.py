"""Shared by the tests of ops. Triton kernels run in its interpreter where there is no GPU: tiny boxes here, real ones there."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

from frazil.maths.fourier import make_hermitian, pixel_list  # noqa: E402
from frazil.maths.rotation import random_rotations  # noqa: E402

SIZES = (16, 90, 180) if ON_GPU else (6, 8)  # windows of the Triton tests; half volumes of M = size + 1, no power of two


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton tests are `gpu` tests on a machine that has one, and ordinary ones, in the interpreter, elsewhere."""
    for item in items:
        if ON_GPU and "triton" in item.name:
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel_size" in metafunc.fixturenames:
        metafunc.parametrize("kernel_size", SIZES)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Two cores are shared: a test that wants threads asks for them and they are taken back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> str:
    """Where Triton tests put their tensors."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def half_volume(rng) -> Callable[..., Tensor]:
    """half_volume(m, dtype): random centred half volume with a Hermitian x = 0 plane (complex) or random weights (real)."""

    def make(m: int, dtype: torch.dtype = torch.complex128) -> Tensor:
        values = torch.randn(2 * m + 1, 2 * m + 1, m + 1, dtype=torch.complex128, generator=rng)
        values[m, m, 0] = values[m, m, 0].abs()
        return make_hermitian(values if dtype.is_complex else values.abs()).to(dtype)

    return make


@pytest.fixture
def rotations(rng) -> Callable[[int], Tensor]:
    """rotations(n): (n, 3, 3) float64, uniform."""
    return lambda n: random_rotations(n, rng)


@pytest.fixture
def window() -> Callable[[int], Tensor]:
    """window(size): (p, 2) float64 coords of the slice pixels of a window; at pad 2 they fit a half volume of M = size + 1."""

    def make(size: int) -> Tensor:
        pixels = pixel_list(size, size)
        return pixels.k()[: pixels.inside]

    return make


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """relative_error(value, exact): relative L2 distance, computed in the precision of `exact`."""
    return lambda value, exact: float((value.to(exact) - exact).norm() / exact.norm())
