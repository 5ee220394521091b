"""Extraction: places and residuals, Fourier crop, recentring on a point of the map, duplicates, dust."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.data import Optics
from frazil.maths.ctf import ctf
from frazil.maths.fourier import fourier_resample
from frazil.maths.rotation import random_rotations
from frazil.ops.boxes.reference import background
from frazil.steps.extract import ExtractSettings, box_for, extract, first_of_each, fourier_crop, place, refined_places, replace_dust_

PLAIN = {"normalise": False, "invert": False}


def gaussian(shape: tuple[int, int], x: float, y: float, sigma: float) -> torch.Tensor:
    """(h, w) float64 Gaussian at a place that is no pixel's."""
    h, w = shape
    lines = [torch.exp(-((torch.arange(n, dtype=torch.float64) - c) ** 2) / (2 * sigma**2)) for n, c in ((h, y), (w, x))]
    return lines[0][:, None] * lines[1]


def centroid(image: torch.Tensor) -> torch.Tensor:
    """(2,) x, y from the pixel N/2."""
    line = torch.arange(len(image), dtype=image.dtype) - len(image) // 2
    return torch.stack([(image.sum(0) * line).sum(), (image.sum(1) * line).sum()]) / image.sum()


@pytest.mark.parametrize("size", [40, 20])
def test_a_gaussian_between_pixels_is_where_centre_less_residual_says(size):
    x, y = 61.37, 48.81
    micrograph = gaussian((100, 120), x, y, 4.0)
    placed = place(torch.tensor([[x, y]]), (100, 120), 40)
    assert placed.centre.tolist() == [[61, 49]] and placed.outside[0] == 0
    (_, images, _), = extract(micrograph, placed.centre, ExtractSettings(40, size, 30.0, **PLAIN))
    found = centroid(images[0]) * (40 / size)
    # moved by the residual, the particle is in the middle: the convention of rlnOriginX/Y
    assert (found + placed.residual[0]).abs().max() < 0.02


def test_halves_round_away_and_what_is_outside_is_measured():
    xy = torch.tensor([[10.5, 2.5], [0.0, 0.0], [100.0, 50.0], [-60.0, 5.0], [99.0, 25.0]])
    placed = place(xy, (50, 100), 20)
    assert placed.centre[0].tolist() == [11, 3]
    assert placed.outside.tolist() == pytest.approx([1 - 13 / 20, 0.75, 0.75, 1.0, 1 - 11 / 20])


def test_fourier_crop_keeps_every_coefficient_below_the_new_nyquist(rng):
    images = torch.randn(2, 48, 48, generator=rng, dtype=torch.float64)
    small = fourier_crop(images, 20)
    assert torch.allclose(small.mean((1, 2)), images.mean((1, 2)))
    whole, cropped = torch.fft.rfft2(images) / 48**2, torch.fft.rfft2(small) / 20**2
    keep = [*range(10), *range(-9, 0)]
    assert (whole[:, keep, :10] - cropped[:, keep, :10]).abs().max() < 1e-5 * whole.abs().max()
    assert torch.allclose(small, fourier_resample(images, 20, dims=2))


def test_refined_places_follow_shift_rotation_and_point(rng):
    coordinate, shift = torch.tensor([[100.0, 200.0]] * 3), torch.tensor([[3.0, -4.5]] * 3)
    assert torch.allclose(refined_places(coordinate, shift, torch.eye(3).repeat(3, 1, 1), 1.5), torch.tensor([98.0, 203.0]).double())
    rotation = random_rotations(3, rng)
    point = torch.tensor([15.0, -6.0, 30.0], dtype=torch.float64)
    moved = refined_places(coordinate, 0 * shift, rotation, 1.5, point) - coordinate
    # a projection of a dot at the point shows it there: camera coordinates are A · map coordinates
    assert torch.allclose(moved, torch.stack([(r @ point)[:2] / 1.5 for r in rotation]))


def test_of_particles_too_near_the_best_stays():
    xy = torch.tensor([[0.0, 0.0], [5.0, 0.0], [9.0, 0.0], [50.0, 0.0]])
    assert first_of_each(xy, torch.tensor([0.1, 0.9, 0.5, 0.2]), 6.0).tolist() == [1, 3]
    assert first_of_each(xy, torch.tensor([0.8, 0.5, 0.9, 0.2]), 6.0).tolist() == [0, 2, 3]


def test_boxes_are_normalised_inverted_and_in_order_and_the_micrograph_is_left_alone(rng):
    micrograph = 500 + 20 * torch.randn(200, 300, generator=rng)
    micrograph[90:110, 140:160] -= 60  # a dark particle
    before = micrograph.clone()
    centre = torch.cat([torch.tensor([[150, 100]]), torch.randint(30, 170, (200, 2), generator=rng)])
    settings = ExtractSettings(48, 24, 36.0)
    parts = list(extract(micrograph, centre, settings))
    assert torch.equal(torch.cat([index for index, _, _ in parts]), torch.arange(201)) and torch.equal(micrograph, before)
    images, mask = torch.cat([images for _, images, _ in parts]), background(24, 9.0)[1]
    outside = images[:, mask].double()
    assert outside.mean(1).abs().max() < 1e-5 and (outside.std(1, correction=0) - 1).abs().max() < 1e-5
    assert images[0, 10:14, 10:14].mean() > 3  # bright now


def test_dust_becomes_background_and_the_rest_stays(rng):
    images = torch.randn(3, 40, 40, generator=rng)
    original = images.clone()
    images[1, 5, 5], images[2, 20, 20] = 80.0, -70.0
    replace_dust_(images, 15.0, 8.0, 8.0, torch.Generator().manual_seed(1))
    assert images.abs().max() < 6
    changed = images != original
    assert changed.sum() == 2 and changed[1, 5, 5] and changed[2, 20, 20]


def test_premultiplied_images_have_the_ctf_once_more(rng):
    optics, one = Optics(2.0, 32), torch.ones(1, dtype=torch.float64)
    lines = torch.fft.fftfreq(32, 2.0, dtype=torch.float64), torch.fft.rfftfreq(32, 2.0, dtype=torch.float64)
    k = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1], -1).reshape(-1, 2)
    factor = ctf(k, torch.tensor([[15000.0, 14000.0, 30.0]]).double(), 0 * one, 0 * one, one, optics).view(1, 32, 17)
    micrograph = torch.randn(64, 64, generator=rng, dtype=torch.float64)
    settings, centre = ExtractSettings(32, 32, 24.0, **PLAIN), torch.tensor([[30, 31]])
    (_, plain, _), = extract(micrograph, centre, settings)
    (_, with_ctf, _), = extract(micrograph, centre, settings, ctf=lambda index: factor)
    interior = (slice(None), slice(1, 16), slice(1, 16))  # away from the frequencies that are their own mates
    assert torch.allclose(torch.fft.rfft2(with_ctf)[interior], (torch.fft.rfft2(plain) * factor)[interior], atol=1e-9)


def test_a_box_for_a_diameter_is_wide_enough_and_fast():
    assert box_for(150.0, 1.0) == 240  # 226 to 238 have large prime factors or are odd
    assert all(box_for(d, 0.9) * 0.9 >= 1.5 * d and box_for(d, 0.9) % 2 == 0 for d in (100.0, 173.0, 333.0))
    assert math.gcd(box_for(173.0, 0.9), 11 * 13 * 17 * 19) == 1
