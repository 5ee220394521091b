"""Posterior-weighted sums over images, in slice space (spec/refinement 3.1, 3.8, 1.6): one insertion a slice comes later.

With A[r, p] = Σ_t Γ[r, t] E[p, t] (one matrix product, E shared by all images) the sum over shifts is done once a row, and every
statistic of the E-step is an elementwise product with A, since Σ_t Γ conj(S) F E_t = conj(S) F A.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.ops.compare import check_rows
from frazil.ops.dispatch import pick


@dataclass(frozen=True)
class Sums:
    """What `accumulate` gives; real and complex types are those of the arguments."""

    data: Tensor  # (s, p) complex: D
    weight: Tensor  # (s, p) real: W
    cross: Tensor  # (n_shells,) float64: Σ Γ Re(conj(S) F E) of all rows
    power: Tensor  # (n_shells,) float64: Σ Γ |S|² G of all rows
    rows: Tensor  # (r, 4) real, a row: cross, power over all pixels; the same over scale_pixels


@dataclass(frozen=True)
class EntryWeights:
    """Γ of r rows kept as it comes from `ops.score`: by entry (pair of orientation and image, coarse shift) and child.

    Row k is child child[k] of pair pair[k]; the pair's entries are start[pair] … start[pair + 1].
    """

    gamma: Tensor  # (n, C, c) real, zero where a sample does not count
    shift: Tensor  # (n,) int64 coarse shift of an entry: its children are shift·c …
    start: Tensor  # (pairs + 1,) int64
    pair: Tensor  # (r,) int64
    child: Tensor  # (r,) int64
    shifts: int  # T

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, rows: slice) -> EntryWeights:
        return replace(self, pair=self.pair[rows], child=self.child[rows])

    def dense(self) -> Tensor:
        """(r, T) Γ as a table."""
        count = self.start[self.pair + 1] - self.start[self.pair]
        row = torch.arange(len(self.pair), device=count.device).repeat_interleave(count)
        entry = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row] + self.start[self.pair][row]
        small = self.gamma.shape[2]
        table = self.gamma.new_zeros(len(self.pair), self.shifts)
        columns = self.shift[entry, None] * small + torch.arange(small, device=count.device)
        table[row[:, None], columns] = self.gamma[entry, self.child[row]]
        return table


def accumulate(slices: Tensor, row_slice: Tensor, row_image: Tensor, weights: Tensor | EntryWeights, phases: Tensor, masked: Tensor,
               gain: Tensor, unmasked: Tensor, inverse: Tensor, shell: Tensor, n_shells: int, scale_pixels: Tensor,
               *, slice_class: Tensor | None = None, implementation: str | None = None) -> Sums:
    """Sums over r (slice, image) rows with posterior weights Γ at T shifts.

        A[r, p] = Σ_t Γ[r, t] E[p, t],                    γ[r] = Σ_t Γ[r, t]
        D[s]   += A[r] ∘ U[image_r],                      W[s] += γ[r] C[image_r]                 over the rows of slice s
        x[r]    = Re(conj(S[slice_r]) ∘ F[image_r] ∘ A),  q[r]  = γ[r] |S[slice_r]|² G[image_r]

    slices S (s, p) complex; row_slice ascending, row_image (r,) int64; weights Γ (r, T) real, or EntryWeights; phases E (p, T) complex;
    masked F = s c X_masked, unmasked U = s c X/σ² (b, p) complex; gain G = s²c², inverse C = s²c²/σ² (b, p) real;
    shell (p,) int64 in [0, n_shells); scale_pixels (p,) bool, or with slice_class (s,) int64 a table (K, p). x and q are summed by
    shell over all rows (cross, power), and by row over all pixels and over scale_pixels (rows).
    Raises ValueError for shapes, types or (in main memory) indices that do not fit.
    """
    _check(slices, weights, phases, (masked, unmasked), (gain, inverse))
    check_rows(row_slice, row_image, len(slices), len(masked))
    p = slices.shape[1]
    if slice_class is None:
        scale_pixels, slice_class = scale_pixels[None], torch.zeros(len(slices), dtype=torch.int64, device=slices.device)
    if slice_class.shape != (len(slices),) or slice_class.dtype != torch.int64:
        raise ValueError(f"slice_class must be ({len(slices)},) int64, got {tuple(slice_class.shape)} {slice_class.dtype}")
    if len(weights) != len(row_slice) or shell.shape != (p,) or scale_pixels.shape[1:] != (p,) or scale_pixels.dtype != torch.bool:
        raise ValueError(f"weights must have {len(row_slice)} rows, shell and scale_pixels (bool) {p} pixels, got {len(weights)}, "
                         f"{tuple(shell.shape)}, {tuple(scale_pixels.shape)} {scale_pixels.dtype}")
    if shell.dtype != torch.int64 or not (shell.is_cuda or bool((shell.amin() >= 0) & (shell.amax() < n_shells))):
        raise ValueError(f"shell must be int64 within [0, {n_shells})")
    chosen = pick(slices, implementation)
    match chosen:
        case "reference":
            from .reference import accumulate as run
        case "cpu":
            from .cpu import accumulate as run
        case "triton":
            from .triton import accumulate as run
        case other:
            raise ValueError(f"accumulate has no implementation {other!r}")
    if isinstance(weights, EntryWeights) and chosen == "reference":
        weights = weights.dense()
    arrays = (masked, gain, unmasked, inverse, scale_pixels, slice_class)
    data, weight, x, q, rows = run(slices, row_slice, row_image, weights, phases, *arrays)  # pyright: ignore[reportArgumentType]
    cross, power = torch.zeros(2, n_shells, dtype=torch.float64, device=slices.device).index_add_(1, shell, torch.stack([x, q])).unbind()
    return Sums(data, weight, cross, power, rows)


def _check(slices: Tensor, weights: Tensor | EntryWeights, phases: Tensor, complexes: tuple[Tensor, Tensor],
           reals: tuple[Tensor, Tensor]) -> None:
    """Shapes, types and devices of the arrays."""
    if isinstance(weights, EntryWeights):
        weights = weights.gamma.new_zeros(1, 1).expand(len(weights), weights.shifts)
    flat = slices.ndim == phases.ndim == weights.ndim == 2
    if not flat or phases.shape != (slices.shape[1], weights.shape[1]) or 0 in phases.shape:
        raise ValueError(f"slices (s, p), weights (r, T), phases (p, T) expected, got {tuple(slices.shape)}, {tuple(weights.shape)}, "
                         f"{tuple(phases.shape)}")
    shape = (len(complexes[0]), slices.shape[1])
    if any(x.shape != shape for x in (*complexes, *reals)):
        raise ValueError(f"masked, unmasked, gain, inverse must all be {shape}, got {[tuple(x.shape) for x in (*complexes, *reals)]}")
    real = slices.real.dtype
    if not slices.is_complex() or {x.dtype for x in (slices, phases, *complexes)} != {slices.dtype} \
            or {x.dtype for x in (weights, *reals)} != {real}:
        raise ValueError(f"slices, phases, masked, unmasked must be {slices.dtype}, weights, gain, inverse {real}")
    if len({x.device for x in (slices, weights, phases, *complexes, *reals)}) > 1:
        raise ValueError("all arrays must be on one device")
