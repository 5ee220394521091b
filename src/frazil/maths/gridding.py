"""Corrections for interpolation in Fourier space (spec/refinement 3.4).

Trilinear interpolation on a grid padded P times multiplies the map by the transform of its kernel, a product of sinc² of each coordinate;
the radial form, which RELION uses, agrees with it to first order. Divide a map by it before projecting and after reconstructing.

Iterative gridding (Pipe & Menon 1999) finds weights Q with C * (Q·W) = 1, C a narrow Kaiser-Bessel blob, so that B·Q is the transform of
the map for any unevenness of the sampling W.
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.maths.fourier import half_volume_radius, slabs
from frazil.maths.masks import radii

BLOB_RADIUS = 1.9  # of the Kaiser-Bessel blob, voxels of the unpadded grid
BLOB_ALPHA = 15.0
FLOOR = 1e-6  # of the convolved weight, so that empty regions do not blow up


def sinc2(
    box: int,
    pad: float,
    kind: str = "radial",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    dims: int = 3,
) -> Tensor:
    """(N, N, N), or (N, N) with dims=2: what linear interpolation at padding `pad` multiplies a map by; DIVIDE by it.

    kind "radial": sinc²(|x|/(P N)); "separable": the exact product of sinc²(x_i/(P N)). sinc(x) = sin(πx)/(πx).
    """
    if kind == "radial":
        # Some planes at a time in double precision: a box of 400 px would take 1.5 GB at once.
        line = (torch.arange(box, device=device, dtype=torch.float64) - box // 2).square()
        plane, out = radii(box, dims - 1, device, torch.float64).square(), torch.empty((box,) * dims, device=device, dtype=dtype)
        for rows in torch.arange(box).split(max(1, (1 << 23) // plane.numel())):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            out[part] = torch.sinc((line[part].view(-1, *(1,) * (dims - 1)) + plane).sqrt() / (pad * box)).square()
        return out
    if kind == "separable":
        line = torch.sinc((torch.arange(box, device=device, dtype=torch.float64) - box // 2) / (pad * box)).square()
        out = line
        for _ in range(dims - 1):
            out = out[..., None] * line
        return out.to(dtype)
    raise ValueError(f"kind of gridding correction is radial or separable, not {kind!r}")


def blob_transform(xi: Tensor, radius: float, alpha: float = BLOB_ALPHA) -> Tensor:
    """Transform, 1 at 0, of the 3D blob I0(α sqrt(1 − (r/a)²)), r ≤ a voxels, at xi (any shape) cycles per voxel (Lewitt 1990, order 0).

    Proportional to I_{3/2}(z)/z^{3/2}, i.e. (cosh z − sinh z / z)/z², with z² = α² − (2π a ξ)², which may be negative.
    """
    z2 = alpha**2 - (2 * torch.pi * radius * xi.double()).square()
    z = z2.abs().sqrt().clamp(min=1e-3)  # near z = 0 the expression is smooth (1/3) but cancels
    growing = (torch.cosh(z) - torch.sinh(z) / z) / z.square()
    waving = (torch.sin(z) / z - torch.cos(z)) / z.square()
    at_zero = torch.tensor(alpha, dtype=torch.float64)
    return torch.where(z2 >= 0, growing, waving) / ((torch.cosh(at_zero) - torch.sinh(at_zero) / at_zero) / at_zero**2)


def iterative_gridding(weight: Tensor, pad: float, box: int, iterations: int = 10) -> Tensor:
    """Q, a float64 half volume like `weight`, for V = B·Q: repeat Q ← Q / max(1e-6, |C * (Q·W)|) from Q = 1 inside |p| ≤ M − 1.

    weight: real centred half volume (2M+1, 2M+1, M+1) of fourier.py, Hermitian on x = 0. The convolution goes through real space on a grid
    large enough that the blob never wraps round. ValueError if the half volume reaches beyond the Nyquist shell of the box.
    """
    m = weight.shape[-1] - 1
    if m > half_volume_radius(pad, box // 2):
        raise ValueError(f"a half volume of radius {m} is too large for a box of {box} px padded {pad} times")
    inside = torch.cat([radius <= m - 1 for _, radius in slabs(m, weight.device)])
    w = weight.double() * inside
    mean = float(w[inside].mean())
    if mean <= 0:
        return torch.zeros_like(w)
    w /= mean  # the floor is relative to this
    reach = BLOB_RADIUS * pad
    side = _fast_size(2 * (m + int(reach) + 1))
    line = torch.fft.fftfreq(side, device=weight.device, dtype=torch.float64).square()
    blob = _whole(blob_transform((line[:, None, None] + line[:, None] + line[: side // 2 + 1]).sqrt(), reach))
    place = torch.arange(-m, m + 1, device=weight.device) % side
    cut = (place[:, None], place[None, :], slice(0, m + 1))
    q = inside.double()
    for _ in range(iterations):
        grid = torch.zeros(side, side, side // 2 + 1, dtype=torch.complex128, device=weight.device)
        grid[cut] = (q * w).to(torch.complex128)
        smooth = torch.fft.rfftn(torch.fft.irfftn(grid, s=(side, side, side)) * blob)[cut].real
        q = q / smooth.abs().clamp(min=FLOOR)
    return q * inside / mean


def _fast_size(least: int) -> int:
    """Smallest even size from `least` on whose prime factors are 2, 3, 5 and 7, which every FFT library does fast."""
    for size in range(least + least % 2, 4 * least, 2):
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
    raise AssertionError("there is a power of two before twice any number")


def _whole(half: Tensor) -> Tensor:
    """Whole array (S, S, S) of an even quantity given on x = 0 … S/2 in FFT order."""
    side = half.shape[0]
    mirrored = torch.arange(side // 2 - 1, 0, -1, device=half.device)
    return torch.cat([half, half[:, :, mirrored]], -1)
