"""Local resolution: FSC of two half maps in soft spheres on a grid of points (spec/refinement 4.8, spec/processing 7.4).

    window    m_j: sphere of `radius` with a cosine edge, at points `sampling` apart, cut out as cubes of side c ≥ 2 (radius + edge)
    maps      whitened: each shell divided by the root of its power, so that windows do not leak between shells
    curve     corrected FSC of the two cubes (Chen et al. 2013); d_j: where it first falls below 0.143, between two shells linearly
    share     s_j = Σ (m_j M)²/Σ m_j² of the window's noise is inside the mask M; the FSC of that part is FSC/(s + (1 − s) FSC)
    map       1/d(r) = Σ_j s_j t_j(r)/d_j / Σ_j s_j t_j(r), t_j trilinear between the points;  without a mask all s_j are 1
    filtered  the sharpened mean map low-passed at d(r), between the two nearest of a bank of low-passed maps

Maps with random phases are the same everywhere in the statistical sense, and all windows are alike: what a window adds to the FSC is one
curve, the mean over many windows, with far less noise than window by window. All windows go through batched transforms of the cubes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from scipy.fft import next_fast_len
from torch import Tensor

from frazil.data import Watch
from frazil.maths.filters import apply_spectrum, friedel_weights, lowpass_weights, power_spectrum, shell_rows
from frazil.maths.fsc import corrected_for_mask, randomise_phases
from frazil.maths.masks import soft_sphere
from frazil.steps.postprocess import mtf_at, particle_fsc

GOLD = 0.143
RANDOM_WINDOWS = 48  # over which the FSC of random phases is averaged
BATCH_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # of the cubes treated at a time
SMALLEST_SHARE = 0.2  # of the noise in a window must be inside the mask, or the window is left out
FAINT = 1e-5  # weight of a window where points near by say more
TABLE_BYTES = 1 << 28  # largest table (elements of a cube, shells) for the sums; else they are added element by element
UNWATCHED = Watch()
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}


class LocalresParams(BaseModel):
    """Local resolution of two half maps, and the map filtered by it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    sampling: float = Field(20.0, gt=0, description="distance of the points where the resolution is measured", json_schema_extra=ANGSTROM)
    radius: float = Field(12.5, gt=0, description="radius of the window at each point", json_schema_extra={**ANGSTROM, **EXPERT})
    edge: float = Field(15.0, gt=0, description="width of the window's soft edge", json_schema_extra={**ANGSTROM, **EXPERT})
    randomise_from: float = Field(25.0, gt=0, description="phases are random from this resolution, to see what the windows add",
                                  json_schema_extra={**ANGSTROM, **EXPERT})  # fmt: skip
    lowest: float = Field(50.0, gt=0, description="lowest local resolution reported", json_schema_extra={**ANGSTROM, **EXPERT})
    solvent_share: bool = Field(True, description="with a mask: take the solvent's share of the noise out of each window's FSC",
                                json_schema_extra=EXPERT)  # fmt: skip
    b_factor: float = Field(-100.0, description="B-factor of the filtered map (negative sharpens)", json_schema_extra={"unit": "Å²"})


@dataclass(frozen=True)
class Windows:
    """The soft window and the points it is put on, in px."""

    weight: Tensor  # (c, c, c) float32
    points: Tensor  # (n, 3) int64 zyx, centres of the windows
    share: Tensor  # (n,) float64, how much of the noise in the window lies inside the mask, 0 to 1
    side: int  # c
    step: int  # px between the points


@dataclass(frozen=True)
class LocalResolution:
    """What came out."""

    resolution: Tensor  # (N, N, N) float32, Å
    filtered: Tensor  # (N, N, N) float32
    points: Tensor  # (n, 3) int64 zyx in px
    at_points: Tensor  # (n,) float64 Å
    curves: Tensor  # (n, c/2+1) float64, corrected FSC of each window
    masked: Tensor  # (n, c/2+1), before the correction
    random: Tensor  # (c/2+1,) FSC of random phases in such a window
    side: int  # c, px


