"""Numbers that tell a good 2D class average from junk (spec/processing 6.2), each free of units, grey scale and box.

Inside the circle of the particle's diameter D (radius R) an average is low-passed and parted at the level of least variance within (Otsu)
into density and solvent; the largest connected piece, its holes filled, is the particle.

    resolution   ln(D / d)                                   d: the class's own resolution
    relative     ln(best d of the run / d)
    share        ln(K' · share of the particles)             K': classes that are not empty
    contrast     ln of (mean particle − mean solvent) / sd of the solvent
    detail       ln of rms of what the low-pass took away, particle over solvent
    edge         share of the rim (0.85 R … 0.97 R) that is density
    touching     share of the rim that is the particle itself: it does not end inside the circle
    fragments    share of the density that is outside the largest piece
    area         |ln(area of the particle / that of the typical class, weighted by share)|
    centring     distance of the particle's centre of mass from the middle / R
    compactness  area of the particle / area of its convex hull
    accuracy     ln of the expected angular error in degrees, 60 where it is not known
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from frazil.maths.filters import lowpass_map
from frazil.maths.masks import radii
from frazil.maths.peaks import split_level

NAMES = ("resolution", "relative", "share", "contrast", "detail", "edge", "touching", "fragments", "area", "centring", "compactness",
         "accuracy")  # fmt: skip
LOWPASS = 1 / 7  # of the diameter: finer is detail
RIM = (0.85, 0.97)
UNKNOWN_ACCURACY = 60.0  # degrees; programs write 999
TINY = 1e-3


@dataclass(frozen=True)
class ClassFacts:
    """What a run says of its classes besides their averages."""

    resolution: Tensor  # (K,) Å
    share: Tensor  # (K,) of the particles
    accuracy: Tensor  # (K,) degrees, 999 where it is not known


def class_features(averages: Tensor, pixel_size: float, diameter: float, facts: ClassFacts) -> Tensor:
    """(K, len(NAMES)) float64 features of averages (K, N, N); NaN for empty classes (no share, or an average without contrast)."""
    n, radius = averages.shape[-1], min(0.5 * diameter / pixel_size, averages.shape[-1] / 2 - 1)
    r = radii(n, 2).numpy()
    smooth = lowpass_map(averages.float(), pixel_size, max(LOWPASS * diameter, 3 * pixel_size), dims=2).numpy()
    whole, share = averages.float().numpy(), facts.share.double().numpy()
    inside = r <= RIM[1] * radius
    live = (share > 0) & (np.ptp(whole[:, inside], axis=1) > 0)
    out = np.full((len(whole), len(NAMES)), np.nan)
    shapes = [_shape(smooth[k], whole[k], r, radius) if live[k] else None for k in range(len(whole))]
    found = [k for k, shape in enumerate(shapes) if shape is not None]
    if not found:
        return torch.from_numpy(out)
    area = np.array([s[-1] for s in shapes if s is not None])
    typical = float(np.exp(np.average(np.log(area), weights=share[found])))
    d = facts.resolution.double().numpy().clip(2 * pixel_size, 10 * diameter)
    accuracy = facts.accuracy.double().numpy()
    accuracy = np.where(np.isfinite(accuracy) & (accuracy < UNKNOWN_ACCURACY), accuracy, UNKNOWN_ACCURACY).clip(0.1)
    for k, shape in enumerate(shapes):
        if shape is not None:
            of_run = (math.log(diameter / d[k]), math.log(d[found].min() / d[k]), math.log(max(len(found) * share[k], TINY)))
            out[k] = (*of_run, *shape[:5], abs(math.log(shape[7] / typical)), *shape[5:7], math.log(accuracy[k]))
    return torch.from_numpy(out)


def _shape(smooth: NDArray, whole: NDArray, r: NDArray, radius: float) -> tuple[float, ...]:
    """contrast, detail, edge, touching, fragments, centring, compactness, area in px of one average."""
    circle = r <= RIM[1] * radius
    dense = circle & (smooth > split_level(smooth[circle].astype(float)))
    pieces = np.zeros(dense.shape, np.int32)
    ndimage.label(dense, output=pieces)
    sizes = np.bincount(pieces[dense])[1:]
    particle = np.zeros_like(dense)
    ndimage.binary_fill_holes(pieces == 1 + int(np.argmax(sizes)), output=particle)
    wide = np.zeros_like(dense)
    ndimage.binary_dilation(particle | dense, iterations=2, output=wide)
    solvent = circle & ~wide
    if solvent.sum() < 0.02 * circle.sum():
        solvent = circle & ~dense
    spread = max(float(whole[solvent].std()), TINY * float(whole[circle].std()))
    contrast = (float(whole[particle].mean()) - float(whole[solvent].mean())) / spread
    fine = whole - smooth
    detail = _rms(fine[particle]) / max(_rms(fine[solvent]), TINY * float(whole[circle].std()))
    rim = circle & (r >= RIM[0] * radius)
    y, x = np.nonzero(particle)
    half = len(r) // 2
    weight = (smooth[particle] - float(smooth[solvent].mean())).clip(0)
    weight = weight / max(float(weight.sum()), 1e-30)
    away = math.hypot(float((weight * (x - half)).sum()), float((weight * (y - half)).sum())) / radius
    other = 1 - float(sizes.max() / sizes.sum())
    return (math.log(max(contrast, 0.05)), math.log(max(detail, 0.05)), float(dense[rim].mean()), float(particle[rim].mean()), other, away,
            _compactness(x, y), float(particle.sum()))  # fmt: skip


def _rms(values: NDArray) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def _compactness(x: NDArray, y: NDArray) -> float:
    """Pixels over the area of their convex hull (of the pixels' corners, so that it is at most 1)."""
    corners = np.concatenate([np.stack([x + a, y + b], -1) for a in (0, 1) for b in (0, 1)])
    try:
        return len(x) / float(ConvexHull(corners).volume)
    except QhullError:
        return 1.0
