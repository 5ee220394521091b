"""One map onto another: every orientation, every shift and both hands are tried, then the best are refined.

    aligned(x) = moving(M Rᵀ (x − t)),   M = 1 or the mirror x → −x;   in Fourier space  exp(−2πi k·t/N) V(M Rᵀ k)

Both maps are whitened (unit power in every shell). Coarse: C(R, t) = Re Σ_k A(k) conj V(M Rᵀ k) exp(2πi k·t/N) over low shells, all
shifts by an inverse FFT for each of the rotations of a HEALPix grid. Fine: Gauss-Newton on Σ |A − ρ e^{-2πi k·t/N} V(M Rᵀ k)|² over
(R, t) with the gradient of V from the transforms of x·v, y·v, z·v, more shells and fewer candidates at each step.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.maths.filters import apply_to_ft, power_spectrum
from frazil.maths.fourier import padded_ft, shell_round
from frazil.maths.rotation import euler_to_matrix
from frazil.maths.sphere import directions, psi_angles

PAD = 2.0
COARSE_ORDER = 2  # HEALPix order of the exhaustive grid: 192 directions × 24 in-plane angles, 15° apart
FINEST_SHELL = 64  # the fit needs no more; a larger box is in effect sampled coarser
BATCH = 1 << 22  # samples of V looked up at a time
SAMPLES = 20_000, 200_000  # of the target's transform compared at most, on the way and in the last steps
KEPT = (128, 40, 16, 6, 2, 1)  # candidates of each hand on the way from low to high shells
SURE = 1.02  # the mirrored map is taken if it correlates this much better


@dataclass(frozen=True)
class Alignment:
    """Where a moving map lies on a target: aligned(x) = moving(M Rᵀ (x − t))."""

    rotation: Tensor  # (3, 3) float64 R, proper
    mirrored: bool  # x → −x comes first
    shift: Tensor  # (3,) float64 px, xyz
    correlation: float  # mean FSC of the shells that were compared, this hand
    other_hand: float  # the same for the best alignment of the other hand; NaN if that was not tried
    shell: int  # last shell that was compared

    @property
    def matrix(self) -> Tensor:
        """(3, 3) Q = R M of steps.map_transform.transform."""
        return self.rotation @ hand_matrix(self.mirrored)


@dataclass(frozen=True)
class Lookup:
    """A whitened map's centred transform with its gradient, ready for trilinear look-up."""

    rows: Tensor  # ((2M+1)²(M+1), 2c) float32: c = 1 (V) or 4 (V, ∂V/∂kx, ∂V/∂ky, ∂V/∂kz)
    m: int


def hand_matrix(mirrored: bool) -> Tensor:
    """(3, 3) float64 identity, or the mirror x → −x."""
    return torch.diag(torch.tensor([-1.0 if mirrored else 1.0, 1.0, 1.0], dtype=torch.float64))


def whiten(data: Tensor) -> Tensor:
    """Map (N, N, N) whose shells have unit power (interpolated between shells), mean 0, nothing beyond N/2."""
    power = power_spectrum(data - data.mean())
    weight = torch.where(power > 1e-10 * power.max(), power.clamp(min=1e-300).rsqrt(), torch.zeros_like(power))
    weight[0] = 0

    def at(radius: Tensor) -> Tensor:
        low = radius.long().clamp(max=len(weight) - 2)
        part = radius - low
        return torch.where(radius <= len(weight) - 1, weight[low] * (1 - part) + weight[low + 1] * part, 0.0)

    return apply_to_ft(data, at)


