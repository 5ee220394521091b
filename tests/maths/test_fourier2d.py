"""Padded transforms of images: against the plain sum, against the volumes' ones, and there and back."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.fourier import half_volume_radii, image_ft, make_hermitian
from frazil.maths.fourier2d import half_plane_radii, hermitian_planes, images_from_planes, padded_planes, shell_means_of_planes
from frazil.refine.maximization import shell_means

N = 16


@pytest.fixture
def images(rng):
    return torch.randn(3, N, N, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize("pad", [1, 2, 1.5])
def test_planes_are_the_plain_sum(pad, images):
    """V(p) = Σ v(x) exp(−2πi p·(x − N/2)/(P N)) / N² at every element within the circle, 0 beyond."""
    r_max = 5
    planes = padded_planes(images, pad, r_max)
    m = planes.shape[-1] - 1
    assert planes.shape == (3, 2 * m + 1, m + 1) and m == int(pad * r_max + 0.5) + 1
    line = torch.arange(N, dtype=torch.float64) - N // 2
    y, x = torch.arange(-m, m + 1).double(), torch.arange(m + 1).double()
    waves = [torch.exp(-2j * torch.pi * p[:, None] * line / round(pad * N)) for p in (y, x)]
    exact = torch.einsum("ai,bj,kij->kab", *waves, images + 0j) / N**2 * (half_plane_radii(m) <= m - 1)
    assert torch.allclose(planes, exact, atol=1e-14)


def test_unpadded_planes_are_the_transform_of_images(images):
    """At P = 1 an element is that of image_ft."""
    planes, ft = padded_planes(images, 1, 5), image_ft(images)
    for y, x in ((0, 0), (2, 3), (-4, 1)):
        assert torch.allclose(planes[:, y + 6, x], ft[:, y % N, x], atol=1e-14)


def test_there_and_back(images):
    """Images the circle holds come back; a stack of stacks keeps its shape."""
    smooth = images_from_planes(padded_planes(images, 1, N // 2 - 2), 1, N)
    assert torch.allclose(images_from_planes(padded_planes(smooth, 1, N // 2), 1, N), smooth, atol=1e-12)
    assert torch.equal(padded_planes(images[None], 2, 5)[0], padded_planes(images, 2, 5))


def test_padded_planes_invert_exactly_where_they_hold_everything(images):
    """With every frequency of the padded grid (r_max beyond its corner's reach in x and y) the image is what it was."""
    big = images_from_planes(padded_planes(images, 2, N), 2, N)  # |p| to 2N: the whole grid
    assert torch.allclose(big, images, atol=1e-12)


def test_hermitian_column_is_that_of_the_volumes_plane(rng):
    m = 4
    volume = torch.randn(2 * m + 1, 2 * m + 1, m + 1, dtype=torch.complex128, generator=rng)
    volume[torch.arange(2 * m + 1) != m] = 0  # a plane z = 0 in an empty volume
    assert torch.equal(hermitian_planes(volume[m][None])[0], make_hermitian(volume)[m])
    weight = volume.real.contiguous()
    assert torch.equal(hermitian_planes(weight[m][None])[0], make_hermitian(weight)[m])


@pytest.mark.parametrize("how", [{}, {"floor": True}, {"strict": True}])
def test_shell_means_of_a_radial_function(how):
    """A function of the shell alone has it as means, in a plane as in a volume."""
    m, pad, shells = 11, 2.0, 8
    shift = 0.0 if how.get("floor") else 0.5
    volume, plane = ((r / pad + shift).long().double() ** 2 for r in (half_volume_radii(m), half_plane_radii(m)))
    found = shell_means_of_planes(torch.stack([plane, 2 * plane]), pad, shells, **how)
    expected = torch.arange(shells, dtype=torch.float64) ** 2
    expected[6:] = 0  # the circle ends at |p| = 10
    if how.get("strict"):  # |p| < 10 leaves of shell 5 what is below
        assert found[0, 5] == 25
    assert torch.equal(found, torch.stack([expected, 2 * expected]))
    assert torch.equal(shell_means(volume, pad, shells, **how), expected)
