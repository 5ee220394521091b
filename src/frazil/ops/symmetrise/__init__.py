"""Point-group sums of the insertion volumes: B(p) ← Σ_R B(R·p), W(p) ← Σ_R W(R·p) (spec/refinement 3.2: sum, not mean).

The identity is taken exactly; every other operator by trilinear interpolation, for |p| ≤ M − 1. See README.md in this folder.
"""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.ops.dispatch import pick


def symmetrise(data: Tensor, weight: Tensor, operators: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """New (data, weight) summed over the group; the arguments are left as they are.

    data (2M+1, 2M+1, M+1) complex64 or complex128, its x = 0 plane Hermitian (maths.fourier.make_hermitian comes first);
    weight the same of its real type; operators (g, 3, 3) rotations on xyz columns, the identity among them.
    Raises ValueError on wrong shapes or types, on operators that are no rotations and where the identity is missing.
    """
    m = data.shape[-1] - 1
    if m < 2 or data.shape != (2 * m + 1, 2 * m + 1, m + 1) or not data.is_complex():
        raise ValueError(f"symmetrise: data must be a complex half volume (2M+1, 2M+1, M+1), got {tuple(data.shape)} {data.dtype}")
    if weight.shape != data.shape or weight.dtype != data.real.dtype or weight.device != data.device:
        raise ValueError(f"symmetrise: weight must be {tuple(data.shape)}, real type of data, got {tuple(weight.shape)} {weight.dtype}")
    if data.numel() >= 2**31:
        raise ValueError(f"symmetrise: a half volume of M = {m} has more than 2³¹ elements: use a smaller padding or box")
    if operators.ndim != 3 or operators.shape[1:] != (3, 3) or not operators.is_floating_point():
        raise ValueError(f"symmetrise: operators must be (g, 3, 3) float, got {tuple(operators.shape)} {operators.dtype}")
    group = operators.detach().to("cpu", torch.float64)
    one = torch.eye(3, dtype=torch.float64)
    if not bool(((group @ group.mT - one).abs().amax((1, 2)) < 1e-5).all()):  # also catches NaN
        raise ValueError("symmetrise: an operator is not a rotation")
    identity = (group - one).abs().amax((1, 2)) < 1e-5
    if identity.sum() != 1:
        raise ValueError(f"symmetrise: the identity must be among the operators once, found {int(identity.sum())}")
    group = group[~identity]
    if not len(group):
        return data.clone(), weight.clone()
    match pick(data, implementation, op="symmetrise"):
        case "triton":
            from .triton import symmetrise as run
        case "cpu":
            from .cpu import symmetrise as run
        case _:
            from .reference import symmetrise as run
    return run(data.resolve_conj().contiguous(), weight.contiguous(), m, group)
