"""Log-likelihoods of many (orientation, shift) hypotheses at once, as matrix products (spec/refinement 2.1, 2.6, 2.8, 10.1–10.5).

Expanding the squared distance and dropping what no hypothesis changes leaves, for slice S, image b and shift t,

    L = Re Σ_p conj(S_p) Y_bp E_pt − Σ_p |S_p|² Q_bp,     Y = s c X/σ²,  Q = s²c²/(2σ²),  E_pt = exp(−2πi k_p·shift_t),

and E is shared by all images, so that the sum over pixels for all shifts is one product with a matrix that never changes.
`compare` takes a list of (slice, image) pairs, `candidates` every slice against every image, `significant` picks what matters.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.ops.compare.significance import significant
from frazil.ops.dispatch import pick

NO_LIMIT = 1 << 62

__all__ = ["Candidates", "candidates", "check_rows", "compare", "significant"]


@dataclass(frozen=True)
class Candidates:
    """The hypotheses that may matter, sorted by image, then shift, then hypothesis."""

    image: Tensor  # (m,) int64
    hypothesis: Tensor  # (m,) int64 in [0, 2h): mate·h + index of the slice; mate 1 is psi + 180°
    shift: Tensor  # (m,) int64
    value: Tensor  # (m,) real: L with the priors (cc: the correlation)
    best: Tensor  # (b,) real: the largest value of each image, −inf where everything is excluded
    left_out: Tensor  # (b,) float64: Σ exp(L − best) over the hypotheses above best − depth that are not listed (0 without `fraction`)


def compare(slices: Tensor, row_slice: Tensor, row_image: Tensor, images: Tensor, power: Tensor, phases: Tensor,
            *, cc: bool = False, implementation: str | None = None) -> Tensor:
    """(r, T) scores of r (slice, image) pairs at T shifts.

        score[r, t] = Re Σ_p conj(S[row_slice_r, p]) Y[row_image_r, p] E[p, t] − Σ_p |S[row_slice_r, p]|² Q[row_image_r, p]

    slices S (s, p) complex; row_slice, row_image (r,) int64, row_slice ascending; images Y (b, p) complex; power Q (b, p) real;
    phases E (p, T) complex. With cc the score is the first sum over the root of the second (0 where that is 0).
    Raises ValueError for shapes, types or indices that do not fit.
    """
    _check_arrays(slices, images, power, phases)
    check_rows(row_slice, row_image, len(slices), len(images))
    match pick(slices, implementation):
        case "reference":
            from .reference import compare as run
        case "cpu":
            from .cpu import compare as run
        case "triton":
            from .triton import compare as run
        case other:
            raise ValueError(f"compare has no implementation {other!r}")
    return run(slices, row_slice, row_image, images, power, phases, cc)


def candidates(slices: Tensor, images: Tensor, power: Tensor, phases: Tensor, log_prior: Tensor, log_prior_shift: Tensor,
               *, depth: float = 26.0, fraction: float | None = None, most: int | None = None, cc: bool = False,
               batch: int | None = None, tf32: bool = True, implementation: str | None = None) -> Candidates:
    """All (image, orientation, shift) whose L comes within `depth` of the best of its image: every slice against every image.

        L = Re Σ_p conj(S) Y E − Σ_p |S|² Q + log_prior + log_prior_shift

    Arrays as in `compare`, slices (h, p). log_prior (2, h): row 0 for the slices, row 1 for their mates at psi + 180°, which are
    their complex conjugates and cost no product of their own; −inf excludes. log_prior_shift (b, T).
    fraction: leave out as well what cannot belong to the smallest set of hypotheses that holds this fraction of Σ exp L: the list
    is then short even where L is flat, and `left_out` says how much it lacks (hand it to `significant`). The set is found from a
    histogram, so some more than needed are listed, never fewer.
    most: with `fraction`, leave out what is surely not among so many largest ones of an image (again some more are listed).
    cc: only the single best hypothesis of each image, by cross/sqrt(power); of the priors only −inf counts.
    batch: images at a time (None: by memory). tf32: the products may use TF32 on a GPU, bfloat16 inputs on a CPU; they only rank.
    """
    _check_arrays(slices, images, power, phases)
    shapes = ((2, len(slices)), (len(images), phases.shape[1]))
    if log_prior.shape != shapes[0] or log_prior_shift.shape != shapes[1]:
        raise ValueError(f"log_prior and log_prior_shift must be {shapes[0]} and {shapes[1]}, "
                         f"got {tuple(log_prior.shape)} and {tuple(log_prior_shift.shape)}")
    if depth <= 0 or (fraction is not None and not 0 < fraction <= 1) or any(x is not None and x < 1 for x in (batch, most)):
        raise ValueError(f"depth must be > 0, fraction in (0, 1], batch, most >= 1; got {depth}, {fraction}, {batch}, {most}")
    log_prior, log_prior_shift = log_prior.to(power), log_prior_shift.to(power)
    if cc:
        log_prior, log_prior_shift = (torch.where(x.isneginf(), x, torch.zeros_like(x)) for x in (log_prior, log_prior_shift))
    keep, most = 1.0 if fraction is None else fraction, NO_LIMIT if most is None else most
    args = (slices, images, power, phases, log_prior, log_prior_shift)
    match pick(slices, implementation):
        case "reference":
            from .reference import candidates as run_reference
            return Candidates(*run_reference(*args, depth, keep, most, cc))
        case "cpu":
            from .cpu import candidates as run_cpu
            return Candidates(*run_cpu(*args, depth, keep, most, cc, batch, tf32 and not cc))
        case "triton":
            from .triton import candidates as run_triton
            return Candidates(*run_triton(*args, depth, keep, most, cc, batch, tf32 and not cc))
        case other:
            raise ValueError(f"candidates has no implementation {other!r}")


def _check_arrays(slices: Tensor, images: Tensor, power: Tensor, phases: Tensor) -> None:
    """Slices (·, p), images (b, p), phases (p, T) complex and power (b, p) real, of one precision and device."""
    if not (slices.ndim == images.ndim == power.ndim == phases.ndim == 2):
        raise ValueError("slices, images, power and phases must each have two dimensions")
    p = slices.shape[1]
    if images.shape[1] != p or power.shape != images.shape or phases.shape[0] != p or 0 in phases.shape:
        raise ValueError(f"pixels do not agree: slices {tuple(slices.shape)}, images {tuple(images.shape)}, "
                         f"power {tuple(power.shape)}, phases {tuple(phases.shape)}")
    if not slices.is_complex() or images.dtype != slices.dtype or phases.dtype != slices.dtype or power.dtype != slices.real.dtype:
        raise ValueError(f"slices, images, phases must be of one complex type and power of its real type, got {slices.dtype}, "
                         f"{images.dtype}, {phases.dtype}, {power.dtype}")
    if len({x.device for x in (slices, images, power, phases)}) > 1:
        raise ValueError("slices, images, power and phases must be on one device")


def check_rows(row_slice: Tensor, row_image: Tensor, n_slices: int, n_images: int) -> None:
    """Raise ValueError unless rows are (r,) int64 and, in main memory (on a GPU looking would stop the queue), in range and ascending."""
    if row_slice.ndim != 1 or row_slice.shape != row_image.shape or {row_slice.dtype, row_image.dtype} != {torch.int64}:
        raise ValueError(f"row_slice and row_image must be (r,) int64, got {tuple(row_slice.shape)} {row_slice.dtype} and "
                         f"{tuple(row_image.shape)} {row_image.dtype}")
    if not len(row_slice) or row_slice.is_cuda:
        return
    good = (row_slice[1:] >= row_slice[:-1]).all() & (row_slice[0] >= 0) & (row_slice[-1] < n_slices)
    good = good & (row_image.amin() >= 0) & (row_image.amax() < n_images)
    if not bool(good):
        raise ValueError(f"row_slice must ascend within [0, {n_slices}) and row_image lie within [0, {n_images})")
