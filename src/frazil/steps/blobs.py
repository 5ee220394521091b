"""Round particles without a template: Laplacian of Gaussian, and the profile its picks teach (spec/processing 4.9; Zivanov 2018).

    L_d = IFT[ X (k/s)² exp(−k²/2s²) ],   s = 1/(2d)

answers most to discs of diameter d. The best d of a pixel must lie between the smallest and the largest asked for. A hollow shell answers
at its rim, so the picks lie off centre. Therefore the picks' mean radial profile is taken as a template, matched, and taken again, some
rounds from several starting diameters; the profile with the highest mean correlation wins. Nothing but the range of diameters is given.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.masks import radii
from frazil.maths.micrographs import blank_border, normalised
from frazil.maths.peaks import highest_apart, local_maxima, refine_peaks
from frazil.maths.tiling import WorkGrid, half_plane, on_micrograph, transform, work_grid
from frazil.steps.pick import (
    Picks,
    PickSettings,
    ScoreMap,
    candidates,
    make_bank,
    match,
    picking_grid,
    prepare,
    preview,
)

FRACTIONS = (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0)  # of the smallest diameter, which are tried
MULTIPLES = (1.0, 2.0, 3.0, 4.0, 5.0)  # of the largest
SPACING = 0.8  # least distance of two picks, of the smallest diameter
MARGIN = 1.15  # mask of the learned template, of the largest diameter
USED = (0.1, 0.6)  # ranks of the picks a profile is taken of: the very best answer is contamination


@dataclass(frozen=True)
class BlobSettings:
    """What is looked for. Lengths in Å."""

    min_diameter: float
    max_diameter: float
    lowpass: float = 20.0
    invert: bool = True


@dataclass(frozen=True)
class BlobMap:
    """Response of a micrograph on its work grid (h, w)."""

    grid: WorkGrid
    value: Tensor  # best response less the mean of those in range, over their standard deviation
    diameter: Tensor  # Å that answers best
    in_range: Tensor  # bool
    border: tuple[float, float, float, float]  # px at top, bottom, left, right that hold nothing new
    preview: Tensor  # (h', w') float16, for pictures


def trial_diameters(settings: BlobSettings) -> list[float]:
    """Å: fractions of the smallest, mean, multiples of the largest."""
    low, high = settings.min_diameter, settings.max_diameter
    return sorted({*(f * low for f in FRACTIONS), 0.5 * (low + high), *(m * high for m in MULTIPLES)})


def blob_map(micrograph: Tensor, pixel_size: float, settings: BlobSettings) -> BlobMap:
    """Response of a micrograph (y, x) to discs; see the module."""
    grid = work_grid(_shape(micrograph), pixel_size, settings.lowpass, settings.max_diameter)
    ft = transform(normalised(micrograph, settings.invert), grid)
    shown = preview(ft, grid, -1.0 if settings.invert else 1.0)
    k2 = half_plane(grid, ft.device)
    if settings.lowpass > 2 * pixel_size:
        ft = ft * (k2 <= settings.lowpass**-2)
    best = diameter = None
    for d in trial_diameters(settings):
        answer = _response(ft, k2, d, grid)
        if best is None or diameter is None:
            best, diameter = answer, torch.full_like(answer, d)
        else:
            better = answer > best
            best, diameter = torch.where(better, answer, best), torch.where(better, torch.full_like(best, d), diameter)
    assert best is not None and diameter is not None
    slack = 1e-4 * settings.min_diameter
    in_range = (diameter >= settings.min_diameter - slack) & (diameter <= settings.max_diameter + slack)
    chosen = best[in_range] if bool(in_range.any()) else best.reshape(-1)
    return BlobMap(grid, (best - chosen.mean()) / chosen.std().clamp(min=1e-30), diameter, in_range, blank_border(micrograph), shown)


def blob_candidates(found: BlobMap, threshold: float, edge: float, level: float | None = None, distance: float = 0.0) -> Picks:
    """Local maxima ≥ threshold whose best diameter is in range, at least `edge` Å from the border; `size` is the best diameter.

    `level`, `distance`: as in steps.pick.candidates.
    """
    zero = torch.zeros_like(found.value)
    value = torch.where(found.in_range, found.value, torch.full_like(found.value, -torch.inf))
    scores = ScoreMap(found.grid, value, zero, zero.to(torch.int16), zero, zero, found.border)
    picks = candidates(scores, threshold, edge, level=level, distance=distance)
    scale = torch.tensor(found.grid.scale)
    row, column = (picks.xy.flip(-1) * scale).round().long().unbind(-1)
    h, w = found.diameter.shape
    size = found.diameter.cpu()[row.clamp(max=h - 1), column.clamp(max=w - 1)]
    return Picks(picks.xy, picks.value, picks.psi, torch.zeros_like(picks.template), picks.area, size)


def blobs_apart(picks: Picks, settings: BlobSettings, pixel_size: float) -> Tensor:
    """Indices of the picks kept, best first: each farther than SPACING · smallest diameter from all better ones."""
    kept = highest_apart(picks.xy.numpy(), picks.value.double().numpy(), SPACING * settings.min_diameter / pixel_size)
    return torch.from_numpy(kept)


@dataclass(frozen=True)
class Learned:
    """A round template made from picks."""

    template: Tensor  # (1, N, N)
    pixel_size: float  # Å
    diameter: float  # Å of the mask
    agreement: float  # mean correlation coefficient of the picks it was made of
    start: float  # Å, diameter it began with


def learn_profile(micrographs: Sequence[Tensor], pixel_size: float, settings: BlobSettings, rounds: int = 4) -> Learned:
    """The radial profile common to the particles of micrographs of equal shape, found from the range of diameters alone."""
    ratio = settings.max_diameter / settings.min_diameter
    count = min(5, 1 + math.ceil(math.log(ratio) / math.log(1.2) - 1e-9))
    starts = [settings.min_diameter * ratio ** (i / max(1, count - 1)) for i in range(count)]
    return max((_learn(micrographs, pixel_size, settings, start, rounds) for start in starts), key=lambda found: found.agreement)


def _learn(micrographs: Sequence[Tensor], pixel_size: float, settings: BlobSettings, start: float, rounds: int) -> Learned:
    """Rounds of matching and averaging from the picks of one diameter."""
    diameter = MARGIN * settings.max_diameter
    plan = PickSettings(diameter, settings.lowpass, 360.0, "ncc", settings.invert)
    shape = _shape(micrographs[0])
    side = 2 * math.ceil(1.1 * diameter / (2 * picking_grid(shape, pixel_size, settings.lowpass, diameter).work_pixel)) + 4
    blank = torch.eye(side, device=micrographs[0].device)[None]
    bank = make_bank(blank, pixel_size, shape, pixel_size, plan)
    prepared = [prepare(m, bank) for m in micrographs]
    work_pixel = bank.grid.work_pixel
    places = [_first_places(p.image, start / work_pixel, settings.min_diameter / work_pixel) for p in prepared]
    number = [max(20, len(p)) for p in places]
    agreement = 0.0
    template = blank
    for _ in range(max(1, rounds)):
        windows = torch.cat([_windows(p.image, at, side // 2) for p, at in zip(prepared, places, strict=True)])
        template = _radial_mean(windows, side)[None]
        bank = make_bank(template, work_pixel, shape, pixel_size, plan)
        values = []
        for i, p in enumerate(prepared):
            found = candidates(match(p, bank), 0.0, 0.5 * diameter, distance=SPACING * settings.min_diameter)
            kept = blobs_apart(found, settings, pixel_size)[: number[i]]
            places[i] = found.xy[kept].flip(-1).float() * torch.tensor(bank.grid.scale)
            values.append(found.value[kept])
        agreement = float(torch.cat(values).mean()) if sum(map(len, values)) else 0.0
    return Learned(template, work_pixel, diameter, agreement, start)


def _shape(micrograph: Tensor) -> tuple[int, int]:
    return micrograph.shape[0], micrograph.shape[1]


def _response(ft: Tensor, k2: Tensor, diameter: float, grid: WorkGrid) -> Tensor:
    """(h, w) L_d."""
    u = k2 * (4 * diameter**2)
    answer = torch.fft.irfft2(ft * (u * torch.exp(-0.5 * u)).to(ft.real.dtype), s=grid.size)
    return on_micrograph(answer, grid)


def _first_places(image: Tensor, diameter: float, smallest: float) -> Tensor:
    """(n, 2) row, column of single-scale peaks of a work image, the middle of their ranking; sizes in work pixels."""
    h, w = image.shape
    k2 = torch.fft.fftfreq(h, device=image.device).square()[:, None] + torch.fft.rfftfreq(w, device=image.device).square()
    u = k2 * (4 * diameter**2)
    answer = torch.fft.irfft2(torch.fft.rfft2(image) * u * torch.exp(-0.5 * u), s=(h, w))
    peaks = local_maxima(answer, torch.ones_like(answer, dtype=torch.bool), float(answer[answer > 0].mean()))
    at = refine_peaks(answer, peaks).cpu()
    values = answer[peaks[:, 0], peaks[:, 1]].double().cpu()
    kept = highest_apart(at.numpy(), values.numpy(), SPACING * smallest)
    first, last = (int(len(kept) * share) for share in USED)
    return at[torch.from_numpy(kept[first : max(last, first + 1)])].float()


def _windows(image: Tensor, places: Tensor, half: int) -> Tensor:
    """(n, 2·half, 2·half) windows with the places (row, column) at pixel `half`, interpolated."""
    line = torch.arange(-half, half, device=image.device, dtype=torch.float32)
    places = places.to(image.device)
    y, x = torch.meshgrid(line, line, indexing="ij")
    h, w = image.shape
    grid = torch.stack([(x + places[:, 1, None, None]) * (2 / (w - 1)) - 1, (y + places[:, 0, None, None]) * (2 / (h - 1)) - 1], -1)
    source = image[None, None].expand(len(places), 1, h, w)
    return torch.nn.functional.grid_sample(source, grid, mode="bicubic", align_corners=True)[:, 0]


def _radial_mean(windows: Tensor, side: int) -> Tensor:
    """(N, N) picture of the mean radial profile of windows (n, N, N), linear between whole radii."""
    r = radii(side, 2, windows.device)
    shell = r.round().long().reshape(-1)
    mean = windows.mean(0).reshape(-1).double()
    profile = torch.bincount(shell, mean) / torch.bincount(shell).clamp(min=1)
    low = r.floor().long().clamp(max=len(profile) - 2)
    part = r - low
    return (profile[low] * (1 - part) + profile[low + 1] * part).float()
