"""`compare` and `candidates` straight from their formulas, any float type. Memory: every score at once."""
from __future__ import annotations

import torch
from torch import Tensor


def _norm2(slices: Tensor) -> Tensor:
    """|S|²."""
    return slices.real.square() + slices.imag.square()


def compare(slices: Tensor, row_slice: Tensor, row_image: Tensor, images: Tensor, power: Tensor, phases: Tensor, cc: bool) -> Tensor:
    """(r, T): Re Σ_p conj(S) Y E − Σ_p |S|² Q, or with cc their ratio cross/sqrt(power)."""
    s = slices[row_slice]
    cross = ((s.conj() * images[row_image]) @ phases).real
    norm = (_norm2(s) * power[row_image]).sum(1, keepdim=True)
    return cross * torch.where(norm > 0, norm.rsqrt(), 0) if cc else cross - norm


def candidates(slices: Tensor, images: Tensor, power: Tensor, phases: Tensor, log_prior: Tensor, log_prior_shift: Tensor,
               depth: float, fraction: float, most: int, cc: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fields of Candidates; with fraction < 1 exactly the smallest set that holds it, or the `most` largest (ties included)."""
    h, b, t = len(slices), len(images), phases.shape[1]
    both = torch.cat([slices, slices.conj()])
    shifted = images[:, None, :] * phases.T  # (b, T, p)
    cross = (shifted @ both.conj().T).real  # (b, T, 2h)
    norm = (power @ _norm2(both).T)[:, None, :]
    value = cross * torch.where(norm > 0, norm.rsqrt(), 0) if cc else cross - norm
    value = (value + log_prior.reshape(-1) + log_prior_shift[:, :, None]).reshape(b, t * 2 * h)
    best = value.amax(1)
    left_out = torch.zeros(b, dtype=torch.float64, device=value.device)
    if cc:
        keep = torch.zeros_like(value, dtype=torch.bool).scatter_(1, value.argmax(1, keepdim=True), True)
    else:
        keep = value >= (best - depth)[:, None]
    keep &= ~value.isneginf()
    if fraction < 1 and not cc:
        weight = torch.where(keep, (value.double() - best.double()[:, None]).exp(), 0)
        ordered, order = weight.sort(1, descending=True)
        needed = (ordered.cumsum(1) < fraction * weight.sum(1, keepdim=True)).sum(1, keepdim=True)  # position of the last one
        floor = value.gather(1, order.gather(1, needed.clamp(max=min(most, order.shape[1]) - 1)))
        left_out = torch.where(value < floor, weight, 0).sum(1)
        keep &= value >= floor
    image, flat = keep.nonzero(as_tuple=True)
    return image, flat % (2 * h), flat // (2 * h), value[image, flat], best, left_out
