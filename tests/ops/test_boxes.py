"""ops.boxes: the kernel against the float64 reference, edges, planes, what cannot be normalised."""
from __future__ import annotations

import pytest
import torch

from frazil.ops.boxes import cut, level_
from frazil.ops.boxes.reference import background

IMPLEMENTATIONS = ("reference", "cpu")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boxes_hold_the_pixels_and_repeat_the_edge(implementation, rng):
    image = torch.randn(30, 40, generator=rng)
    corner = torch.tensor([[3, 5], [-4, -2], [35, 26], [-20, 10], [50, 40]])
    boxes = cut(image, corner, 12, implementation=implementation)
    padded = torch.nn.functional.pad(image[None, None], (30, 30, 30, 30), mode="replicate")[0, 0]
    for box, (x, y) in zip(boxes, corner.tolist(), strict=True):
        assert torch.equal(box, padded[y + 30 : y + 42, x + 30 : x + 42])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_background_has_mean_0_and_sd_1_on_a_large_slope(implementation, dtype, limit, rng):
    line = torch.arange(50, dtype=torch.float64)
    images = (5000 + 3 * line[:, None] - 2 * line + 30 * torch.randn(4, 50, 50, generator=rng, dtype=torch.float64)).to(dtype)
    original = images.double().clone()
    found = level_(images, 18.0, -1.0, implementation=implementation)
    mask = background(50, 18.0)[1]
    outside = images.double()[:, mask]
    assert outside.mean(1).abs().max() < limit and (outside.std(1, correction=0) - 1).abs().max() < limit
    assert (found[:, 0] - (5000 + 25 * 3 - 25 * 2)).abs().max() < 5 and (found[:, 1] - 30).abs().max() < 3
    basis = background(50, 18.0)[0]
    for image, start in zip(images.double(), original, strict=True):  # by an independent least-squares fit
        plane = torch.linalg.lstsq(basis[:, mask].T, start[mask][:, None]).solution[:, 0]
        rest = start - (plane[:, None, None] * basis).sum(0)
        assert torch.allclose(image, -rest / rest[mask].square().mean().sqrt(), atol=max(20 * limit, 1e-9))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_alone_becomes_flat_and_without_ramp_only_the_mean_goes(implementation, rng):
    line = torch.arange(32, dtype=torch.float64)
    images = (7 + 0.5 * line[:, None] - line).repeat(1, 1, 1)
    signal = torch.randn(1, 32, 32, generator=rng, dtype=torch.float64)
    both, alone = images + signal, signal.clone()
    level_(both, 10.0, 1.0, implementation=implementation)
    level_(alone, 10.0, 1.0, implementation=implementation)
    assert torch.allclose(both, alone, atol=1e-10)  # the plane is removed exactly
    sloped = images.clone()
    level_(sloped, 10.0, 1.0, ramp=False, implementation=implementation)
    assert torch.allclose(sloped[0, 0].diff(), sloped[0, 0].diff()[:1]) and sloped[0, 0, 0] > sloped[0, 0, -1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flat_or_broken_images_are_told(implementation, rng):
    images = torch.randn(4, 24, 24, generator=rng)
    images[1] = 3.5
    images[2, 12, 12] = torch.nan  # inside the circle, where no sum of the background sees it
    images[3, 0, 0] = torch.inf
    sd = level_(images, 9.0, -1.0, implementation=implementation)[:, 1]
    good = torch.isfinite(sd) & (sd > 0)
    assert good.tolist() == [True, False, False, False]


def test_wrong_arguments_are_refused(rng):
    image = torch.randn(30, 30, generator=rng)
    with pytest.raises(ValueError, match="cut: micrograph"):
        cut(image, torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="no background"):
        level_(image[None].clone(), 25.0, 1.0)
    with pytest.raises(ValueError, match="expected"):
        level_(image.clone(), 5.0, 1.0)
