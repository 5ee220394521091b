"""Q-score of atoms in a map (Pintilie et al. 2020): how much the density around an atom looks like a well-resolved one.

    Q = Σ (u − ū)(v − v̄) / sqrt(Σ (u − ū)² Σ (v − v̄)²),   v(r) = exp(−r²/2σ²), σ = 0.6 Å

u are map values at points 0, 0.1 … 2 Å from the atom, eight at each distance, only where no other atom is nearer. The correlation
about the mean does not depend on scale and offset of the map. Values between voxels are those of a cubic spline.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from frazil.steps.map_transform import Spline, sample

SIGMA = 0.6  # Å, width of the reference
REACH, STEP = 2.0, 0.1  # Å
POINTS = 8  # at each distance
TRIED = 64  # directions from which those points are taken
ATOMS = 20_000  # treated at a time
Floats = NDArray[np.float64]


def fibonacci_sphere(n: int) -> Floats:
    """(n, 3) directions spread evenly over the sphere."""
    i = np.arange(n) + 0.5
    z, turn = 1 - 2 * i / n, math.pi * (1 + math.sqrt(5)) * i
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn), z], 1)


def own_points(tree: KDTree, centres: Floats, radius: float, directions: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Points (a, POINTS, 3) at `radius` from each centre to which no other atom of the tree is nearer, and which of them there are."""
    points = centres[:, None] + radius * directions
    nearest = tree.query(points.reshape(-1, 3))[0].reshape(points.shape[:2])
    free = nearest > radius - 1e-6
    # Of m free directions take every m/8th, so that they stay spread out.
    order = np.argsort(~free, axis=1, kind="stable")
    count = free.sum(1)
    rank = np.floor(np.arange(POINTS) * np.maximum(count, POINTS)[:, None] / POINTS).astype(int)
    pick = np.take_along_axis(order, rank, 1)
    chosen = np.take_along_axis(points, pick[..., None], 1)
    return chosen, rank < count[:, None]


def q_scores(through: Spline, positions: Tensor, pixel_size: float) -> Tensor:
    """(n,) float64 Q-score of atoms at positions (n, 3), xyz in Å from the first voxel, all of which count as neighbours.

    NaN for an atom with fewer than two distances of its own.
    """
    where = positions.cpu().numpy().astype(np.float64)
    tree, directions = KDTree(where), fibonacci_sphere(TRIED)
    out = np.full(len(where), np.nan)
    radii = np.arange(0, REACH + STEP / 2, STEP)
    device = through.coefficients.device
    for start in range(0, len(where), ATOMS):
        centres = where[start : start + ATOMS]
        n = len(centres)
        weight, value = np.zeros((n, len(radii), POINTS)), np.zeros((n, len(radii), POINTS))
        for i, radius in enumerate(radii):
            if i == 0:
                points, own = np.repeat(centres[:, None], POINTS, 1), np.ones((n, POINTS), bool)
            else:
                points, own = own_points(tree, centres, float(radius), directions)
            flat = torch.from_numpy(points.reshape(-1, 3) / pixel_size).to(device)
            value[:, i] = sample(through, flat).cpu().numpy().reshape(n, POINTS)
            weight[:, i] = own
        reference = np.broadcast_to(np.exp(-(radii**2) / (2 * SIGMA**2))[None, :, None], weight.shape)
        out[start : start + n] = _correlation(value.reshape(n, -1), reference.reshape(n, -1), weight.reshape(n, -1))
    return torch.from_numpy(out)


def _correlation(u: Floats, v: Floats, weight: Floats) -> Floats:
    """(n,) weighted correlation about the mean of the rows; NaN where nothing varies."""
    total = weight.sum(1, keepdims=True)
    du = u - (weight * u).sum(1, keepdims=True) / total
    dv = v - (weight * v).sum(1, keepdims=True) / total
    power = (weight * du * du).sum(1) * (weight * dv * dv).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(power > 0, (weight * du * dv).sum(1) / np.sqrt(power), np.nan)