def place_windows(box: int, pixel_size: float, params: LocalresParams, mask: Tensor | None) -> Windows:
    """Points of a cubic grid through the centre: those whose window holds enough of the mask, or lie in the sphere that fits the box."""
    radius, edge = params.radius / pixel_size, params.edge / pixel_size
    side = next_fast_len(2 * math.ceil(radius + edge) + 2) or 0
    side += side % 2
    weight = soft_sphere(side, radius, edge)
    step = max(1, round(params.sampling / pixel_size))
    line = torch.arange(-(box // 2 // step), box // 2 // step + 1) * step
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    if mask is None:
        place = grid[grid.double().norm(dim=1) <= box / 2 - radius] + box // 2
        return Windows(weight, place, torch.ones(len(place), dtype=torch.float64), side, step)
    place = grid + box // 2
    place = place[((place >= 0) & (place < box)).all(1)]
    share = mask_shares(mask, weight)[tuple(place.T)].double().clamp(0, 1)
    kept = share >= SMALLEST_SHARE
    return Windows(weight, place[kept], share[kept], side, step)


def mask_shares(mask: Tensor, window: Tensor) -> Tensor:
    """(N, N, N) share Σ (m M)² / Σ m² of white noise in a window m (c, c, c) that lies inside a mask M, for a window at each voxel."""
    box, side = mask.shape[-1], window.shape[-1]
    big = box + side
    kernel = torch.nn.functional.pad(window.to(mask).square(), (0, big - side) * 3).roll((-(side // 2),) * 3, (0, 1, 2))
    padded = torch.nn.functional.pad(mask.square(), (0, side) * 3)
    product = torch.fft.irfftn(torch.fft.rfftn(padded) * torch.fft.rfftn(kernel), s=padded.shape)
    return product[:box, :box, :box].cpu() / float(window.square().sum())


def whitened(half1: Tensor, half2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both maps (N, N, N) divided by the square root of their mean's power inside the mask, shell by shell.

    That changes no FSC of the whole box. A small window spreads each component over a shell or two; between shells of equal power as
    much goes in as out, where the much stronger low frequencies would otherwise leak upwards and raise the FSC.
    """
    mean = (half1 + half2) / 2
    power = power_spectrum(mean if mask is None else mean * mask)
    scale = torch.where(power > power.max() * 1e-12, power, torch.full_like(power, torch.inf)).rsqrt()
    return apply_spectrum(half1, scale), apply_spectrum(half2, scale)


class _ShellSums:
    """Sums over the shells of cubes of side c: a product with a table of 0 and 1 or, for large cubes, element by element."""

    def __init__(self, side: int, device: torch.device) -> None:
        self.shells = side // 2 + 1
        shell = shell_rows(side, 3, device, slice(0, side)).reshape(-1)
        weight = friedel_weights(side, device).float().expand(side, side, self.shells).reshape(-1)
        self._kept = (shell < self.shells).nonzero()[:, 0]
        shell, weight = shell[self._kept], weight[self._kept]
        self._shell, self._weight, self._table = shell, weight, None
        if 4 * len(shell) * self.shells <= TABLE_BYTES:
            self._table = torch.zeros(len(shell), self.shells, device=device)
            self._table[torch.arange(len(shell), device=device), shell] = weight

    def __call__(self, values: Tensor) -> Tensor:
        """(b, shells) of real values (b, c, c, c/2+1)."""
        flat = values.reshape(len(values), -1)[:, self._kept]
        if self._table is not None:
            return flat @ self._table
        return flat.new_zeros(len(flat), self.shells).index_add_(1, self._shell, flat * self._weight)


def window_curves(a: Tensor, b: Tensor, windows: Windows, what: str = "windows", watch: Watch = UNWATCHED) -> Tensor:
    """(n, c/2+1) float64 FSC of two maps (N, N, N) in every window; what lies outside the box is 0.

    Batch by batch the curves so far go to the watch under the name `what`, and those it knows are not measured again.
    """
    side, device = windows.side, a.device
    weight = windows.weight.to(device)
    sums = _ShellSums(side, device)
    batch = max(1, BATCH_BYTES.get(device.type, 1 << 27) // (8 * side**3))
    pads = [torch.nn.functional.pad(x, (side // 2,) * 6) for x in (a, b)]
    corners = windows.points.tolist()  # the window's first voxel in the padded map is at its centre's coordinates
    known = watch.known.get(what)
    curves = [] if known is None else [known]
    for start in range(0 if known is None else len(known), len(corners), batch):
        chosen = corners[start : start + batch]
        x, y = (
            torch.fft.rfftn(torch.stack([pad[i : i + side, j : j + side, k : k + side] for i, j, k in chosen]) * weight, dim=(1, 2, 3))
            for pad in pads
        )
        cross, power1, power2 = sums(x.real * y.real + x.imag * y.imag), sums(_power(x)), sums(_power(y))
        curves.append((cross.double() / (power1.double() * power2.double()).sqrt().clamp(min=1e-300)).cpu())
        watch.keep(what, torch.cat(curves))
        watch.progress(what, min(start + batch, len(corners)), len(corners))
    out = torch.cat(curves)
    out[:, 0] = 1.0
    return out


def _power(x: Tensor) -> Tensor:
    """|x|²."""
    return x.real.square() + x.imag.square()


def crossing(curves: Tensor, length: float, lowest: float) -> Tensor:
    """(n,) float64 Å where curves (n, shells) of windows of side `length` Å first fall below 0.143; at most `lowest`.

    Between the last shell above and the first below the frequency is interpolated; a curve that never falls has its last shell's.
    """
    below = curves < GOLD
    below[:, 0] = False
    last = curves.shape[1] - 1
    first = torch.where(below.any(1), below.double().argmax(1), torch.tensor(last))
    row = torch.arange(len(curves))
    high, low = curves[row, (first - 1).clamp(min=0)], curves[row, first]
    part = ((high - GOLD) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    shell = torch.where(below.any(1), first - 1 + part, torch.full_like(part, last))
    return (length / shell.clamp(min=1e-6)).clamp(max=lowest)


def blend(windows: Windows, values: Tensor, box: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(Σ_j s_j t_j v_j / Σ_j s_j t_j, the denominator): (N, N, N) float32 of values (n,) at windows with shares s; 0 where none reaches.

    t_j is the trilinear interpolation between the points; where none of a voxel's eight was kept, the windows that reach it decide.
    """
    side = windows.side
    big = box + side
    total, weight = (torch.zeros(big, big, big, device=device) for _ in range(2))
    line = (1 - (torch.arange(side, device=device) - side // 2).abs() / windows.step).clamp(min=0)
    kernel = line[:, None, None] * line[:, None] * line + FAINT * windows.weight.to(device)
    for (i, j, k), value, share in zip(windows.points.tolist(), values.tolist(), windows.share.tolist(), strict=True):
        cut = (slice(i, i + side), slice(j, j + side), slice(k, k + side))
        total[cut].add_(kernel, alpha=value * share)
        weight[cut].add_(kernel, alpha=share)
    inner = (slice(side // 2, side // 2 + box),) * 3
    total, weight = total[inner], weight[inner]
    return total / weight.clamp(min=1e-12), weight


def filter_locally(
    mean_map: Tensor, frequency: Tensor, pixel_size: float, side: int, b_factor: float, mtf: tuple[np.ndarray, float] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:  # fmt: skip
    """(N, N, N) map low-passed at a frequency in 1/Å that differs from voxel to voxel, sharpened by b_factor and divided by the MTF."""
    box, device = mean_map.shape[-1], mean_map.device
    length = box * pixel_size
    ft = torch.fft.rfftn(mean_map)
    line = torch.fft.fftfreq(box, 1 / box, device=device).round().int().square()
    k2 = line[:, None, None] + line[:, None] + line[: box // 2 + 1].int()
    radius = torch.arange(3 * (box // 2) ** 2 + 1, device=device, dtype=torch.float64).sqrt()
    k = radius / length
    factor = torch.exp(-b_factor / 4 * k.square())
    ft *= (factor / mtf_at(mtf[0], k * mtf[1]) if mtf is not None else factor).float()[k2]
    low, high = float(frequency.min()), min(float(frequency.max()), 0.5 / pixel_size)
    levels = max(2, math.ceil((high - low) * side * pixel_size) + 1)
    step = max((high - low) / (levels - 1), 1e-9)
    place = ((frequency - low) / step).clamp(0, levels - 1)
    edge = max(2.0, box / side)
    out = torch.zeros_like(mean_map)
    for level in range(levels):
        table = lowpass_weights(radius, box, pixel_size, 1 / (low + level * step), edge).float()
        out += torch.fft.irfftn(ft * table[k2], s=mean_map.shape) * (1 - (place - level).abs()).clamp(min=0)
        tick(level + 1, levels)
    return out


def local_resolution(
    half1: Tensor, half2: Tensor, mask: Tensor | None, pixel_size: float, params: LocalresParams,
    mtf: tuple[np.ndarray, float] | None = None, seed: int = 0, watch: Watch = UNWATCHED,
) -> LocalResolution:  # fmt: skip
    """Local resolution of two half maps (N, N, N) float32; the mask says which windows to look at, and their s_j.

    ValueError where no window is. Voxels that no window reaches have the lowest resolution.
    """
    box, device = half1.shape[-1], half1.device
    windows = place_windows(box, pixel_size, params, mask)
    count = len(windows.points)
    if not count:
        raise ValueError("no window lies inside the mask")
    half1, half2, mean_map = *whitened(half1, half2, mask), (half1 + half2) / 2
    masked = window_curves(half1, half2, windows, "windows", watch)
    length = windows.side * pixel_size
    # Random phases on the shells of the whole box; the shell of the cubes from which on their curves are corrected is the same frequency.
    start = max(1, math.floor(box * pixel_size / params.randomise_from))
    noisy = [randomise_phases(half, start, torch.Generator().manual_seed(2 * seed + i)) for i, half in enumerate((half1, half2))]
    every = max(1, count // RANDOM_WINDOWS)
    some = replace(windows, points=windows.points[::every], share=windows.share[::every])
    random = window_curves(noisy[0], noisy[1], some, "random phases", watch).mean(0)
    del noisy
    curves = corrected_for_mask(masked, random, math.floor(length / params.randomise_from))
    if params.solvent_share:
        curves = particle_fsc(curves, 1 / windows.share[:, None])
    at_points = crossing(curves, length, params.lowest)
    frequency, weight = blend(windows, 1 / at_points, box, device)
    frequency = torch.where(weight > 1e-9, frequency, torch.full_like(frequency, 1 / params.lowest)).clamp(min=1 / params.lowest)
    filtered = filter_locally(mean_map, frequency, pixel_size, windows.side, params.b_factor, mtf,
                              lambda done, total: watch.progress("local filter", done, total))  # fmt: skip
    return LocalResolution(1 / frequency, filtered, windows.points, at_points, curves, masked, random, windows.side)
