"""Point groups: rotations, the asymmetric unit of directions, and the directions a search keeps (spec/refinement 6.2, 6.3).

An operator R acts on map coordinates, ρ(R x) = ρ(x), so orientations A and A·R are equivalent, and so are the viewing directions
d and d·R (row vectors; since a group holds its inverses, {R d} is the same set).
"""
from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from scipy.spatial import KDTree
from torch import Tensor

from frazil.maths.rotation import euler_to_matrix
from frazil.maths.sphere import direction_vectors, directions

KNOWN_GROUPS = "C1, C2, ... Cn; D1, D2, ... Dn; T; O; I (= I2), I1, I2, I3, I4"
GOLDEN = (1 + math.sqrt(5)) / 2
I3_TILT = math.degrees(math.atan2(1.0, GOLDEN))  # 31.7174745°: from the 2-fold on z of I2 to the nearest 5-fold
FEW_DIRECTIONS = 4000  # below this many, near-duplicates on the border of the asymmetric unit are removed
BORDER = 1e-6  # what counts as on the border of the asymmetric unit: a cosine, or degrees


def parse_group(group: str) -> tuple[str, int]:
    """("C", n), ("D", n), ("T", 0), ("O", 0) or ("I", setting 1…4). Any case. ValueError names the groups that exist."""
    name = group.strip().upper()
    if found := re.fullmatch(r"([CD])([1-9]\d{0,2})", name):
        return found[1], int(found[2])
    if name in ("T", "O"):
        return name, 0
    if found := re.fullmatch(r"I([1-4]?)", name):
        return "I", int(found[1] or 2)
    raise ValueError(f"unknown symmetry group {group!r}: give one of {KNOWN_GROUPS}")


def rotation_about(axis: tuple[float, float, float], order: int) -> Tensor:
    """(3, 3) float64 matrix of an `order`-fold rotation about `axis` (xyz, any length)."""
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0).tolist()
    angle = 2 * math.pi / order
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def _generators(family: str, n: int) -> list[Tensor]:
    """Two rotations that generate T, O or the setting n of I, from exact axes."""
    z = (0.0, 0.0, 1.0)
    if family == "T":
        return [rotation_about(z, 3), rotation_about((0.0, math.sqrt(2.0), 1.0), 2)]
    if family == "O":
        return [rotation_about(z, 4), rotation_about((1.0, 1.0, 1.0), 3)]
    fivefold = {1: (GOLDEN, 0.0, -1.0), 2: (1.0, 0.0, GOLDEN), 3: z, 4: z}[n]
    second = {1: (z, 2), 2: (z, 2), 3: ((-2.0, 0.0, 1.0), 5), 4: ((2.0, 0.0, 1.0), 5)}[n]
    return [rotation_about(fivefold, 5), rotation_about(*second)]


@lru_cache(maxsize=64)
def _closure(family: str, n: int) -> Tensor:
    """All rotations of a group, (g, 3, 3), identity first."""
    if family in "CD":
        angles = torch.arange(n, dtype=torch.float64) * (360.0 / n)
        spin = euler_to_matrix(torch.stack([angles, torch.zeros_like(angles), torch.zeros_like(angles)], -1))
        return spin if family == "C" else torch.cat([spin, spin @ rotation_about((1.0, 0.0, 0.0), 2)])
    group = torch.eye(3, dtype=torch.float64)[None]
    while True:  # multiply by the generators until nothing new comes
        products = torch.cat([group, *(g @ group for g in _generators(family, n))])
        distance = (products[:, None] - products[None]).abs().amax((-1, -2))
        first = (distance < 1e-6).int().argmax(1)  # of each product, the first equal one
        unique = products[first == torch.arange(len(products))]
        if len(unique) == len(group):
            break
        group = unique
    u, _, v = torch.linalg.svd(group)  # rounding grows with each product: back to exact rotations
    return u @ v


def operators(group: str) -> Tensor:
    """(g, 3, 3) float64 rotations of a point group, identity first. ValueError if the group is unknown."""
    return _closure(*parse_group(group)).clone()


def _border_normals(family: str, n: int) -> Tensor:
    """(m, 3) normals whose half spaces d·n ≥ 0 cut out the asymmetric unit of T, O and I (spec 6.2)."""
    if family == "T":
        rows = [(-0.942809, 0.0, 0.0), (0.471405, 0.272165, 0.7698), (0.471404, 0.816497, 0.0)]
        return torch.tensor(rows, dtype=torch.float64)
    if family == "O":
        return torch.tensor([(0.0, -1.0, 1.0), (1.0, 1.0, 0.0), (-1.0, 1.0, 0.0)], dtype=torch.float64)
    half, tall, low = 0.5, GOLDEN / 2, 1 / (2 * GOLDEN)
    if n == 4:  # the table's (0.18759, ±0.30353, −0.49112), exactly; it cuts on the other side
        rows = [(0.0, 0.0, 1.0), (1.0, -GOLDEN, -(GOLDEN**2)), (1.0, GOLDEN, -(GOLDEN**2))]
        return -_tilted(rows, -I3_TILT)
    rows = [(0.0, 1.0, 0.0), (-half, -tall, low), (half, -tall, low)]
    return _tilted(rows, {1: 90.0, 2: 0.0, 3: I3_TILT}[n])


