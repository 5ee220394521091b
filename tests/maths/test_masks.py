"""Soft masks (spec/refinement 2.4, 3.4)."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.masks import check_mask, mask_images, mask_volume, soft_circle, soft_edge, soft_sphere


def test_edge_is_a_raised_cosine_of_the_given_width() -> None:
    r = torch.tensor([0.0, 9.99, 10.0, 11.25, 12.5, 13.75, 15.0, 15.01, 40.0], dtype=torch.float64)
    low, high = 0.5 - math.sqrt(0.125), 0.5 + math.sqrt(0.125)
    assert soft_edge(r, 10, 5).tolist() == pytest.approx([1, 1, 1, high, 0.5, low, 0, 0, 0], abs=1e-12)
    assert soft_edge(r, 10, 0).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    # the spec's words: fill fraction ½ + ½cos(π(R+w−r)/w)
    assert soft_edge(r[3:6], 10, 5).tolist() == pytest.approx([0.5 - 0.5 * math.cos(math.pi * (15 - x) / 5) for x in (11.25, 12.5, 13.75)])


@pytest.mark.parametrize("box", [32, 33])
def test_centre_is_pixel_half_the_box(box: int) -> None:
    circle = soft_circle(box, 8, 3, dtype=torch.float64)
    c = torch.arange(box, dtype=torch.float64)
    assert (circle.sum(0) @ c / circle.sum()).item() == pytest.approx(box // 2)
    sphere = soft_sphere(box, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(sphere[box // 2], circle)
    torch.testing.assert_close(sphere, sphere.permute(2, 0, 1))


def test_volume_of_a_sphere() -> None:
    sphere = soft_sphere(48, 15, 4, dtype=torch.float64)
    shell = sum(4 * math.pi * (15 + x) ** 2 * 0.04 * float(soft_edge(torch.tensor(15 + x, dtype=torch.float64), 15, 4))
                for x in torch.arange(0.02, 4, 0.04).tolist())  # fmt: skip
    assert sphere.sum().item() == pytest.approx(4 / 3 * math.pi * 15**3 + shell, rel=2e-3)


def test_outside_becomes_its_own_weighted_mean(rng: torch.Generator) -> None:
    images = torch.randn(3, 24, 24, generator=rng, dtype=torch.float64) + torch.tensor([0.0, 5.0, -2.0])[:, None, None]
    before = images.clone()
    masked = mask_images(images, 7, 3)
    keep = soft_circle(24, 7, 3, dtype=torch.float64)
    mean = (images * (1 - keep)).sum((1, 2)) / (1 - keep).sum()
    torch.testing.assert_close(masked[:, keep == 0], mean[:, None].expand(-1, int((keep == 0).sum())))
    assert torch.equal(masked[:, keep == 1], images[:, keep == 1])
    edge = (keep > 0.2) & (keep < 0.8)
    torch.testing.assert_close(masked[:, edge], images[:, edge] * keep[edge] + mean[:, None] * (1 - keep[edge]))
    assert torch.equal(images, before)


def test_a_constant_image_stays_as_it_is() -> None:
    torch.testing.assert_close(mask_images(torch.full((2, 16, 16), 3.5), 4, 5), torch.full((2, 16, 16), 3.5))


def test_noise_fills_the_outside(rng: torch.Generator) -> None:
    images, noise = torch.randn(2, 3, 16, 16, generator=rng)
    masked, keep = mask_images(images, 4, 2, noise), soft_circle(16, 4, 2)
    assert torch.equal(masked[:, keep == 0], noise[:, keep == 0]) and torch.equal(masked[:, keep == 1], images[:, keep == 1])
    torch.testing.assert_close(masked, images * keep + noise * (1 - keep))


def test_a_mask_wider_than_the_box_changes_nothing(rng: torch.Generator) -> None:
    images = torch.randn(2, 16, 16, generator=rng)
    assert torch.equal(mask_images(images, 20, 5), images)


def test_dtype_is_kept(rng: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        assert mask_images(torch.randn(1, 8, 8, generator=rng).to(dtype), 2, 2).dtype == dtype


def test_volume_outside_becomes_its_mean(rng: torch.Generator) -> None:
    volume = torch.randn(16, 16, 16, generator=rng, dtype=torch.float64) + 4
    masked, keep = mask_volume(volume, 5, 3), soft_sphere(16, 5, 3, dtype=torch.float64)
    mean = (volume * (1 - keep)).sum() / (1 - keep).sum()
    assert masked[0, 0, 0].item() == pytest.approx(mean.item()) and masked[8, 8, 8] == volume[8, 8, 8]


def test_what_is_said_of_a_bad_mask() -> None:
    good = soft_sphere(8, 2, 1)
    assert check_mask(good) is None and check_mask(good, box=8) is None
    for bad, words in (
        (good * 1.5, ["solvent.mrc", "1.5", "0 to 1"]),
        (good - 0.25, ["-0.25", "0 to 1"]),
        (torch.where(good > 0.5, float("nan"), good), ["NaN"]),
        (good * 0, ["every voxel is 0"]),
    ):
        message = check_mask(bad, "solvent.mrc")
        assert message and "\n" not in message and all(w in message for w in words)
    assert "8 x 8 x 8" in (check_mask(good, box=10) or "")
