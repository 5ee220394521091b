"""Post-processing of two half maps (spec/refinement 4.8, spec/processing 7.3).

    FSC      unmasked, masked, of maps with random phases, corrected (Chen et al. 2013): (FSC_m − FSC_r)/(1 − FSC_r)
    map      (h1 + h2)/2 / MTF(k) · sqrt(2 FSC/(1 + FSC)) · exp(−B k²/4)                     (Rosenthal & Henderson 2003)
    B        4 · slope of ln⟨|F|⟩ against k² between two resolutions (Guinier plot), or given
    part     f FSC/(1 + (f − 1) FSC), f = 0.476 / share of the box inside the mask           (particle's share of the noise)

Sums over shells count the plane kx = 0 twice, as RELION's do (maths/filters.shell_totals), so that figures can be compared.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import Watch
from frazil.maths.filters import lowpass_weights, planes, shell_rows, shell_totals
from frazil.maths.fsc import NO_RESOLUTION, CorrectedFsc, corrected_for_mask, corrected_fsc, fsc, resolution_at
from frazil.maths.independence import SHARED_NOISE, identical, shared_shells, solvent_correlation

UNWATCHED = Watch()
GOLD = 0.143
TIGHT = 0.1  # FSC of random phases at the resolution from which on the mask is too tight
DRAWN_VOXELS = 1 << 25  # boxes get several sets of random phases until about so many voxels are drawn: some CPU-seconds
MOST_DRAWS = 16  # one set has an error of 0.03 a shell at 64 px, the mean of so many of 0.008
NO_WEIGHT = 1e-4  # FSC from which on nothing of the map is kept
SMALLEST_MTF = 1e-3
SPHERE_SHARE = 0.476  # of the box, in the definition of the fraction f
EMPTY = -99.0  # ln of an amplitude that is zero, as RELION writes it
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}


class PostprocessParams(BaseModel):
    """Corrected FSC, resolution, sharpened map of two half maps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    b_factor: float | None = Field(None, description="sharpen by this B-factor (negative sharpens) instead of the fitted one",
                                   json_schema_extra={"unit": "Å²"})  # fmt: skip
    fit_from: float = Field(10.0, gt=0, description="lowest resolution of the B-factor fit", json_schema_extra=ANGSTROM)
    fit_to: float = Field(0.0, ge=0, description="highest resolution of the fit; 0: as far as the FSC has weight",
                          json_schema_extra={**ANGSTROM, **EXPERT})  # fmt: skip
    fsc_weighting: bool = Field(True, description="weight by sqrt(2 FSC/(1 + FSC)); without, the map is low-passed at its resolution",
                                json_schema_extra=EXPERT)  # fmt: skip
    low_pass: float = Field(0.0, description="low-pass the map at this resolution; 0: not; negative: at FSC 0.143",
                            json_schema_extra={**ANGSTROM, **EXPERT})  # fmt: skip
    edge: float = Field(2.0, ge=0, description="width of the low-pass filter's edge",
                       json_schema_extra={"unit": "Fourier shells", **EXPERT})  # fmt: skip
    randomise_below: float = Field(0.8, gt=0, lt=1, description="phases are random from where the unmasked FSC falls below this",
                                   json_schema_extra={"unit": "FSC", **EXPERT})  # fmt: skip
    randomise_from: float | None = Field(None, gt=0, description="phases are random from this resolution, whatever the FSC",
                                         json_schema_extra={**ANGSTROM, **EXPERT})  # fmt: skip
    force_mask: bool = Field(False, description="keep the corrected FSC where the unmasked one reaches farther", json_schema_extra=EXPERT)
    mass: float | None = Field(None, gt=0, description="molecular mass of the particle, for the FSC of its share of the box",
                               json_schema_extra={"unit": "kDa", **EXPERT})  # fmt: skip


