"""Powers by shell: analytic values, and the implementations against each other."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.fourier import full_half_plane, image_ft, shell_counts
from frazil.ops.shells import shell_power


def starts(shell: torch.Tensor, shells: int) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(shell, minlength=shells).cumsum(0)])


def test_constant_modulus_counts_the_pixels() -> None:
    index, shell = full_half_plane(12)
    values = torch.polar(torch.full((2, 12 * 7), 3.0, dtype=torch.float64), torch.rand(2, 12 * 7, dtype=torch.float64))
    found = shell_power(values, index, starts(shell, 7))
    torch.testing.assert_close(found, 9 * shell_counts(12).expand(2, -1))


def test_white_noise_has_its_power_in_every_shell(rng: torch.Generator) -> None:
    box, n = 16, 4000
    index, shell = full_half_plane(box)
    ft = image_ft(torch.randn(n, box, box, generator=rng, dtype=torch.float64)).reshape(n, -1)
    mean = shell_power(ft, index, starts(shell, 9)).mean(0) / (2 * shell_counts(box))
    assert (mean[1:8] * 2 * box**2 - 1).abs().max() < 6 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_triton_agrees_with_the_reference(rng: torch.Generator, dtype: torch.dtype, device: str) -> None:
    values = torch.randn(3, 400, generator=rng, dtype=dtype)
    index = torch.randperm(400, generator=rng)[:370]
    start = torch.tensor([0, 0, 1, 300, 369, 370])  # an empty shell, one longer than a block
    exact = shell_power(values.to(torch.complex128), index, start, implementation="reference")
    found = shell_power(values.to(device), index.to(device), start.to(device), implementation="triton").cpu()
    torch.testing.assert_close(found, exact, rtol=2e-6 if dtype == torch.complex64 else 1e-12, atol=0)


def test_bad_arguments() -> None:
    values, index, start = torch.zeros(1, 4, dtype=torch.complex64), torch.tensor([0, 4]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="out of"):
        shell_power(values, index, start)
    with pytest.raises(ValueError, match="expected"):
        shell_power(values.real, index, start)
