"""Motion of a movie's frames: RELION's polynomial, smoothing of tracks, path lengths (spec/processing 2.7, 2.10).

Shifts are translations that bring a frame onto the first one: a feature that is at x in frame 0 is at x − s_f − D in frame f.

    D(X, Y, z) = Σ_{a=1..3} z^a (c_a0 + c_a1 X + c_a2 X² + c_a3 Y + c_a4 Y² + c_a5 XY),   X = x/W − ½, Y = y/H − ½

z = frame − first frame; coefficients (2, 18) for x and y in RELION's order, index = 3·(space term) + (a − 1), in unbinned px.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

SPACE_TERMS, TIME_TERMS = 6, 3
TERMS = SPACE_TERMS * TIME_TERMS


def space_terms(place: Tensor) -> Tensor:
    """(…, 6) 1, X, X², Y, Y², XY of places (…, 2) xy as fractions of the image, 0.5 in the middle."""
    x, y = (place - 0.5).unbind(-1)
    return torch.stack([torch.ones_like(x), x, x * x, y, y * y, x * y], -1)


def polynomial_basis(z: Tensor, place: Tensor) -> Tensor:
    """(f, p, 18) value of each of RELION's terms for times z (f,) at places (p, 2)."""
    powers = torch.stack([z, z**2, z**3], -1)
    both = space_terms(place)[None, :, :, None] * powers[:, None, None, :]
    return both.reshape(len(z), len(place), TERMS)


def local_shift(coefficients: Tensor, frames: int, place: Tensor) -> Tensor:
    """(f, p, 2) xy shifts in px of the polynomial with coefficients (2, 18) for frames 0 … f − 1 at places (p, 2)."""
    z = torch.arange(frames, dtype=coefficients.dtype, device=coefficients.device)
    powers = torch.stack([z, z**2, z**3])
    in_space = coefficients.reshape(2, SPACE_TERMS, TIME_TERMS) @ powers  # (2, 6, f)
    return (space_terms(place.to(coefficients)) @ in_space).permute(2, 1, 0)


def total_shift(track: Tensor, coefficients: Tensor | None, place: Tensor) -> Tensor:
    """(f, p, 2) xy shifts in px: track (f, 2) plus, where there are coefficients, the local motion at places (p, 2)."""
    shift = track[:, None].expand(len(track), len(place), 2)
    return shift if coefficients is None else shift + local_shift(coefficients, len(track), place).to(track)


def fit_polynomial(shifts: Tensor, place: Tensor, rounds: int = 3) -> tuple[Tensor, float]:
    """Coefficients (2, 18) and rms residual in px of shifts (f, p, 2) at places (p, 2); NaN marks a shift that is not known.

    Least squares with Huber weights (bound: 1.5 robust standard deviations) so that a few wild patches do not bend the field.
    Raises ValueError with 18 shifts or fewer, and where these do not determine the polynomial.
    """
    frames = len(shifts)
    z = torch.arange(frames, dtype=torch.float64)
    basis = polynomial_basis(z / max(frames - 1, 1), place.double()).reshape(-1, TERMS)
    values = shifts.double().reshape(-1, 2)
    known = torch.isfinite(values).all(-1)
    basis, values = basis[known], values[known]
    if len(values) <= TERMS or torch.linalg.matrix_rank(basis) < TERMS:
        raise ValueError(f"{len(values)} shifts do not determine the {TERMS} coefficients of local motion")
    weight = torch.ones(len(values), dtype=torch.float64)
    solution = torch.zeros(TERMS, 2, dtype=torch.float64)
    for _ in range(rounds):
        solution = torch.linalg.lstsq(basis * weight.sqrt()[:, None], values * weight.sqrt()[:, None]).solution
        residual = (values - basis @ solution).norm(dim=-1)
        bound = 1.5 * float(residual.median()) / 1.1774  # the median of a two-dimensional Gaussian's radius is 1.1774 sd
        weight = (bound / residual.clamp(min=1e-12)).clamp(max=1) if bound > 1e-9 else weight
    rms = float(residual.square().mean().sqrt()) if rounds else 0.0
    scale = max(frames - 1, 1) ** -torch.arange(1, TIME_TERMS + 1, dtype=torch.float64)
    return (solution.T * scale.repeat(SPACE_TERMS)).contiguous(), rms


def second_differences(n: int) -> Tensor:
    """(n − 2, n) float64 matrix of second differences; empty for fewer than three frames."""
    d = torch.zeros(max(n - 2, 0), n, dtype=torch.float64)
    for i in range(len(d)):
        d[i, i : i + 3] = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    return d


def remove_spikes(track: Tensor, most: float = 3.0) -> Tensor:
    """A track (f, 2) whose single frames more than `most` px off the mean of their neighbours are put on that mean.

    The neighbours must themselves be nearer to each other than the frame is to them, so a step of the stage stays a step.
    """
    out = track.clone()
    for f in range(1, len(track) - 1):
        middle = 0.5 * (out[f - 1] + track[f + 1])
        off = float((track[f] - middle).norm())
        if off > most and off > float((track[f + 1] - out[f - 1]).norm()):
            out[f] = middle
    return out


def interpolate_groups(values: Tensor, starts: list[int], frames: int) -> Tensor:
    """(f, 2) shifts of single frames from those of groups (g, 2), which start at `starts`: linear between the groups' centres,
    beyond the first and last along the nearest piece."""
    if len(values) == 1:
        return values.expand(frames, 2).clone()
    ends = [*starts[1:], frames]
    centre = torch.tensor([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], dtype=torch.float64)
    t = torch.arange(frames, dtype=torch.float64)
    left = (torch.searchsorted(centre, t, right=True) - 1).clamp(0, len(centre) - 2)
    share = ((t - centre[left]) / (centre[left + 1] - centre[left]))[:, None].to(values)
    return values[left] * (1 - share) + values[left + 1] * share


def full_phases(size: tuple[int, int], shift: Tensor) -> tuple[Tensor, Tensor]:
    """((H, 1), (1, W//2+1)) factors that move a frame by `shift` (2,) xy px; Nyquist keeps its real part only, so that images stay real."""
    height, width = size
    ky = torch.fft.fftfreq(height, dtype=torch.float64, device=shift.device)
    kx = torch.fft.rfftfreq(width, dtype=torch.float64, device=shift.device)
    angles = (-2 * math.pi * shift[1].double() * ky[:, None], -2 * math.pi * shift[0].double() * kx[None])
    y, x = (torch.polar(torch.ones_like(angle), angle).to(torch.complex64) for angle in angles)
    if height % 2 == 0:
        y[height // 2] = y[height // 2].real.to(y.dtype)
    if width % 2 == 0:
        x[:, -1] = x[:, -1].real.to(x.dtype)
    return y, x


def path_lengths(track: Tensor, dose: float, before: float = 0.0, cutoff: float = 4.0) -> tuple[float, float, float]:
    """(total, early, late) length Σ|s_{f+1} − s_f| of a track, in its own unit; early: up to an exposure of `cutoff` e/Å².

    Where the dose is not known (0) all of it is late.
    """
    steps = (track[1:] - track[:-1]).norm(dim=-1)
    early = max(0, min(len(steps), int((cutoff - before) / dose))) if dose > 0 else 0
    return float(steps.sum()), float(steps[:early].sum()), float(steps[early:].sum())