@dataclass(frozen=True)
class Guinier:
    """ln⟨|F|⟩ by shell, (N/2+1,) float64 each, −99 where nothing is left, and the line fitted to `weighted`."""

    k2: Tensor  # 1/Å²
    original: Tensor
    mtf_corrected: Tensor
    weighted: Tensor
    sharpened: Tensor
    slope: float = 0.0
    intercept: float = 0.0
    correlation: float = 0.0  # r² of the fit, which is what RELION writes as its correlation
    fitted: int = 0  # shells in the fit


@dataclass(frozen=True)
class Postprocessed:
    """What came out."""

    data: Tensor  # (N, N, N) float32, sharpened
    curves: CorrectedFsc
    used: Tensor  # (N/2+1,) float64, the curve that decides
    particle: Tensor  # FSC of the particle's share of the box
    fraction: float  # f, box to particle
    resolution: float  # Å, FSC 0.143
    resolution_half: float  # Å, FSC 0.5
    b_factor: float  # Å², applied
    guinier: Guinier
    warnings: tuple[str, ...]


def compare_halves(
    half1: Tensor, half2: Tensor, mask: Tensor | None, pixel_size: float, params: PostprocessParams, seed: int = 0
) -> CorrectedFsc:
    """The four curves of two half maps (N, N, N); without a mask all but the random one are the unmasked curve."""
    if mask is None:
        curve = fsc(half1, half2, relion=True)
        return CorrectedFsc(curve, curve.clone(), torch.zeros_like(curve), curve.clone(), None)
    start = None
    if params.randomise_from is not None:
        start = max(1, int(half1.shape[-1] * pixel_size / params.randomise_from + 1e-6))
    draws = max(1, min(MOST_DRAWS, round(DRAWN_VOXELS / half1.numel())))
    found = corrected_fsc(half1, half2, mask, seed, randomise_from=start, below=params.randomise_below, relion=True, draws=draws)
    if found.randomise_from is None:
        return found
    return replace(found, corrected=corrected_for_mask(found.masked, found.randomised, found.randomise_from))


def fsc_weight(curve: Tensor) -> Tensor:
    """(n,) sqrt(2 FSC/(1 + FSC)), 0 from the first shell on whose FSC is below 1e-4."""
    kept = (curve >= NO_WEIGHT).cummin(0).values
    return torch.where(kept, (2 * curve / (1 + curve)).clamp(min=0).sqrt(), torch.zeros_like(curve))


def particle_fsc(curve: Tensor, fraction: float | Tensor) -> Tensor:
    """(…, n) f FSC/(1 + (f − 1) FSC): the curve if only the particle's share of the box, 1/f, held noise."""
    return fraction * curve / (1 + (fraction - 1) * curve)


def fit_guinier(guinier: Guinier, weight: Tensor, pixel_size: float, params: PostprocessParams) -> Guinier:
    """The line ln⟨|F|⟩ = intercept + slope·k² between the two resolutions, over shells that have weight; no line with fewer than 3."""
    d = guinier.k2.clamp(min=1e-12).rsqrt()
    inside = (d <= params.fit_from) & (d >= max(params.fit_to, 2 * pixel_size - 1e-6)) & (weight > 0) & (guinier.weighted > EMPTY)
    x, y = guinier.k2[inside], guinier.weighted[inside]
    if len(x) < 3:
        return replace(guinier, fitted=len(x))
    dx, dy = x - x.mean(), y - y.mean()
    slope = float((dx * dy).sum() / dx.square().sum())
    r2 = float((dx * dy).sum() ** 2 / (dx.square().sum() * dy.square().sum()).clamp(min=1e-300))
    return replace(guinier, slope=slope, intercept=float(y.mean()) - slope * float(x.mean()), correlation=r2, fitted=len(x))


def mtf_at(table: np.ndarray, frequency: Tensor) -> Tensor:
    """MTF of a table (n, 2: 1/px of the detector, value) at frequencies in those units; 1 where it would be below 1e-3."""
    values = torch.from_numpy(np.interp(frequency.cpu().numpy(), table[:, 0], table[:, 1])).to(frequency.device)
    return torch.where(values < SMALLEST_MTF, torch.ones_like(values), values)


