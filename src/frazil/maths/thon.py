"""Thon rings: polar averages of power spectra, the model of rings in their logarithm, search and fit of the defocus.

    log P(k, φ) = b(k, φ) − a(k) V(k) cos 2χ(k, φ) + noise,      V: how much of the modulation the tile's window leaves

χ is the phase of maths/ctf.py. The logarithm makes the noise of the spectrum the same everywhere, so least squares weigh every ring as
they should, weak ones at high resolution too. b and a are cubic splines in log k (b with a two-fold part in φ: drift). Both are linear,
hence fitted anew for every trial of the defocus (variable projection): rings need no background taken off before, and a
background that is a little wrong cannot turn into a defocus. In the search b is projected out, a is one of a few Gaussians, and χ² is
tabulated by sector and defocus with one matrix product; an astigmatic trial reads each sector at its own defocus.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from frazil.data import Optics
from frazil.maths.ctf import wavelength

SECTORS = 36  # of 180°
BACKGROUND, TWOFOLD, ENVELOPE = 9, 4, 5  # numbers of splines
SHARPNESS = (0.0, 60.0, 200.0, 600.0)  # Å²: envelopes exp(−B k²/2) tried in the search
STRONGEST = 3000.0  # Å, largest U − V looked for
ROUND = 700.0  # Å, standard deviation of the prior of ½(U − V): keeps fits to noise round
ASTIGMATISMS = 64  # looked up at a time
BOUND = 1.35e-3  # relative limit within which linear systems are solved


@dataclass(frozen=True)
class PolarBins:
    """Which polar bin each element of a half transform falls into, and what the phase needs to know of the bins."""

    index: Tensor  # (h·(w//2+1),) int64 elements of the transform in the order of their bins
    edges: Tensor  # (s·r + 1,) int64 where each bin begins in that order
    count: Tensor  # (s, r) float64 elements in a bin
    terms: Tensor  # (4, s, r) float64 bin means of k², k² cos 2φ, k² sin 2φ, k⁴
    width: float  # 1/Å, of a ring

    @property
    def k(self) -> Tensor:
        """(s, r) rms frequency in 1/Å."""
        return self.terms[0].sqrt()

    @property
    def angle(self) -> Tensor:
        """(s,) degrees of the sectors' middles."""
        s = self.count.shape[0]
        return (torch.arange(s, dtype=torch.float64, device=self.count.device) + 0.5) * (180.0 / s)


def polar_bins(ky: Tensor, kx: Tensor, limits: tuple[float, float], width: float, cross: tuple[float, float]) -> PolarBins:
    """Bins of a grid with frequencies ky (h,), kx (w') in 1/Å between `limits`, rings `width` wide.

    |ky|, |kx| up to `cross` are left out: the arms of the central cross.
    """
    y, x = torch.broadcast_tensors(ky.double()[:, None], kx.double()[None, :])
    k2 = y.square() + x.square()
    first, rings = math.floor(limits[0] / width), math.ceil(limits[1] / width)
    ring = (k2.sqrt() / width).long()
    sector = (torch.atan2(y, x) / math.pi * SECTORS).floor().long() % SECTORS
    use = (ring >= first) & (ring < rings) & (y.abs() > cross[0]) & (x.abs() > cross[1])
    rings -= first
    place = torch.where(use, sector * rings + ring - first, SECTORS * rings).flatten()
    order = torch.argsort(place, stable=True)
    count = torch.bincount(place, minlength=SECTORS * rings + 1)[: SECTORS * rings]
    edges = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    order = order[: int(edges[-1])]
    bins = PolarBins(order, edges, count.double().reshape(SECTORS, rings), torch.zeros(0), width)
    twofold = (x.square() - y.square(), 2 * x * y)  # k² cos 2φ, k² sin 2φ
    means = torch.stack([polar_mean(part, bins) for part in (k2, *twofold, k2.square())])
    # Empty bins get the values of their middles: nothing is divided by zero there, and their weight is zero.
    middle = (first + 0.5 + torch.arange(rings, device=k2.device, dtype=torch.float64)) * width
    turn = torch.deg2rad(2 * bins.angle)[:, None]
    nominal = torch.stack([middle.square() * f for f in (torch.ones_like(turn), turn.cos(), turn.sin(), middle.square() + 0 * turn)])
    return PolarBins(order, edges, bins.count, torch.where(bins.count > 0, means, nominal), width)


