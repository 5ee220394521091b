"""Directional resolution: FSC in cones (3D FSC), its sphericity, and how evenly the views of the particles sample Fourier space.

    FSC(n, r)    = Re Σ A B* / sqrt(Σ|A|² Σ|B|²)     over shell r and a cone of half angle α about ±n            (Tan et al. 2017)
    sphericity   = π^⅓ (6 V)^⅔ / S                   of the surface 1/d(n) whose V is its volume, S its area
    sampling     S(k) = views whose central slice passes within half a width of k
    efficiency   = 1 / (⟨S⟩ ⟨1/S⟩)                   sampling compensation factor                       (Baldwin & Lyumkis 2020)

An efficiency of E means that N particles are worth E·N evenly spread ones; side views about one axis have 8/π² = 0.81.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import healpix
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from scipy.spatial import ConvexHull
from torch import Tensor

from frazil.maths.filters import PLANES, friedel_weights, shell_rows
from frazil.maths.fsc import NO_RESOLUTION
from frazil.maths.sphere import direction_vectors, directions

GOLD = 0.143
BIN_ORDER = 4  # HEALPix order of the bins (3.7°) over which Fourier voxels are summed before cones are
CONE_ORDER = 3  # of the directions of cones (7.3°)
VIEW_ORDER = 6  # of the bins of viewing directions (0.9°)
FEWEST = 12  # elements of a shell in a cone; with fewer the whole shell's FSC is taken
EXPERT: JsonDict = {"level": "expert"}


class DirectionalParams(BaseModel):
    """Directional FSC of two half maps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    cone: float = Field(20.0, gt=0, le=90, description="half angle of the cones of the directional FSC",
                        json_schema_extra={"unit": "degrees", **EXPERT})  # fmt: skip


@dataclass(frozen=True)
class Directional:
    """FSC by direction. Directions are those of sphere.directions(CONE_ORDER), each standing for itself and its opposite."""

    angles: Tensor  # (d, 2) rot, tilt in degrees
    curves: Tensor  # (d, N/2+1) float64
    resolution: Tensor  # (d,) float64 Å at FSC 0.143
    sphericity: float
    mean: float  # Å
    spread: float  # Å, standard deviation over directions


@dataclass(frozen=True)
class PoseEfficiency:
    """How evenly views sample Fourier space."""

    efficiency: float  # sampling compensation factor, 0 to 1
    empty: float  # share of directions in Fourier space that no view reaches
    angles: Tensor  # (d, 2) rot, tilt in degrees
    sampling: Tensor  # (d,) float64 at those directions, mean 1
    views: Tensor  # (d,) float64 density of viewing directions, mates and opposites counted, mean 1


def cone_sums(a: Tensor, b: Tensor) -> Tensor:
    """(4, 12·4^4, N/2+1) float64: Re Σ A B*, Σ|A|², Σ|B|², elements by direction bin and shell of two maps (N, N, N)."""
    box, device = a.shape[-1], a.device
    x, y = torch.fft.rfftn(a), torch.fft.rfftn(b)
    nside, last = 2**BIN_ORDER, box // 2
    bins = 12 * nside**2
    totals = torch.zeros(4, bins * (last + 2), dtype=torch.float64, device=device)
    line = np.fft.fftfreq(box, 1 / box)
    weight = friedel_weights(box, device)
    for start in range(0, box, PLANES):
        rows = slice(start, min(start + PLANES, box))
        kz, ky, kx = np.meshgrid(line[rows], line, np.arange(last + 1), indexing="ij")
        pixel = torch.from_numpy(healpix.vec2pix(nside, kx.ravel(), ky.ravel(), kz.ravel(), nest=True).astype(np.int64)).to(device)
        index = pixel * (last + 2) + shell_rows(box, 3, device, rows).reshape(-1)
        p, q = x[rows], y[rows]
        parts = ((p * q.conj()).real, p.abs().square(), q.abs().square(), torch.ones_like(p.real))
        for total, values in zip(totals, parts, strict=True):
            total += torch.bincount(index, (values.double() * weight).reshape(-1), minlength=len(total))
    return totals.reshape(4, bins, last + 2)[..., :-1]


def directional_fsc(half1: Tensor, half2: Tensor, mask: Tensor | None, pixel_size: float, params: DirectionalParams) -> Directional:
    """FSC in cones of two half maps (N, N, N), inside the mask where there is one."""
    box = half1.shape[-1]
    inside = (half1, half2) if mask is None else (half1 * mask, half2 * mask)
    sums = cone_sums(*inside).cpu()
    angles = directions(CONE_ORDER)
    near = direction_vectors(angles) @ direction_vectors(directions(BIN_ORDER)).T
    members = (near.abs() >= math.cos(math.radians(params.cone)) - 1e-9).double()
    cross, power1, power2, count = torch.einsum("dp,qpr->qdr", members, sums)
    curves = cross / (power1 * power2).sqrt().clamp(min=1e-300)
    whole = sums.sum(1)
    curves = torch.where(count >= FEWEST, curves, whole[0] / (whole[1] * whole[2]).sqrt().clamp(min=1e-300))
    curves[:, 0] = 1.0
    resolution = last_above(curves, box * pixel_size)
    known = resolution < NO_RESOLUTION
    mean, spread = (float(resolution[known].mean()), float(resolution[known].std())) if known.any() else (NO_RESOLUTION, 0.0)
    return Directional(angles, curves, resolution, sphericity(angles, smoothed(angles, 1 / resolution, params.cone)), mean, spread)


