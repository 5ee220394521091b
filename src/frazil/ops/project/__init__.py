"""Central slices of a half volume: S_n(k) = V(P · R_nᵀ · (kx, ky, 0)), trilinear (spec/refinement 1.1, 1.3, 3.1).

Where p_x < 0, p is negated and the value conjugated. README.md in this folder has the derivation, the cost and the figures.
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def project(
    volume: Tensor, rotations: Tensor, coords: Tensor, pad: float, *, out: Tensor | None = None, implementation: str | None = None
) -> Tensor:
    """(n, p) complex slices, one a rotation, in the type of the volume.

    volume (2M+1, 2M+1, M+1) complex64 or complex128, centred half volume; rotations (n, 3, 3), map → camera; coords (p, 2)
    float, kx ky in cycles per model box, with |pad·k| ≤ M − 1; `out` (n, p), contiguous, is filled and returned if given.
    Raises ValueError on wrong shapes, types or devices and, in main memory, on frequencies out of reach; on a GPU, where
    looking would stop the queue, a frequency out of reach gives 0.
    """
    m = check_geometry(volume, rotations, coords, pad, "project")
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
    run(volume.contiguous().resolve_conj(), m, rotations, coords, pad, out)
    return out


def check_geometry(volume: Tensor, rotations: Tensor, coords: Tensor, pad: float, op: str) -> int:
    """M of the half volume, after the checks that project and insert_ share; ValueError otherwise."""
    m = volume.shape[-1] - 1
    if m < 2 or volume.shape != (2 * m + 1, 2 * m + 1, m + 1):
        raise ValueError(f"{op}: the volume must be a centred half volume (2M+1, 2M+1, M+1) with M ≥ 2, got {tuple(volume.shape)}")
    if volume.numel() >= 2**31:
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
    return m