def look_up_table(data: Tensor, r_max: int, gradient: bool = True) -> Lookup:
    """The table of a map (N, N, N) up to shell r_max."""
    n = data.shape[-1]
    volumes = [padded_ft(data, PAD, r_max)]
    if gradient:
        line = (torch.arange(n, device=data.device, dtype=data.dtype) - n // 2) * (2 * math.pi / n)
        shapes = ((1, 1, n), (1, n, 1), (n, 1, 1))
        volumes += [-1j * padded_ft(data * line.reshape(shape), PAD, r_max) for shape in shapes]
    m = volumes[0].shape[-1] - 1
    rows = torch.view_as_real(torch.stack(volumes, -1)).reshape(-1, 2 * len(volumes))
    return Lookup(rows, m)


def look_up(table: Lookup, k: Tensor) -> Tensor:
    """(n, c) complex values at k (n, 3), xyz in cycles per box, trilinear; |k| must stay inside the table."""
    m, side = table.m, 2 * table.m + 1
    p = k.to(table.rows.dtype) * PAD
    negative = p[:, 0] < 0
    p = torch.where(negative[:, None], -p, p)
    base = p.floor()
    f = (p - base)[:, :, None]
    x, y, z = base.long().unbind(1)
    first = ((z + m) * side + (y + m)) * (m + 1) + x
    total: Tensor | None = None
    for dz in (0, 1):
        wz = f[:, 2] if dz else 1 - f[:, 2]
        for dy in (0, 1):
            wy = wz * (f[:, 1] if dy else 1 - f[:, 1])
            place = first + (dz * side + dy) * (m + 1)
            part = torch.lerp(table.rows.index_select(0, place), table.rows.index_select(0, place + 1), f[:, 0]) * wy
            total = part if total is None else total + part
    assert total is not None
    value = torch.view_as_complex(total.reshape(len(k), -1, 2))
    # ∂V/∂k is odd where V is even under the conjugation: V(−k) = V*(k), ∂V(−k) = −(∂V(k))*.
    flipped = value.conj() * torch.tensor([1.0, -1.0, -1.0, -1.0][: value.shape[1]], device=k.device)
    return torch.where(negative[:, None], flipped, value)


@dataclass(frozen=True)
class Target:
    """Samples of the whitened target on the integer lattice, by increasing |k|."""

    k: Tensor  # (n, 3) float64, xyz, half space
    value: Tensor  # (n,) complex64
    radius: Tensor  # (n,) float64
    box: int

    def up_to(self, shell: float) -> Target:
        """Only |k| ≤ shell."""
        n = int((self.radius <= shell).sum())
        return Target(self.k[:n], self.value[:n], self.radius[:n], self.box)

    def some(self, n: int) -> Target:
        """At most n of the samples, drawn at random (always the same ones)."""
        if len(self.k) <= n:
            return self
        drawn = torch.randperm(len(self.k), generator=torch.Generator().manual_seed(0))[:n].sort().values.to(self.k.device)
        return Target(self.k[drawn], self.value[drawn], self.radius[drawn], self.box)


def target_samples(data: Tensor, r_max: int) -> Target:
    """The independent samples 0 < |k| ≤ r_max of a map (N, N, N)."""
    half = padded_ft(data, 1.0, r_max + 1)  # keeps |p| ≤ r_max + 1
    m = half.shape[-1] - 1
    line = torch.arange(-m, m + 1, device=data.device)
    z, y, x = torch.meshgrid(line, line, torch.arange(m + 1, device=data.device), indexing="ij")
    k = torch.stack([x, y, z], -1).reshape(-1, 3)
    radius = k.double().norm(dim=1)
    once = (k[:, 0] > 0) | (k[:, 2] > 0) | ((k[:, 2] == 0) & (k[:, 1] > 0))
    keep = ((radius > 0) & (radius <= r_max) & once).nonzero()[:, 0]
    keep = keep[torch.argsort(radius[keep], stable=True)]
    return Target(k[keep].double(), half.reshape(-1)[keep], radius[keep], data.shape[-1])


def radius_of(data: Tensor) -> float:
    """Root-mean-square radius in px of the density above mean + sd, about its own centre, times 1.3: the radius of a ball like it."""
    weight = (data - data.mean() - data.std()).clamp(min=0).double()
    total = weight.sum()
    if total <= 0:
        return 0.3 * data.shape[-1]
    second = 0.0
    for axis in range(3):
        line = torch.arange(data.shape[axis], device=data.device, dtype=torch.float64)
        profile = weight.sum(tuple(a for a in range(3) if a != axis)) / total
        second += float((profile * line.square()).sum() - (profile * line).sum().square())
    return max(2.0, 1.3 * math.sqrt(second))


@dataclass(frozen=True)
class Candidates:
    """Orientations under refinement."""

    rotation: Tensor  # (c, 3, 3) float64
    shift: Tensor  # (c, 3) float64 px
    score: Tensor  # (c,) float64

    def best(self, n: int) -> Candidates:
        """The n with the highest scores."""
        keep = self.score.argsort(descending=True)[:n]
        return Candidates(self.rotation[keep], self.shift[keep], self.score[keep])

    def distinct(self, degrees: float, most: int) -> Candidates:
        """At most so many, sorted by score, none closer than so many degrees to a better one."""
        order = self.best(len(self.score))
        cosine = math.cos(math.radians(degrees))
        free = torch.ones(len(order.score), dtype=torch.bool, device=order.score.device)
        keep: list[int] = []
        while len(keep) < most and bool(free.any()):
            i = int(free.int().argmax())  # the best that is left
            keep.append(i)
            trace = (order.rotation * order.rotation[i]).sum((1, 2))
            free &= (trace - 1) / 2 <= cosine
            free[i] = False
        return Candidates(order.rotation[keep], order.shift[keep], order.score[keep])


def coarse_search(target: Target, table: Lookup, hand: Tensor, max_shift: float) -> Candidates:
    """Score and best shift of every rotation of the grid; target: low shells only. max_shift in px."""
    device, n = target.k.device, len(target.k)
    rot_tilt, psi = directions(COARSE_ORDER), psi_angles(360 / (6 * 2**COARSE_ORDER))
    angles = torch.cat([rot_tilt[:, None].expand(-1, len(psi), 2), psi[None, :, None].expand(len(rot_tilt), -1, 1)], -1)
    rotations = euler_to_matrix(angles.reshape(-1, 3)).to(device)
    reach = int(math.ceil(float(target.radius.max())))
    grid = 2 * math.ceil(1.3 * (reach + 1))
    k = target.k.long()
    line = torch.fft.fftfreq(grid, 1 / grid, device=device, dtype=torch.float64) * target.box / grid
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    shifts = torch.stack([x, y, z], -1).reshape(-1, 3)
    allowed = shifts.norm(dim=1) <= max_shift + target.box / grid
    score, place = [], []
    for some in rotations.split(max(1, min(BATCH // n, (1 << 24) // grid**3))):
        points = torch.einsum("nj,bjk->bnk", target.k, some @ hand.to(some)).reshape(-1, 3)  # rows k·(R M) = ((R M)ᵀ k)ᵀ
        product = target.value * look_up(table, points).reshape(len(some), n).conj()
        ft = torch.zeros(len(some), grid, grid, grid // 2 + 1, dtype=torch.complex64, device=device)
        ft[:, k[:, 2] % grid, k[:, 1] % grid, k[:, 0]] = product
        edge = k[:, 0] == 0  # the inverse transform wants both halves of the plane x = 0
        ft[:, -k[edge, 2] % grid, -k[edge, 1] % grid, 0] = product[:, edge].conj()
        found = torch.fft.irfftn(ft, s=(grid, grid, grid), dim=(1, 2, 3)).reshape(len(some), -1)
        best = torch.where(allowed, found, -torch.inf).max(1)
        score.append(best.values.double())
        place.append(shifts[best.indices])
    return Candidates(rotations, torch.cat(place), torch.cat(score))


def _cross_product(w: Tensor) -> Tensor:
    """(…, 3, 3) matrices of v → w × v."""
    zero = torch.zeros_like(w[..., 0])
    x, y, z = w.unbind(-1)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*w.shape[:-1], 3, 3)


def gauss_newton(target: Target, table: Lookup, candidates: Candidates, hand: Tensor, weight: Tensor | None = None) -> Candidates:
    """One step for every candidate; `score` of what comes back is the correlation before the step. weight (n,) of the samples."""
    k, box, device = target.k.float(), target.box, target.k.device
    weight = torch.ones(len(k), device=device) if weight is None else weight.float()
    pieces = []
    for index in torch.arange(len(candidates.score), device=device).split(max(1, BATCH // (4 * len(k)))):
        rotation, shift = candidates.rotation[index], candidates.shift[index]
        value = placed(target, table, rotation @ hand.to(rotation), shift)  # (c, n, 4)
        v = value[..., 0]
        cross = (weight * (target.value * v.conj()).real).double().sum(1)
        power = (weight * v.abs().square()).double().sum(1).clamp(min=1e-30)
        whole = (weight * target.value.abs().square()).double().sum()
        rho = cross / power
        # A turn by ω after R changes Qᵀk by −Qᵀ(ω × k), so ∂V/∂ω = (Q ∂V) × k: the gradient brought to the target's frame.
        gradient = torch.einsum("cij,cnj->cni", (rotation @ hand.to(rotation)).to(value.dtype), value[..., 1:])
        turn = torch.linalg.cross(gradient, k.to(value.dtype).expand_as(gradient))
        jacobian = torch.cat([turn, (-2j * math.pi / box) * k * v[..., None]], 2)  # (c, n, 6)
        rows = torch.cat([jacobian.real, jacobian.imag], 1)
        residual = target.value - rho[:, None].float() * v
        residual = torch.cat([residual.real, residual.imag], 1)
        weighted = rows * torch.cat([weight, weight])[:, None]
        normal = (rows.mT @ weighted).double()
        diagonal = torch.diag_embed(normal.diagonal(dim1=1, dim2=2))
        normal = normal + 1e-6 * diagonal + 1e-30 * torch.eye(6, dtype=torch.float64, device=device)
        step = torch.linalg.solve(normal, (weighted.mT @ residual[..., None]).double())[..., 0] / rho.clamp(min=0.3)[:, None]
        turned, moved = _shortened(step[:, :3], 0.2), _shortened(step[:, 3:], 0.25 * box / float(target.radius.max()))
        # The map turns about the centre of the box, so the shift stays what it was.
        spin = torch.linalg.matrix_exp(_cross_product(turned))
        pieces.append((spin @ rotation, shift + moved, cross / (power * whole).sqrt()))
    return Candidates(*(torch.cat(part) for part in zip(*pieces, strict=True)))


def _shortened(step: Tensor, longest: float) -> Tensor:
    """(c, 3) steps, none longer than `longest`."""
    return step * (longest / step.norm(dim=1, keepdim=True).clamp(min=longest))


def placed(target: Target, table: Lookup, q: Tensor, shift: Tensor) -> Tensor:
    """(c, n, channels) values of the moving map under Q (c, 3, 3) and shift (c, 3) at the target's samples."""
    points = torch.einsum("nj,cjk->cnk", target.k.float(), q.float())
    value = look_up(table, points.reshape(-1, 3)).reshape(len(q), len(target.k), -1)
    angle = (-2 * math.pi / target.box) * torch.einsum("nj,cj->cn", target.k, shift).float()
    return value * torch.polar(torch.ones_like(angle), angle)[..., None]


def _refined(target: Target, table: Lookup, hand: Tensor, found: Candidates, shells: list[float]) -> Candidates:
    """Candidates through ever more shells, thinned out on the way."""
    found = found.distinct(8.0, KEPT[0])
    for n, shell in zip(KEPT, shells, strict=True):
        part = target.up_to(shell).some(SAMPLES[0])
        found = found.best(n)
        for _ in range(3):
            found = gauss_newton(part, table, found, hand)
        found = replace(found, score=gauss_newton(part, table, found, hand).score).distinct(2.0, n)
    return found.best(1)


def shell_agreement(target: Target, table: Lookup, one: Candidates, hand: Tensor) -> Tensor:
    """(R+1,) float64 FSC of the target and the moving map as `one` places it, by shell."""
    v = placed(target, table, one.rotation[:1] @ hand.to(one.rotation), one.shift[:1])[0, :, 0]
    shell = shell_round(target.radius).long()

    def total(x: Tensor) -> Tensor:
        return torch.bincount(shell, x.double())

    a = target.value
    return total((a * v.conj()).real) / (total(a.abs().square()) * total(v.abs().square())).sqrt().clamp(min=1e-30)


def align(
    target: Tensor, moving: Tensor, *, finest: float | None = None, max_shift: float | None = None, both_hands: bool = True
) -> Alignment:
    """How the map `moving` (N, N, N) has to be mirrored, turned and moved to lie on `target` (N, N, N), same pixel size and device.

    finest: last shell compared (default: where the two still agree, at most 64 and 0.9 of Nyquist); max_shift in px (default any).
    ValueError if the boxes differ.
    """
    if target.shape != moving.shape:
        raise ValueError(f"align: boxes differ: {tuple(target.shape)} and {tuple(moving.shape)}")
    box = target.shape[-1]
    last = int(min(FINEST_SHELL, 0.45 * box, finest or box))
    first = max(4.0, min(1.7 * box / radius_of(target), 12.0, 0.5 * last))
    white = [whiten(data.float()) for data in (target, moving)]
    samples = target_samples(white[0], last)
    low = look_up_table(white[1], math.ceil(first) + 1, gradient=False)
    fine = look_up_table(white[1], last + 1)
    shells = [first * (last / first) ** (0.8 * i / (len(KEPT) - 1)) for i in range(len(KEPT))]
    results = []
    hands = (False, True) if both_hands else (False,)
    for mirrored in hands:
        hand = hand_matrix(mirrored).to(target.device)
        found = coarse_search(samples.up_to(first), low, hand, box if max_shift is None else max_shift)
        results.append((_refined(samples, fine, hand, found, shells), hand, mirrored))
    agreement = [shell_agreement(samples, fine, one, hand) for one, hand, _ in results]
    means = [float(curve[1 : int(shells[-1]) + 1].mean()) for curve in agreement]
    chosen = 1 if both_hands and means[1] > SURE * means[0] else 0
    one, hand, mirrored = results[chosen]
    one, shell = _finish(samples, fine, hand, one, agreement[chosen])
    pairs = [(one, hand), *((rest, h) for i, (rest, h, _) in enumerate(results) if i != chosen)]
    correlation = [float(shell_agreement(samples, fine, each, h)[1 : shell + 1].mean()) for each, h in pairs]
    other = correlation[1] if both_hands else math.nan
    return Alignment(one.rotation[0].cpu(), mirrored, one.shift[0].cpu(), correlation[0], other, shell)


def _finish(samples: Target, table: Lookup, hand: Tensor, one: Candidates, curve: Tensor) -> tuple[Candidates, int]:
    """The last steps, shells weighted by how well they agree; also the last shell that took part."""
    shell = len(curve) - 1
    for _ in range(5):
        below = (curve[4:] < 0.3).nonzero()
        shell = int(below[0]) + 3 if len(below) else len(curve) - 1
        part = samples.up_to(shell + 0.5).some(SAMPLES[1])
        weight = curve.clamp(0, 0.99)[shell_round(part.radius).long()]
        one = gauss_newton(part, table, one, hand, weight / (1 - weight.square()))
        curve = shell_agreement(samples, table, one, hand)
    return one, shell
