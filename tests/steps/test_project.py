"""Projections against sums along an axis and against the analytic projection of Gaussians."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.data import Optics, Particles, Volume
from frazil.maths.rotation import euler_to_matrix, random_rotations
from frazil.steps.project import prepare_map, project_particles

BOX, PIXEL, SIGMA = 32, 2.0, 2.0
CENTRES = torch.tensor([[5.0, -3.0, 2.0], [-4.0, 1.0, 6.0], [0.0, 4.0, -5.0]], dtype=torch.float64)  # px, xyz


def gaussians() -> Volume:
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    data = sum(torch.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) / (2 * SIGMA**2)) for c in CENTRES)
    return Volume(data.float(), PIXEL)


def poses(rotation: torch.Tensor, shift: torch.Tensor | None = None, optics: Optics | None = None) -> Particles:
    n = len(rotation)
    zero = torch.zeros(n, dtype=torch.int64)
    shift = torch.zeros(n, 2, dtype=torch.float64) if shift is None else shift
    optics = optics or Optics(PIXEL, BOX)
    return Particles((optics,), zero, rotation, shift, torch.zeros(n, 3, dtype=torch.float64), zero, zero)


def expected(rotation: torch.Tensor, shift: torch.Tensor, box: int = BOX, pixel: float = PIXEL) -> torch.Tensor:
    """(n, box, box) projections of the Gaussians: their centres turned into the camera frame and displaced by −shift (Å)."""
    line = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel / PIXEL
    y, x = torch.meshgrid(line, line, indexing="ij")
    out = torch.zeros(len(rotation), box, box, dtype=torch.float64)
    for c in CENTRES:
        seen = rotation @ c
        for i, (cx, cy, _) in enumerate(seen.tolist()):
            dx, dy = (shift[i] / PIXEL).tolist()
            out[i] += torch.exp(-((x - cx + dx) ** 2 + (y - cy + dy) ** 2) / (2 * SIGMA**2)) * SIGMA * math.sqrt(2 * math.pi)
    return out


def test_projection_equals_the_analytic_one_at_any_pose(rng: torch.Generator) -> None:
    rotation = random_rotations(6, rng)
    shift = 4 * torch.randn(6, 2, generator=rng, dtype=torch.float64)
    found = project_particles(prepare_map(gaussians()), PIXEL, poses(rotation, shift), torch.arange(6)).double()
    truth = expected(rotation, shift)
    assert ((found - truth).norm() / truth.norm()) < 0.03  # trilinear interpolation at twofold padding
    still = project_particles(prepare_map(gaussians()), PIXEL, poses(rotation, shift), torch.arange(6), shifts=False).double()
    assert ((still - expected(rotation, 0 * shift)).norm() / truth.norm()) < 0.03


def test_the_view_along_z_is_the_sum_over_z() -> None:
    rotation = euler_to_matrix(torch.tensor([[3.0, 0.0, -3.0], [0.0, 180.0, 0.0]], dtype=torch.float64))
    found = project_particles(prepare_map(gaussians()), PIXEL, poses(rotation), torch.arange(2))
    total = gaussians().data.sum(0)
    assert (found[0] - total).abs().max() < 0.06 * total.max()
    mirrored = total.flip(1).roll(1, 1)  # from behind, x runs the other way
    assert (found[1] - mirrored).abs().max() < 0.06 * total.max()


def test_a_finer_pixel_shows_the_same_object(rng: torch.Generator) -> None:
    rotation, shift = random_rotations(2, rng), torch.tensor([[3.0, -2.0], [0.0, 5.0]], dtype=torch.float64)
    optics = Optics(1.6, 40)
    found = project_particles(prepare_map(gaussians()), PIXEL, poses(rotation, shift, optics), torch.arange(2)).double()
    truth = expected(rotation, shift, 40, 1.6)
    assert found.shape[-1] == 40
    assert ((found - truth).norm() / truth.norm()) < 0.04


def test_the_ctf_at_zero_frequency_is_the_amplitude_contrast(rng: torch.Generator) -> None:
    p = poses(random_rotations(1, rng))
    half = prepare_map(gaussians())
    plain, with_ctf = (project_particles(half, PIXEL, p, torch.arange(1), ctf=ctf) for ctf in (False, True))
    assert float(with_ctf.mean() / plain.mean()) == pytest.approx(0.1, rel=1e-3)
