"""Moving and resampling maps: against densities known in closed form."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frazil.maths.rotation import random_rotations
from frazil.maths.symmetry import operators
from frazil.simulate.phantom import density, phantom
from frazil.steps import map_transform
from frazil.steps.map_transform import crop, mirror, moved_origin, resample_isotropic, sample, shift, spline, symmetrise, transform

BOX = 40


def blobs(centre: Tensor, sigma: float, shape: tuple[int, int, int] = (BOX, BOX, BOX), size: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Tensor:
    """Gaussians at centre (n, 3), xyz in px (or Å, for voxels of `size` xyz) from the centre of the box."""
    z, y, x = torch.meshgrid(*[(torch.arange(n, dtype=torch.float64) - n // 2) * size[2 - a] for a, n in enumerate(shape)], indexing="ij")
    each = [torch.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) / (2 * sigma**2)) for c in centre]
    return torch.stack(each).sum(0)


def points(rng: torch.Generator, n: int = 8, reach: float = 9.0) -> Tensor:
    return (torch.rand(n, 3, generator=rng, dtype=torch.float64) - 0.5) * 2 * reach


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_turned_map_is_the_map_of_turned_points(rng, mirrored):
    where, turn, by = points(rng), random_rotations(1, rng)[0], torch.tensor([1.3, -2.4, 0.6], dtype=torch.float64)
    matrix = turn @ torch.diag(torch.tensor([-1.0 if mirrored else 1.0, 1, 1], dtype=torch.float64))
    data = blobs(where, 1.5)
    before = data.clone()
    assert error(transform(data, matrix, by.tolist()), blobs(where @ matrix.T + by, 1.5)) < 5e-4
    assert torch.equal(data, before)


def test_large_maps_are_interpolated_without_the_finer_grid(rng, monkeypatch):
    monkeypatch.setattr(map_transform, "FINER_UP_TO", 8)
    where, turn = points(rng), random_rotations(1, rng)[0]
    assert error(transform(blobs(where, 1.5), turn), blobs(where @ turn.T, 1.5)) < 5e-3


def test_turns_of_the_lattice_are_exact(rng):
    where = points(rng)
    for turn in operators("O"):
        assert error(transform(blobs(where, 1.5), turn, (2, 0, -3)), blobs(where @ turn.T + torch.tensor([2.0, 0, -3]), 1.5)) < 1e-9


def test_shift_is_exact_whole_or_not(rng):
    where = points(rng)
    for by in ([3, 0, -2], [0.4, -1.7, 2.5]):
        assert error(shift(blobs(where, 1.6), by), blobs(where + torch.tensor(by, dtype=torch.float64), 1.6)) < 1e-5
    noise = torch.randn(7, 7, 7, generator=rng, dtype=torch.float64)  # odd: without Nyquist, so that halves make a whole
    assert torch.allclose(shift(shift(noise, [0.5, 0, 0]), [0.5, 0, 0]), shift(noise, [1, 0, 0]), atol=1e-12)


def test_samples_are_the_voxels_and_zero_outside(rng):
    at = torch.tensor([[1.0, 2, 3], [7, 6, 5], [0, 0, 0], [-1, 0, 0], [3, 19, 0]], dtype=torch.float64)
    smooth = blobs(points(rng, reach=3), 2.0, (16, 17, 18))
    found = sample(spline(smooth), at)
    assert torch.allclose(found[:3], torch.stack([smooth[int(z), int(y), int(x)] for x, y, z in at[:3]]), atol=1e-3)
    assert found[3:].tolist() == [0, 0]


@pytest.mark.parametrize("group", ["C3", "D2", "T"])
def test_symmetrised_maps_obey_the_group(rng, group):
    where, all_of_it = points(rng, 4), operators(group)
    mates = torch.einsum("gij,nj->gni", all_of_it, where).reshape(-1, 3)
    found = symmetrise(blobs(where, 1.6), all_of_it)
    assert error(found, blobs(mates, 1.6) / len(all_of_it)) < 1e-3
    assert error(symmetrise(found, all_of_it), found) < 2e-3


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_mirrors_of_the_three_axes(rng, axis):
    where = points(rng)
    other = where.clone()
    other[:, -1 - axis] *= -1
    assert error(mirror(blobs(where, 1.5), axis), blobs(other, 1.5)) < 1e-9


def test_voxels_of_unequal_sides_become_cubic(rng):
    where = points(rng, reach=8)
    sizes = (1.0, 1.25, 2.0)
    data = blobs(where, 3.0, (20, 32, 40), sizes)
    found = resample_isotropic(data, sizes, 1.0)
    assert found.shape == (40, 40, 40)
    assert error(found, blobs(where, 3.0)) < 5e-3


def test_the_centre_stays_in_space():
    assert moved_origin((10.0, 20.0, 30.0), ((40, 40, 40), (2.0, 2.0, 2.0)), ((20, 20, 20), 2.0)) == (30.0, 40.0, 50.0)
    assert crop(torch.arange(27.0).reshape(3, 3, 3), 1).item() == 13


def test_a_matrix_that_is_no_rotation_is_refused():
    with pytest.raises(ValueError, match="orthogonal"):
        transform(torch.zeros(4, 4, 4), 2 * torch.eye(3))


def test_phantoms_and_transform_share_the_convention(rng):
    """Phantom.moved says where Qᵀ(c + t) puts a density; transform with Q and t undoes it."""
    shape, turn = phantom(BOX, 2.0, seed=2), random_rotations(1, rng)[0]
    by = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    moved = density(replace(shape.moved(turn, -by)), BOX, 2.0).data
    # Fourier corners turn out of the box: the rest of the difference
    assert error(transform(moved, turn, (by / 2).tolist()), density(shape, BOX, 2.0).data) < 0.1
