"""Sums of slices in a half volume: the exact adjoint of ops.project, with a weight beside every value (spec/refinement 3.1).

    B(p) += Σ_n Σ_k t(p − p_nk) d_n(k),    W(p) += Σ_n Σ_k t(p − p_nk) w_n(k),    p_nk = P · R_nᵀ · (kx, ky, 0)

t is the trilinear weight; where p_x < 0, p is negated and d conjugated. README.md has the derivation, the cost and the figures.
"""
from __future__ import annotations

from torch import Tensor

from frazil.ops.dispatch import pick
from frazil.ops.project import check_geometry


def insert_(
    data: Tensor, weight: Tensor, slices: Tensor, slice_weights: Tensor, rotations: Tensor, coords: Tensor, pad: float,
    *, which: Tensor | None = None, implementation: str | None = None,
) -> None:  # fmt: skip
    """Add (n, p) slices to `data` and (n, p) slice_weights to `weight`, in place.

    data (2M+1, 2M+1, M+1) complex64 or complex128 and weight, of its real type: contiguous centred half volumes, or half planes
    (2M+1, M+1), bilinear; with `which` (n,) int64 stacks of either, slice i going to data[which[i]]; slices of the
    same type or a less precise one, slice_weights of their real type; rotations (n, 3, 3); coords (p, 2), cycles per model
    box, |pad·k| ≤ M − 1. The x = 0 plane is not made Hermitian (maths.fourier.make_hermitian does, once all is inserted).
    On a GPU the sums are float32 atomics: their order, hence the last bits, vary, and a caller adds them to float64 volumes now
    and then. On the CPU they are the same bits at the same number of threads. Raises ValueError on wrong shapes or types.
    """
    geometry = check_geometry(data, rotations, coords, pad, "insert_", which)
    shape = (len(rotations), len(coords))
    if not data.is_complex() or weight.dtype != data.real.dtype or weight.shape != data.shape or weight.device != data.device:
        raise ValueError(f"insert_: weight must be {tuple(data.shape)} of the real type of data, got {tuple(weight.shape)} {weight.dtype}")
    if not (data.is_contiguous() and weight.is_contiguous()) or data.is_conj():
        raise ValueError("insert_: data and weight are written in place and must be contiguous")
    if slices.shape != shape or slice_weights.shape != shape:
        raise ValueError(f"insert_: slices and slice_weights must be {shape}, got {tuple(slices.shape)} and {tuple(slice_weights.shape)}")
    if not slices.is_complex() or slices.itemsize > data.itemsize or slice_weights.dtype != slices.real.dtype:
        got = f"{slices.dtype} and {slice_weights.dtype}"
        raise ValueError(f"insert_: slices may be {data.dtype} or less precise, their weights of the same real type; got {got}")
    if not slices.device == slice_weights.device == data.device:
        raise ValueError(f"insert_: data, slices and slice_weights are on {data.device}, {slices.device}, {slice_weights.device}")
    if slices.numel() == 0:
        return
    match pick(data, implementation, op="insert"):
        case "triton":
            from .triton import insert_ as run
        case "cpu":
            from .cpu import insert_ as run
        case _:
            from .reference import insert_ as run
    run(data, weight, geometry, slices.resolve_conj().contiguous(), slice_weights.contiguous(), rotations, coords, pad, which)