def polar_mean(values: Tensor, bins: PolarBins) -> Tensor:
    """(…, s, r) float64 mean over each bin of values (…, h, w'); 0 in empty bins. The same sums in the same order on every device."""
    flat = values.flatten(-2)[..., bins.index].double()
    # One running sum through all: many rows at a time are slow on a GPU.
    running = torch.nn.functional.pad(flat.flatten().cumsum(0), (1, 0))
    first = torch.arange(flat[..., 0].numel(), device=flat.device)[:, None] * flat.shape[-1]
    sums = (running[first + bins.edges[1:]] - running[first + bins.edges[:-1]]).reshape(*values.shape[:-2], *bins.count.shape)
    return sums / bins.count.clamp(min=1)


def orthonormal(columns: Tensor) -> Tensor:
    """(n, b) orthonormal columns that span those of `columns` (n, b); none where these depend on each other.

    By Cholesky's factor of their products, twice (Yamamoto et al. 2015): on a GPU this takes a fraction of the time of Householder's QR.
    """
    for _ in range(2):
        products = columns.T @ columns
        products.diagonal().add_(1e-13 * products.diagonal().mean())
        factor = torch.linalg.cholesky_ex(products)[0]
        columns = torch.linalg.solve_triangular(factor, columns.T, upper=False).T
    return columns


def splines(x: Tensor, low: float, high: float, n: int) -> Tensor:
    """(…, n) cubic B-splines with equal spacing whose sum is 1 on [low, high], at x (…)."""
    step = (high - low) / (n - 3)
    t = ((x[..., None] - low) / step - torch.arange(-1, n - 1, device=x.device, dtype=x.dtype)).abs()
    near, far = 2 / 3 - t.square() + 0.5 * t**3, (2 - t).clamp(min=0) ** 3 / 6
    return torch.where(t < 1, near, far)


@dataclass(frozen=True)
class Rings:
    """A log spectrum ready to be fitted: weighted data and the model's fixed parts, (n,) the bins that count."""

    bins: PolarBins
    use: Tensor  # (s, r) bool
    terms: Tensor  # (4, n) of the bins that count
    root: Tensor  # (n,) square root of the weights
    data: Tensor  # (n,) weighted log spectrum, background projected out
    basis: Tensor  # (n, b) orthonormal columns of the weighted background
    shape: Tensor  # (e, n) splines of the envelope
    raw: Tensor  # (n,) log spectrum
    optics: Optics
    seen: Tensor  # (l,) float64, what window and bins leave of a modulation whose period is 1/x, x = 0, lag_step, … Å
    lag_step: float  # Å
    noise: float  # variance of a bin of weight 1 about a smooth background, rings included


def make_rings(power: Tensor, weight: Tensor, bins: PolarBins, optics: Optics, lags: Tensor, lag_step: float) -> Rings:
    """What the fit needs of a polar power spectrum (s, r); weight (s, r): independent values behind each bin, 0: left out."""
    use = (weight > 0) & (power > 0)
    raw = power[use].double().log()
    terms = bins.terms[:, use]
    u = 0.5 * terms[0].log()
    low, high = float(u.min()), float(u.max())
    radial, slow = splines(u, low, high, BACKGROUND), splines(u, low, high, TWOFOLD)
    twofold = terms[1:3] / terms[0]
    columns = torch.cat([radial, slow * twofold[0][:, None], slow * twofold[1][:, None]], -1)
    root = weight[use].double().sqrt()
    basis = orthonormal(columns * root[:, None])
    data = root * raw
    data = data - basis @ (basis.T @ data)
    noise = float(data.square().sum() / max(1, len(data) - basis.shape[1]))
    # Outliers (spots of ice, lines of the detector) are brought within five standard deviations.
    limit = 5 * math.sqrt(noise)
    data = data.clamp(-limit, limit)
    data = data - basis @ (basis.T @ data)
    noise = float(data.square().sum() / max(1, len(data) - basis.shape[1]))
    shape = splines(u, low, high, ENVELOPE).T.contiguous()
    return Rings(bins, use, terms, root, data, basis, shape, raw, optics, _seen(lags, lag_step, bins.width), lag_step, noise)


