"""Which rotations leave a map as it is: symmetry axes, the point group they make, and the turn into that group's setting.

For an axis of order n the map is compared with itself turned by 360°/n: C = Σ A(k)* A(Rᵀk) e^{−2πi k·t/N} of the whitened transform.
All directions of a half sphere are tried for every order, the maxima refined over all rotations and shifts (steps.align), and kept
if the rotation found is still one by 360°/n. The point group is the largest all of whose operators the map obeys.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.sphere import direction_vectors, directions
from frazil.maths.symmetry import operators, rotation_about
from frazil.steps.align import (
    SAMPLES,
    Candidates,
    Lookup,
    Target,
    gauss_newton,
    look_up_table,
    placed,
    radius_of,
    target_samples,
    whiten,
)
from frazil.steps.map_transform import centre_of_mass, shift

SPHERE_ORDER = 3  # HEALPix: 384 directions on the half sphere, 7.3° apart
TRIED = 16  # maxima of each order that are refined
TOLERANCE = 4.0  # degrees by which a refined rotation may miss 360°/n, or two axes the angle of a group


@dataclass(frozen=True)
class Axis:
    """A symmetry axis of a map."""

    order: int
    direction: tuple[float, float, float]  # unit vector xyz, z ≥ 0
    correlation: float  # mean over the shells compared of the map with itself turned by 360°/order


Found = tuple[Axis, Tensor, Tensor]  # an axis with the refined rotation (3, 3) and the shift (3,) in px it came with


@dataclass(frozen=True)
class Symmetry:
    """What symmetry a map has."""

    axes: tuple[Axis, ...]  # best first; of each direction the highest order
    group: str  # the largest point group the map obeys
    rotation: Tensor  # (3, 3) float64 S: the map turned by it (after centring) is in RELION's setting of the group
    centre: Tensor  # (3,) float64 px, xyz from pixel N/2: where the axes meet
    correlation: float  # lowest of the group's operators; 1 for C1
    resolution_shell: int  # last shell compared


def _correlations(target: Target, table: Lookup, rotations: Tensor, centre: Tensor) -> Tensor:
    """(c,) correlation of the map with itself under each rotation (c, 3, 3) about `centre` (3,), px from pixel N/2."""
    power = target.value.abs().square().sum()
    out = []
    for some in rotations.split(max(1, (1 << 20) // len(target.k))):
        v = placed(target, table, some.to(target.k), centre - some.to(target.k) @ centre)[..., 0]
        out.append((target.value * v.conj()).real.sum(1) / (power * v.abs().square().sum(1)).sqrt())
    return torch.cat(out).double()


def _axis_of(rotation: Tensor) -> tuple[Tensor, float]:
    """(unit vector with z ≥ 0, angle in degrees from 0 to 180) of a rotation (3, 3)."""
    angle = math.degrees(math.acos(max(-1.0, min(1.0, (float(rotation.trace()) - 1) / 2))))
    values, vectors = torch.linalg.eigh((rotation + rotation.T) / 2)
    axis = vectors[:, int((values - 1).abs().argmin())]
    return (axis if float(axis[2] + 1e-9 * axis[0]) >= 0 else -axis), angle


def _maxima(vectors: Tensor, score: Tensor) -> Tensor:
    """(m,) indices of the best directions, none within 15° of a better one."""
    kept: list[int] = []
    for i in score.argsort(descending=True).tolist():
        if all(float((vectors[i] @ vectors[j]).abs()) < math.cos(math.radians(15)) for j in kept):
            kept.append(i)
        if len(kept) == TRIED:
            break
    return torch.tensor(kept)


def _best_axes(coarse: Target, fine: Target, table: Lookup, orders: Sequence[int]) -> list[Found]:
    """Refined axes of all orders, best first."""
    vectors = direction_vectors(directions(SPHERE_ORDER))
    vectors = vectors[(vectors[:, 2] > 1e-9) | ((vectors[:, 2].abs() <= 1e-9) & (vectors[:, 1] >= 0))]
    device, one = coarse.k.device, torch.eye(3, dtype=torch.float64)
    found = []
    for order in orders:
        x, y, z = vectors.T.tolist()
        turns = torch.stack([rotation_about(axis, order) for axis in zip(x, y, z, strict=True)])
        index = _maxima(vectors, _correlations(coarse, table, turns.to(device), torch.zeros(3, dtype=torch.float64, device=device)).cpu())
        some = Candidates(turns[index].to(device), torch.zeros(len(index), 3, dtype=torch.float64, device=device), torch.zeros(len(index)))
        for samples in (coarse, coarse, coarse, fine, fine, fine):
            some = gauss_newton(samples, table, some, one.to(device))
        scores = gauss_newton(fine, table, some, one.to(device)).score.cpu()
        for rotation, moved, score in zip(some.rotation.cpu(), some.shift.cpu(), scores.tolist(), strict=True):
            axis, angle = _axis_of(rotation)
            if abs(angle - 360 / order) < TOLERANCE:
                a, b, c = axis.tolist()
                found.append((Axis(order, (a, b, c), score), rotation, moved))
    return sorted(found, key=lambda pair: -pair[0].correlation)


def _distinct(found: list[Found], threshold: float) -> list[Found]:
    """One entry a direction: the highest order above the threshold (a six-fold axis is a two- and a three-fold one too)."""
    kept: list[Found] = []
    for one in sorted(found, key=lambda pair: (-pair[0].order, -pair[0].correlation)):
        dots = [abs(sum(a * b for a, b in zip(k.direction, one[0].direction, strict=True))) for k, _, _ in kept]
        if one[0].correlation >= threshold and max(dots, default=0.0) < math.cos(math.radians(6)):
            kept.append(one)
    return sorted(kept, key=lambda pair: -pair[0].correlation)


def _group_axes(group: str) -> list[tuple[Tensor, int]]:
    """Axes of a point group with their orders."""
    out: list[tuple[Tensor, int]] = []
    for operator in operators(group)[1:]:
        axis, angle = _axis_of(operator)
        order = round(360 / angle) if angle > 1 else 1
        if abs(360 / order - angle) > 1e-3:  # a multiple of the smallest turn
            continue
        if not any(float((axis @ other).abs()) > 0.999 and o >= order for other, o in out):
            out = [(other, o) for other, o in out if float((axis @ other).abs()) < 0.999] + [(axis, order)]
    return sorted(out, key=lambda pair: -pair[1])


def _frame(first: Tensor, second: Tensor) -> Tensor:
    """(3, 3) orthonormal columns: first, what is left of second, their cross product."""
    a = first / first.norm()
    b = second - (second @ a) * a
    b = b / b.norm()
    return torch.stack([a, b, torch.linalg.cross(a, b)], 1)


def _settings(axes: Sequence[Axis], group: str) -> list[Tensor]:
    """(3, 3) rotations that bring a pair of the axes found onto a pair of the group's."""
    wanted = _group_axes(group)
    first, order = wanted[0]
    found = [(torch.tensor(a.direction, dtype=torch.float64), a.order) for a in axes]
    if len(wanted) == 1:
        helper = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        out = []
        for axis, n in found:
            if n == order:
                other = helper if float((axis @ helper).abs()) < 0.9 else torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
                out.append(_frame(first, helper) @ _frame(axis, other).T)
        return out
    second, order2 = wanted[1]
    angle = math.degrees(math.acos(max(-1.0, min(1.0, float(first @ second)))))
    out = []
    for axis, n in found:
        for other, n2 in found:
            if other is axis or n != order or n2 != order2:
                continue
            for sign in (1.0, -1.0):
                between = math.degrees(math.acos(max(-1.0, min(1.0, sign * float(axis @ other)))))
                if abs(between - angle) < TOLERANCE:
                    out.append(_frame(first, second) @ _frame(axis, sign * other).T)
    return out


