"""LoG: discs of three sizes; a shell's profile learned from nothing but a range of diameters."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from frazil.maths.peaks import match_points
from frazil.steps.blobs import BlobSettings, blob_candidates, blob_map, blobs_apart, learn_profile
from frazil.steps.pick import PickSettings, candidates, make_bank, match, prepare

PIXEL = 5.0


def discs(places: list[tuple[int, int, float]], shape=(300, 300), hollow: float = 0.0) -> torch.Tensor:
    """Dark soft discs (x, y, diameter in Å), or projected shells."""
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij")
    image = torch.zeros(shape)
    for cx, cy, diameter in places:
        r = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() * PIXEL
        outer, inner = diameter / 2, hollow * diameter / 2
        depth = (outer**2 - r**2).clamp(min=0).sqrt() - (inner**2 - r**2).clamp(min=0).sqrt() if hollow else torch.sigmoid((outer - r) / 4)
        image -= depth
    return image


def test_only_discs_in_range_are_picked_and_their_size_is_told(rng):
    places = [(60, 60, 60.0), (150, 70, 150.0), (230, 220, 150.0), (90, 210, 400.0)]
    image = discs(places) + 0.3 * torch.randn(300, 300, generator=rng)
    settings = BlobSettings(120.0, 180.0)
    found = blob_candidates(blob_map(image, PIXEL, settings), 3.0, 30.0)
    kept = blobs_apart(found, settings, PIXEL)[:2]
    pairs = match_points(found.xy[kept].numpy(), found.value[kept].double().numpy(), np.array([p[:2] for p in places[1:3]], float), 4.0)
    assert pairs.gains.all()
    assert found.size is not None and all(abs(float(s) / 150 - 1) <= 0.2 for s in found.size[kept])


@pytest.mark.parametrize("limits", [(110.0, 150.0), (90.0, 160.0)])
def test_a_shell_is_learned_and_centred(limits, rng):
    places = [(x + int(torch.randint(9, (1,), generator=rng)), y + int(torch.randint(9, (1,), generator=rng)), 124.0)
              for x in range(35, 270, 45) for y in range(35, 270, 45)]  # fmt: skip
    image = discs(places, hollow=0.65) / 30 + 0.7 * torch.randn(300, 300, generator=rng)
    learned = learn_profile([image], PIXEL, BlobSettings(*limits))
    bank = make_bank(learned.template, learned.pixel_size, (300, 300), PIXEL, PickSettings(learned.diameter, 20.0, 360.0, "ncc"))
    found = candidates(match(prepare(image, bank), bank), 0.2, 20.0)
    kept = blobs_apart(found, BlobSettings(*limits), PIXEL)[: len(places)]
    pairs = match_points(found.xy[kept].numpy(), found.value[kept].double().numpy(), np.array([p[:2] for p in places], float), 5.0)
    assert pairs.gains.mean() > 0.9 and np.nanmedian(pairs.distance) * PIXEL < 6
