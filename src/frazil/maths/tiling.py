"""Sizes that transform fast, work grids of low-passed micrographs, tiles of long correlations (spec/processing 0.9, 4.3).

A micrograph of H × W px is padded to M ≥ H + margin and its transform cut to m, both with prime factors up to 7, so that the Nyquist
frequency of the work grid lies at or just beyond the low-pass: m/M ≥ 2p/lowpass. Work pixel i is pixel i·M/m of the micrograph.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PRIMES = (2, 3, 5, 7)
ANISOTROPY = 1e-3  # relative difference of the scales along x and y that is let pass: templates are rotated as if there were none


def is_good(n: int) -> bool:
    """Whether n has no prime factor above 7."""
    for prime in PRIMES:
        while n % prime == 0:
            n //= prime
    return n == 1


def good_size(n: float) -> int:
    """The smallest even number ≥ n without prime factors above 7."""
    size = 2 * math.ceil(n / 2)
    while not is_good(size):
        size += 2
    return size


@dataclass(frozen=True)
class WorkGrid:
    """How a micrograph is sampled for picking. Pairs are (y, x)."""

    shape: tuple[int, int]  # px of the micrograph
    padded: tuple[int, int]  # px, what is transformed
    size: tuple[int, int]  # work pixels, what the transform is cut to
    pixel_size: float  # Å of the micrograph

    @property
    def scale(self) -> tuple[float, float]:
        """Work pixels a pixel."""
        return self.size[0] / self.padded[0], self.size[1] / self.padded[1]

    @property
    def work_pixel(self) -> float:
        """Å, side of a work pixel."""
        return self.pixel_size / self.scale[1]

    @property
    def visible(self) -> tuple[int, int]:
        """Work pixels that lie on the micrograph."""
        return tuple(min(s, math.floor((n - 1) * f) + 1) for n, s, f in zip(self.shape, self.size, self.scale, strict=True))  # pyright: ignore


def work_grid(shape: tuple[int, int], pixel_size: float, lowpass: float, margin: float) -> WorkGrid:
    """Grid for micrographs of `shape` (y, x) px, low-passed to `lowpass` Å (0 or below 2 pixels: not at all), padded by ≥ margin Å."""
    pad = math.ceil(margin / pixel_size)
    least = [n + pad for n in shape]
    if lowpass <= 2 * pixel_size:
        good = (good_size(least[0]), good_size(least[1]))
        return WorkGrid(shape, good, good, pixel_size)
    factor = 2 * pixel_size / lowpass
    _, _, padded, size = min(_choices(least[1], factor))
    if least[0] == least[1]:
        return WorkGrid(shape, (padded, padded), (size, size), pixel_size)
    fits = [(s, m) for s, m in _pairs(least[0], size / padded) if abs(s / m / (size / padded) - 1) < ANISOTROPY]
    if not fits:  # a square always fits
        padded, size = min(_choices(max(least), factor))[2:]
        return WorkGrid(shape, (padded, padded), (size, size), pixel_size)
    size_y, padded_y = min(fits)
    return WorkGrid(shape, (padded_y, padded), (size_y, size), pixel_size)


def _choices(least: int, factor: float) -> list[tuple[float, int, int, int]]:
    """(cost, work size, padded, work size) of good pairs: a larger work size costs everywhere, more padding in one transform only."""
    out = []
    padded = good_size(least)
    while padded <= 1.12 * least + 16:
        size = min(padded, good_size(padded * factor - 1e-9))
        out.append((size / (least * factor) + 0.2 * padded / least, size, padded, size))
        padded = good_size(padded + 2)
    return out


def _pairs(least: int, scale: float) -> list[tuple[int, int]]:
    """(work size, padded) with about this scale."""
    out, padded = [], good_size(least)
    while padded <= 1.3 * least + 64:
        size = 2 * round(padded * scale / 2)
        if is_good(size) and size <= padded:
            out.append((size, padded))
        padded = good_size(padded + 2)
    return out


@dataclass(frozen=True)
class Tiling:
    """A long axis cut into `count` tiles of `size` samples, of which the first `step` results each are free of wrap-around."""

    size: int
    step: int
    count: int


def tile_axis(length: int, reach: int, longest: int) -> Tiling:
    """The cheapest tiles (count × size) that give `length` correlations with kernels of 2·reach + 1, at most `longest` if they can be."""
    least = good_size(2 * reach + 2)
    best = None
    size = least
    while size <= max(longest, 8 * reach, least):
        step = size - 2 * reach
        count = -(-length // step)
        if best is None or count * size < best.count * best.size:
            best = Tiling(size, step, count)
        if count == 1:
            break
        size = good_size(size + 2)
    assert best is not None
    return best


def transform(image: Tensor, grid: WorkGrid) -> Tensor:
    """(m_y, m_x//2+1) rfft2 of a padded micrograph, cut to the work grid; values keep their scale, Nyquist is dropped."""
    ft = torch.fft.rfft2(image, s=grid.padded)
    if grid.padded == grid.size:
        return ft
    (my, mx), (py, px) = grid.size, grid.padded
    out = ft.new_zeros(my, mx // 2 + 1)
    top = my // 2
    out[:top, : mx // 2] = ft[:top, : mx // 2]
    out[my - top + 1 :, : mx // 2] = ft[py - top + 1 :, : mx // 2]
    return out * ((my * mx) / (py * px))


def on_micrograph(values: Tensor, grid: WorkGrid) -> Tensor:
    """The part of a work grid that lies on the micrograph."""
    return values[: grid.visible[0], : grid.visible[1]]


def frequencies(grid: WorkGrid, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """ky (rows,) and kx (m_x//2+1,) of the work grid's half transform, float64, 1/Å."""
    my, mx = grid.size
    ky = torch.fft.fftfreq(my, 1 / my, device=device, dtype=torch.float64)[rows] / (grid.padded[0] * grid.pixel_size)
    kx = torch.arange(mx // 2 + 1, device=device, dtype=torch.float64) / (grid.padded[1] * grid.pixel_size)
    return ky, kx


def half_plane(grid: WorkGrid, device: torch.device) -> Tensor:
    """(m_y, m_x//2+1) float64 |k|² of the work grid's half transform, 1/Å²."""
    ky, kx = frequencies(grid, slice(None), device)
    return ky[:, None].square() + kx.square()


def tiles_ft(image: Tensor, tiles: tuple[Tiling, Tiling], reach: int) -> Tensor:
    """(tiles, T_y, T_x//2+1) transforms of overlapping tiles; a tile begins `reach` before the results it gives, zeros outside."""
    ty, tx = tiles
    h, w = image.shape
    below, right = ((t.count - 1) * t.step + t.size - reach - n for t, n in ((ty, h), (tx, w)))
    padded = torch.nn.functional.pad(image, (reach, max(right, 0), reach, max(below, 0)))
    cut = padded.unfold(0, ty.size, ty.step).unfold(1, tx.size, tx.step)[: ty.count, : tx.count]
    return torch.fft.rfft2(cut.reshape(-1, ty.size, tx.size))


def joined(values: Tensor, tiles: tuple[Tiling, Tiling], h: int, w: int) -> Tensor:
    """(h, w) of the valid parts of tiles (n, T_y, T_x)."""
    ty, tx = tiles
    if ty.count == tx.count == 1:
        return values[0, :h, :w]
    valid = values.reshape(ty.count, tx.count, ty.size, tx.size)[:, :, : ty.step, : tx.step]
    return valid.permute(0, 2, 1, 3).reshape(ty.count * ty.step, tx.count * tx.step)[:h, :w]
