"""The orientations and shifts an iteration compares every particle with (spec/refinement 2.5, 2.6, 2.9, 6)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from frazil.maths import sphere
from frazil.maths.rotation import euler_to_matrix
from frazil.maths.symmetry import kept_directions, operators


@dataclass(frozen=True)
class Sampling:
    """Settings of the search grid; the coarse grid is the one named, children come from `oversampling`."""

    order: int  # HEALPix order of the coarse directions
    offset_range: float  # Å
    offset_step: float  # Å, coarse
    oversampling: int = 1
    group: str = "C1"
    instance: float = 0.0  # ρ, the present perturbation
    factor: float = 0.5  # f, its limit; 0: none
    sigma: float | None = None  # degrees, sd of the local orientation prior; None: search everywhere
    flat: bool = False  # 2D references: in-plane rotation only
    psi_step: float | None = None  # degrees between coarse in-plane angles; None: that of the order

    @property
    def coarse_step(self) -> float:
        """Degrees between coarse orientations."""
        return self.psi_step or sphere.angular_step(self.order)

    @property
    def step(self) -> float:
        """Degrees between oversampled orientations."""
        return self.coarse_step / 2**self.oversampling

    @property
    def fine_offset_step(self) -> float:
        """Å between oversampled shifts."""
        return self.offset_step / 2**self.oversampling

    def perturbed(self, generator: torch.Generator) -> Sampling:
        """The same with the next random perturbation."""
        return replace(self, instance=sphere.next_perturbation(self.instance, self.factor, generator))

MOST_MADE = 400_000  # rotations of children that are made at once: 29 MB


@dataclass(frozen=True)
class Grid:
    """The samples themselves. Coarse orientation o = direction · n_psi + psi; 8^q children each."""

    sampling: Sampling
    pixels: Tensor  # (d,) NEST indices of the directions kept
    n_psi: int
    perturbation: Tensor  # (3, 3)
    shifts: Tensor  # (t, 2) Å coarse, without perturbation: where priors are evaluated
    table: Tensor  # (12·4^order, 2) rot, tilt of all coarse directions
    fine_table: Tensor  # (12·4^(order+q), 2) the same for children
    rotations: Tensor | None = None  # (n, 3, 3): orientation i is this rotation of particle i, and nothing is searched
    made: tuple[Tensor, Tensor] | None = None  # rotations of all coarse orientations (o, 3, 3) and of all children (o, 8^q, 3, 3)

    def to(self, device: str) -> Grid:
        """The grid with its tables on a device, where rotations are then made; on a GPU, if they are not too many, all at once."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = replace(self, **{name: t.to(device) for name, t in tensors.items()})
        return moved if device == "cpu" or self.orientations * self.children > MOST_MADE else moved.with_rotations()

    def with_rotations(self) -> Grid:
        """The grid with the rotations of all orientations made: each time they are wanted they are then looked up."""
        if self.rotations is not None:
            return self
        o, n = torch.arange(self.orientations, device=self.pixels.device), self.children
        fine = self.fine_rotations(o.repeat_interleave(n), torch.arange(n, device=o.device).repeat(len(o)))
        return replace(self, made=(self.coarse_rotations(o), fine.view(len(o), n, 3, 3)))

    @property
    def directions(self) -> int:
        return len(self.pixels)

    @property
    def orientations(self) -> int:
        return self.directions * self.n_psi

    @property
    def children(self) -> int:
        """Fine orientations of a coarse one."""
        if self.rotations is not None:
            return 1
        return (2 if self.sampling.flat else 8) ** self.sampling.oversampling

    @property
    def shift_children(self) -> int:
        """Fine shifts of a coarse one."""
        return 4**self.sampling.oversampling

    def coarse_shifts(self) -> Tensor:
        """(t, 2) Å, perturbed."""
        return self.shifts.cpu() + self.sampling.instance * self.sampling.offset_step

    def fine_shifts(self) -> Tensor:
        """(t·4^q, 2) Å, perturbed; the children of a coarse shift are consecutive."""
        s = self.sampling
        return (sphere.fine_shifts(self.shifts.cpu(), s.offset_step, s.oversampling) + s.instance * s.offset_step).reshape(-1, 2)

    def coarse_rotations(self, orientation: Tensor) -> Tensor:
        """(n, 3, 3) float64 rotations of coarse orientations (n,)."""
        if self.rotations is not None:
            return self.rotations[orientation.to(self.rotations.device)]
        o = orientation.to(self.pixels.device)
        if self.made is not None:
            return self.made[0][o]
        rot_tilt = self.table[self.pixels[o // self.n_psi]]
        psi = (o % self.n_psi).double() * (360.0 / self.n_psi)
        return euler_to_matrix(torch.cat([rot_tilt, psi[:, None]], -1)) @ self.perturbation

    def fine_rotations(self, orientation: Tensor, child: Tensor) -> Tensor:
        """(n, 3, 3) float64 rotations of children (n,) of coarse orientations (n,)."""
        if self.rotations is not None:
            return self.rotations[orientation.to(self.rotations.device)]
        o, q = orientation.to(self.pixels.device), self.sampling.oversampling
        child = child.to(o)
        if self.made is not None:
            return self.made[1][o, child]
        rot_tilt = self.fine_table[self.pixels[o // self.n_psi] * 4**q + child // 2**q]
        step = 360.0 / self.n_psi
        psi = (o % self.n_psi).double() * step + step * (((child % 2**q).double() + 0.5) / 2**q - 0.5)
        return euler_to_matrix(torch.cat([rot_tilt, psi[:, None]], -1)) @ self.perturbation

    def first_half(self) -> Tensor:
        """Coarse orientations with psi < 180° (direction-major): the other half are their complex conjugates."""
        o = torch.arange(self.orientations).reshape(self.directions, self.n_psi)
        return o[:, : self.n_psi // 2].reshape(-1)


def make_grid(sampling: Sampling) -> Grid:
    """The grid of some sampling settings."""
    if sampling.flat:
        turn = torch.tensor([0.0, 0.0, sampling.instance * sampling.coarse_step], dtype=torch.float64)
        return Grid(
            sampling=sampling,
            pixels=torch.zeros(1, dtype=torch.int64),
            n_psi=len(sphere.psi_angles(sampling.coarse_step)),
            perturbation=euler_to_matrix(turn),
            shifts=sphere.shift_grid(sampling.offset_range, sampling.offset_step),
            table=torch.zeros(1, 2, dtype=torch.float64),
            fine_table=torch.zeros(1, 2, dtype=torch.float64),
        )
    return Grid(
        sampling=sampling,
        pixels=kept_directions(sampling.group, sampling.order),
        n_psi=len(sphere.psi_angles(sampling.coarse_step)),
        perturbation=sphere.perturbation_matrix(sampling.instance, sampling.order),
        shifts=sphere.shift_grid(sampling.offset_range, sampling.offset_step),
        table=sphere.directions(sampling.order),
        fine_table=sphere.directions(sampling.order + sampling.oversampling),
    )


def fixed_grid(rotations: Tensor, sampling: Sampling | None = None) -> Grid:
    """The grid on which particle i keeps its rotation i (n, 3, 3): with a sampling its shifts are searched, else they stay too."""
    still = sampling is None
    sampling = Sampling(0, 0.0, 1.0, oversampling=0, factor=0.0) if sampling is None else sampling
    none = torch.zeros(1, 2, dtype=torch.float64)
    return Grid(
        sampling=sampling,
        pixels=torch.zeros(1, dtype=torch.int64),
        n_psi=len(rotations),
        perturbation=torch.eye(3, dtype=torch.float64),
        shifts=none if still else sphere.shift_grid(sampling.offset_range, sampling.offset_step),
        table=none,
        fine_table=none,
        rotations=rotations,
    )


@dataclass(frozen=True)
class Neighbours:
    """Coarse orientations near each particle's prior rotation, sorted by orientation."""

    image: Tensor  # (m,) int64
    orientation: Tensor  # (m,) int64
    log_prior: Tensor  # (m,) float64, normalised a particle


def neighbours(grid: Grid, prior: Tensor, reference_form: bool = False) -> Neighbours:
    """Local search lists around prior rotations (b, 3, 3), spec 2.5.

    A grid orientation counts when its direction is within 3σ of the prior's and its in-plane angle, relative to the prior
    rotation carried to that direction without twist, is within 3σ; both minimal over symmetry mates, Gaussian weights in each.
    reference_form: psi compared as plain angles and without the mate (RELION's form, kept for tests of parity).
    """
    sigma = grid.sampling.sigma
    if sigma is None:
        raise ValueError("neighbours needs a sampling with a local prior (sigma)")
    mates = torch.einsum("nij,gjk->ngik", prior, operators(grid.sampling.group).to(prior))
    n, g = mates.shape[:2]
    kept = grid.table[grid.pixels]
    vectors, views = sphere.direction_vectors(kept), mates[:, :, 2].reshape(-1, 3)
    find = _near_by_products if prior.is_cuda else _near_by_tree
    mate, direction = find(vectors, views, g, min(3 * sigma, 180.0))
    image = mate // g
    cosine = (views[mate] * vectors[direction]).sum(-1).clamp(-1, 1)
    delta = torch.rad2deg(torch.acos(cosine))

    rot_tilt = kept[direction]
    untwisted = euler_to_matrix(torch.cat([rot_tilt, torch.zeros_like(rot_tilt[:, :1])], -1))
    target = mates.reshape(-1, 3, 3)[mate]
    if reference_form:
        original = prior[image]
        psi0 = torch.rad2deg(torch.atan2(original[:, 1, 2], -original[:, 0, 2]))
    else:  # the psi that makes A(direction, psi) nearest to the mate: maximises trace(Rz(psi) B Tᵀ)
        m = untwisted @ target.transpose(-1, -2)
        psi0 = torch.rad2deg(torch.atan2(m[:, 1, 0] - m[:, 0, 1], m[:, 0, 0] + m[:, 1, 1]))
        psi0 = torch.where(m[:, 0, 0] + m[:, 1, 1] == 0, torch.zeros_like(psi0), psi0)
    return _with_psi(grid, image, direction, delta, psi0, n, sigma)


def _near_by_tree(vectors: Tensor, views: Tensor, group: int, reach: float) -> tuple[Tensor, Tensor]:
    """(view, direction) pairs within `reach` degrees; where none of `group` consecutive views has one, the nearest pair of theirs."""
    tree = KDTree(vectors.numpy())
    lists = tree.query_ball_point(views.numpy(), 2 * np.sin(np.radians(reach) / 2), workers=torch.get_num_threads())
    counts = np.fromiter((len(x) for x in lists), np.int64, len(lists))
    missing = np.nonzero(counts.reshape(-1, group).sum(1) == 0)[0]
    for i in missing:
        distance, nearest = tree.query(views[i * group : (i + 1) * group].numpy())
        best = int(np.argmin(distance))
        lists[i * group + best] = [int(np.atleast_1d(nearest)[best])]
        counts[i * group + best] = 1
    found = torch.repeat_interleave(torch.arange(len(views)), torch.from_numpy(counts))
    return found, torch.from_numpy(np.concatenate([np.asarray(x, np.int64) for x in lists]))


def _near_by_products(vectors: Tensor, views: Tensor, group: int, reach: float) -> tuple[Tensor, Tensor]:
    """The same from all cosines, some views at a time: on a GPU quicker than any tree."""
    least, found = float(np.cos(np.radians(reach))), []
    chunk = max(1, (1 << 24) // (len(vectors) * group)) * group  # the views of an image stay together
    for start in range(0, len(views), chunk):
        cosine = views[start : start + chunk] @ vectors.T
        near = cosine >= least
        of_image = cosine.view(-1, group * len(vectors))
        lonely = torch.nonzero(~near.view(len(of_image), -1).any(1))[:, 0]
        near.view(len(of_image), -1)[lonely, of_image[lonely].argmax(1)] = True
        view, direction = torch.nonzero(near, as_tuple=True)
        found.append((view + start, direction))
    return torch.cat([view for view, _ in found]), torch.cat([direction for _, direction in found])


def _with_psi(grid: Grid, image: Tensor, direction: Tensor, delta: Tensor, psi0: Tensor, n: int, sigma: float) -> Neighbours:
    """Cross directions (per image) with the in-plane angles within 3σ of psi0; weights, duplicates merged, normalised."""
    step = 360.0 / grid.n_psi
    reach = max(0, int(np.floor(3 * sigma / step)) + 1)
    ladder = torch.arange(-reach, reach + 1, device=psi0.device)
    nearest = torch.floor(psi0 / step + 0.5).long()
    index = nearest[:, None] + ladder
    twist = index * step - psi0[:, None]
    near = (twist.abs() < 3 * sigma) | (ladder == 0)
    weight = -0.5 * (delta[:, None] ** 2 + twist**2) / sigma**2
    orientation = direction[:, None] * grid.n_psi + index % grid.n_psi
    flat_image = image[:, None].expand_as(index)[near]
    key = orientation[near] * n + flat_image
    # The same orientation through two mates (near a symmetry axis) counts once, with the larger weight.
    unique, where = torch.unique(key, return_inverse=True)
    log_prior = weight.new_full((len(unique),), -torch.inf).scatter_reduce(0, where, weight[near], "amax")
    image_of = unique % n
    total = weight.new_zeros(n).index_add_(0, image_of, log_prior.exp())
    return Neighbours(image_of, unique // n, log_prior - total[image_of].log())
