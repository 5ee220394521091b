"""What warp_sum_ does, sixteen neighbours gathered one after the other."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.warp import TILE


def spline_weights(t: Tensor) -> list[Tensor]:
    """Cubic B-spline weights of the neighbours −1, 0, 1, 2 of a position with fraction t."""
    u = 1 - t
    return [u**3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (4 - 6 * u**2 + 3 * u**3) / 6, t**3 / 6]


def warp_sum_(sums: Tensor, frames: Tensor, gain: Tensor, shifts: Tensor, weights: Tensor) -> None:
    """See frazil.ops.warp."""
    _, height, width = sums.shape
    y = torch.arange(height, device=sums.device)
    x = torch.arange(width, device=sums.device)
    for f, frame in enumerate(frames):
        field = shifts[f][(y // TILE)[:, None], (x // TILE)[None, :]]
        # The fraction is that of the displacement alone: exact however large the coordinate is.
        back = -field
        whole = torch.floor(back)
        wx, wy = (spline_weights((back - whole)[..., axis]) for axis in (0, 1))
        ix, iy = x + whole[..., 0].long(), y[:, None] + whole[..., 1].long()
        flat = (frame.float() * gain).reshape(-1)
        value = torch.zeros_like(sums[0])
        for j in range(4):
            row = (iy + j - 1).clamp(0, height - 1) * width
            for i in range(4):
                value += wy[j] * wx[i] * flat[row + (ix + i - 1).clamp(0, width - 1)]
        sums += weights[:, f, None, None] * value