def _tilted(rows: list[tuple[float, float, float]], tilt: float) -> Tensor:
    """Vectors multiplied by A(0, tilt, 0)."""
    matrix = euler_to_matrix(torch.tensor([0.0, tilt, 0.0], dtype=torch.float64))
    return torch.tensor(rows, dtype=torch.float64) @ matrix.T


def asymmetric_unit(group: str, vectors: Tensor) -> Tensor:
    """(n,) bool: which unit vectors (n, 3) xyz lie in RELION's asymmetric unit of the group.

    Borders belong to it, except rot = 90 of T and rot = 45 of O, which RELION's arithmetic leaves out.
    """
    family, n = parse_group(group)
    d = vectors.double()
    rot = torch.rad2deg(torch.atan2(d[:, 1], d[:, 0]))
    upper = d[:, 2] >= -BORDER

    def sector(centre: float, half_width: float) -> Tensor:
        away = torch.remainder(rot - centre + 180, 360) - 180
        return away.abs() <= half_width + BORDER

    if family == "C":
        return sector(0.0, 180 / n)
    if family == "D":
        return sector(90.0, 180 / n) & upper
    inside = (d @ _border_normals(family, n).to(d.device).T >= -BORDER).all(1)
    if family == "O":
        return inside & upper & sector(90.0, 45.0) & (rot > 45.0 + BORDER)
    if family == "T":
        pole = torch.hypot(d[:, 0], d[:, 1]) < BORDER
        return inside & (sector(120.0, 30.0) & (rot > 90.0 + BORDER) | pole)
    return inside


def _pixel_radius(order: int) -> float:
    """Radians from the centre to the farthest corner of the largest HEALPix pixel.

    That pixel has its corner at z = 2/3 where the caps begin, its centre on the ring above.
    """
    nside = 2**order
    corner, centre = math.acos(2 / 3), math.acos(1 - (1 - 1 / nside) ** 2 / 3)
    turn = math.cos(math.pi / (4 * nside))
    return math.acos(math.cos(corner) * math.cos(centre) + math.sin(corner) * math.sin(centre) * turn)


def _without_near_duplicates(vectors: Tensor, group: Tensor, radius: float) -> Tensor:
    """(n,) bool: keep each of (n, 3) in turn unless a mate of one kept before it is closer than `radius` (radians)."""
    points = vectors.numpy()
    tree = KDTree(points)
    rivals: list[list[int]] = [[] for _ in range(len(points))]
    for operator in group[1:].numpy():
        close = KDTree(points @ operator).query_ball_tree(tree, 2 * math.sin(radius / 2))
        for i, found in enumerate(close):
            rivals[i].extend(j for j in found if j > i)
    keep = torch.ones(len(points), dtype=torch.bool)
    for i, found in enumerate(rivals):
        if keep[i] and found:
            keep[found] = False
    return keep


@lru_cache(maxsize=64)
def _kept(family: str, n: int, order: int, limit_tilt: float | None) -> Tensor:
    group = f"{family}{n or ''}"
    angles = directions(order)
    vectors = direction_vectors(angles)
    inside = asymmetric_unit(group, vectors)
    if limit_tilt is not None and abs(limit_tilt) <= 90:
        from_pole = torch.minimum(angles[:, 1], 180 - angles[:, 1])
        inside &= from_pole >= limit_tilt - BORDER if limit_tilt > 0 else from_pole <= -limit_tilt + BORDER
    kept = inside.nonzero()[:, 0]
    if len(kept) < FEW_DIRECTIONS and _closure(family, n).shape[0] > 1:
        kept = kept[_without_near_duplicates(vectors[kept], _closure(family, n), 0.5 * _pixel_radius(order))]
    return kept


def kept_directions(group: str, order: int, limit_tilt: float | None = None) -> Tensor:
    """(m,) int64 NEST pixels of sphere.directions(order) that a search with this symmetry needs, increasing.

    Those in the asymmetric unit; where fewer than 4000 are, without those closer than half a pixel's radius to a symmetry mate of
    an earlier one. limit_tilt L > 0 keeps side views (tilt at least L from either pole), L < 0 keeps top views (at most |L|); None
    or more than 90 (RELION writes -91) keeps all. The order is that of RELION's rlnOrientationDistribution.
    """
    return _kept(*parse_group(group), order, limit_tilt).clone()


def nearest_mate(rotation: Tensor, target: Tensor, group_operators: Tensor) -> Tensor:
    """(n, 3, 3) the orientation equivalent to rotation (n, 3, 3) under operators (g, 3, 3) that is closest to target (n, 3, 3)."""
    mates = torch.einsum("nij,gjk->ngik", rotation, group_operators.to(rotation))
    best = torch.einsum("ngik,nik->ng", mates, target.to(rotation)).argmax(1)
    return mates[torch.arange(len(rotation), device=rotation.device), best]
