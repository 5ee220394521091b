"""Rotations: Euler angles, matrices, distances.

A(rot, tilt, psi) = Rz(psi) Ry(tilt) Rz(rot) with passive matrices (spec/refinement 1.3): A takes map coordinates to
camera coordinates, row 3 is the viewing direction in the map frame, and a central slice samples Aᵀ (kx, ky, 0).
"""
from __future__ import annotations

import torch
from torch import Tensor


def euler_to_matrix(angles: Tensor) -> Tensor:
    """(…, 3, 3) rotation matrices of (…, 3) angles rot, tilt, psi in degrees; float64 in, float64 out."""
    a, b, g = torch.deg2rad(angles).unbind(-1)
    ca, sa, cb, sb, cg, sg = a.cos(), a.sin(), b.cos(), b.sin(), g.cos(), g.sin()
    rows = [
        cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb,
        -sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb,
        sb * ca, sb * sa, cb,
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(*angles.shape[:-1], 3, 3)


def matrix_to_euler(matrix: Tensor) -> Tensor:
    """(…, 3) angles rot, tilt, psi in degrees: rot, psi in (−180, 180], tilt in [0, 180]; rot = 0 where tilt is 0 or 180."""
    m = matrix
    sin_tilt = torch.hypot(m[..., 2, 0], m[..., 2, 1])
    tilt = torch.atan2(sin_tilt, m[..., 2, 2])
    polar = sin_tilt < 1e-7
    rot = torch.where(polar, torch.zeros_like(tilt), torch.atan2(m[..., 2, 1], m[..., 2, 0]))
    # At the poles only psi ± rot is defined; all of it goes into psi.
    at_pole = torch.atan2(torch.where(m[..., 2, 2] > 0, -m[..., 1, 0], m[..., 1, 0]), m[..., 1, 1])
    psi = torch.where(polar, at_pole, torch.atan2(m[..., 1, 2], -m[..., 0, 2]))
    angles = torch.rad2deg(torch.stack([rot, tilt, psi], -1))
    wrap = torch.tensor([True, False, True], device=m.device)
    return torch.where(wrap & (angles <= -180 + 1e-12), angles + 360, angles)


def rotation_angle(a: Tensor, b: Tensor, operators: Tensor | None = None) -> Tensor:
    """(…) angle in degrees of the rotation between a and b (…, 3, 3); minimal over `operators` (g, 3, 3) where given.

    Orientations A and A·R are equivalent for a symmetry operator R.
    """
    if operators is None:
        operators = torch.eye(3, dtype=a.dtype, device=a.device)[None]
    trace = torch.einsum("...ij,gjk,...ik->...g", a, operators.to(a), b)  # trace(A R Bᵀ)
    return torch.rad2deg(torch.acos(((trace.amax(-1) - 1) / 2).clamp(-1, 1)))


def axis_change(a: Tensor, b: Tensor, operators: Tensor) -> Tensor:
    """(n,) degrees: mean over the three axes of arccos(row_j(a)·row_j(b)), minimal over symmetry (spec 4.5)."""
    mates = torch.einsum("nij,gjk->ngik", a, operators.to(a))
    cosines = (mates * b[:, None]).sum(-1).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosines)).mean(-1).amin(-1)


def random_rotations(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 3) float64 rotations, uniform on SO(3) (normalised Gaussian quaternions)."""
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(n, 3, 3)
