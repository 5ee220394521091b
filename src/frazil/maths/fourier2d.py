"""Padded transforms of images and back, all classes of a 2D classification in one call (spec/refinement 1.1).

    V(p) = (1/N²) Σ_x v(x) exp(−2πi p·(x − N/2)/(P N)),   p on the grid of the box padded P times

A *half plane* is a centred half transform (2M+1, M+1), M = round(P r_max) + 1: element [y+M, x] holds p = (x, y), x ≥ 0, zero for
|p| > M − 1: the plane z = 0 of a half volume (fourier.py), which ops.project and ops.insert turn by the in-plane angle alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from frazil.maths.fourier import half_volume_radius, round_half_away


def half_plane_radii(m: int, device: torch.device | str | None = None) -> Tensor:
    """(2M+1, M+1) float64 |p| of every element of a half plane."""
    y = torch.arange(-m, m + 1, device=device, dtype=torch.float64)
    return torch.sqrt(y[:, None].square() + y[m:].square())


def padded_planes(images: Tensor, pad: float, r_max: int) -> Tensor:
    """(…, 2M+1, M+1) half planes of images (…, N, N) zero-padded P times, up to shell r_max, zero beyond."""
    n = images.shape[-1]
    big, m = round_half_away(pad * n), half_volume_radius(pad, r_max)
    take = torch.arange(-m, m + 1, device=images.device) % big
    # Beyond Nyquist of the padded grid (only the border at full size) any value will do: the circle below removes it.
    take_x = torch.arange(0, m + 1, device=images.device).clamp(max=big // 2)
    ft = torch.fft.rfft(_padded(images / n**2, -1, big), dim=-1).index_select(-1, take_x)
    ft = torch.fft.fft(_padded(ft, -2, big), dim=-2).index_select(-2, take)
    return ft * (half_plane_radii(m, images.device) <= m - 1)


def _padded(data: Tensor, dim: int, big: int) -> Tensor:
    """`data` in a longer axis of zeros, its pixel N/2 at the origin."""
    n, shape = data.shape[dim], list(data.shape)
    shape[dim] = big
    out = data.new_zeros(shape)
    out.narrow(dim, 0, n - n // 2).copy_(data.narrow(dim, n // 2, n - n // 2))
    out.narrow(dim, big - n // 2, n // 2).copy_(data.narrow(dim, 0, n // 2))
    return out


def images_from_planes(planes: Tensor, pad: float, box: int) -> Tensor:
    """(…, N, N) images of half planes: the inverse of padded_planes, cropped to the box."""
    m, big = planes.shape[-1] - 1, round_half_away(pad * box)
    reach, width = min(m, (big - 1) // 2), big // 2 + 1
    full = planes.new_zeros(*planes.shape[:-2], big, width)
    columns = min(m + 1, width)
    full[..., : reach + 1, :columns] = planes[..., m : m + reach + 1, :columns]
    full[..., big - reach :, :columns] = planes[..., m - reach : m, :columns]
    if m > reach:  # p = −P N/2 and +P N/2 are one frequency of the padded grid
        both = planes[..., m - reach - 1, :columns] + planes[..., m + reach + 1, :columns]
        full[..., reach + 1, :columns] = 0.5 * both
    keep = torch.arange(-(box // 2), box - box // 2, device=planes.device) % big
    lines = torch.fft.ifft(full, dim=-2).index_select(-2, keep)
    return torch.fft.irfft(lines, n=big, dim=-1).index_select(-1, keep) * box**2


def hermitian_planes(data: Tensor) -> Tensor:
    """A copy of half planes (…, 2M+1, M+1) whose column x = 0 is f(y) + conj f(−y) (spec 3.1), the origin left; also for real weights."""
    m, out = data.shape[-1] - 1, data.clone()
    mate = data[..., 0].flip(-1)
    out[..., 0] += mate.conj() if data.is_complex() else mate
    out[..., m, 0] = data[..., m, 0]
    return out


def shell_means_of_planes(values: Tensor, pad: float, shells: int, *, floor: bool = False, strict: bool = False) -> Tensor:
    """(…, shells) float64 means of real half planes over shells round(|p|/P) (or floor) within their circle, 0 where a shell is empty.

    strict: |p| below the circle's radius only, else up to it. Every stored element counts once. The result is on the planes' device.
    """
    m = values.shape[-1] - 1
    radius = half_plane_radii(m, values.device).reshape(-1)
    shell = (radius / pad if floor else radius / pad + 0.5).long()
    inside = torch.nonzero((radius < m - 1 if strict else radius <= m - 1) & (shell < shells))[:, 0]
    flat, shell = values.reshape(-1, len(radius))[:, inside].double(), shell[inside]
    total = torch.zeros(len(flat), shells, dtype=torch.float64, device=values.device).index_add_(1, shell, flat)
    count = torch.bincount(shell, minlength=shells)
    return (total / count.clamp(min=1)).reshape(*values.shape[:-2], shells)
