"""Features of class averages: on averages whose features are known."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.class_features import NAMES, ClassFacts, class_features
from frazil.maths.masks import soft_circle
from frazil.simulate.averages import pictures

PIXEL, BOX, DIAMETER = 3.0, 64, 160.0


def features(averages: torch.Tensor, **facts) -> dict[str, torch.Tensor]:
    k = len(averages)
    values = {"resolution": torch.full((k,), 16.0), "share": torch.full((k,), 1 / k), "accuracy": torch.full((k,), 3.0)}
    found = class_features(averages, PIXEL, DIAMETER, ClassFacts(**(values | facts)))
    return dict(zip(NAMES, found.T, strict=True))


def disc(x: float, y: float, radius: float) -> torch.Tensor:
    """(N, N) disc at a place from the middle, px."""
    line = torch.arange(BOX, dtype=torch.float32) - BOX // 2
    return torch.sigmoid(2 * (radius - torch.hypot(line - x, (line - y)[:, None])))


def test_numbers_of_the_run():
    found = features(disc(0, 0, 10).repeat(3, 1, 1), resolution=torch.tensor([8.0, 16.0, 40.0]), share=torch.tensor([0.5, 0.25, 0.25]),
                     accuracy=torch.tensor([2.0, 999.0, math.e]))  # fmt: skip
    assert found["resolution"].tolist() == pytest.approx([math.log(20), math.log(10), math.log(4)])
    assert found["relative"].tolist() == pytest.approx([0, -math.log(2), -math.log(5)])
    assert found["share"].tolist() == pytest.approx([math.log(1.5), math.log(0.75), math.log(0.75)])
    assert found["accuracy"].tolist() == pytest.approx([math.log(2), math.log(60), 1])


def test_where_the_density_is():
    middle, off = disc(0, 0, 9), disc(10, 4, 9)
    two, rim = disc(-11, 0, 7) + disc(11, 0, 7), disc(21, 0, 9)
    found = features(torch.stack([middle, off, two, rim]) + 0.02 * torch.randn(4, BOX, BOX, generator=torch.Generator().manual_seed(1)))
    radius = 0.5 * DIAMETER / PIXEL
    assert found["centring"][:2].tolist() == pytest.approx([0, math.hypot(10, 4) / radius], abs=0.02)
    assert found["fragments"].tolist() == pytest.approx([0, 0, 0.5, 0], abs=0.03)
    assert found["edge"][0] == 0 and found["edge"][3] > 0.1 and found["touching"][3] == found["edge"][3]
    assert found["compactness"][0] > 0.9 and found["area"][1] < 0.2


def test_contrast_and_detail_tell_structure_from_noise(rng):
    good = pictures(1, BOX, rng)[0] * soft_circle(BOX, 25, 4)
    noise = torch.randn(BOX, BOX, generator=rng) * soft_circle(BOX, 25, 4)
    found = features(torch.stack([good + 0.05 * noise, noise]))
    assert found["contrast"][0] > found["contrast"][1] + 0.5 and found["detail"][0] > found["detail"][1]


def test_grey_scale_and_offset_do_not_matter_and_holes_are_filled(rng):
    image = disc(2, 1, 12) + 0.05 * torch.randn(BOX, BOX, generator=rng)
    shell = image - disc(2, 1, 6)
    found = features(torch.stack([image, 1e4 * image, image - 70, shell]))
    for name in NAMES:
        assert found[name][1] == pytest.approx(float(found[name][0]), abs=2e-3) and found[name][2] == pytest.approx(
            float(found[name][0]), abs=2e-2
        )
    assert found["area"][3] < 0.15 and found["compactness"][3] > 0.85  # a shell is one particle


def test_empty_classes_have_no_features(rng):
    averages = disc(0, 0, 10).repeat(3, 1, 1)
    averages[1] = 0
    found = torch.stack(list(features(averages, share=torch.tensor([0.7, 0.3, 0.0])).values()), -1)
    assert torch.isfinite(found).all(-1).tolist() == [True, False, False]
