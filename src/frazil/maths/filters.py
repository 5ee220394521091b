"""Filters and spectra of maps and images on the shells r = round(|k|) of their Fourier transform (spec/refinement 2.3).

    low-pass to d Å:  1 for |k| < R0,  ½ + ½ cos(π (|k| − R0)/w) up to R0 + w,  0 beyond;   R0 = N a/d − w/2,  w = 2 shells

Half transforms are those of torch.fft.rfftn, in FFT order. They are walked some planes at a time, so that nothing else has their size.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from frazil.maths.fourier import resolution_shell, shell_round

PLANES = 32  # of a volume's transform treated at a time


def frequency_radii(box: int, dims: int = 3, device: torch.device | str | None = None, rows: slice = slice(None)) -> Tensor:
    """Float64 |k| in cycles per box of every element of a half transform with `dims` axes; `rows` of the first axis only."""
    line = torch.fft.fftfreq(box, 1 / box, device=device, dtype=torch.float64).square()
    half = torch.arange(box // 2 + 1, device=device, dtype=torch.float64).square()
    if dims == 2:
        return (line[rows, None] + half).sqrt()
    return (line[rows, None, None] + line[:, None] + half).sqrt()


def friedel_weights(box: int, device: torch.device | str | None = None) -> Tensor:
    """(N//2+1,) float64: how many elements of the whole transform an element of that kx stands for, 1 or 2."""
    weight = torch.full((box // 2 + 1,), 2.0, device=device, dtype=torch.float64)
    weight[0] = 1
    if box % 2 == 0:
        weight[-1] = 1
    return weight


def planes(box: int, dims: int = 3, device: torch.device | str | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of a half transform along its first axis with their float64 |k|."""
    for start in range(0, box, PLANES):
        rows = slice(start, min(start + PLANES, box))
        yield rows, frequency_radii(box, dims, device, rows)


def shell_sums(values: Callable[[slice], Tensor], box: int, dims: int = 3, device: torch.device | str | None = None) -> Tensor:
    """(N//2+1,) float64 sums over the whole transform of a real quantity, by shell round(|k|) ≤ N/2.

    values(rows) gives the quantity on those rows of the half transform; elements that stand for two count twice.
    """
    last = box // 2
    total = torch.zeros(last + 2, dtype=torch.float64, device=device)
    weight = friedel_weights(box, device)
    for rows, radius in planes(box, dims, device):
        shell = shell_round(radius).long().clamp(max=last + 1)  # the corners beyond N/2 fall into a bin that is dropped
        total += torch.bincount(shell.reshape(-1), (values(rows).double() * weight).reshape(-1), minlength=last + 2)
    return total[:-1]


def shell_rows(box: int, dims: int, device: torch.device | str | None, rows: slice) -> Tensor:
    """int64 shell round(|k|) of the elements `rows` of a half transform, N//2 + 1 for the corners beyond N//2; exact: from integers."""
    last = box // 2
    line = torch.fft.fftfreq(box, 1 / box, device=device).round().long().square()
    half = torch.arange(last + 1, device=device).square()
    k2 = line[rows, None] + half if dims == 2 else line[rows, None, None] + line[:, None] + half
    table = shell_round(torch.arange(dims * last**2 + 1, device=device, dtype=torch.float64).sqrt()).long().clamp(max=last + 1)
    return table[k2]


def shell_totals(
    values: Callable[[slice], Sequence[Tensor]], box: int, dims: int = 3, device: torch.device | str | None = None, *, relion: bool = False
) -> Tensor:
    """(q, N//2+1) float64 sums by shell of q real quantities, values(rows) → q tensors, in one walk over the half transform.

    relion: every stored element counts once, so that the plane kx = 0, whose elements are there twice, has twice its weight, as in
    RELION's FSC and Guinier plots; otherwise the sums are those over the whole transform, as in `shell_sums`.
    """
    last = box // 2
    single = slice(0, None, last) if box % 2 == 0 else slice(0, 1)  # kx of the elements that stand for themselves alone
    totals: list[Tensor] = []
    for start in range(0, box, PLANES):
        rows = slice(start, min(start + PLANES, box))
        shell, given = shell_rows(box, dims, device, rows), values(rows)
        sums = [_by_shell(shell, x, last) for x in given]
        if not relion:
            sums = [2 * a - _by_shell(shell[..., single], x[..., single], last) for a, x in zip(sums, given, strict=True)]
        totals = sums if not totals else [a + b for a, b in zip(totals, sums, strict=True)]
    return torch.stack(totals)


def _by_shell(shell: Tensor, values: Tensor, last: int) -> Tensor:
    """(last + 1,) float64 sums of values by shell; those beyond `last` are left out."""
    return torch.bincount(shell.reshape(-1), values.double().reshape(-1), minlength=last + 2)[:-1]


def shell_average(half: Tensor, box: int) -> Tensor:
    """(N//2+1,) float64 shell means of a real half array (N, [N,] N//2+1) of the rfftn layout."""
    dims = half.ndim
    counts = shell_sums(lambda rows: torch.ones_like(half[rows]), box, dims, half.device)
    return shell_sums(lambda rows: half[rows], box, dims, half.device) / counts.clamp(min=1)


def power_spectrum(data: Tensor) -> Tensor:
    """(N//2+1,) float64 shell means of |F|², F the plain (unnormalised) transform of a map or an image."""
    ft = torch.fft.rfftn(data)
    return shell_average(ft.real.square() + ft.imag.square(), data.shape[-1])


def lowpass_weights(r: Tensor, box: int, pixel_size: float, resolution: float, edge: float = 2.0) -> Tensor:
    """Raised-cosine low-pass at shells r (real numbers, any shape) for a box (px), a pixel size and a resolution in Å."""
    start = box * pixel_size / resolution - edge / 2
    if edge <= 0:
        return (r <= start).to(r.dtype)
    return 0.5 + 0.5 * torch.cos(math.pi * ((r - start) / edge).clamp(0, 1))


def apply_to_ft(data: Tensor, weight: Callable[[Tensor], Tensor], dims: int = 3) -> Tensor:
    """Map(s) whose transform over the last `dims` axes is multiplied by weight(|k|), |k| in cycles per box."""
    box, axes = data.shape[-1], tuple(range(-dims, 0))
    ft = torch.fft.rfftn(data, dim=axes)
    first = ft.movedim(-dims, 0)
    for rows, radius in planes(box, dims, data.device):
        factor = weight(radius).to(first.real.dtype)
        batch = (1,) * (data.ndim - dims)
        first[rows] *= factor.reshape(factor.shape[0], *batch, *factor.shape[1:])
    return torch.fft.irfftn(ft, s=data.shape[-dims:], dim=axes)


def lowpass_shell(box: int, pixel_size: float, resolution: float) -> int:
    """Shell of a low-pass filter's resolution in Å, at most N/2: one beyond Nyquist leaves everything."""
    return min(resolution_shell(box, pixel_size, resolution), box // 2)


def lowpass_map(data: Tensor, pixel_size: float, resolution: float, edge: float = 2.0, *, dims: int = 3) -> Tensor:
    """Low-passed map (N, N, N), or with dims=2 image(s) (…, N, N): raised cosine `edge` shells wide centred on `resolution` Å."""
    box = data.shape[-1]

    def weight(r: Tensor) -> Tensor:
        return lowpass_weights(r, box, pixel_size, resolution, edge)

    first_empty = math.floor(box * pixel_size / resolution + max(edge, 0) / 2) + 1  # |k| from which on the weight is 0
    if dims == 3 == data.ndim and first_empty <= box // 2:
        return _inner_components(data, weight, first_empty)
    return apply_to_ft(data, weight, dims)


def _inner_components(data: Tensor, weight: Callable[[Tensor], Tensor], end: int) -> Tensor:
    """As apply_to_ft does with a map (N, N, N) whose weight is 0 from |k| = end ≤ N/2 on, without the transform's empty part.

    One axis is transformed after the other and cut to its components below `end`; at 15 Å in a box of 500 Å that is a hundredth of them.
    """
    box, device = data.shape[-1], data.device
    kept = torch.cat([torch.arange(end, device=device), torch.arange(box - end + 1, box, device=device)])
    k = torch.cat([torch.arange(end, device=device), torch.arange(1 - end, 0, device=device)]).double().square()
    low = torch.stack([torch.fft.fft(torch.fft.rfft(plane)[:, :end], dim=0)[kept] for plane in data])
    low = torch.fft.fft(low, dim=0)[kept]
    low *= weight((k[:, None, None] + k[:, None] + k[:end]).sqrt()).to(data.dtype)
    spread = low.new_zeros(box, len(kept), end)
    spread[kept] = low
    out = torch.empty_like(data)
    for plane, inner in zip(out, torch.fft.ifft(spread, dim=0), strict=True):
        rows = inner.new_zeros(box, end)
        rows[kept] = inner
        plane.copy_(torch.fft.irfft(torch.fft.ifft(rows, dim=0), n=box))
    return out


def apply_spectrum(data: Tensor, spectrum: Tensor, *, dims: int = 3) -> Tensor:
    """Map(s) multiplied in Fourier space by spectrum (N//2+1,) at shell round(|k|); the corners beyond N/2 become 0."""
    box, axes = data.shape[-1], tuple(range(-dims, 0))
    table = torch.cat([spectrum.to(data.device, data.dtype), torch.zeros(1, dtype=data.dtype, device=data.device)])
    ft = torch.fft.rfftn(data, dim=axes)
    first, batch = ft.movedim(-dims, 0), (1,) * (data.ndim - dims)
    for start in range(0, box, PLANES):
        rows = slice(start, min(start + PLANES, box))
        factor = table[shell_rows(box, dims, data.device, rows)]
        first[rows] *= factor.reshape(factor.shape[0], *batch, *factor.shape[1:])
    return torch.fft.irfftn(ft, s=data.shape[-dims:], dim=axes)
