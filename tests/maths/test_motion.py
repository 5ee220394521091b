"""RELION's motion polynomial, tracks and path lengths."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.motion import fit_polynomial, interpolate_groups, local_shift, path_lengths, polynomial_basis, remove_spikes, total_shift


def grid(n: int) -> torch.Tensor:
    line = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.cartesian_prod(line, line)


def test_polynomial_is_relions(rng: torch.Generator) -> None:
    """Index 3·space + (a − 1); space terms 1, X, X², Y, Y², XY of x/W − ½, y/H − ½; z counts frames from the first."""
    for index, value in ((0, 3.0), (2, 27.0), (3, 3 * 0.25), (8, 27 * 0.0625), (9, 3 * -0.4), (13, 9 * 0.16), (17, 27 * 0.25 * -0.4)):
        coefficients = torch.zeros(2, 18, dtype=torch.float64)
        coefficients[1, index] = 1
        shift = local_shift(coefficients, 5, torch.tensor([[0.75, 0.1]]))
        assert shift[3, 0].tolist() == pytest.approx([0.0, value], abs=1e-7)
        assert shift[0].abs().max() == 0


def test_coefficients_come_back_from_noise_free_shifts(rng: torch.Generator) -> None:
    coefficients = torch.randn(2, 18, generator=rng, dtype=torch.float64) * torch.tensor([0.3, 0.01, 3e-4]).repeat(6)
    shifts = local_shift(coefficients, 24, grid(5))
    found, rms = fit_polynomial(shifts, grid(5))
    assert (found - coefficients).abs().max() < 1e-6 and rms < 1e-6


def test_wild_patches_do_not_bend_the_field(rng: torch.Generator) -> None:
    coefficients = torch.randn(2, 18, generator=rng, dtype=torch.float64) * torch.tensor([0.05, 1e-3, 3e-5]).repeat(6)
    truth = local_shift(coefficients, 20, grid(6))
    noisy = truth + 0.1 * torch.randn(truth.shape, generator=rng, dtype=torch.float64)
    noisy[:, 7] += 30
    noisy[3, 2] = float("nan")
    found, _ = fit_polynomial(noisy, grid(6), rounds=20)
    assert (local_shift(found, 20, grid(6)) - truth).square().mean().sqrt() < 0.15
    with pytest.raises(ValueError, match="do not determine"):
        fit_polynomial(truth[:2, :4], grid(6)[:4])


def test_basis_and_total() -> None:
    assert polynomial_basis(torch.arange(4.0), grid(3)).shape == (4, 9, 18)
    track = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert torch.equal(total_shift(track, None, grid(2))[1], torch.tensor([[1.0, 2.0]]).expand(4, 2))


def test_spikes_and_steps() -> None:
    track = torch.zeros(9, 2, dtype=torch.float64)
    track[:, 0] = torch.arange(9) * 0.2
    spiked = track.clone()
    spiked[4] += 8
    assert torch.allclose(remove_spikes(spiked), track)
    step = track.clone()
    step[5:] += 8  # the stage jumped: that is real
    assert torch.allclose(remove_spikes(step), step)


def test_groups_and_lengths() -> None:
    line = torch.arange(10, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0])
    groups = torch.stack([line[0:3].mean(0), line[3:6].mean(0), line[6:10].mean(0)])
    assert torch.allclose(interpolate_groups(groups, [0, 3, 6], 10), line)
    total, early, late = path_lengths(torch.tensor([[0.0, 0], [3, 4], [3, 4], [6, 8]]), dose=2.0, before=1.0)
    assert (total, early, late) == (10.0, 5.0, 5.0)
    assert path_lengths(torch.tensor([[0.0, 0], [3, 4]]), 0.0) == (5.0, 0.0, 5.0)
