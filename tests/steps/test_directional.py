"""Directional FSC of maps made anisotropic on purpose; sampling of views whose answer is known."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.maths.fsc import fsc, resolution_at
from frazil.maths.rotation import euler_to_matrix, random_rotations
from frazil.maths.sphere import direction_vectors, directions
from frazil.maths.symmetry import operators
from frazil.steps.directional import DirectionalParams, directional_fsc, fsc_volume, pose_efficiency, sphericity

BOX = 48
ONE = torch.eye(3, dtype=torch.float64)[None]


def halves(rng: torch.Generator, along_z: float) -> list[Tensor]:
    """Signal that falls off along k_z faster by a factor `along_z`, and white noise."""
    ft = torch.fft.rfftn(torch.randn(BOX, BOX, BOX, generator=rng))
    line = torch.fft.fftfreq(BOX, 1 / BOX)
    r = ((along_z * line[:, None, None]) ** 2 + line[:, None] ** 2 + torch.arange(BOX // 2 + 1) ** 2).sqrt()
    signal = torch.fft.irfftn(ft * 30 * torch.exp(-r / 3.5), s=(BOX,) * 3)
    return [signal + torch.randn(BOX, BOX, BOX, generator=rng) for _ in range(2)]


def test_an_even_map_is_a_sphere(rng: torch.Generator) -> None:
    a, b = halves(rng, 1.0)
    found = directional_fsc(a, b, None, 1.5, DirectionalParams())
    assert found.sphericity > 0.98
    assert found.mean == pytest.approx(resolution_at(fsc(a, b), 0.143, BOX, 1.5), rel=0.06) and found.spread < 0.05 * found.mean


def test_a_map_blurred_along_z_is_found_flat_there(rng: torch.Generator) -> None:
    found = directional_fsc(*halves(rng, 2.0), None, 1.5, DirectionalParams(cone=15.0))
    z = direction_vectors(found.angles)[:, 2].abs()
    top, side = found.resolution[z > 0.95].mean(), found.resolution[z < 0.1].mean()
    assert float(top / side) == pytest.approx(2.0, rel=0.12)
    assert found.sphericity < 0.93
    volume = fsc_volume(found, BOX)
    middle = BOX // 2
    assert volume[middle, middle, middle] == 1 and volume[middle, middle, middle + 8] > volume[middle + 8, middle, middle] + 0.2
    assert volume[0, 0, 0] == 0


def test_cones_of_90_degrees_are_the_shells(rng: torch.Generator) -> None:
    a, b = halves(rng, 1.5)
    curves = directional_fsc(a, b, None, 1.5, DirectionalParams(cone=90.0)).curves
    torch.testing.assert_close(curves, fsc(a, b).expand_as(curves), atol=1e-6, rtol=0)


def test_sphericity_of_an_ellipsoid() -> None:
    angles = directions(3)
    v = direction_vectors(angles)
    assert sphericity(angles, torch.full((len(v),), 3.0)) == pytest.approx(1.0)
    radius = (v[:, 0] ** 2 + v[:, 1] ** 2 + (v[:, 2] / 0.5) ** 2).rsqrt()
    e = math.sqrt(0.75)
    area, volume = 2 * math.pi * (1 + (1 - e * e) / e * math.atanh(e)), 4 / 3 * math.pi * 0.5
    assert sphericity(angles, radius) == pytest.approx(math.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area, rel=0.005)


def test_efficiency_of_known_distributions(rng: torch.Generator) -> None:
    angles = torch.rand(20000, 3, generator=rng, dtype=torch.float64) * 360
    even = pose_efficiency(random_rotations(20000, rng), ONE)
    assert even.efficiency > 0.99 and even.empty == 0
    angles[:, 1] = 90
    side = pose_efficiency(euler_to_matrix(angles), ONE)
    assert side.efficiency == pytest.approx(8 / math.pi**2, rel=0.03) and side.empty == 0  # Baldwin & Lyumkis 2020
    angles[:, 1] = 45
    cone = pose_efficiency(euler_to_matrix(angles), ONE)
    assert cone.empty == pytest.approx(1 - math.sqrt(0.5), abs=0.03) and cone.efficiency < 0.05


def test_mates_are_views_too(rng: torch.Generator) -> None:
    """Views about one direction are uneven; the octahedral group spreads them."""
    angles = torch.rand(2000, 3, generator=rng, dtype=torch.float64) * torch.tensor([360.0, 45.0, 360.0])
    alone, spread = (pose_efficiency(euler_to_matrix(angles), group) for group in (ONE, operators("O")))
    assert alone.empty > 0.1 and spread.empty == 0 and spread.efficiency > 0.7 > alone.efficiency
