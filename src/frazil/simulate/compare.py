"""Found poses against true ones."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.rotation import rotation_angle


@dataclass(frozen=True)
class PoseDifference:
    """How found poses differ from true ones: as a whole (A_found = A_true Q, t), and particle by particle after that."""

    rotation: Tensor  # (3, 3) Q
    translation: Tensor  # (3,) Å, t in the true map's frame: (A_true t)_xy = shift_found − shift_true
    angle: Tensor  # (n,) degrees, modulo symmetry
    shift: Tensor  # (n,) Å


def compare_poses(true: Particles, found: Particles, group: Tensor) -> PoseDifference:
    """What is left between found and true poses of the same particles, in the same order, modulo the symmetry group (g, 3, 3).

    The group's axes are those of the true map; a refinement may turn and move its own by a little as a whole. That is estimated from
    the better half of the particles (mean rotation by singular values, least squares for the translation) and taken out of the errors.
    """
    mates = torch.einsum("nij,gjk->ngik", true.rotation, group.to(true.rotation))  # A_true R, all of them as true as A_true
    rotation, every = torch.eye(3, dtype=torch.float64), torch.arange(len(mates))
    for _ in range(5):
        nearest = mates[every, torch.einsum("ngij,jk,nik->ng", mates, rotation, found.rotation).argmax(-1)]
        angle = rotation_angle(nearest @ rotation, found.rotation)
        good = angle <= angle.median()
        u, _, vh = torch.linalg.svd(torch.einsum("nji,njk->ik", nearest[good], found.rotation[good]))
        rotation = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ vh))], dtype=torch.float64)) @ vh
    angle = rotation_angle(nearest @ rotation, found.rotation)
    moved = found.shift - true.shift
    translation = torch.linalg.lstsq(nearest[good, :2].reshape(-1, 3), moved[good].reshape(-1, 1)).solution[:, 0]
    left = moved - torch.einsum("nij,j->ni", nearest[:, :2], translation)
    return PoseDifference(rotation, translation, angle, left.norm(dim=-1))