def smoothed(angles: Tensor, values: Tensor, cone: float) -> Tensor:
    """(d,) means of values (d,) over the directions within the cone of each: noise of neighbouring cones is no roughness of a surface."""
    vectors = direction_vectors(angles)
    near = ((vectors @ vectors.T).abs() >= math.cos(math.radians(cone)) - 1e-9).double()
    return near @ values / near.sum(1)


def last_above(curves: Tensor, length: float, threshold: float = GOLD) -> Tensor:
    """(d,) Å where curves (d, shells) of a box of `length` Å first fall below the threshold, linear between shells; 999: at once."""
    below = curves < threshold
    below[:, 0] = False
    falls = below.any(1)
    first = torch.where(falls, below.double().argmax(1), torch.tensor(curves.shape[1] - 1))
    row = torch.arange(len(curves))
    high, low = curves[row, first - 1], curves[row, first]
    shell = torch.where(falls, first - 1 + ((high - threshold) / (high - low).clamp(min=1e-9)).clamp(0, 1), first.double())
    return torch.where(shell > 0.5, length / shell.clamp(min=0.5), torch.full_like(shell, NO_RESOLUTION))


def sphericity(angles: Tensor, radius: Tensor) -> float:
    """π^⅓ (6V)^⅔/S of the closed surface with `radius` (d,) at directions (d, 2) rot, tilt, relative to the sphere's on that mesh."""
    unit = direction_vectors(angles).numpy()
    faces = ConvexHull(unit).simplices
    return _shape(unit * radius.double().numpy()[:, None], faces) / _shape(unit, faces)


def _shape(points: np.ndarray, faces: np.ndarray) -> float:
    """π^⅓ (6V)^⅔/S of a star-shaped mesh."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    volume = np.abs(np.einsum("fi,fi->f", a, normal)).sum() / 6
    return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / (np.linalg.norm(normal, axis=1).sum() / 2))


def fsc_volume(found: Directional, box: int) -> Tensor:
    """(N, N, N) float32: the directional FSC at every element of the centred transform, 0 beyond Nyquist."""
    nside = 2**CONE_ORDER
    out = torch.zeros(box, box, box)
    line = np.arange(box) - box // 2
    table = torch.cat([found.curves, torch.zeros(len(found.curves), 1, dtype=torch.float64)], 1).float()
    for z in range(box):
        ky, kx = np.meshgrid(line, line, indexing="ij")
        kz = np.full_like(kx, line[z])
        pixel = torch.from_numpy(healpix.vec2pix(nside, kx.ravel(), ky.ravel(), kz.ravel(), nest=True).astype(np.int64))
        shell = torch.from_numpy(np.floor(np.sqrt(kx**2 + ky**2 + kz**2) + 0.5).astype(np.int64)).clamp(max=box // 2 + 1).reshape(-1)
        out[z] = table[pixel, shell].reshape(box, box)
    return out


def pose_efficiency(rotation: Tensor, operators: Tensor, width: float = 2.0) -> PoseEfficiency:
    """Sampling of Fourier space by views (n, 3, 3) and their symmetry mates (operators (g, 3, 3)); slices fall off over `width` degrees.

    Directions that no view reaches count as sampled by half a view each: they hold almost nothing, and the factor stays above 0.
    """
    views = torch.einsum("ni,gij->ngj", rotation[:, 2].double(), operators.double()).reshape(-1, 3)
    views = torch.where(views[:, 2:] < 0, -views, views).numpy()  # a slice is that of the opposite view too
    nside = 2**VIEW_ORDER
    counts = torch.from_numpy(np.bincount(healpix.vec2pix(nside, *views.T, nest=True), minlength=12 * nside**2))
    seen = counts.nonzero()[:, 0]
    centres, weight = direction_vectors(directions(VIEW_ORDER))[seen].float(), counts[seen].float()
    angles = directions(BIN_ORDER)
    upper = direction_vectors(angles)[:, 2] >= 0
    reach = math.sin(math.radians(width))
    parts = direction_vectors(angles)[upper].float().split(256)
    above = torch.cat([(1 - (part @ centres.T).abs() / reach).clamp(min=0) @ weight for part in parts]).double()
    opposite = healpix.vec2pix(2**BIN_ORDER, *(-direction_vectors(angles)[~upper]).T.numpy(), nest=True)
    sampling = torch.zeros(len(angles), dtype=torch.float64)
    sampling[upper] = above
    sampling[~upper] = sampling[torch.from_numpy(opposite.astype(np.int64))]
    empty = float((sampling == 0).double().mean())
    floored = sampling.clamp(min=0.5)
    efficiency = float(1 / (floored.mean() * (1 / floored).mean()))
    density = counts.double().reshape(len(angles), -1).sum(1)  # NEST: children follow each other
    density[~upper] = density[torch.from_numpy(opposite.astype(np.int64))]
    return PoseEfficiency(efficiency, empty, angles, sampling / sampling.mean(), density / density.mean())
