"""warp: the reference against exact shifts, the kernels against the reference."""
from __future__ import annotations

import pytest
import torch

from frazil.ops.warp import TILE, spline_transfer, warp_sum_


def smooth(n: int, height: int, width: int, rng: torch.Generator) -> torch.Tensor:
    ft = torch.fft.rfft2(torch.randn(n, height, width, generator=rng))
    k2 = torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()
    return torch.fft.irfft2(ft * torch.exp(-k2 * 40), s=(height, width))


def tiles(height: int, width: int) -> tuple[int, int]:
    return -(-height // TILE), -(-width // TILE)


def test_reference_is_spline_interpolation(rng: torch.Generator) -> None:
    """A constant shift of a smooth periodic image, against its Fourier shift; identical frames at rest add up exactly."""
    frame = smooth(1, 64, 48, rng)
    shift = torch.tensor([2.3, -1.7])
    sums = torch.zeros(1, 64, 48)
    field = shift.expand(1, *tiles(64, 48), 2).contiguous()
    warp_sum_(sums, frame, torch.ones(64, 48), field, torch.ones(1, 1), implementation="reference")
    spline = spline_transfer(64, False)[:, None] * spline_transfer(48, True)
    found = torch.fft.irfft2(torch.fft.rfft2(sums[0]) / spline, s=(64, 48))
    phase = torch.exp(-2j * torch.pi * (torch.fft.rfftfreq(48) * 2.3 + torch.fft.fftfreq(64)[:, None] * -1.7))
    exact = torch.fft.irfft2(torch.fft.rfft2(frame[0]) * phase, s=(64, 48))
    inner = (slice(10, -10), slice(10, -10))
    assert (found - exact)[inner].norm() < 0.01 * exact[inner].norm()
    sums.zero_()
    rest = torch.zeros(3, *tiles(64, 48), 2)
    warp_sum_(sums, frame.expand(3, -1, -1), torch.ones(64, 48), rest, torch.ones(1, 3), implementation="reference")
    still = torch.fft.irfft2(torch.fft.rfft2(sums[0]) / spline, s=(64, 48))
    assert (still - 3 * frame[0])[8:-8, 8:-8].abs().max() < 2e-2 * frame.std()


@pytest.mark.parametrize(
    "implementation, dtype", [("cpu", torch.uint8), ("cpu", torch.int16), ("cpu", torch.float32), ("triton", torch.uint8)]
)
def test_kernels_repeat_the_reference(implementation: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    height, width, n, r = (37, 50, 3, 3) if implementation == "cpu" else (18, 21, 2, 3)  # no multiples of a square
    frames = torch.poisson(torch.full((n, height, width), 5.0), generator=rng).to(dtype).to(device)
    gain = (1 + 0.1 * torch.randn(height, width, generator=rng)).to(device)
    shifts = (6 * torch.randn(n, *tiles(height, width), 2, generator=rng)).to(device)
    shifts[0, 0, 0] = torch.tensor([-60.0, 75.0])  # far outside
    weights = torch.randn(r, n, generator=rng).to(device)
    start = torch.randn(r, height, width, generator=rng).to(device)
    found, wanted = start.clone(), start.clone()
    warp_sum_(wanted, frames, gain, shifts, weights, implementation="reference")
    warp_sum_(found, frames, gain, shifts, weights, implementation=implementation)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_wrong_shapes_are_refused() -> None:
    good = (torch.zeros(1, 32, 32), torch.zeros(2, 32, 32), torch.ones(32, 32), torch.zeros(2, 2, 2, 2), torch.ones(1, 2))
    wrong = ((1, torch.zeros(2, 32, 32, dtype=torch.int64)), (2, torch.ones(32, 31)), (3, torch.zeros(2, 3, 2, 2)), (4, torch.ones(2, 2)))
    for place, bad in wrong:
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises(ValueError, match="warp_sum_"):
            warp_sum_(*arguments)
