"""Sampling of orientations and shifts: HEALPix directions × in-plane angles, oversampled children, perturbation (spec 6.1, 2.9)."""
from __future__ import annotations

import math

import healpix
import numpy as np
import torch
from torch import Tensor

from frazil.maths.rotation import euler_to_matrix


def angular_step(order: int) -> float:
    """Angular step in degrees of a HEALPix order: 360 / (6·2^o)."""
    return 360.0 / (6 * 2**order)


def directions(order: int) -> Tensor:
    """(12·4^o, 2) float64 rot, tilt in degrees of the pixel centres of a HEALPix order, NEST numbering; rot in (−180, 180]."""
    nside = 2**order
    tilt, rot = healpix.pix2ang(nside, np.arange(12 * nside**2), nest=True)
    rot = np.degrees(rot)
    rot = np.where(rot > 180, rot - 360, rot)
    return torch.from_numpy(np.stack([rot, np.degrees(tilt)], -1))


def direction_vectors(angles: Tensor) -> Tensor:
    """(…, 3) unit vectors xyz of (…, 2) rot, tilt in degrees: row 3 of the rotation matrix."""
    rot, tilt = torch.deg2rad(angles).unbind(-1)
    return torch.stack([tilt.sin() * rot.cos(), tilt.sin() * rot.sin(), tilt.cos()], -1)


def psi_angles(step: float) -> Tensor:
    """(n,) float64 in-plane angles j·360/n in degrees, n = ceil(360/step), made even so that psi + 180° is on the grid."""
    n = math.ceil(360.0 / step - 1e-9)
    n += n % 2
    return torch.arange(n, dtype=torch.float64) * (360.0 / n)


def perturbation_matrix(instance: float, order: int) -> Tensor:
    """(3, 3) float64 rigid rotation R(ρΔ, ρΔ, ρΔ) applied on the map side to the whole grid: A → A·R (spec 2.9)."""
    angle = instance * angular_step(order)
    return euler_to_matrix(torch.full((3,), angle, dtype=torch.float64))


def next_perturbation(instance: float, factor: float, generator: torch.Generator) -> float:
    """ρ ← wrap(ρ + U(f/2, f)) into [−f, f] (spec 2.9)."""
    if factor <= 0:
        return 0.0
    value = instance + factor * (0.5 + 0.5 * float(torch.rand((), generator=generator, dtype=torch.float64)))
    return value - 2 * factor if value > factor else value


def shift_grid(offset_range: float, step: float) -> Tensor:
    """(t, 2) float64 xy shifts, Å: all multiples of `step` with |t|² < range² + 0.001 (spec 6.1); x is the fast index."""
    reach = math.ceil(offset_range / step)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64) * step
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x.reshape(-1), y.reshape(-1)], -1)
    return grid[grid.square().sum(-1) < offset_range**2 + 0.001]


def fine_shifts(coarse: Tensor, step: float, oversampling: int) -> Tensor:
    """(t, 4^q, 2) children of coarse shifts (t, 2): t − step/2 + (m + ½) step/2^q on each axis."""
    n = 2**oversampling
    line = step * ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return coarse[:, None] + torch.stack([x.reshape(-1), y.reshape(-1)], -1)
