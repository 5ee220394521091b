"""Motion correction of a movie: gain, bad pixels, alignment, dose-weighted sum (spec/processing 2; docs/steps/motion.md).

Frames are read three times: to add them up (bad pixels), to take the low frequencies of their transforms (alignment), to sum them. They are
kept in the detector's own number type where memory allows, otherwise read again. With local motion frames are interpolated by cubic splines
(ops.warp) into a few sums with weights a_rf, w_f(k) ≈ Σ_r a_rf b_r(k), the leading singular vectors of the dose weights: the
frequency part b_r is applied to the sums. Without it, each frame is shifted by a phase, exactly.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.maths.align import Fit, correlate_track, crop_reduced, empty_reduced, fit_motion, make_patches, reduced_transform
from frazil.maths.bad_pixels import Repair, find_bad_pixels
from frazil.maths.dose import damage, dose_weights, frame_exposures
from frazil.maths.motion import TERMS, fit_polynomial, full_phases, interpolate_groups, remove_spikes, total_shift
from frazil.maths.movie_spectrum import SPECTRUM_PIXEL, movie_spectrum
from frazil.ops.warp import spline_transfer, tile_centres, warp_sum_

CHUNK_BYTES = 1 << 28  # of frames read at a time, if a pixel is a byte
RADII = 512  # samples of |k| at which dose weights are tabulated
WEIGHT_ERROR = 2e-3  # largest error of a weight by leaving out singular vectors; weights are about 0.2 to 1
CORRELATION_TAIL = 1e-3  # weight exp(−2B s²) below which frequencies are left out of the first alignment
DOSE_A_GROUP = 0.8  # e/Å²: frames with less are grouped for alignment
# Frames of real movies differ two or three times in dose (a first frame that the shutter opened before); a saturated one has ten times the
# counts or more, and with four times its noise would already be half of that of a sum of sixteen frames.
MOST_COUNTS = 4.0  # times the median
PROBE = 16  # px between those looked at first for a frame of one value


class Frames(Protocol):
    """A movie that can be read in pieces."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        ...

    def load(self, start: int, stop: int) -> Tensor:
        """(stop − start, H, W) frames as stored: uint8, int8, int16, uint16 or float32."""
        ...


@dataclass(frozen=True)
class MotionSettings:
    """How a movie is corrected."""

    patches: tuple[int, int] = (5, 5)  # columns, rows; fewer than 3 either way: whole frames only
    b_factor: float = 150.0  # px², damping of the first correlation
    bin: float = 1.0
    group: int = 0  # frames aligned together; 0: as many as the dose asks for
    dose: float = 0.0  # e/Å² a frame; 0: not known, no dose weighting
    pre_exposure: float = 0.0  # e/Å²
    dose_weighting: bool = True
    no_dose_weighting: bool = False  # the unweighted sum as well
    even_odd: bool = False
    spectrum_size: int = 512  # px of the power spectrum; 0: none
    aligned_frames: bool = False
    finest: float = 5.0  # Å, the finest detail that alignment uses
    search: float = 50.0  # px
    hot: float = 6.0  # standard deviations
    accept: float = 10.0  # px rms of local motion beyond which it is not believed
    memory: int = 5 * 10**9  # bytes of frames kept between the passes
    wide_repair: bool = False  # neighbours within 4 px instead of 2 (EER)


