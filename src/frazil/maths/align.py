"""Motion of a movie from all its patches and frames at once: a likelihood, its gradient, its information, smooth tracks.

With A_pf the whitened transform of patch p in frame f after shifts s_pf, h_f(k) the damage, s(k) the signal-to-noise power of a frame,

    R_p = Σ_f h_f A_pf,    n = Σ_f h_f²,    log p(A | s) = Σ_p Σ_k  s |R_p|² / (1 + s n)  + const

(the unknown image, Gaussian with power s, integrated out; noise has the power 1: here, where values have it together with their signal, it
is what the signal leaves). s(k) comes from the movie: Re ⟨h_f A_f* (R − h_f A_f)⟩ = s h_f² (n − h_f²),
which noise does not bias. The shifts are s_pf = g_f + B_pf c: a free track g with a Gaussian prior on its second differences and local
motion on smooth terms B with a ridge. Newton steps use the expected information; the two prior widths maximise the evidence in its
quadratic form.
"""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.maths.motion import SPACE_TERMS, polynomial_basis, second_differences

TAPER = 0.06  # of a patch's side, at each end, over which it fades
ROUNDS = 10
ROWS = 512  # of a frame transformed at a time on a CPU
SMALL_STEP = 0.01  # px: converged
LEAST_NOISE = 0.03  # share of noise in the power of the values, at least
LONGEST_STEP = 3.0  # px a round
ACCELERATIONS = (0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.7, 1.5, 4.0)  # px, candidates for the sd of second differences of the track
LOCAL_SIZES = (1e-4, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # px rms of a term of local motion; the first means none
EARLY = ((1.0, 0.1), (5.0, 0.1), (5.0, 0.2), (20.0, 0.1), (20.0, 0.2), (20.0, 0.4))  # candidates: how much livelier the first frames are,
# and the share of the movie after which 1/e of that is left: specimens move fast at first, and ever less
INFORMATION_KEPT = 0.98  # frequencies beyond which less than the rest of the information lies are left out of later rounds


def empty_reduced(count: tuple[int, ...], shape: tuple[int, int], device: torch.device) -> Tensor:
    """(…, h, w//2+1) complex64 not filled in; columns are contiguous, which is how transforms along them come."""
    return torch.empty(*count, shape[1] // 2 + 1, shape[0], dtype=torch.complex64, device=device).transpose(-2, -1)


def reduced_transform(
    frame: Tensor, shape: tuple[int, int], *, whole: bool = False, gain: Tensor | None = None, out_: Tensor | None = None
) -> Tensor:
    """(h, w//2+1) complex64: the low frequencies of the transform of a (H, W) frame, times `gain` if given, as of an image of (h, w) px.

    Nyquist and the mean are zero unless the transform is wanted `whole`. Written to `out_` where it is given.
    """
    h, w = shape
    if frame.device.type == "cpu":
        # A block of rows stays in the cache while it is converted, transformed and turned to columns.
        columns = torch.empty(w // 2 + 1, len(frame), dtype=torch.complex64)
        block = torch.empty(ROWS, frame.shape[1])
        for top in range(0, len(frame), ROWS):
            rows = block[: len(frame) - top].copy_(frame[top : top + ROWS])
            columns[:, top : top + ROWS] = torch.fft.rfft(rows if gain is None else rows.mul_(gain[top : top + ROWS]))[:, : w // 2 + 1].T
        ft = torch.fft.fft(columns).T
    else:
        ft = torch.fft.fft(torch.fft.rfft(frame.float() if gain is None else frame * gain)[:, : w // 2 + 1], dim=0)
    out = empty_reduced((), shape, ft.device) if out_ is None else out_
    out[: h // 2] = ft[: h // 2]
    out[h // 2 :] = ft[len(frame) - h // 2 :]
    if not whole:
        out[h // 2] = 0
        out[:, -1] = 0
        out[0, 0] = 0
    return out


def shift_phases(shape: tuple[int, int], size: tuple[int, int], shift: Tensor) -> tuple[Tensor, Tensor]:
    """((…, h, 1), (…, 1, w//2+1)) factors that move the reduced transform of a (H, W) frame by `shift` (…, 2) xy px of the frame."""
    h, w = shape
    ky = torch.fft.fftfreq(h, 1 / h, device=shift.device, dtype=torch.float64) / size[0]
    kx = torch.arange(w // 2 + 1, device=shift.device, dtype=torch.float64) / size[1]
    phase_y, phase_x = -2 * math.pi * shift[..., 1, None].double() * ky, -2 * math.pi * shift[..., 0, None].double() * kx
    y, x = (torch.polar(torch.ones_like(p), p).to(torch.complex64) for p in (phase_y, phase_x))
    return y[..., :, None], x[..., None, :]


def crop_reduced(ft: Tensor, shape: tuple[int, int]) -> Tensor:
    """(…, h, w//2+1) lower frequencies of reduced transforms; Nyquist is zero."""
    h, w = shape
    if h >= ft.shape[-2]:
        return ft
    out = empty_reduced(ft.shape[:-2], shape, ft.device)
    out[..., : h // 2, :] = ft[..., : h // 2, : w // 2 + 1]
    out[..., h // 2 :, :] = ft[..., ft.shape[-2] - h // 2 :, : w // 2 + 1]
    out[..., h // 2, :] = 0
    out[..., -1] = 0
    return out


def correlate_track(ft: Tensor, size: tuple[int, int], b_factor: float = 150.0, search: float = 50.0, rounds: int = 5) -> Tensor:
    """(f, 2) float64 xy px: whole-frame shifts by correlation with the sum of the other frames, first frame 0.

    ft: reduced transforms (f, h, w//2+1) of frames of `size` (H, W). Each correlation is weighted by exp(−2B|s|²) (s in cycles/px of the
    frame), its highest point within ±search px taken, between grid points by a parabola. Ends when the steps are below 0.5 px rms.
    """
    shape = (ft.shape[1], 2 * (ft.shape[2] - 1))
    ky = torch.fft.fftfreq(shape[0], 1 / shape[0], device=ft.device) / size[0]
    kx = torch.arange(ft.shape[2], device=ft.device) / size[1]
    weight = torch.exp(-2 * b_factor * (ky[:, None].square() + kx.square()))
    weight[:, 0] = 0
    weight[0] = 0
    ft = ft * weight.sqrt()
    step = torch.tensor([size[1] / shape[1], size[0] / shape[0]], dtype=torch.float64, device=ft.device)  # px of the frame a grid point
    reach = [max(1, min(n // 2 - 1, int(search / float(p)))) for n, p in zip((shape[1], shape[0]), step, strict=True)]
    track = torch.zeros(len(ft), 2, dtype=torch.float64, device=ft.device)
    for _ in range(rounds):
        moved = torch.empty_like(ft)
        y, x = shift_phases(shape, size, track)
        total = torch.zeros_like(ft[0])
        for f, one in enumerate(ft):
            total += torch.mul(one * y[f], x[f], out=moved[f])
        found = torch.empty_like(track)
        for f, one in enumerate(moved):
            found[f] = _highest((total - one) * one.conj(), shape, reach).to(found) * step
        found -= found[0].clone()
        track += found
        if float(found.square().sum(-1).mean().sqrt()) < 0.5:
            break
    return track


def _highest(ft: Tensor, shape: tuple[int, int], reach: list[int]) -> Tensor:
    """(2,) xy grid points of the highest value of a correlation, given its transform (h, w//2+1), within ±reach, with a parabola along
    each axis.
    """
    rx, ry = reach
    rows, columns = (torch.arange(-r - 1, r + 2, device=ft.device) % side for r, side in zip((ry, rx), shape, strict=True))
    part = torch.fft.irfft(torch.fft.ifft(ft, dim=0).index_select(0, rows), n=shape[1]).index_select(1, columns)
    index = int(part[1:-1, 1:-1].argmax())
    y, x = index // (2 * rx + 1) + 1, index % (2 * rx + 1) + 1
    around = part[y - 1 : y + 2, x - 1 : x + 2].double().cpu()

    def vertex(a: Tensor) -> float:
        bend = float(a[0] + a[2] - 2 * a[1])
        return min(0.5, max(-0.5, -0.5 * float(a[2] - a[0]) / bend)) if bend < 0 else 0.0

    return torch.tensor([x - 1 - rx + vertex(around[1]), y - 1 - ry + vertex(around[:, 1])], dtype=torch.float64)


@dataclass(frozen=True)
class Patches:
    """Transforms of patches of every frame at the frequencies that matter, moved by a first track, noise of variance 1."""

    values: Tensor  # (p, f, k) complex64
    k: Tensor  # (k, 2) float32 cycles/px of the frame, half plane without its axes
    bins: Tensor  # (k,) int64 radial bin
    radius: Tensor  # (bins,) mean |k| of each bin, cycles/px
    place: Tensor  # (p, 2) float64 centres as fractions of the field
    power: Tensor  # (f, bins) float64 Σ |values|² over patches and a bin
    independence: float  # share of the values that is independent, because patches fade at their edges

    def below(self, bins: int) -> Patches:
        """Only the first so many bins."""
        keep = self.bins < bins
        values, power = self.values[..., keep].contiguous(), self.power[:, :bins]
        return replace(self, values=values, k=self.k[keep], bins=self.bins[keep], radius=self.radius[:bins], power=power)


def make_patches(ft: Tensor, size: tuple[int, int], track: Tensor, grid: tuple[int, int], finest: float) -> Patches:
    """Cut frames, given as reduced transforms (f, h, w//2+1) and moved by `track` (f, 2), into grid = (columns, rows) patches.

    Frequencies up to `finest` cycles/px of the frame are kept. Patches do not overlap; they fade at their edges (TAPER).
    """
    shape = (ft.shape[1], 2 * (ft.shape[2] - 1))
    columns, rows = grid
    high, wide = shape[0] // rows // 2 * 2, shape[1] // columns // 2 * 2
    window = _fade(high, ft.device)[:, None] * _fade(wide, ft.device)
    ky = torch.fft.fftfreq(high, 1 / high, device=ft.device) * shape[0] / (size[0] * high)
    kx = torch.arange(wide // 2 + 1, device=ft.device) * shape[1] / (size[1] * wide)
    radius = (ky[:, None].square() + kx.square()).sqrt()
    keep = (radius <= finest) & (kx > 0) & (ky[:, None] != 0)
    keep[high // 2] = False
    keep[:, -1] = False
    width = 2 * float(kx[1]) if wide > 2 else 1.0
    index = torch.nonzero(keep.reshape(-1))[:, 0]
    k = torch.stack(torch.broadcast_tensors(kx, ky[:, None]), -1)[keep].float()
    bins = (radius[keep] / width).long()
    bins = bins - bins.min()
    counts = torch.bincount(bins).clamp(min=1)
    values = torch.empty(rows * columns, len(ft), len(index), dtype=torch.complex64, device=ft.device)
    power = torch.empty(len(ft), len(counts), dtype=torch.float64, device=ft.device)
    y, x = shift_phases(shape, size, track)
    for f, one in enumerate(ft):
        image = torch.fft.irfft2(one * y[f] * x[f], s=shape)[: rows * high, : columns * wide]
        cut = image.reshape(rows, high, columns, wide).transpose(1, 2).contiguous().reshape(rows * columns, high, wide)
        cut -= cut.mean((1, 2), keepdim=True)
        cut *= window
        kept = torch.fft.rfft2(cut).reshape(rows * columns, -1).index_select(1, index)
        values[:, f] = kept
        power[f] = torch.bincount(bins, (kept.real.square() + kept.imag.square()).sum(0).double(), minlength=len(counts))
    mean = torch.bincount(bins, radius[keep].double()) / counts
    noise = (power.sum(0) / (counts * rows * columns * len(ft))).clamp(min=1e-30)
    values *= (1 / noise.sqrt()).float()[bins]
    power /= noise
    x = ((torch.arange(columns, dtype=torch.float64) + 0.5) * wide / shape[1]).repeat(rows)
    y = ((torch.arange(rows, dtype=torch.float64) + 0.5) * high / shape[0]).repeat_interleave(columns)
    share = float(window.square().sum() ** 2 / (window.numel() * (window**4).sum()))
    return Patches(values, k, bins, mean.float(), torch.stack([x, y], -1), power, share)


def _fade(n: int, device: torch.device) -> Tensor:
    """(n,) raised-cosine window, flat but for TAPER at each end."""
    edge = max(1, round(TAPER * n))
    t = (torch.arange(n, device=device) + 0.5).clamp(max=edge)
    up = 0.5 - 0.5 * torch.cos(math.pi * t / edge)
    return up * up.flip(0)


@dataclass(frozen=True)
class Fit:
    """Motion found from patches: all of it, the track that the patches were moved by included; frame 0 is 0."""

    track: Tensor  # (f, 2) float64 px
    local: Tensor  # (f, p, 2) float64 px, local motion at the patches
    patch_tracks: Tensor  # (f, p, 2) float64 px: local motion of each patch by itself, smoothed in time only
    ssnr: Tensor  # (bins,) signal-to-noise power of one undamaged frame
    error: float  # px, expected rms error of the track
    error_local: float  # px, of local motion
    acceleration: float  # px, sd of the second differences of the track
    local_size: float  # px rms of a term of local motion; that of LOCAL_SIZES[0] means none was found
    gain: float  # log evidence of local motion against none
    rounds: int


def fit_motion(patches: Patches, left: Tensor, start: Tensor, local: bool, smooth: bool = True) -> Fit:
    """The shifts that maximise the likelihood of the module docstring times its priors.

    start: (f, 2) track the patches were moved by; left: (f, bins) amplitude left of each frame by damage, at patches.radius; local: fit
    local motion too; smooth: let the evidence
    choose how smooth the track is (otherwise every frame is free).
    """
    count, frames, _ = patches.values.shape
    basis = local_basis(frames, patches.place) if local else torch.zeros(frames, count, 0, dtype=torch.float64)
    start = start.double().cpu() - start[0].double().cpu()
    theta = torch.cat([start, torch.zeros(basis.shape[-1], 2, dtype=torch.float64)])
    trust = torch.ones(count, dtype=torch.float64)
    prior = _Prior.weakest(frames, basis.shape[-1], count)
    state = None
    rounds = 0
    while rounds < ROUNDS:
        rounds += 1
        shifts = (theta[:frames] - start)[:, None] + basis @ theta[frames:]
        state = _evaluate(patches, left, shifts)
        normal, slope = _normal(state, basis, trust)
        prior = _choose_prior(prior, normal, slope + normal @ theta, smooth)
        step = torch.linalg.solve(normal + prior.matrix, slope - prior.matrix @ theta)
        step[:frames] -= step[0].clone()
        moved = (step[:frames, None] + basis @ step[frames:]).norm(dim=-1)
        step *= min(1.0, LONGEST_STEP / max(float(moved.max()), 1e-9))
        theta = theta + step
        if float(moved.square().mean().sqrt()) < SMALL_STEP and rounds > 2:
            break
        if rounds > 2:
            trust = _trust(state, trust)
        needed = _bins_needed(state, patches)
        if needed < 0.9 * len(patches.radius):
            patches, left = patches.below(needed), left[:, :needed]
    assert state is not None
    return _finish(state, basis, theta, prior, rounds)


def local_basis(frames: int, place: Tensor) -> Tensor:
    """(f, p, m) float64 combinations of RELION's terms that vary over the field (those constant in space belong to the track).

    Orthogonal over patches and frames, simple terms first; the squared sizes of a term say how much of it is expected: motion is mostly
    linear in time and space.
    """
    z = torch.arange(frames, dtype=torch.float64) / max(frames - 1, 1)
    terms = polynomial_basis(z, place).reshape(frames, len(place), SPACE_TERMS, 3)[:, :, 1:].reshape(frames * len(place), -1)
    in_space, in_time = (torch.tensor(sizes, dtype=torch.float64) for sizes in ([1.0, 0.6, 1.0, 0.6, 0.6], [1.0, 0.5, 0.25]))
    expected = (in_space[:, None] * in_time).reshape(-1)
    order = torch.argsort(expected, descending=True, stable=True)
    q, r = torch.linalg.qr(terms[:, order])
    diagonal = r.diagonal().abs()
    q = q * expected[order]
    return q[:, diagonal > 1e-9 * diagonal.max()].reshape(frames, len(place), -1)


@dataclass(frozen=True)
class _State:
    slope: Tensor  # (p, f, 2) gradient of the log-likelihood
    laplacian: Tensor  # (f, f) information of a patch about its frames' shifts along an axis
    ssnr: Tensor  # (bins,)
    information: Tensor  # (bins,) share of it by bin


def _evaluate(patches: Patches, left: Tensor, shifts: Tensor) -> _State:
    """Signal spectrum, gradient and expected information at shifts (f, p, 2)."""
    bins, k = patches.bins, patches.k
    n_bins = len(patches.radius)
    h = left.to(k)[:, bins]  # (f, k)
    n1 = left.square().sum(0).double()  # (bins,)
    squares = left.double().square()
    # conj(A)(R − A): its real part adds up to |R|² − Σ|A|², its imaginary part is that of conj(A) R. Shifts leave |A|² as it is.
    real = -(squares * patches.power).sum(0)
    cross = torch.empty(patches.values.shape[:2] + (len(k),), dtype=torch.float32, device=k.device)
    # exp(−2πi k·s) is a product of two factors with few different values each.
    places = [torch.unique(k[:, axis], return_inverse=True) for axis in (0, 1)]
    phases = [-2 * math.pi * shifts[..., axis].T[..., None].to(k.device) * places[axis][0].double() for axis in (0, 1)]  # (p, f, …)
    factors = [torch.polar(torch.ones_like(phase), phase).to(torch.complex64) for phase in phases]
    moved = torch.empty_like(patches.values[0])
    for p, patch in enumerate(patches.values):
        torch.mul(patch, h, out=moved)
        for factor, place in zip(factors, places, strict=True):
            moved *= factor[p].index_select(1, place[1])
        total = moved.sum(0)
        real += torch.bincount(bins, (total.real.square() + total.imag.square()).double(), minlength=n_bins)
        torch.sub(moved.real * total.imag, moved.imag * total.real, out=cross[p])
    pairs = n1.square() - left.double().pow(4).sum(0)
    counts = torch.bincount(bins, minlength=n_bins).double() * len(patches.values)
    ssnr = _smooth_positive(real / (counts * pairs.clamp(min=1e-12)), counts)
    # Values have the power 1 together with their signal: the rest is noise.
    noise = (1 - ssnr * squares.mean(0).to(ssnr)).clamp(min=LEAST_NOISE)
    weight = ssnr / (noise * (noise + ssnr * n1))
    slope = -4 * math.pi * patches.independence * (cross @ (k * weight.to(k)[bins][:, None])).double().cpu()
    k2 = torch.bincount(bins, k.double().square().sum(-1), minlength=n_bins) / 2
    share = 2 * patches.independence * (2 * math.pi) ** 2 * k2 * weight * ssnr
    coupling = ((squares * share) @ squares.T).cpu()
    laplacian = torch.diag(coupling.sum(1)) - coupling
    return _State(slope, laplacian, ssnr, share * n1.square())


def _smooth_positive(value: Tensor, counts: Tensor) -> Tensor:
    """Running mean of three bins weighted by their counts, not below zero."""
    pad = torch.nn.functional.pad
    weight = pad(counts, (1, 1))[None, None].unfold(-1, 3, 1).sum(-1)[0, 0]
    total = pad(counts * value, (1, 1))[None, None].unfold(-1, 3, 1).sum(-1)[0, 0]
    return (total / weight.clamp(min=1)).clamp(min=0)


def _normal(state: _State, basis: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
    """(m, m) information and (m, 2) gradient of track and local terms, patches weighted by `trust`."""
    frames, count, terms = basis.shape
    joint = torch.cat([torch.eye(frames, dtype=torch.float64)[:, None].expand(frames, count, frames), basis], -1)
    normal = torch.einsum("fpa,fg,gpb,p->ab", joint, state.laplacian, joint, trust)
    slope = torch.einsum("fpa,pfx,p->ax", joint, state.slope, trust)
    ridge = 1e-6 * float(state.laplacian.diagonal().mean() * count) + 1e-9
    normal[:frames, :frames] += ridge * torch.ones(frames, frames, dtype=torch.float64) / frames
    return normal, slope


@dataclass(frozen=True)
class _Prior:
    matrix: Tensor  # (m, m) precision
    acceleration: float
    local_size: float
    early: tuple[float, float]
    frames: int
    patches: int
    gain: float = 0.0

    @staticmethod
    def weakest(frames: int, terms: int, patches: int) -> _Prior:
        """Nearly free."""
        return _Prior.make(frames, terms, patches, ACCELERATIONS[-1], LOCAL_SIZES[-1], EARLY[0])

    @staticmethod
    def make(frames: int, terms: int, patches: int, acceleration: float, local_size: float, early: tuple[float, float]) -> _Prior:
        """Prior of these widths (px)."""
        matrix = torch.zeros(frames + terms, frames + terms, dtype=torch.float64)
        d = second_differences(frames) / _liveliness(frames, early)[:, None]
        matrix[:frames, :frames] = d.T @ d / acceleration**2
        matrix[frames:, frames:] = torch.eye(terms, dtype=torch.float64) / (local_size**2 * frames * patches)
        return _Prior(matrix, acceleration, local_size, early, frames, patches)

    def log_determinant(self) -> float:
        """Of the part that is not zero."""
        terms = len(self.matrix) - self.frames
        live = _liveliness(self.frames, self.early)
        return float(-2 * (live * self.acceleration).log().sum() - terms * math.log(self.local_size**2 * self.frames * self.patches))


def _liveliness(frames: int, early: tuple[float, float]) -> Tensor:
    """(f − 2,) factor of the second differences' sd: early[0] at the start, 1 later on, falling over the share early[1] of the frames."""
    t = torch.arange(max(frames - 2, 0), dtype=torch.float64)
    return 1 + (early[0] - 1) * torch.exp(-t / max(1.0, early[1] * frames))


def _choose_prior(old: _Prior, normal: Tensor, target: Tensor, smooth: bool) -> _Prior:
    """The widths with the highest evidence, given information and normal · (best unrestrained parameters).

    First those of the track, with the old one of local motion, then that: the two hardly depend on each other.
    """
    frames, terms = old.frames, len(normal) - old.frames
    if frames < 4 and not terms:
        return old
    local = old.local_size if terms else LOCAL_SIZES[0]
    accelerations = ACCELERATIONS if smooth and frames >= 4 else ACCELERATIONS[-1:]
    tracks = [(local, *widths) for widths in itertools.product(accelerations, EARLY if smooth else EARLY[:1])]
    _, acceleration, early = tracks[int(_evidence(tracks, old, normal, target).argmax())]
    both = [(size, acceleration, early) for size in (LOCAL_SIZES if terms else LOCAL_SIZES[:1])]
    value = _evidence(both, old, normal, target)
    best = int(value.argmax())
    return replace(_Prior.make(frames, terms, old.patches, acceleration, both[best][0], early), gain=float(value[best] - value[0]))


def _evidence(widths: list[tuple[float, float, tuple[float, float]]], old: _Prior, normal: Tensor, target: Tensor) -> Tensor:
    """(n,) log evidence of widths (local size, acceleration, early), all as one batch of small factorisations."""
    frames, terms = old.frames, len(normal) - old.frames
    size, acceleration = (torch.tensor([w[i] for w in widths], dtype=torch.float64) for i in (0, 1))
    shapes = {value: _Prior.make(frames, 0, old.patches, 1.0, 1.0, value) for value in {w[2] for w in widths}}
    matrix = normal.repeat(len(widths), 1, 1)
    matrix[:, :frames, :frames] += torch.stack([shapes[w[2]].matrix for w in widths]) / acceleration.square()[:, None, None]
    precision = 1 / (size.square() * frames * old.patches)
    matrix.diagonal(dim1=1, dim2=2)[:, frames:] += precision[:, None]
    factor = torch.linalg.cholesky(matrix)
    fitted = torch.linalg.solve_triangular(factor, target.expand(len(widths), *target.shape), upper=False).square().sum((1, 2))
    determinant = torch.tensor([shapes[w[2]].log_determinant() for w in widths], dtype=torch.float64)
    determinant += -2 * max(frames - 2, 0) * acceleration.log() + terms * precision.log()
    # Two axes share the widths: their determinants count twice.
    return determinant - 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * fitted


def _trust(state: _State, old: Tensor) -> Tensor:
    """(p,) Huber weights of patches whose gradient is far larger than their information allows: carbon, edges, broken ice."""
    strength = state.slope.square().sum(-1) / state.laplacian.diagonal().clamp(min=1e-12)
    r = strength.mean(-1).sqrt()
    bound = 2 * float(r.median())
    return (bound / r.clamp(min=1e-12)).clamp(max=1) if bound > 0 else old


def _bins_needed(state: _State, patches: Patches) -> int:
    """How many bins hold nearly all of the information."""
    total = state.information.cumsum(0)
    return int((total < INFORMATION_KEPT * total[-1]).sum()) + 2 if float(total[-1]) > 0 else len(patches.radius)


def _finish(state: _State, basis: Tensor, theta: Tensor, prior: _Prior, rounds: int) -> Fit:
    """Tracks of single patches and expected errors at the end."""
    frames, count, terms = basis.shape
    normal, _ = _normal(state, basis, torch.ones(count, dtype=torch.float64))
    covariance = torch.linalg.inv(normal + prior.matrix)
    centred = torch.eye(frames, dtype=torch.float64) - 1 / frames
    error = float((centred @ covariance[:frames, :frames] @ centred).diagonal().mean().clamp(min=0).sqrt())
    spread = torch.einsum("fpa,ab,fpb->fp", basis, covariance[frames:, frames:], basis) if terms else torch.zeros(1)
    local = basis @ theta[frames:]
    d = second_differences(frames)
    smooth = state.laplacian + d.T @ d / (2 * prior.acceleration) ** 2 + 1e-9 + 1e-6 * torch.diag(state.laplacian.diagonal())
    smooth = smooth + torch.eye(frames, dtype=torch.float64) * max(1e-9, 1e-3 * float(state.laplacian.diagonal().mean()))
    alone = local + torch.linalg.solve(smooth, state.slope.transpose(0, 1).reshape(frames, -1)).reshape(frames, count, 2)
    # Terms such as X² have a mean over the field: it belongs to the track.
    mean = local.mean(1)
    local, alone, track = local - mean[:, None], alone - mean[:, None], theta[:frames] + mean
    return Fit(
        track - track[0], local, alone - alone[:1], state.ssnr.cpu(), error, float(spread.mean().clamp(min=0).sqrt()),
        prior.acceleration, prior.local_size, prior.gain, rounds,
    )  # fmt: skip
