"""Moved, normalised, masked images: by hand, and Triton against the float64 reference."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.masks import mask_images, soft_circle
from frazil.ops.prepare import prepare


def test_a_pixel_moves_by_the_shift_and_leaves_at_the_edge() -> None:
    images = torch.zeros(3, 6, 6)
    images[:, 2, 1] = 2.0
    shift = torch.tensor([[1, 0], [0, -2], [-2, 0]])
    plain, masked = prepare(images, shift, torch.tensor([0.5, 1.0, 1.0]), torch.ones(6, 6))
    expected = torch.zeros(3, 6, 6)
    expected[0, 2, 2], expected[1, 0, 1] = 1.0, 2.0
    assert torch.equal(plain, expected)
    assert torch.equal(masked, plain)  # nothing is outside the mask


def test_the_mask_is_that_of_mask_images(rng: torch.Generator) -> None:
    images = torch.randn(2, 12, 12, generator=rng, dtype=torch.float64) + 3
    circle = soft_circle(12, 3, 2, dtype=torch.float64)
    plain, masked = prepare(images, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, dtype=torch.float64), circle)
    torch.testing.assert_close(plain, images)
    torch.testing.assert_close(masked, mask_images(images, 3, 2))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_triton_agrees_with_the_reference(rng: torch.Generator, stored: torch.dtype, device: str) -> None:
    n = 38  # more than a block of pixels
    images = torch.randn(3, n, n, generator=rng).to(stored)
    shift = torch.tensor([[0, 0], [3, -5], [-40, 2]])
    factor, circle = torch.tensor([1.0, 0.7, 1.2]), soft_circle(n, 11, 4)
    exact = prepare(images.double(), shift, factor.double(), circle.double(), implementation="reference")
    found = prepare(*(t.to(device) for t in (images, shift, factor, circle)), implementation="triton")
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-6, atol=1e-6)


def test_bad_arguments() -> None:
    good = dict(images=torch.zeros(2, 4, 4), shift=torch.zeros(2, 2, dtype=torch.int64), factor=torch.ones(2), circle=torch.ones(4, 4))
    for name, value in (("shift", torch.zeros(2, 2)), ("factor", torch.ones(3)), ("circle", torch.ones(4, 4).double())):
        with pytest.raises(ValueError, match="prepare"):
            prepare(**{**good, name: value})