@dataclass(frozen=True)
class MotionResult:
    """What comes of a movie. Shifts in px of the frames as read."""

    micrograph: Tensor  # (H', W') float32, dose-weighted if that was asked for; background n·mean / √n then, else n·mean
    pixel_size: float  # Å, of the micrograph
    track: Tensor  # (n, 2) float64 px, whole-frame shifts; first usable frame 0
    observed: Tensor  # (n,) bool: False for frames without counts or saturated, left out
    coefficients: Tensor | None  # (2, 18) of RELION's polynomial; None: whole-frame motion only
    patch_shifts: Tensor  # (n, p, 2) px, local motion of each patch alone
    patch_places: Tensor  # (p, 2) fractions of the field
    bad: Tensor  # (m, 2) int64 xy of the pixels that were replaced beyond the gain's own and the defects
    fit: Fit
    notes: list[str] = field(default_factory=list)
    no_dw: Tensor | None = None
    even: Tensor | None = None
    odd: Tensor | None = None
    spectrum: Tensor | None = None  # (s, s) centred amplitudes
    spectrum_pixel: float = 0.0  # Å
    aligned: Tensor | None = None  # (n, H', W')


class _Source:
    """The frames with their bad pixels replaced, from memory or from the file again."""

    def __init__(self, frames: Frames, settings: MotionSettings, device: torch.device) -> None:
        self.frames, self.device = frames, device
        self.n, self.height, self.width = frames.shape
        self.repair: Repair | None = None
        self.kept: list[Tensor] = []
        self.memory = settings.memory
        self.beside = 0  # bytes of transforms that are kept at the same time
        self.step = max(1, CHUNK_BYTES // (self.height * self.width))

    def chunks(self, first_pass: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(index of the first frame, (m, H, W) frames) in order."""
        if self.kept and not first_pass:
            yield from zip(range(0, self.n, self.step), self.kept, strict=True)
            return
        for start, part in self._loaded():
            if first_pass:
                size = part.numel() // len(part) * part.element_size() * self.n
                if size <= self.memory and size + self.beside <= 2 * self.memory:
                    self.kept.append(part)
            elif self.repair is not None:
                self.repair.apply_(part, start)
            yield start, part

    def _loaded(self) -> Iterator[tuple[int, Tensor]]:
        """Frames from the file, on the device; while some are worked on the next ones are decoded and sent there."""

        def load(start: int) -> Tensor:
            return self.frames.load(start, min(start + self.step, self.n)).to(self.device)

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(load, 0)
            for start in range(0, self.n, self.step):
                part = ahead.result()
                if start + self.step < self.n:
                    ahead = reader.submit(load, start + self.step)
                yield start, part

    def one(self, f: int) -> Tensor:
        """(H, W) a single frame."""
        if self.kept:
            return self.kept[f // self.step][f % self.step]
        part = self.frames.load(f, f + 1).to(self.device)
        if self.repair is not None:
            self.repair.apply_(part, f)
        return part[0]

    def use(self, repair: Repair) -> None:
        """Replace bad pixels from now on."""
        self.repair = repair
        for number, part in enumerate(self.kept):
            repair.apply_(part, number * self.step)


def correct_motion(
    frames: Frames, optics: Optics, settings: MotionSettings, *, gain: Tensor | None = None, defects: Tensor | None = None,
    seed: int = 0, device: torch.device | str = "cpu",
) -> MotionResult:  # fmt: skip
    """Align the frames of a movie and sum them.

    gain: (H, W) multiplicative, 0 for bad pixels; defects: (H, W) bool; optics: pixel size and voltage. Raises BadInput where the
    frames hold nothing to align: no counts, saturated, not finite, fewer than two.
    """
    device = torch.device(device)
    source = _Source(frames, settings, device)
    n, height, width = frames.shape
    shape, fine = (_reduced_shape(source, optics, settings, spectrum) for spectrum in (False, settings.spectrum_size > 0))
    if 4 * n * fine[0] * fine[1] <= settings.memory:  # otherwise the power spectrum has transforms of its own, one at a time
        shape = fine
    source.beside = 4 * n * shape[0] * shape[1]
    total, means, same = _add_up(source)
    observed, notes = usable_frames(means, total, same)
    for f in (~observed & (means != 0)).nonzero()[:, 0].tolist():
        total -= source.one(f).float()  # a saturated frame is no measure of how many counts a pixel should have
    flat = torch.ones(height, width, device=device) if gain is None else gain.to(device)
    given = flat == 0 if defects is None else (flat == 0) | defects.to(device)
    bad, new, level = find_bad_pixels(total * flat, given, settings.hot)
    level /= max(1, int(observed.sum()))
    source.use(Repair.make(bad, level, seed, 4 if settings.wide_repair else 2))
    flat = torch.where(bad, torch.ones_like(flat), flat).contiguous()
    exposure = frame_exposures(n, settings.dose, settings.pre_exposure)
    reduced = _reduce(source, flat, shape)
    seen = reduced if bool(observed.all()) else reduced[observed]
    track, patches_local, fit, starts = _align(seen, exposure[observed], (height, width), optics, settings)
    track, patch_shifts = (spread(values, observed) for values in (track, patches_local[0]))
    coefficients = _local_model(spread(patches_local[1], observed), patches_local[2], fit, settings, notes)
    spectrum, spectrum_pixel = None, 0.0
    if settings.spectrum_size:
        transform = reduced.__getitem__ if shape == fine else lambda f: reduced_transform(source.one(f), fine, gain=flat)
        spectrum, spectrum_pixel = movie_spectrum(
            transform, track, observed, (height, width), optics.pixel_size, settings.spectrum_size, settings.dose
        )
    del reduced, seen
    sums = _sum(source, flat, track, coefficients, _frame_weights(exposure, observed, optics, settings), settings)
    made = {name: _binned(ft, (height, width), settings.bin) for name, ft in sums.items()}
    return MotionResult(
        made["all"], optics.pixel_size * settings.bin, track, observed, coefficients, patch_shifts, patches_local[2],
        torch.nonzero(new).flip(-1).cpu(), fit, notes, made.get("no_dw"), made.get("even"), made.get("odd"), spectrum, spectrum_pixel,
        _aligned(source, flat, track, coefficients, settings.bin) if settings.aligned_frames else None,
    )  # fmt: skip


def _add_up(source: _Source) -> tuple[Tensor, Tensor, Tensor]:
    """(H, W) float32 sum of the raw frames, (n,) float64 mean of each, (n,) bool: frames with one value everywhere."""
    total = torch.zeros(source.height, source.width, device=source.device)
    values, means, spans = torch.empty_like(total), [], []
    for _, part in source.chunks(first_pass=True):
        for one in part:
            total += values.copy_(one)
            means.append(values.mean())
            some = values[::PROBE, ::PROBE]
            spans.append(some.amax() - some.amin())
    flat = (torch.stack(spans) == 0).cpu()
    for f in flat.nonzero()[:, 0].tolist():  # few: now every pixel of them
        values.copy_(source.one(f))
        flat[f] = bool(values.amax() == values.amin())
    return total, torch.stack(means).double().cpu(), flat


def usable_frames(means: Tensor, total: Tensor, flat: Tensor) -> tuple[Tensor, list[str]]:
    """(n,) bool of the frames to use, and notes on the others: without counts, saturated. Raises BadInput where there is nothing to align.

    means (n,): of each frame; total (H, W): their sum; flat (n,) bool: frames with one value everywhere.
    """
    if not bool(torch.isfinite(means).all()):
        first = int((~torch.isfinite(means)).nonzero()[0]) + 1
        raise BadInput(f"frame {first} holds values that are not finite; copy the movie again")
    if float(total.max()) == float(total.min()):
        raise BadInput("every pixel of every frame has the same value: no counts, or all saturated; leave the movie out")
    usual = max(0.0, float(means[~flat].median())) if not bool(flat.all()) else 0.0
    empty = (means <= 0.02 * usual) | (flat & (means == 0))
    stuck = flat & ~empty
    bright = (means > MOST_COUNTS * usual) & ~empty & ~stuck & (usual > 0)
    observed = ~(empty | stuck | bright)
    if int(observed.sum()) < 2:
        raise BadInput(f"only {int(observed.sum())} of {len(means)} frames hold counts; at least two are needed")
    kinds = {"without counts": empty, "with one value everywhere": stuck, f"of more than {MOST_COUNTS:g} times the usual counts": bright}
    lost = {kind: (which.nonzero()[:, 0] + 1).tolist() for kind, which in kinds.items()}
    return observed, [f"frames {kind} left out: {', '.join(map(str, some[:10]))}" for kind, some in lost.items() if some]


def _even_size(share: float, side: int) -> int:
    """Even side, with small prime factors, of a transform cropped to `share` of the frequencies of `side` px."""
    smooth = (n for n in range(math.ceil(share * side / 2) * 2, side + 1, 2) if 210**16 % n == 0)  # no prime factor beyond 7
    return next(smooth, side // 2 * 2)


def _reduced_shape(source: _Source, optics: Optics, settings: MotionSettings, spectrum: bool) -> tuple[int, int]:
    """Rows and columns of the image whose transform holds the frequencies that alignment, and the power spectrum too, need."""
    share = 2 * min(0.25, optics.pixel_size / settings.finest)
    if spectrum:
        share = max(share, min(1.0, optics.pixel_size / SPECTRUM_PIXEL))
    return _even_size(share, source.height), _even_size(share, source.width)


def _reduce(source: _Source, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """(n, h, w//2+1) reduced transforms of the corrected frames."""
    out = empty_reduced((source.n,), shape, source.device)
    for start, part in source.chunks():
        for f, one in enumerate(part, start):
            reduced_transform(one, shape, gain=flat, out_=out[f])
    return out


def _align(
    reduced: Tensor, exposure: Tensor, size: tuple[int, int], optics: Optics, settings: MotionSettings
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Fit, list[int]]:
    """Track (n, 2); (patch shifts, model at the patches (n, p, 2), places (p, 2)); the fit; first frames of the groups."""
    n = len(reduced)
    starts = group_starts(n, settings)
    finest = min(0.25, optics.pixel_size / settings.finest)
    shape = (_even_size(2 * finest, size[0]), _even_size(2 * finest, size[1]))
    ft = crop_reduced(reduced, shape)
    exposure = exposure - 0.5 * settings.dose
    if len(starts) < n:
        ends = [*starts[1:], n]
        ft = torch.stack([ft[a:b].sum(0) for a, b in zip(starts, ends, strict=True)])
        exposure = torch.stack([exposure[a:b].mean() for a, b in zip(starts, ends, strict=True)])
    tail = 2 * math.sqrt(-math.log(CORRELATION_TAIL) / (2 * settings.b_factor))
    rough = tuple(min(side, _even_size(min(1, tail), whole)) for side, whole in zip(shape, size, strict=True))
    # Not named: it is as large as half of the frames, and is let go when the track is known.
    track = correlate_track(crop_reduced(ft, (rough[0], rough[1])), size, settings.b_factor, settings.search)
    track = remove_spikes(track.cpu())
    local = min(settings.patches) >= 3 and len(starts) >= 4
    grid = settings.patches if local else (2, 2)
    patches = make_patches(ft, size, track.to(ft.device), grid, finest)
    left = damage(patches.radius.cpu() / optics.pixel_size, exposure, optics.voltage).to(ft.device)
    fit = fit_motion(patches, left, track, local)
    places = [interpolate_groups(t.reshape(len(starts), -1), starts, n).reshape(n, -1, 2) for t in (fit.patch_tracks, fit.local)]
    return interpolate_groups(fit.track, starts, n), (places[0], places[1], patches.place), fit, starts


def group_starts(n: int, settings: MotionSettings) -> list[int]:
    """First frames of the groups that are aligned together; leftovers join the last group, fewer than three groups are not made."""
    size = settings.group or (math.ceil(DOSE_A_GROUP / settings.dose) if settings.dose > 0 else 1)
    count = n // max(1, size)
    return [g * size for g in range(count)] if size > 1 and count >= 3 else list(range(n))


def spread(values: Tensor, observed: Tensor) -> Tensor:
    """(n, …) values of the observed frames given to all: others get those of the nearest observed frame."""
    places = observed.nonzero()[:, 0]
    nearest = (torch.arange(len(observed))[:, None] - places).abs().argmin(1)
    return values[nearest]


def _local_model(local: Tensor, places: Tensor, fit: Fit, settings: MotionSettings, notes: list[str]) -> Tensor | None:
    """RELION's coefficients (2, 18) of the local motion (n, p, 2), or None with a note where it is not to be believed."""
    if min(settings.patches) < 3:
        return None
    if len(local) * len(places) <= TERMS or len(local) < 4:
        notes.append("too few frames for local motion: whole-frame motion only")
        return None
    if fit.gain <= 0:
        notes.append("no local motion found above the noise: whole-frame motion only")
        return None
    rms = float(local.square().sum(-1).mean().sqrt())
    if not rms < settings.accept:
        notes.append(f"local motion of {rms:.1f} px rms is not believable (limit {settings.accept:g}): whole-frame motion only")
        return None
    coefficients, _ = fit_polynomial(local, places)
    return coefficients


def _frame_weights(exposure: Tensor, observed: Tensor, optics: Optics, settings: MotionSettings) -> dict[str, Tensor]:
    """Name of a sum → (n, RADII) weight of each frame at |k| from 0 to the corner of the transform."""
    n = len(exposure)
    k = torch.linspace(0, math.sqrt(0.5) / optics.pixel_size, RADII, dtype=torch.float64)
    plain = observed.double()[:, None].expand(n, RADII)
    weighted = plain
    if settings.dose_weighting and settings.dose > 0:
        weighted = torch.zeros(n, RADII, dtype=torch.float64)
        weighted[observed] = dose_weights(k, exposure[observed], optics.voltage)
    out = {"all": weighted}
    if settings.no_dose_weighting:
        out["no_dw"] = plain
    if settings.even_odd:
        even = (torch.arange(n) % 2 == 1)[:, None]  # frames count from 1: 2, 4, … are even
        out |= {"even": weighted * even, "odd": weighted * ~even}
    return out


def _sum(
    source: _Source, flat: Tensor, track: Tensor, coefficients: Tensor | None, weights: dict[str, Tensor], settings: MotionSettings
) -> dict[str, Tensor]:
    """Transforms (H, W//2+1) of the sums."""
    if coefficients is None:
        return _sum_shifted(source, flat, track, weights)
    return _sum_warped(source, flat, track, coefficients, weights)


def _radius_index(height: int, width: int, device: torch.device) -> Tensor:
    """(H, W//2+1) int64 place of |k| in the table of weights."""
    s = (torch.fft.fftfreq(height, device=device)[:, None].square() + torch.fft.rfftfreq(width, device=device).square()).sqrt()
    return (s * ((RADII - 1) / math.sqrt(0.5)) + 0.5).long().clamp(max=RADII - 1)


def _sum_shifted(source: _Source, flat: Tensor, track: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames shifted by phases."""
    height, width = source.height, source.width
    index = _radius_index(height, width, source.device)
    tables = {name: table.float().to(source.device) for name, table in weights.items()}
    out = {name: torch.zeros(height, width // 2 + 1, dtype=torch.complex64, device=source.device) for name in weights}
    for start, part in source.chunks():
        for i, one in enumerate(part):
            f = start + i
            y, x = full_phases((height, width), track[f].to(source.device))
            ft = torch.fft.rfft2(one.float() * flat) * y * x
            for name, table in tables.items():
                if bool(table[f].any()):
                    out[name] += ft * (table[f][index] if bool((table[f] != table[f][0]).any()) else table[f][0])
    return out


def _sum_warped(source: _Source, flat: Tensor, track: Tensor, coefficients: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frames interpolated by cubic splines into sums of the leading singular vectors of the weights."""
    height, width, device = source.height, source.width, source.device
    names = [name for name in weights if name not in ("even", "odd")]
    u, sv, vh = torch.linalg.svd(torch.cat([weights[name] for name in names], 1), full_matrices=False)
    rank = next(r for r in range(1, len(sv) + 1) if r == len(sv) or float((u[:, r:] * sv[r:] @ vh[r:]).abs().max()) < WEIGHT_ERROR)
    rows = u[:, :rank].T
    split = "even" in weights
    if split:  # even and odd frames into rows of their own; together they are all
        even = (torch.arange(source.n) % 2 == 1).double()
        rows = torch.cat([rows * even, rows * (1 - even)])
    shifts = _tile_shifts(source, track, coefficients)
    sums = torch.zeros(len(rows), height, width, device=device)
    for start, part in source.chunks():
        some = slice(start, start + len(part))
        warp_sum_(sums, part, flat, shifts[some].contiguous(), rows[:, some].float().contiguous().to(device))
    index = _radius_index(height, width, device).reshape(-1)
    parts = (sv[:rank, None] * vh[:rank]).float().to(device).split(RADII, 1)
    out: dict[str, Tensor] = {}
    for row in range(len(rows)):
        ft = torch.fft.rfft2(sums[row])
        wanted = list(zip(names, parts, strict=True))
        if split:
            wanted.append(("even" if row < rank else "odd", parts[0]))
        for name, part in wanted:
            piece = ft * part[row % rank].index_select(0, index).reshape(ft.shape)
            out[name] = out[name].add_(piece) if name in out else piece
    spline = 1 / (spline_transfer(height, False, device)[:, None] * spline_transfer(width, True, device))
    return {name: ft.mul_(spline) for name, ft in out.items()}


def _aligned(source: _Source, flat: Tensor, track: Tensor, coefficients: Tensor | None, factor: float) -> Tensor:
    """(n, H', W') aligned frames, binned, one by one."""
    size = (source.height, source.width)
    spline = spline_transfer(size[0], False, source.device)[:, None] * spline_transfer(size[1], True, source.device)
    one = torch.ones(1, 1, device=source.device)
    shifts = None if coefficients is None else _tile_shifts(source, track, coefficients)
    out = []
    for start, part in source.chunks():
        for f, frame in enumerate(part, start):
            if shifts is None:
                y, x = full_phases(size, track[f].to(source.device))
                ft = torch.fft.rfft2(frame.float() * flat) * y * x
            else:
                moved = torch.zeros(1, *size, device=source.device)
                warp_sum_(moved, frame[None], flat, shifts[f : f + 1].contiguous(), one)
                ft = torch.fft.rfft2(moved[0]) / spline
            out.append(_binned(ft, size, factor))
    return torch.stack(out)


def _tile_shifts(source: _Source, track: Tensor, coefficients: Tensor) -> Tensor:
    """(n, ty, tx, 2) float32 shift of each square of ops.warp."""
    ys, xs = tile_centres(source.height, source.width)
    places = torch.stack(torch.meshgrid(xs / source.width, ys / source.height, indexing="xy"), -1).reshape(-1, 2)
    return total_shift(track, coefficients, places).reshape(source.n, len(ys), len(xs), 2).float().to(source.device)


def _binned(ft: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """(H', W') image of a transform (H, W//2+1), cropped by `factor`; the mean stays."""
    height, width = size
    if factor == 1:
        # By hand: of rows in order each step takes half the time of irfft2.
        return torch.fft.irfft(torch.fft.ifft(ft, dim=0).contiguous(), n=width).cpu()
    h, w = (max(2, 2 * round(side / factor / 2)) for side in size)
    small = torch.cat([ft[: h // 2, : w // 2 + 1], ft[height - h // 2 :, : w // 2 + 1]])
    small[h // 2] = 0
    small[:, -1] = 0
    return (torch.fft.irfft2(small, s=(h, w)) * (h * w / (height * width))).cpu()