def _multiply_(ft: Tensor, box: int, factor: Callable[[Tensor, slice], Tensor]) -> None:
    """Multiply a half transform by factor(|k| in cycles per box, rows)."""
    for rows, radius in planes(box, 3, ft.device):
        ft[rows] *= factor(radius, rows).to(ft.real.dtype)


def _amplitude(ft: Tensor, box: int, count: Tensor) -> Tensor:
    """(N/2+1,) ⟨|F|⟩ with F = FFT/N³; count (N/2+1,): elements of the shells."""
    return shell_totals(lambda s: (ft[s].abs(),), box, 3, ft.device, relion=True)[0] / count / box**3


def _log(mean: Tensor) -> Tensor:
    """ln of amplitudes, −99 for none."""
    return torch.where(mean > 1e-40, mean.clamp(min=1e-300).log(), torch.full_like(mean, EMPTY)).cpu()


def sharpen(
    mean_map: Tensor, pixel_size: float, curve: Tensor, resolution: float, params: PostprocessParams,
    mtf: tuple[np.ndarray, float] | None = None,
) -> tuple[Tensor, Guinier, float]:
    """(map (N, N, N), Guinier plot, B-factor): the mean of the halves divided by the MTF, weighted, sharpened, filtered.

    curve: FSC (N/2+1,) for the weights; mtf: (table, pixel size of the detector in Å).
    """
    box = mean_map.shape[-1]
    side = box * pixel_size
    weight = fsc_weight(curve) if params.fsc_weighting else torch.ones_like(curve)
    table = torch.cat([weight, weight.new_zeros(1)]).to(mean_map.device)
    ft = torch.fft.rfftn(mean_map)
    count = shell_totals(lambda s: (torch.ones_like(ft[s].real),), box, 3, ft.device, relion=True)[0]
    original = corrected = _amplitude(ft, box, count)
    if mtf is not None:
        values, detector = mtf
        _multiply_(ft, box, lambda r, rows: 1 / mtf_at(values, r / side * detector))
        corrected = _amplitude(ft, box, count)
    weighted = corrected * weight.to(corrected)  # the weight is the same all over a shell
    k2 = (torch.arange(len(curve), dtype=torch.float64) / side).square()
    plot = Guinier(k2, _log(original), _log(corrected), _log(weighted), _log(weighted))
    guinier = fit_guinier(plot, weight.cpu(), pixel_size, params)
    b = params.b_factor if params.b_factor is not None else 4 * guinier.slope
    low_pass = params.low_pass if params.low_pass > 0 else resolution if params.low_pass < 0 or not params.fsc_weighting else 0.0

    def last(r: Tensor, rows: slice) -> Tensor:
        factor = torch.exp(-b / 4 * (r / side).square()) * (r <= box // 2)  # nothing beyond Nyquist, where B would raise noise alone
        if params.fsc_weighting:
            factor = factor * table[shell_rows(box, 3, ft.device, rows)]
        return factor * lowpass_weights(r, box, pixel_size, low_pass, params.edge) if 0 < low_pass < NO_RESOLUTION else factor

    _multiply_(ft, box, last)
    guinier = replace(guinier, sharpened=_log(_amplitude(ft, box, count)))
    return torch.fft.irfftn(ft, s=mean_map.shape), guinier, b


def postprocess(
    half1: Tensor, half2: Tensor, mask: Tensor | None, pixel_size: float, params: PostprocessParams,
    mtf: tuple[np.ndarray, float] | None = None, seed: int = 0, watch: Watch = UNWATCHED,
) -> Postprocessed:  # fmt: skip
    """Everything from two half maps (N, N, N) float32, a mask in [0, 1] or None, and the pixel size in Å; see the module's text."""
    box = half1.shape[-1]
    watch.progress("FSC curves", 1, 4)
    packed = watch.known.get("curves")
    packed = _pack(compare_halves(half1, half2, mask, pixel_size, params, seed)) if packed is None else packed
    watch.keep("curves", packed)
    curves = _unpack(packed)
    used, told = decide(curves, box, pixel_size, params, mask is not None)
    resolution, at_half = (resolution_at(used, level, box, pixel_size) for level in (GOLD, 0.5))
    watch.progress("independence of the halves", 2, 4)
    shared = watch.known.get("independence")
    shared = measure_independence(half1, half2, mask) if shared is None else shared
    watch.keep("independence", shared)
    told += about_independence(shared, curves.unmasked, box, pixel_size, resolution)
    watch.progress("sharpening", 3, 4)
    data, guinier, b = sharpen((half1 + half2) / 2, pixel_size, used, resolution, params, mtf)
    told += about_fit(guinier, params, resolution)
    fraction = box_fraction(mask, box, pixel_size, params.mass)
    particle = particle_fsc(curves.unmasked, fraction)
    return Postprocessed(data, curves, used, particle, fraction, resolution, at_half, b, guinier, tuple(told))


def _pack(curves: CorrectedFsc) -> Tensor:
    """(5, n) float64 on the CPU: the four curves, and the first randomised shell (−1: none) in a row of its own."""
    rows = [curves.unmasked, curves.masked, curves.randomised, curves.corrected]
    start = -1 if curves.randomise_from is None else curves.randomise_from
    return torch.stack([*rows, torch.full_like(rows[0], start)]).cpu()


def _unpack(packed: Tensor) -> CorrectedFsc:
    """The curves that _pack packed."""
    unmasked, masked, randomised, corrected, start = packed
    first = int(start[0])
    return CorrectedFsc(unmasked, masked, randomised, corrected, None if first < 0 else first)


def box_fraction(mask: Tensor | None, box: int, pixel_size: float, mass: float | None) -> float:
    """f of the particle's FSC: 0.476 of the box over the volume of the mass (kDa), or over the voxels of the mask above ½; 1 without."""
    if mass is not None:
        return SPHERE_SHARE * (box * pixel_size) ** 3 * 0.81 / (mass * 1e3)
    inside = float((mask > 0.5).double().mean()) if mask is not None else 0.0
    return SPHERE_SHARE / inside if inside > 0 else 1.0


def decide(curves: CorrectedFsc, box: int, pixel_size: float, params: PostprocessParams, masked: bool) -> tuple[Tensor, list[str]]:
    """(the curve that gives the resolution and the weights, warnings)."""
    told: list[str] = []
    used = curves.corrected
    plain, corrected = (resolution_at(curve, GOLD, box, pixel_size) for curve in (curves.unmasked, used))
    if not masked:
        told.append("no mask: the solvent's noise is in the FSC, so that it says less than the map holds; give --mask")
    elif curves.randomise_from is None:
        told.append(f"the unmasked FSC never falls below {params.randomise_below:g}, so the effect of the mask could not be measured: "
                    "the pixel size limits the resolution; refine with smaller pixels")  # fmt: skip
    if masked and plain < corrected and not params.force_mask:
        told.append(f"the unmasked halves agree to {plain:.2f} Å, those in the mask only to {corrected:.2f} Å: the unmasked curve is used. "
                    "Does the mask cover the particle? --force-mask keeps the corrected curve")  # fmt: skip
        used = curves.unmasked
    shell = _shell(resolution_at(used, GOLD, box, pixel_size), box, pixel_size)
    if masked and curves.randomise_from is not None:
        at = min(max(shell, curves.randomise_from + 2), len(used) - 1)
        by_mask = float(curves.randomised[at])
        tight = _shell(resolution_at(curves.masked, GOLD, box, pixel_size), box, pixel_size) - _shell(corrected, box, pixel_size)
        if by_mask > TIGHT or tight > max(3, 0.1 * shell):
            told.append(f"the mask is too tight: even with random phases the masked maps correlate by {by_mask:.2f} at the resolution. "
                        "The corrected curve takes that off; better use a larger mask with a wider edge")  # fmt: skip
    return used, told + about_curve(used, box, pixel_size)


def about_curve(curve: Tensor, box: int, pixel_size: float) -> list[str]:
    """Warnings about the shape of an FSC curve (N/2+1,): dips that rise again, no end before Nyquist."""
    shell = _shell(resolution_at(curve, GOLD, box, pixel_size), box, pixel_size)
    if shell == len(curve) - 1:
        return [f"the FSC is above {GOLD} up to Nyquist: the resolution of {2 * pixel_size:.2f} Å is the limit of the pixels, not of the "
                "data; refine with smaller pixels. If the curve does not fall at all the halves are not independent"]  # fmt: skip
    told = []
    rises = (curve[shell + 1 :] > GOLD + 0.1).nonzero()
    if len(rises):
        again = shell + 1 + int(rises[-1])
        told.append(f"the FSC falls below {GOLD} at {box * pixel_size / (shell + 1):.2f} Å and rises again as far as "
                    f"{box * pixel_size / again:.2f} Å: the first fall counts; a wrong pixel size, CTF faults or a hard mask can "
                    "be the cause")  # fmt: skip
    before = curve[1 : shell + 1]
    if len(before) > 4:
        recovery = (before.flip(0).cummax(0).values.flip(0) - before).max()
        if float(recovery) > 0.25:
            dip = 1 + int((before.flip(0).cummax(0).values.flip(0) - before).argmax())
            told.append(f"the FSC dips to {float(curve[dip]):.2f} at {box * pixel_size / dip:.1f} Å and recovers: often a fault of the CTF "
                        "or of the mask")  # fmt: skip
    return told


def measure_independence(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64: 1 where two half maps (N, N, N) are identical, else 0; correlation of their noise in the solvent; its error."""
    if identical(a, b):
        return torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    return torch.tensor([0.0, *solvent_correlation(a, b, mask)], dtype=torch.float64)


def about_independence(shared: Tensor, unmasked: Tensor, box: int, pixel_size: float, resolution: float) -> list[str]:
    """Warnings where the halves are not independent: identical, noise in common (measure_independence), or joined at low resolution."""
    same, noise, error = shared.tolist()
    if same:
        return ["the half maps are identical: their FSC is 1 and means nothing; give the two halves of one refinement"]
    told = []
    if noise > SHARED_NOISE and noise > 5 * error:
        told.append(f"the noise of the halves correlates by {noise:.2f} in the solvent: they are not independent (the same particles in "
                    "both, duplicates, or halves refined together), and the resolution is too good")  # fmt: skip
    joined = shared_shells(unmasked)
    if joined:
        limit = box * pixel_size / joined
        note = " and so is the resolution: it means nothing" if resolution >= 0.9 * limit else "; the FSC there is 1 by construction"
        told.append(f"the halves are the same up to {limit:.1f} Å (joined at low resolution during refinement){note}")
    return told


def about_fit(guinier: Guinier, params: PostprocessParams, resolution: float) -> list[str]:
    """Warnings about the B-factor."""
    if params.b_factor is not None:
        return []
    if guinier.fitted < 3:
        return [f"no B-factor could be fitted ({guinier.fitted} shells between {params.fit_from:g} Å and the end of the FSC), the map is "
                "not sharpened: give --b-factor, or --fit-from a lower resolution"]  # fmt: skip
    told = []
    if resolution > params.fit_from or guinier.fitted < 10:
        told.append(f"the B-factor rests on {guinier.fitted} shells: doubtful; below 10 Å the Guinier plot is not a line")
    if guinier.slope > 0:
        told.append("the fitted B-factor is positive and blurs the map: it was sharpened before, or is filtered; give --b-factor")
    elif guinier.correlation < 0.81:
        told.append(f"the Guinier plot is no line (r² {guinier.correlation:.2f}): look at it before trusting the B-factor")
    return told


def _shell(resolution: float, box: int, pixel_size: float) -> int:
    """Shell of a resolution that came from resolution_at; 0 for none."""
    return 0 if resolution >= NO_RESOLUTION else round(box * pixel_size / resolution)
