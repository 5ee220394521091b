"""Interpolation corrections and iterative gridding (spec/refinement 3.4)."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.maths.fourier import half_volume_radius, make_hermitian, map_from_half_volume, padded_ft, pixel_list
from frazil.maths.gridding import blob_transform, iterative_gridding, sinc2
from frazil.maths.rotation import euler_to_matrix


def sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


@pytest.mark.parametrize("kind", ["radial", "separable"])
def test_known_values(kind: str) -> None:
    c = sinc2(16, 2, kind, dtype=torch.float64)
    assert c.shape == (16, 16, 16) and c[8, 8, 8] == 1
    assert c[8, 8, 0].item() == pytest.approx(sinc(8 / 32) ** 2) and c[4, 8, 8].item() == pytest.approx(sinc(4 / 32) ** 2)
    diagonal = sinc(math.hypot(3, 4) / 32) ** 2 if kind == "radial" else (sinc(3 / 32) * sinc(4 / 32)) ** 2
    assert c[8, 11, 12].item() == pytest.approx(diagonal)
    torch.testing.assert_close(sinc2(16, 2, kind, dtype=torch.float64, dims=2), c[8])
    assert sinc2(16, 1, kind).dtype == torch.float32 and (sinc2(16, 1, kind) > 0).all()


def test_the_two_kinds_agree_to_first_order_and_others_are_refused() -> None:
    """Near the centre both are 1 − (π²/3) r²/(PN)²; they differ by the fourth power."""
    gap = (sinc2(64, 2, "radial", dtype=torch.float64) - sinc2(64, 2, "separable", dtype=torch.float64)).abs()
    at = [float(gap[32 + i, 32 + i, 32 + i]) for i in (4, 8)]
    assert at[0] < 1e-4 and at[1] / at[0] == pytest.approx(16, rel=0.1)
    with pytest.raises(ValueError, match="radial or separable"):
        sinc2(8, 2, "cubic")


@pytest.mark.parametrize("pad", [1, 2])
def test_separable_form_is_what_linear_interpolation_does(pad: float, trilinear, rng: torch.Generator) -> None:
    """Mean over all fractions of a voxel of e^{2πi p·x} interpolated = e^{2πi p·x} sinc²: the map is multiplied by it."""
    box, m = 8, half_volume_radius(pad, 4)
    point = torch.zeros(box, box, box, dtype=torch.float64)
    point[6, 5, 7] = 1.0  # xyz 3, 1, 2 from the centre
    half = padded_ft(point, pad, 4)
    fractions = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    offset = torch.stack(torch.meshgrid(fractions, fractions, fractions, indexing="ij"), -1).reshape(-1, 3)
    p = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64) + offset
    found = sum(half.reshape(-1)[index] * weight for index, weight in trilinear.corners(p, m))
    exact = torch.exp(-2j * math.pi / (pad * box) * (p @ torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))) / box**2
    ratio = (found * exact.conj()).mean().real / exact.abs().square().mean()
    assert ratio.item() == pytest.approx(sinc2(box, pad, "separable", dtype=torch.float64)[6, 5, 7].item(), abs=2e-3)


def test_blob_transform_is_the_radial_integral() -> None:
    a, alpha = 3.8, 15.0
    r = (torch.arange(20000, dtype=torch.float64) + 0.5) * a / 20000
    blob = torch.special.i0(alpha * (1 - (r / a) ** 2).sqrt())
    xi = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.62825, 0.7, 0.9], dtype=torch.float64)
    integral = (4 * math.pi * r**2 * blob * torch.sinc(2 * r * xi[:, None])).sum(1)
    torch.testing.assert_close(blob_transform(xi, a), integral / integral[0], atol=1e-8, rtol=1e-4)


def test_even_sampling_needs_no_more_than_its_inverse() -> None:
    m = half_volume_radius(2, 10)
    q = iterative_gridding(torch.full((2 * m + 1, 2 * m + 1, m + 1), 4.0), 2, 20)
    radius = half_radius(m)
    assert q.dtype == torch.float64 and (q[radius <= m - 8] * 4 - 1).abs().max() < 0.02
    assert not q[radius > m - 1].any()


def half_radius(m: int) -> Tensor:
    """|p| of a half volume's elements."""
    c = torch.arange(-m, m + 1, dtype=torch.float64)
    return (c[:, None, None].square() + c[None, :, None].square() + c[m:].square()).sqrt()


