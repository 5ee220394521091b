"""Gaussian-blob phantoms: their density, and their exact projections in closed form.

    F(q) = Σ_b m_b exp(−2π²σ_b²|q|²) exp(−2πi q·c_b),     X(k) = F(Aᵀ M k / (N a)) / (a_1 (N a)²)

q in 1/Å, k in cycles per box of side N a Å. No interpolation is involved, so a test against these images is a test against truth.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Volume
from frazil.maths.symmetry import operators


@dataclass(frozen=True)
class Phantom:
    """A density made of isotropic Gaussian blobs: everything about it is known in closed form."""

    centre: Tensor  # (b, 3) float64 Å, xyz from the box centre
    sigma: Tensor  # (b,) float64 Å
    mass: Tensor  # (b,) float64, integral of each blob, grey value · Å³
    symmetry: str = "C1"

    def diameter(self) -> float:
        """Å: twice the largest distance of a blob's two-sigma rim from the centre."""
        return 2 * float((self.centre.norm(dim=-1) + 2 * self.sigma).max())

    def scaled(self, factor: float) -> Phantom:
        """The same density times `factor`."""
        return replace(self, mass=self.mass * factor)

    def moved(self, rotation: Tensor, translation: Tensor) -> Phantom:
        """The same density where a refinement whose frame differs by Q (3, 3) and t (3,) Å puts it: Qᵀ (c + t); see compare_poses."""
        return replace(self, centre=(self.centre + translation) @ rotation)


