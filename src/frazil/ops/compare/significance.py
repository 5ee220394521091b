"""Which hypotheses matter (spec/refinement 2.6): per image the smallest set that holds a given fraction of the posterior."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.ops.dispatch import pick

NEAR = 40.0  # nats below an image's best within which entries are counted one by one


@dataclass(frozen=True)
class Significant:
    """Result of `significant`."""

    keep: Tensor  # bool, the shape of value
    log_norm: Tensor  # (n_images,) float64: log Σ exp(value), −inf without entries
    best: Tensor  # (n_images,) int64: index into the flattened value of the largest entry, −1 without entries
    pmax: Tensor  # (n_images,) float64: the largest posterior, 0 without entries


def significant(image: Tensor, value: Tensor, n_images: int, fraction: float = 0.999, max_significant: int = -1,
                left_out: Tensor | None = None, *, implementation: str | None = None) -> Significant:
    """Per image the smallest set of entries with Σ exp(value) ≥ fraction of the whole, ties at its edge included.

    image (m,) int64, in any order; value (m,) or (m, T) real: logarithms, −inf allowed, all T of a row belong to its image.
    The same as keeping exp(value) ≥ θ for the largest θ with Σ_{w ≥ θ} w ≥ fraction·Σ w. fraction ≥ 1 keeps everything finite.
    max_significant ≥ 0: at most that many, the largest (of equals the first). left_out (n_images,): mass beside the entries, in
    units of the image's largest (Candidates.left_out). Sums are float64. Raises ValueError where shapes or, in main memory, indices do
    not fit.
    """
    if image.ndim != 1 or image.dtype != torch.int64 or value.ndim not in (1, 2) or len(value) != len(image):
        raise ValueError(f"image must be (m,) int64 and value (m,) or (m, T), got {tuple(image.shape)} {image.dtype}, {tuple(value.shape)}")
    if not fraction > 0 or (left_out is not None and left_out.shape != (n_images,)):
        raise ValueError(f"fraction must be > 0 and left_out ({n_images},), got {fraction}, {None if left_out is None else left_out.shape}")
    if len(image) and not image.is_cuda and not bool((image.amin() >= 0) & (image.amax() < n_images)):
        raise ValueError(f"image must lie within [0, {n_images})")
    rest = torch.zeros(n_images, dtype=torch.float64, device=value.device) if left_out is None else left_out.to(value.device, torch.float64)
    table = (value[:, None] if value.ndim == 1 else value).contiguous()
    run = _on_cpu if pick(value, implementation, op="significant") == "cpu" else _on_device
    keep, log_norm, best, pmax = run(image, table, rest, fraction, max_significant)
    return Significant(keep.reshape(value.shape), log_norm, best, pmax)


def _on_cpu(image: Tensor, value: Tensor, rest: Tensor, fraction: float, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By Numba: rows grouped by image, thresholds by partition (no sort)."""
    from .cpu import follow_threads, select

    follow_threads()
    n = len(rest)
    keep = torch.zeros(value.shape, dtype=torch.bool)
    log_norm, best, pmax = rest.new_full((n,), -torch.inf), torch.full((n,), -1), rest.new_zeros(n)
    start = torch.zeros(n + 1, dtype=torch.int64)
    start[1:] = torch.bincount(image, minlength=n).cumsum(0)
    in_order = bool((image[1:] >= image[:-1]).all())
    order = torch.arange(len(image)) if in_order else torch.argsort(image, stable=True)
    given = order.numpy(), start.numpy(), value.numpy(), rest.contiguous().numpy()
    select(*given, float(fraction), limit, keep.numpy(), log_norm.numpy(), best.numpy(), pmax.numpy())
    return keep, log_norm, best, pmax


def _on_device(image: Tensor, value: Tensor, rest: Tensor, fraction: float, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By torch operations: entries near enough to count are sorted by image and value, then summed."""
    n, shifts = len(rest), max(1, value.shape[1])
    flat, nobody = value.reshape(-1), value.numel()
    owner = image.repeat_interleave(shifts) if shifts > 1 else image
    top = flat.new_full((n,), -torch.inf).scatter_reduce_(0, owner, flat, "amax")
    high = top.masked_fill(top.isneginf(), torch.inf)[owner]  # nothing comes near that: an image without entries has none
    place = torch.arange(nobody, device=flat.device).masked_fill(flat != high, nobody)
    best = torch.full((n,), nobody, device=flat.device).scatter_reduce_(0, owner, place, "amin")
    near = (flat >= high - NEAR).nonzero()[:, 0]
    # One sort by image, then by how far below its best: those are less than NEAR, and exact to 1e-8.
    near = near[torch.argsort(owner[near].double() * (2 * NEAR) + (high - flat)[near].double(), stable=True)]
    whose = owner[near]
    weight = (flat[near].double() - top[whose].double()).exp()
    total = rest.clone().index_add_(0, whose, weight)
    count = torch.zeros(n, dtype=torch.int64, device=flat.device).index_add_(0, whose, torch.ones_like(whose))
    start = count.cumsum(0) - count
    running = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
    before = running[:-1] - running[start[whose].clamp(max=len(near))] if len(near) else weight
    chosen = before < fraction * total[whose] * (1 - 1e-12)  # the running sum over all images is only that exact
    theta = top.double().masked_fill(count == 0, torch.inf)
    theta = theta.scatter_reduce(0, whose, flat[near].double().masked_fill(~chosen, torch.inf), "amin")
    keep = flat >= theta[owner] if fraction < 1 else flat > -torch.inf
    if limit >= 0 and int(torch.zeros_like(count).index_add_(0, owner, keep.long()).max() if n else 0) > limit:
        listed = keep.nonzero()[:, 0]
        listed = listed[torch.argsort(flat[listed], descending=True, stable=True)]
        listed = listed[torch.argsort(owner[listed], stable=True)]
        held = torch.bincount(owner[listed], minlength=n)
        rank = torch.arange(len(listed), device=flat.device) - (held.cumsum(0) - held)[owner[listed]]
        keep[listed[rank >= limit]] = False
    some = best < nobody
    return (keep.reshape(value.shape), torch.where(some, top.double() + total.log(), -torch.inf), torch.where(some, best, -1),
            torch.where(some, 1 / total, 0))