def test_weights_make_the_blurred_sampling_even(rng: torch.Generator) -> None:
    """C * (Q·W) = 1 away from the rim, C summed directly from the blob's own values, for a sampling that varies sixfold."""
    m, a, alpha = 12, 3.8, 15.0
    w = make_hermitian(0.2 + torch.rand(2 * m + 1, 2 * m + 1, m + 1, generator=rng, dtype=torch.float64))
    q = iterative_gridding(w, 2, 12)
    product = q * w
    c = torch.arange(-4, 5, dtype=torch.float64)
    r2 = (c[:, None, None].square() + c[:, None].square() + c.square()) / a**2
    kernel = torch.where(r2 <= 1, torch.special.i0(alpha * (1 - r2).clamp(min=0).sqrt()), 0)

    def whole(half: Tensor) -> Tensor:
        return torch.cat([half.flip(0, 1, 2)[..., :-1], half], -1)  # x < 0 by symmetry

    middle = whole(half_radius(m)) < m - 5

    def blurred(half: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(whole(half)[None, None], (kernel / kernel.sum())[None, None], padding=4)[0, 0][middle]

    assert (blurred(product) - 1).abs().max() < 0.03
    before = blurred(w)
    assert (before / before.mean() - 1).abs().max() > 0.1
    once = whole(iterative_gridding(w, 2, 12, iterations=1))[middle]  # the first round divides by C * W
    assert (once * before - 1).abs().max() < 0.01


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale_of_the_sampling_does_not_matter(factor: float, rng: torch.Generator) -> None:
    w = torch.rand(11, 11, 6, generator=rng, dtype=torch.float64)
    copy = w.clone()
    torch.testing.assert_close(iterative_gridding(w * factor, 2, 4) * factor, iterative_gridding(w, 2, 4))
    assert torch.equal(w, copy)
    assert not iterative_gridding(torch.zeros(11, 11, 6), 2, 4).any()


def test_a_half_volume_that_does_not_belong_to_the_box_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for a box of 8"):
        iterative_gridding(torch.ones(41, 41, 21), 2, 8)


def test_a_map_from_very_uneven_views(blobs, trilinear, rng: torch.Generator) -> None:
    """Nine views in ten from one belt: both gridding and division undo the unevenness, sums alone do not."""
    n = 500
    u = torch.rand(n, 3, generator=rng, dtype=torch.float64)
    belt = torch.arange(n) < 0.9 * n
    rotations = euler_to_matrix(torch.stack([u[:, 0] * 360, torch.where(belt, 50 + 25 * u[:, 1], 180 * u[:, 1]), u[:, 2] * 360], -1))
    pixels = pixel_list(24, 22)
    k, m = pixels.k()[: pixels.inside], half_volume_radius(2, 11)
    data = make_hermitian(trilinear.splat(blobs.slices(rotations, k), rotations, k, 2, m))
    weight = make_hermitian(trilinear.splat(torch.ones(n, len(k), dtype=torch.complex128), rotations, k, 2, m)).real
    divided = torch.where(weight > 1e-3 * weight.mean(), data / weight.clamp(min=1e-30), 0)
    truth, correction = blobs.map(), sinc2(24, 2, dtype=torch.float64)
    errors = []
    for half in (data * iterative_gridding(weight, 2, 24), divided, data / weight.mean()):
        found = map_from_half_volume(half, 2, 24) / correction
        slope = (found * truth).sum() / truth.square().sum()
        errors.append(float((found / slope - truth).norm() / truth.norm()))
        if len(errors) < 3:
            assert slope.item() == pytest.approx(1, abs=0.02)
    gridded, direct, raw = errors
    assert gridded < 0.07 and direct < 0.07 and raw > 4 * gridded