def phantom(box: int, pixel_size: float, symmetry: str = "C1", seed: int = 1) -> Phantom:
    """A protein-like density about 0.65 of the box across: globular domains, each filled by a chain of small blobs.

    The domains differ in size and lie at different distances, so that no rotation maps the whole onto itself even at 40 Å; the
    chain carries signal up to Nyquist of `pixel_size`. With a symmetry, operators act on the coordinates, exactly. Density peaks
    are near 1. Raises BadInput for a group that is not known.
    """
    try:
        group = operators(symmetry).double()
    except ValueError as error:
        raise BadInput(str(error)) from None
    rng = torch.Generator().manual_seed(seed)
    radius = 0.325 * box - 1.5  # px, of bead centres
    order = len(group)
    domains = _domains(radius, group, rng)
    beads = max(12, min(round(0.022 * (0.65 * box) ** 3), 1200) // order)
    weights = domains[:, 3] ** 3
    counts = (beads * weights / weights.sum()).round().long().clamp(min=3)
    chain = torch.cat([_chain(d[:3], float(d[3]), int(c), rng) for d, c in zip(domains, counts, strict=True)])
    fine = torch.full((len(chain),), 0.52, dtype=torch.float64)
    fine[::7] = 1.1  # side chains, blurred
    # A smooth bulk below the chain: the low-resolution envelope of each domain.
    centre = torch.cat([chain, domains[:, :3]])
    sigma = torch.cat([fine, 0.45 * domains[:, 3]])
    height = torch.cat([torch.ones(len(chain), dtype=torch.float64), torch.full((len(domains),), 0.18, dtype=torch.float64)])
    centre = torch.einsum("gij,bj->gbi", group, centre).reshape(-1, 3)
    sigma, height = sigma.repeat(order), height.repeat(order)
    if order == 1:
        centre = centre - (centre * (height * sigma**3)[:, None]).sum(0) / (height * sigma**3).sum()
    mass = height * (2 * math.pi * sigma**2) ** 1.5 * pixel_size**3
    return Phantom(centre * pixel_size, sigma * pixel_size, mass, symmetry)


def _domains(radius: float, group: Tensor, rng: torch.Generator) -> Tensor:
    """(d, 4) centre xyz and radius in px of the domains of one asymmetric unit, inside a ball of `radius`."""
    shrink = len(group) ** (-1 / 3)
    if len(group) == 1:
        # Direction, distance and size by hand: distinctive from every side; jittered by the seed.
        plan = torch.tensor(
            [
                [0.1, -0.2, 0.3, 0.05, 0.52], [1.0, 0.2, 0.1, 0.62, 0.36], [-0.3, 1.0, 0.4, 0.66, 0.30],
                [-0.5, -0.6, 0.8, 0.68, 0.28], [-0.2, -0.3, -1.0, 0.76, 0.24], [0.6, -0.9, -0.5, 0.80, 0.18],
            ],
            dtype=torch.float64,
        )  # fmt: skip
        jitter = 0.15 * torch.randn(len(plan), 3, generator=rng, dtype=torch.float64)
        direction = torch.nn.functional.normalize(plan[:, :3] + jitter, dim=-1)
        return torch.cat([radius * plan[:, 3:4] * direction, radius * plan[:, 4:5]], -1)
    # Few small domains of many mates look alike from both hands: of many random designs take the most chiral one.
    designs, points = 100, 200
    direction = torch.nn.functional.normalize(torch.randn(designs, 3, 3, generator=rng, dtype=torch.float64), dim=-1)
    free = torch.rand(designs, 3, 2, generator=rng, dtype=torch.float64)
    size = radius * shrink * (0.3 + 0.3 * free[..., :1])
    domains = torch.cat([direction * (0.4 * radius + (0.6 * radius - size) * free[..., 1:]), size], -1)
    k = torch.nn.functional.normalize(torch.randn(points, 3, generator=rng, dtype=torch.float64), dim=-1)
    k = k * torch.linspace(0.15, 0.9, points, dtype=torch.float64)[:, None] / radius  # shells 3 to 18 of a box of 64
    spread = 0.45 * math.pi * k.norm(dim=-1)[:, None, None] * domains[..., 3]
    mass = domains[..., 3] ** 3 * torch.exp(-2 * spread.square())  # (points, designs, 3)
    mates = torch.einsum("gij,ndj->ngdi", group, domains[..., :3])
    ft = (torch.exp(-2j * math.pi * torch.einsum("ki,ngdi->kngd", k, mates)).sum(2) * mass).sum(-1)
    return domains[int((ft.imag.square().sum(0) / ft.abs().square().sum(0)).argmax())]


def _chain(centre: Tensor, radius: float, count: int, rng: torch.Generator) -> Tensor:
    """(count, 3) positions of a random walk of steps 1.3 px confined to a ball, which avoids itself where it can."""
    place = centre.clone()
    out: list[Tensor] = []
    for _ in range(count):
        step = torch.nn.functional.normalize(torch.randn(24, 3, generator=rng, dtype=torch.float64), dim=-1) * 1.3
        trial = place + step
        inside = (trial - centre).norm(dim=-1) <= max(radius, 1.4)
        if not bool(inside.any()):
            trial, inside = centre + 0.9 * (trial - centre), torch.ones(24, dtype=torch.bool)
        room = torch.cdist(trial, torch.stack(out)).amin(-1).clamp(max=1.2) if out else torch.ones(24, dtype=torch.float64)
        place = trial[int(torch.where(inside, room, -1.0).argmax())]
        out.append(place)
    return torch.stack(out)


def density(shape: Phantom, box: int, pixel_size: float, device: str = "cpu") -> Volume:
    """The phantom sampled on a (box, box, box) grid, band-limited to frequencies below Nyquist along each axis (none is aliased)."""
    n, line = box, torch.arange(box, dtype=torch.float64, device=device)
    k = torch.arange(-(n // 2) + 1, n // 2, dtype=torch.float64, device=device) / (n * pixel_size)  # 1/Å
    shape = replace(shape, centre=shape.centre.to(device), sigma=shape.sigma.to(device), mass=shape.mass.to(device))
    position = (line - n // 2) * pixel_size
    wave = torch.exp(2j * math.pi * k[:, None] * position)  # (k, x)

    def profile(axis: int, index: Tensor) -> Tensor:
        """(b, N) band-limited Gaussians of unit integral along one axis."""
        ft = torch.exp(-2 * (math.pi * shape.sigma[index, None] * k) ** 2 - 2j * math.pi * k * shape.centre[index, axis, None])
        return (ft @ wave).real / (n * pixel_size)

    out = torch.zeros(n, n, n, dtype=torch.float64, device=device)
    for index in torch.arange(len(shape.mass), device=device).split(512):
        x, y, z = (profile(axis, index) for axis in range(3))
        plane = (shape.mass[index, None] * z)[:, :, None] * y[:, None]
        out += (plane.reshape(len(index), n * n).T @ x).reshape(n, n, n)
    return Volume(out.float(), pixel_size)


def frequencies(box: int) -> Tensor:
    """(N, N//2+1, 2) float64 xy, cycles per box, of a half transform (ky in FFT order, −N/2 at Nyquist)."""
    ky = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    kx = torch.arange(box // 2 + 1, dtype=torch.float64)
    return torch.stack(torch.broadcast_tensors(kx[None, :], ky[:, None]), -1)


def project_phantom(shape: Phantom, rotation: Tensor, optics: Optics, unit_pixel: float | None = None) -> Tensor:
    """(n, N, N//2+1) complex64 transforms of the projections along rotated z: exact, centred, divided by N².

    rotation: (n, 3, 3). The magnification of `optics` applies: the slice is taken at Aᵀ M k. unit_pixel: Å, length along the ray
    that counts as one voxel (default: the pixel of `optics`). Frequencies of ±Nyquist are zero.
    """
    n, length = optics.box, optics.box * optics.pixel_size
    magnify = torch.tensor(optics.magnification, dtype=torch.float64).reshape(2, 2)
    k = frequencies(n) / length
    k2 = (k @ magnify.T).square().sum(-1)
    out = torch.zeros(len(rotation), n, n // 2 + 1, dtype=torch.complex64)
    # M k · R x = k · Mᵀ R x: the magnification goes into the coordinates, so the phases separate into x and y.
    for sigma in shape.sigma.unique():
        index = shape.sigma == sigma
        xy = torch.einsum("ji,njl,bl->nbi", magnify, rotation[:, :2].double(), shape.centre[index])
        wave_x, half_y = (_powers(torch.exp(-2j * math.pi * xy[..., axis] / length), n // 2) for axis in (0, 1))  # (n, b, k)
        wave_y = torch.cat([half_y[..., :-1], half_y[..., 1:].conj().flip(-1)], -1)
        wave_y = wave_y * shape.mass[index, None].float()
        out += torch.exp(-2 * (math.pi * sigma) ** 2 * k2).float() * (wave_y.transpose(1, 2) @ wave_x)
    out[:, n // 2] = 0
    out[:, :, n // 2] = 0
    return out / ((unit_pixel or optics.pixel_size) * length**2)


def _powers(base: Tensor, highest: int) -> Tensor:
    """(…, highest+1) complex64 powers 0, 1, 2 … of complex128 numbers of modulus 1: cheaper than as many exponentials."""
    def powers(of: Tensor, count: int) -> Tensor:
        return torch.cat([torch.ones_like(of)[..., None], of[..., None].expand(*of.shape, count - 1)], -1).cumprod(-1)

    small = powers(base, 8)
    large = powers(small[..., -1] * base, highest // 8 + 1)
    both = large.to(torch.complex64)[..., :, None] * small.to(torch.complex64)[..., None, :]
    return both.reshape(*base.shape, -1)[..., : highest + 1]
