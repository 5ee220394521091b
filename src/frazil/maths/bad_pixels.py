"""Pixels of a detector that cannot be believed: found in the sum of a movie, replaced frame by frame (spec/processing 2.3)."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_GOOD = 7  # good neighbours from which one is drawn; with fewer, a Poisson number of the mean rate
NEAR_HOT = 2.0  # standard deviations below the threshold from which pixels are compared with their own neighbourhood
STATISTICS_ROWS = 512  # at least, of which mean and sd are taken: of a million pixels they are known to a thousandth
DEAD_FROM = 20.0  # mean counts of a pixel from which one without any is dead


def find_bad_pixels(total: Tensor, given: Tensor, sigma: float = 6.0) -> tuple[Tensor, Tensor, float]:
    """(all bad pixels, those that were not given) as (H, W) bool, and the mean of the good ones.

    total: (H, W) sum of the gain-corrected frames. Hot: above mean + sigma·sd of the good pixels, twice, since the first pass finds a mean
    and sd that hot pixels have widened; then pixels nearly that hot which also stand so far above the median of their 5 × 5 neighbourhood.
    Dead: no counts where others have many.
    """
    bad = given.clone()
    mean, sd = 0.0, 0.0
    rows = slice(None, None, max(1, len(total) // STATISTICS_ROWS))
    for _ in range(2):
        some, left_out = total[rows], bad[rows]
        count = some.numel() - int(left_out.sum())
        if not count:
            return bad, bad & ~given, 0.0
        good = some.masked_fill(left_out, 0)
        mean = float(good.sum()) / count
        good.sub_(mean).masked_fill_(left_out, 0)
        sd = (float(good.square_().sum()) / count) ** 0.5
        bad |= total > mean + sigma * sd
    bad |= (total <= 0) & (mean > DEAD_FROM)
    suspects = torch.nonzero((total > mean + (sigma - NEAR_HOT) * sd) & ~bad)
    if len(suspects):
        height, width = total.shape
        step = torch.arange(-2, 3, device=total.device)
        y = (suspects[:, 0, None, None] + step[:, None]).clamp(0, height - 1)
        x = (suspects[:, 1, None, None] + step).clamp(0, width - 1)
        around = total[y, x].reshape(len(suspects), -1).median(1).values
        # A real bright spot, ice or gold, raises its neighbours as well.
        alone = total[suspects[:, 0], suspects[:, 1]] - around > (sigma - 0.5 * NEAR_HOT) * sd
        hot = suspects[alone]
        bad[hot[:, 0], hot[:, 1]] = True
    return bad, bad & ~given, mean


@dataclass(frozen=True)
class Repair:
    """Bad pixels and the good neighbours one of which takes their place, another one in every frame: no fixed pattern is left."""

    index: Tensor  # (m,) int64 into a flattened frame
    neighbours: Tensor  # (m, q) int64, good ones first
    count: Tensor  # (m,) int64 how many are good
    level: float  # mean counts of a pixel and frame
    seed: int

    @staticmethod
    def make(bad: Tensor, level: float, seed: int, reach: int = 2) -> Repair:
        """For bad pixels (H, W); neighbours are sought within ±reach px."""
        height, width = bad.shape
        place = torch.nonzero(bad)
        step = torch.arange(-reach, reach + 1, device=bad.device)
        around = (len(place), len(step) ** 2)
        y = (place[:, 0, None, None] + step[:, None]).clamp(0, height - 1).expand(-1, len(step), len(step)).reshape(around)
        x = (place[:, 1, None, None] + step).clamp(0, width - 1).expand(-1, len(step), len(step)).reshape(around)
        fine = ~bad[y, x]
        order = torch.argsort((~fine).to(torch.uint8), dim=1, stable=True)
        return Repair(place[:, 0] * width + place[:, 1], (y * width + x).gather(1, order), fine.sum(1), level, seed)

    def apply_(self, frames: Tensor, first: int) -> None:
        """Replace the bad pixels of frames (m, H, W), the first of which is frame number `first` of its movie, in place."""
        if not len(self.index):
            return
        for i, frame in enumerate(frames):
            rng = torch.Generator().manual_seed((self.seed * 1_000_003 + first + i) % 2**63)
            dice = torch.rand(len(self.index), generator=rng).to(self.count.device)
            chosen = (dice * self.count).long().clamp(max=self.neighbours.shape[1] - 1)
            flat = frame.reshape(-1)
            value = flat[self.neighbours.gather(1, chosen[:, None])[:, 0]]
            drawn = torch.poisson(torch.full((len(self.index),), max(self.level, 0.0)), generator=rng).to(value)
            flat[self.index] = torch.where(self.count >= FEWEST_GOOD, value, drawn)


ORIENTATIONS = tuple((turn, flip) for flip in (0, 1) for turn in range(4))  # all eight; a left-right flip is one of these


def gain_match(mean: Tensor, gain: Tensor) -> float:
    """How many standard deviations the raw mean frame (H, W) and a gain (H, W) agree by: correlation of log(mean) with −log(gain),
    high-passed.

    A pixel that counts more needs a smaller gain. About 0 for a gain that has nothing to do with the frames, or is turned wrongly.
    """
    good = (gain > 0) & (mean > 0)
    if int(good.sum()) < 100:
        return 0.0
    pictures = []
    for values in (mean, 1 / gain.clamp(min=1e-6)):
        log = torch.where(good, values.clamp(min=1e-6), torch.ones_like(values)).log()
        around = torch.nn.functional.avg_pool2d(log[None, None], 9, 1, 4, count_include_pad=False)[0, 0]
        high = torch.where(good, log - around, torch.zeros_like(log))
        spread = float(high.std())
        pictures.append(high.clamp(-4 * spread, 4 * spread))
    a, b = pictures
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm * float(good.sum()) ** 0.5 if norm > 0 else 0.0
