"""Work grids and tiles."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.tiling import good_size, is_good, joined, tile_axis, tiles_ft, transform, work_grid


def test_good_sizes():
    assert [good_size(n) for n in (1, 7, 11, 22, 4097)] == [2, 8, 12, 24, 4116]
    assert is_good(2 * 3 * 5 * 7) and not is_good(22)


@pytest.mark.parametrize("shape, pixel, lowpass", [
    ((4096, 4096), 1.77, 20), ((4096, 4096), 1.77, 10), ((8184, 11520), 0.55, 20), ((1200, 1240), 1.5, 20),
    ((3838, 3710), 0.85, 15), ((1024, 1024), 7.08, 10),
])  # fmt: skip
def test_the_work_grid_reaches_the_lowpass_and_hardly_further(shape, pixel, lowpass):
    grid = work_grid(shape, pixel, lowpass, 200)
    assert all(is_good(n) for n in (*grid.padded, *grid.size)) and all(n % 2 == 0 for n in grid.size)
    assert all(p >= n + 200 / pixel - 1 for p, n in zip(grid.padded, shape, strict=True))
    if lowpass > 2 * pixel:
        assert all(lowpass * 0.85 / 2 <= pixel / s <= lowpass / 2 * 1.001 for s in grid.scale)
    else:
        assert grid.size == grid.padded
    assert abs(grid.scale[0] / grid.scale[1] - 1) < 1e-3


def test_a_smooth_micrograph_keeps_its_values_at_the_places_of_the_grid():
    grid = work_grid((200, 260), 1.0, 8.0, 30.0)
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(260.0), indexing="ij")
    image = torch.exp(-((y - 90) ** 2 + (x - 130) ** 2) / (2 * 20**2))
    small = torch.fft.irfft2(transform(image, grid), s=grid.size)
    rows, columns = (torch.arange(n) / s for n, s in zip(grid.visible, grid.scale, strict=True))
    exact = torch.exp(-((rows[:, None] - 90) ** 2 + (columns - 130) ** 2) / (2 * 20**2))
    assert (small[: grid.visible[0], : grid.visible[1]] - exact).abs().max() < 1e-4


@pytest.mark.parametrize("longest", [24, 64])
def test_tiles_give_what_the_whole_gives(longest, rng):
    """Correlation with a 7 × 7 kernel, tiled and direct, edges seen as zero."""
    image, kernel = torch.randn(50, 70, dtype=torch.float64, generator=rng), torch.randn(7, 7, dtype=torch.float64, generator=rng)
    tiles = tile_axis(50, 3, longest), tile_axis(70, 3, longest)
    ft = tiles_ft(image, tiles, 3)
    values = torch.fft.irfft2(ft * torch.fft.rfft2(kernel, s=(tiles[0].size, tiles[1].size)).conj(), s=(tiles[0].size, tiles[1].size))
    direct = torch.nn.functional.conv2d(image[None, None], kernel[None, None], padding=3)[0, 0]
    assert (joined(values, tiles, 50, 70) - direct).abs().max() < 1e-10
