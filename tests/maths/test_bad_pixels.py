"""Hot and dead pixels, their replacement, and whether a gain fits the frames."""
from __future__ import annotations

import torch

from frazil.maths.bad_pixels import ORIENTATIONS, Repair, find_bad_pixels, gain_match


def counts(rng: torch.Generator, mean: float = 40.0) -> torch.Tensor:
    return torch.poisson(torch.full((120, 100), mean), generator=rng)


def test_hot_dead_and_nearly_hot_pixels_are_found(rng: torch.Generator) -> None:
    total = counts(rng)
    total[5, 7], total[50, 60], total[80, 20] = 5000, 400, 0
    total[30, 30] = 40 + 5.6 * 40**0.5 + 1  # below 6 sd of the whole, but alone
    given = torch.zeros(120, 100, dtype=torch.bool)
    given[0] = True
    bad, new, mean = find_bad_pixels(total, given)
    assert all(bad[y, x] for y, x in ((5, 7), (50, 60), (80, 20), (30, 30)))
    assert bool(bad[0].all()) and not bool(new[0].any()) and 4 <= int(new.sum()) <= 6
    assert abs(mean - 40) < 0.5


def test_a_bright_object_is_no_hot_pixel(rng: torch.Generator) -> None:
    total = counts(rng)
    total[60:66, 60:66] += 32
    _, new, _ = find_bad_pixels(total, torch.zeros_like(total, dtype=torch.bool))
    assert int(new[61:65, 61:65].sum()) <= 3


def test_replacements_are_neighbours_and_differ_from_frame_to_frame(rng: torch.Generator) -> None:
    frames = torch.poisson(torch.full((30, 40, 40), 9.0), generator=rng).to(torch.uint8)
    bad = torch.zeros(40, 40, dtype=torch.bool)
    bad[0, 0] = bad[20, 20] = True
    bad[25:35, 25:35] = True  # the middle of it has no good neighbour
    broken = frames.clone()
    broken[:, bad] = 255
    repair = Repair.make(bad, 9.0, seed=3)
    once = broken.clone()
    repair.apply_(once, 0)
    assert torch.equal(once[:, ~bad], frames[:, ~bad])
    assert once[:, 20, 20].float().std() > 1 and 7 < once[:, 28:32, 28:32].float().mean() < 11
    again = broken[10:].clone()
    repair.apply_(again, 10)
    assert torch.equal(again, once[10:])  # whatever the pieces a movie is read in


def test_only_the_right_orientation_of_a_gain_fits(rng: torch.Generator) -> None:
    gain = torch.exp(0.05 * torch.randn(96, 96, generator=rng))
    gain[10, 10] = 0
    raw = torch.poisson(30 / gain.clamp(min=0.1), generator=rng)
    scores = {}
    for turn, flip in ORIENTATIONS:
        turned = torch.rot90(gain, turn, (0, 1))
        scores[turn, flip] = gain_match(raw, turned.flip(0) if flip else turned)
    assert scores.pop((0, 0)) > 15 and max(scores.values()) < 5
    assert gain_match(raw, torch.where(gain > 0, 1 / gain.clamp(min=0.1), 0.0)) < -10  # counts instead of factors
