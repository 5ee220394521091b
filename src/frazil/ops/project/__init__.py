"""Central slices of a half volume: S_n(k) = V(P · R_nᵀ · (kx, ky, 0)), trilinear (spec/refinement 1.1, 1.3, 3.1).

Where p_x < 0, p is negated and the value conjugated. A 2D reference is a half plane, turned by the upper 2×2 block of R_n, bilinear.
README.md in this folder has the derivation, the cost and the figures.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def project(
    volume: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    *, which: Tensor | None = None, out: Tensor | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """(n, p) complex slices, one a rotation, in the type of the volume.

    volume (2M+1, 2M+1, M+1) complex64 or complex128, centred half volume, or (2M+1, M+1), half plane ([y+M, x]); with `which`
    (n,) int64 a stack of either, slice i being of volume[which[i]]; rotations (n, 3, 3), map → camera; coords (p, 2)
    float, kx ky in cycles per model box, with |pad·k| ≤ M − 1; `out` (n, p), contiguous, is filled and returned if given.
    Raises ValueError on wrong shapes, types or devices and, in main memory, on frequencies out of reach; on a GPU, where
    looking would stop the queue, a frequency out of reach gives 0.
    """
    geometry = check_geometry(volume, rotations, coords, pad, "project", which)
    if not volume.is_complex():
        raise ValueError(f"project: the volume must be complex, got {volume.dtype}")
    shape = (len(rotations), len(coords))
    if out is None:
        out = torch.empty(shape, dtype=volume.dtype, device=volume.device)
    elif out.shape != shape or out.dtype != volume.dtype or out.device != volume.device or not out.is_contiguous():
        raise ValueError(f"project: out must be contiguous {shape} {volume.dtype} on {volume.device}, got {tuple(out.shape)} {out.dtype}")
    if out.numel() == 0:
        return out
    match pick(volume, implementation, op="project"):
        case "triton":
            from .triton import project as run
        case "cpu":
            from .cpu import project as run
        case _:
            from .reference import project as run
    run(volume.contiguous().resolve_conj(), geometry, rotations, coords, pad, out, which)
    return out


class Geometry(NamedTuple):
    """What the kernels need to know of a half volume or half plane."""

    m: int  # M
    flat: bool  # a plane

    @property
    def elements(self) -> int:
        """Elements of one half volume or half plane."""
        return (2 * self.m + 1) * (self.m + 1) * (1 if self.flat else 2 * self.m + 1)


def check_geometry(volume: Tensor, rotations: Tensor, coords: Tensor, pad: float, op: str, which: Tensor | None) -> Geometry:
    """Geometry of the half volume, after the checks that project and insert_ share; ValueError otherwise."""
    m, dims = volume.shape[-1] - 1, volume.ndim - (which is not None)
    if m < 2 or dims not in (2, 3) or volume.shape[-dims:] != (2 * m + 1,) * (dims - 1) + (m + 1,):
        what = "a centred half volume (2M+1, 2M+1, M+1) or half plane (2M+1, M+1), M ≥ 2 (with `which`, a stack)"
        raise ValueError(f"{op}: the volume must be {what}, got {tuple(volume.shape)}")
    geometry = Geometry(m, dims == 2)
    if which is not None:
        if which.shape != rotations.shape[:1] or which.dtype != torch.int64 or which.device != volume.device:
            raise ValueError(f"{op}: which must be ({len(rotations)},) int64 on {volume.device}, got {tuple(which.shape)} {which.dtype}")
        if which.device.type == "cpu" and len(which) and not 0 <= int(which.min()) <= int(which.max()) < len(volume):
            raise ValueError(f"{op}: which names volumes {int(which.min())} to {int(which.max())} of {len(volume)}")
    if geometry.elements >= 2**31:
        raise ValueError(f"{op}: a half volume of M = {m} has more than 2³¹ elements: use a smaller padding or box")
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or not rotations.is_floating_point():
        raise ValueError(f"{op}: rotations must be (n, 3, 3) float, got {tuple(rotations.shape)} {rotations.dtype}")
    if coords.ndim != 2 or coords.shape[1] != 2 or not coords.is_floating_point():
        raise ValueError(f"{op}: coords must be (p, 2) float, got {tuple(coords.shape)} {coords.dtype}")
    if not volume.device == rotations.device == coords.device:
        raise ValueError(f"{op}: volume, rotations and coords are on {volume.device}, {rotations.device}, {coords.device}")
    if volume.device.type == "cpu" and rotations.numel() and coords.numel():
        # Each component of Rᵀ(kx, ky, 0) is at most |k| times the length of a column of R's first two rows. `not <=` catches NaN.
        reach = pad * float(coords.square().sum(-1).max().sqrt())
        longest = float(rotations[:, :2].square().sum(1).max().sqrt())
        if not (reach <= m - 1 + 1e-3 and longest <= 1 + 1e-4):
            what = f"|pad·k| reaches {reach:.3f} > M − 1 = {m - 1}" if longest <= 1 + 1e-4 else "a rotation is not orthonormal, or NaN"
            raise ValueError(f"{op}: {what}")
    return geometry