def _seen(lags: Tensor, lag_step: float, width: float) -> Tensor:
    """(l,) what is left of a modulation by its lag: of the window `lags`, its last value further out, and of bins `width` 1/Å wide."""
    count = max(2, math.ceil(1 / (width * lag_step)) + 1)  # from there on bins leave nothing
    known = lags.double()[:count]
    known = torch.cat([known, known[-1:].expand(count - len(known))])
    lag = torch.arange(count, device=known.device, dtype=torch.float64) * lag_step
    return known * torch.sinc(lag * width).clamp(min=0)


# ---- the phase


def half_phase(terms: Tensor, theta: Tensor, optics: Optics) -> Tensor:
    """(…, n) χ in radians at terms (4, n), theta (…, 4): mean defocus, ½(U−V) cos 2α, ½(U−V) sin 2α in Å, phase shift in radians."""
    lam = wavelength(optics.voltage)
    fixed = -0.5 * math.pi * optics.cs * 1e7 * lam**3 * terms[3] + math.asin(optics.amplitude_contrast)
    return math.pi * lam * theta[..., :3] @ terms[:3] + fixed + theta[..., 3:]


def visibility(terms: Tensor, mean: Tensor, rings: Rings) -> Tensor:
    """(…, n) share of the rings' modulation that window and bins leave, for mean defocus (…, 1): its lag is 2λ(Δf k − Cs λ² k³)."""
    return _look_up(rings.seen, mean, *_lag_terms(terms, rings))