def _possible_groups(axes: Sequence[Axis]) -> list[str]:
    """Point groups that the orders found allow, largest first."""
    orders = sorted({axis.order for axis in axes}, reverse=True)
    names = [f"C{n}" for n in orders] + ([f"D{n}" for n in orders] if 2 in orders else []) + ["T", "O", "I"]
    return sorted(names, key=lambda name: -len(operators(name)))


def find_symmetry(data: Tensor, *, max_order: int = 8, threshold: float = 0.7, finest: float | None = None) -> Symmetry:
    """Axes and point group of a map (N, N, N). threshold: correlation from which a rotation counts as a symmetry.

    finest: last shell compared, by default three times that of the search, which is the one where the particle has about three waves.
    """
    box = data.shape[-1]
    coarse_shell = max(4.0, min(2.5 * box / radius_of(data), 0.2 * box))
    last = int(min(0.45 * box, finest or 3 * coarse_shell))
    middle = centre_of_mass(data)  # all axes meet there, but for noise: what is left is found with each axis
    white = whiten(shift(data.float(), (-middle).tolist()))
    table, samples = look_up_table(white, last + 1), target_samples(white, last)
    coarse, fine = samples.up_to(min(coarse_shell, last)), samples.some(SAMPLES[0])
    kept = _distinct(_best_axes(coarse, fine, table, list(range(2, max_order + 1))), threshold)
    axes = tuple(axis for axis, _, _ in kept)
    left = torch.zeros(3, dtype=torch.float64)
    if kept:  # t = (1 − R) c for every axis
        one = torch.eye(3, dtype=torch.float64)
        system = torch.cat([one - rotation for _, rotation, _ in kept])
        left = torch.linalg.pinv(system, rtol=1e-2) @ torch.cat([moved for _, _, moved in kept])
    group, setting, correlation = _point_group(axes, fine, table, left, threshold)
    return Symmetry(axes, group, setting, middle + left, correlation, last)


def _point_group(axes: Sequence[Axis], samples: Target, table: Lookup, centre: Tensor, threshold: float) -> tuple[str, Tensor, float]:
    """(largest group obeyed, rotation into its setting, lowest correlation of its operators)."""
    one = torch.eye(3, dtype=torch.float64)
    for group in _possible_groups(axes):
        best, setting = -1.0, one
        for turn in _settings(axes, group):
            own = turn.T @ operators(group)[1:] @ turn
            lowest = float(_correlations(samples, table, own.to(samples.k.device), centre.to(samples.k.device)).min())
            if lowest > best:
                best, setting = lowest, turn
        if best >= 0.9 * threshold:  # the setting comes from two axes only and is a little off the others
            return group, setting, best
    return "C1", one, 1.0