def _lag_terms(terms: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Slope with the mean defocus, and what is taken off, of the place of each bin's lag in the table `rings.seen`."""
    lam = wavelength(rings.optics.voltage)
    slope = terms[0].sqrt() * (2 * lam / rings.lag_step)
    return slope, slope * terms[0] * (rings.optics.cs * 1e7 * lam**2)


def _look_up(seen: Tensor, mean: Tensor, slope: Tensor, less: Tensor) -> Tensor:
    """(…, n) the table at |mean · slope − less|, linear between its values."""
    place = (mean * slope - less).abs_().clamp_(max=len(seen) - 1.001)
    whole = place.long()
    return torch.lerp(seen[whole], seen[whole + 1], place - whole)


def theta_of(defocus: Tensor, phase_shift: Tensor) -> Tensor:
    """(…, 4) parameters of the phase from U, V in Å, angle in degrees (…, 3) and phase shift (…) in degrees."""
    u, v, angle = defocus.unbind(-1)
    half, twice = 0.5 * (u - v), torch.deg2rad(2 * angle)
    return torch.stack([0.5 * (u + v), half * twice.cos(), half * twice.sin(), torch.deg2rad(phase_shift)], -1)


def defocus_of(theta: Tensor) -> tuple[Tensor, Tensor]:
    """((…, 3) U ≥ V in Å and angle in (−90, 90] degrees, (…) phase shift in [0, 180) degrees) of the parameters (…, 4)."""
    mean, c, s, phase = theta.unbind(-1)
    half = torch.hypot(c, s)
    angle = 0.5 * torch.rad2deg(torch.atan2(s, c))
    angle = torch.where(angle <= -90, angle + 180, angle)
    return torch.stack([mean + half, mean - half, angle], -1), torch.rad2deg(phase) % 180


# ---- search


@dataclass(frozen=True)
class SearchRange:
    """Where the defocus is looked for. Å and degrees."""

    low: float = 3000.0
    high: float = 60000.0
    phases: tuple[float, ...] = (0.0,)  # degrees of phase shift tried
    astigmatism: float = STRONGEST


def search(rings: Rings, where: SearchRange, keep: int = 6) -> Tensor:
    """(≤ keep, 4) parameters of the highest, distinct peaks of the likelihood over defocus, astigmatism and phase shift."""
    lam = wavelength(rings.optics.voltage)
    top = float(rings.terms[0].max())
    step = 1 / (2 * math.pi * lam * top)  # Å: 2χ changes by a radian at the highest frequency
    half_limit = 0.5 * where.astigmatism
    margin = math.ceil(half_limit / step)
    first = math.ceil(where.low / step)
    grid = torch.arange(max(1, first - margin), math.ceil(where.high / step) + margin + 1, device=rings.data.device).double() * step
    twofold = _disc(half_limit / step, device=grid.device)  # (a, 2) ½(U−V) cos 2α, sin 2α in steps
    inside = torch.nonzero((grid >= where.low - 1e-6) & (grid <= where.high + 1e-6))[:, 0]
    gains, thetas = [], []
    for phase in where.phases:
        product, norm = _sector_table(rings, grid, math.radians(phase))
        gain, number = _best_astigmatism(product, norm, inside, twofold, rings.bins.angle)
        ahead = torch.full((len(inside), 1), math.radians(phase)).to(grid)
        thetas.append(torch.cat([grid[inside][:, None], twofold[number] * step, ahead], -1))
        gains.append(gain)
    return _peaks(torch.stack(gains), torch.stack(thetas), keep, max(300.0, 3 * step))


def _sector_table(rings: Rings, grid: Tensor, phase: float) -> tuple[Tensor, Tensor]:
    """(B, s, d): product of data and model, and square of the model, by envelope, sector and defocus, the background projected out."""
    bins, use = rings.bins, rings.use
    s, r = bins.count.shape
    weight = torch.zeros(s, r, dtype=torch.float64, device=grid.device)
    weight[use] = rings.root.square()
    values = torch.zeros_like(weight)
    values[use] = rings.data * rings.root
    # A ring's frequencies differ little between sectors: the model is that of its mean, the sectors differ by defocus only.
    share = weight.sum(0).clamp(min=1e-12)
    k2, k4 = ((bins.terms[i] * weight).sum(0) / share for i in (0, 3))
    live = weight.sum(0) > 0
    k2, k4, weight, values = k2[live], k4[live], weight[:, live], values[:, live]
    terms = torch.stack([k2, 0 * k2, 0 * k2, k4])
    theta = torch.stack([grid, 0 * grid, 0 * grid, torch.full_like(grid, phase)], -1)
    model = -torch.cos(2 * half_phase(terms, theta, rings.optics)) * visibility(terms, grid[:, None], rings)
    u = 0.5 * k2.log()
    radial = splines(u, float(u.min()), float(u.max()), BACKGROUND) * weight.sum(0).sqrt()[:, None]
    basis = orthonormal(radial) / weight.sum(0).sqrt().clamp(min=1e-12)[:, None]
    out = []
    for b in SHARPNESS:
        m = model * torch.exp(-0.5 * b * k2)
        m = m - (m * weight.sum(0)) @ basis @ basis.T  # of the average over sectors
        out.append((values @ m.T, weight @ m.square().T))
    return torch.stack([p for p, _ in out]), torch.stack([q for _, q in out])


def _disc(radius: float, device: torch.device) -> Tensor:
    """(a, 2) points of a square grid two steps apart within a circle, the origin first."""
    line = torch.arange(-math.floor(radius / 2), math.floor(radius / 2) + 1, device=device, dtype=torch.float64) * 2
    points = torch.cartesian_prod(line, line)
    length = points.norm(dim=-1)
    order = torch.argsort(length, stable=True)
    return points[order][length[order] <= radius]


def _best_astigmatism(product: Tensor, norm: Tensor, inside: Tensor, twofold: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(d,) highest (Σ product)²/Σ norm over envelopes and astigmatism at each defocus of `inside`, and which of `twofold` it was."""
    turn = torch.deg2rad(2 * angle)
    offset = (twofold @ torch.stack([turn.cos(), turn.sin()])).round().long()  # (a, s)
    envelopes, s, d = product.shape
    table = torch.cat([product, norm]).float().permute(1, 2, 0).reshape(s * d, 2 * envelopes)
    sector = torch.arange(s, device=angle.device) * d
    best = torch.full((len(inside),), -1.0, device=angle.device)
    which = torch.zeros(len(inside), dtype=torch.int64, device=angle.device)
    for first in range(0, len(offset), ASTIGMATISMS):
        part = offset[first : first + ASTIGMATISMS]
        place = (inside[:, None] + part[:, None, :]).clamp_(0, d - 1).add_(sector)  # (c, d, s)
        sums = torch.nn.functional.embedding_bag(place.flatten(0, 1), table, mode="sum").unflatten(0, (len(part), len(inside)))
        num, den = sums.split(envelopes, -1)
        gain, row = (num.clamp(min=0).square() / den.clamp(min=1e-9)).amax(-1).max(0)
        better = gain > best
        best, which = torch.where(better, gain, best), torch.where(better, first + row, which)
    return best, which


def _peaks(gains: Tensor, thetas: Tensor, keep: int, apart: float) -> Tensor:
    """(≤ keep, 4) the highest of (phases, d) values, at least `apart` Å or 25° of phase from each other."""
    place = gains.flatten().sort(descending=True)[1][: 200 * keep]
    found: list[list[float]] = []
    for theta in thetas.flatten(0, 1)[place].tolist():
        if all(abs(theta[0] - f[0]) > apart or abs(theta[3] - f[3]) > 0.43 for f in found):
            found.append(theta)
        if len(found) == keep:
            break
    return torch.tensor(found, dtype=torch.float64, device=thetas.device)


# ---- fit


@dataclass(frozen=True)
class RingFit:
    """The fit of one spectrum."""

    theta: Tensor  # (4,) parameters of the phase
    covariance: Tensor  # (4, 4) of theta
    gain: float  # by how much χ² (in units of the noise) fell through the rings
    envelope: Tensor  # (n,) a(k) V(k) ≥ 0
    noise: float  # variance of a bin of weight 1


def fit(rings: Rings, starts: Tensor, where: SearchRange, iterations: int = 25) -> RingFit:
    """The best of Levenberg–Marquardt fits from all starts (m, 4) at once; the phase shift is fitted where several were searched."""
    free = 4 if len(where.phases) > 1 else 3
    theta = starts.double().clone()
    fixed = _fixed(rings, free)
    prior = torch.tensor([0.0, 1 / ROUND**2, 1 / ROUND**2, 0.0], dtype=torch.float64, device=theta.device)[:free] * rings.noise
    damping = torch.full((len(theta),), 1e-3, dtype=torch.float64, device=theta.device)
    longest = torch.tensor([2 / float(fixed.phase[0].max())] * 3 + [0.5], dtype=torch.float64)  # Å: χ changes by 1 rad where k is highest
    limit = longest[:free].to(theta.device)
    here = _evaluate(fixed, theta, prior)
    for _ in range(iterations):
        scale = here.information.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30)
        step = solved(here.information + torch.diag_embed(damping[:, None] * scale + 1e-20), here.slope).clamp(-limit, limit)
        trial = torch.cat([theta[:, :free] + step, theta[:, free:]], -1)
        there = _evaluate(fixed, trial, prior)
        better = there.cost < here.cost
        done = (step[:, :3].abs().amax(-1) < 0.3) | (damping > 1e6)
        theta = torch.where(better[:, None], trial, theta)
        here = here.replaced(there, better)
        damping = torch.where(better, damping * 0.2, damping * 6).clamp_(min=1e-6)
        if bool(done.all()):
            break
    return _chosen(rings, fixed, theta, here, prior, where)


@dataclass(frozen=True)
class _Fixed:
    """What stays the same while theta is sought: n bins, p parameters that are free."""

    phase: Tensor  # (4, n) slopes of 2χ with theta
    rest: Tensor  # (n,) 2χ at theta = 0
    free: int  # p
    root: Tensor  # (n,)
    shape: Tensor  # (e, n)
    known: Tensor  # (n, b + 1) background's basis and, last, the data
    seen: Tensor  # (l,) and the place of the bins' lags in it
    lag: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Point:
    """Cost and its derivatives at theta (m, 4), background and envelope eliminated."""

    cost: Tensor  # (m,)
    coefficients: Tensor  # (m, e) of the envelope, none negative
    information: Tensor  # (m, p, p)
    slope: Tensor  # (m, p)

    def replaced(self, other: _Point, better: Tensor) -> _Point:
        """Those of `other` where it is better (m,)."""
        pairs = ((getattr(other, part.name), getattr(self, part.name)) for part in fields(self))
        return _Point(*(torch.where(better.reshape(-1, *[1] * (new.dim() - 1)), new, old) for new, old in pairs))


def _fixed(rings: Rings, free: int) -> _Fixed:
    """What `rings` and the number of free parameters fix."""
    lam = wavelength(rings.optics.voltage)
    phase = torch.cat([2 * math.pi * lam * rings.terms[:3], torch.full_like(rings.terms[:1], 2.0)])
    rest = 2 * half_phase(rings.terms, torch.zeros_like(rings.terms[:, 0]), rings.optics)
    known = torch.cat([rings.basis, rings.data[:, None]], -1)
    return _Fixed(phase, rest, free, rings.root, rings.shape, known, rings.seen, _lag_terms(rings.terms, rings))


def _evaluate(fixed: _Fixed, theta: Tensor, prior: Tensor) -> _Point:
    """The cost at theta (m, 4) and its Gauss–Newton derivatives.

    All from products of n long rows: G, the rings times the envelope's splines, J, the slopes of the rings with theta, and what is known
    (basis B of the background, data). What the background takes off a product of two rows is the product of their products with B.
    """
    twice = torch.addmm(fixed.rest, theta, fixed.phase)
    seen = _look_up(fixed.seen, theta[:, :1], *fixed.lag).mul_(fixed.root)
    g = (twice.cos() * seen).neg_()[:, None] * fixed.shape
    g_known = g @ fixed.known
    right, g_b = g_known[..., -1], g_known[..., :-1]
    plain = g @ g.mT - g_b @ g_b.mT
    one = torch.eye(plain.shape[-1], dtype=plain.dtype, device=plain.device)
    scale = plain.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    normal = plain + BOUND * scale.clamp(min=1e-12) * one
    # An envelope that is too free to bend would turn a wrong defocus into a right one by changing its sign: it is never negative.
    c = nonnegative(normal, right)
    tied = prior * theta[:, : fixed.free]
    cost = (c * ((normal @ c[..., None])[..., 0] - 2 * right)).sum(-1) + (tied * theta[:, : fixed.free]).sum(-1)
    rate = twice.sin_().mul_(seen).mul_(c @ fixed.shape)
    j = rate[:, None] * fixed.phase[: fixed.free]
    j_known = j @ fixed.known
    j_b = j_known[..., :-1]
    cross = g @ j.mT - g_b @ j_b.mT
    left = torch.cat([cross, (right[..., None] - plain @ c[..., None])], -1)
    inner = cross.mT @ solved(plain + (1e-6 * scale + 1e-12) * one, left)
    information = j @ j.mT - j_b @ j_b.mT - inner[..., :-1] + torch.diag(prior)
    slope = j_known[..., -1] - (cross.mT @ c[..., None])[..., 0] - inner[..., -1] - tied
    return _Point(cost, c, information, slope)


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """x of matrix · x = right, not looking whether it can be solved: that would wait for the device."""
    return torch.linalg.solve_ex(matrix, right)[0]


def nonnegative(normal: Tensor, right: Tensor) -> Tensor:
    """(m, e) x ≥ 0 with the least xᵀ N x − 2 xᵀ r; N (m, e, e) positive definite, r (m, e). Exact: all 2^e choices of zeros are solved."""
    e = right.shape[-1]
    bits = torch.arange(1, 2**e, device=right.device)[:, None] >> torch.arange(e, device=right.device)
    free = (bits & 1).to(right)  # (c, e) 1: may be above 0
    scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None, None]
    # Rows and columns of what is held at zero become those of the unit matrix.
    held = free[:, :, None] * free[:, None, :] * normal[:, None] + torch.diag_embed(1 - free) * scale
    x = solved(held, (free * right[:, None])[..., None])[..., 0]
    cost = torch.where((x >= 0).all(-1), -(x * right[:, None]).sum(-1), torch.zeros_like(x[..., 0]))
    best = cost.argmin(-1)
    chosen = x.gather(1, best[:, None, None].expand(-1, 1, e))[:, 0]
    return torch.where((cost.amin(-1) < 0)[:, None], chosen, torch.zeros_like(chosen))


def _chosen(rings: Rings, fixed: _Fixed, theta: Tensor, found: _Point, prior: Tensor, where: SearchRange) -> RingFit:
    """The fit with the least cost whose defocus lies within the range."""
    outside = (theta[:, 0] < where.low - 500) | (theta[:, 0] > where.high + 500) | (theta[:, 1:3].norm(dim=-1) > 0.6 * where.astigmatism)
    best = int(torch.where(outside, found.cost.abs().max() + 1 - 0 * found.cost, found.cost).argmin())
    one = theta[best]
    envelope = (found.coefficients[best] @ rings.shape) * visibility(rings.terms, one[:1], rings)
    column = -torch.cos(one @ fixed.phase + fixed.rest) * envelope * rings.root
    left = rings.data - (column - rings.basis @ (column @ rings.basis))
    noise = float(left.square().sum() / max(1, len(left) - rings.basis.shape[1] - len(prior)))
    information = _evaluate(fixed, one[None], prior * noise / rings.noise).information[0]
    free = len(prior)
    covariance = torch.zeros(4, 4, dtype=torch.float64, device=theta.device)
    covariance[:free, :free] = noise * torch.linalg.pinv(information.cpu(), hermitian=True).to(theta.device)
    return RingFit(one, covariance, float(rings.data.square().sum() - left.square().sum()) / noise, envelope, noise)
