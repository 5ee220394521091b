"""Point groups: closure, fundamental domains, RELION's directions (spec/refinement 6.2, 6.3, 9.1.7)."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import starfile
import torch
from torch import Tensor

from frazil.maths.rotation import euler_to_matrix, random_rotations, rotation_angle
from frazil.maths.sphere import direction_vectors, directions
from frazil.maths.symmetry import asymmetric_unit, kept_directions, nearest_mate, operators

GROUPS = {"C1": 1, "C2": 2, "C3": 3, "C4": 4, "C7": 7, "C13": 13, "D1": 2, "D2": 4, "D3": 6, "D7": 14, "D8": 16}
GROUPS |= {"T": 12, "O": 24, "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60}
GOLDEN = (1 + math.sqrt(5)) / 2

# Which NEST pixels RELION 3.1.3 keeps, by group and order: read off the sampling files it wrote for these runs.
RELION = json.loads((Path(__file__).parent / "relion_directions.json").read_text())
RELION_COUNTS = {
    ("C3", 5): 4086, ("C7", 5): 1726, ("D3", 5): 2033, ("D7", 5): 864, ("D7", 6): 3493, ("T", 5): 1009, ("T", 6): 4075, ("O", 5): 507,
    ("O", 6): 2037, ("I1", 6): 807, ("I2", 6): 809, ("I3", 6): 820, ("I4", 6): 802,
}  # fmt: skip


def sphere_points(n: int, rng: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, 3, generator=rng, dtype=torch.float64))


@pytest.mark.parametrize(("group", "order"), GROUPS.items())
def test_operators_are_a_group_of_rotations(group: str, order: int) -> None:
    ops = operators(group)
    assert ops.shape == (order, 3, 3) and ops.dtype == torch.float64
    assert torch.equal(ops[0].round(decimals=12), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(ops @ ops.mT, torch.eye(3, dtype=torch.float64).expand_as(ops), atol=1e-14, rtol=0)
    assert torch.allclose(torch.linalg.det(ops), torch.ones(order, dtype=torch.float64))
    products = (ops[:, None] @ ops[None]).reshape(-1, 3, 3)
    distance = (products[:, None] - ops[None]).abs().amax((-1, -2))
    assert ((distance < 1e-12).sum(1) == 1).all(), "each product is one operator"
    assert ((ops[:, None] - ops[None]).abs().amax((-1, -2)) < 1e-3).sum() == order, "no operator twice"


def contains(group: str, axis: tuple[float, float, float], fold: int) -> bool:
    """Whether the group holds the rotations of a `fold`-fold axis."""
    unit = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
    ops = operators(group)
    fixed = (ops @ unit - unit).norm(dim=1) < 1e-6
    return int(fixed.sum()) == fold


@pytest.mark.parametrize(
    ("group", "axis", "fold"),
    [
        ("C4", (0, 0, 1), 4), ("D7", (0, 0, 1), 7), ("D7", (1, 0, 0), 2), ("D2", (0, 1, 0), 2),
        ("T", (0, 0, 1), 3), ("T", (0, 0.816496, 0.577350), 2), ("O", (0, 0, 1), 4), ("O", (1, 1, 1), 3), ("O", (1, 1, 0), 2),
        ("I1", (1, 0, 0), 2), ("I1", (0, 0, 1), 2), ("I1", (0.850651, 0, -0.525731), 5), ("I1", (0.934172, 0.356822, 0), 3),
        ("I2", (0, 1, 0), 2), ("I2", (0.525731, 0, 0.850651), 5), ("I2", (0, 0.356822, 0.934172), 3),
        ("I3", (0, 0, 1), 5), ("I3", (0, 1, 0), 2), ("I3", (-0.894427, 0, 0.447214), 5),
        ("I4", (0, 0, 1), 5), ("I4", (0, 1, 0), 2), ("I4", (0.894427, 0, 0.447214), 5),
    ],
)  # fmt: skip
def test_axes_are_where_the_table_has_them(group: str, axis: tuple[float, float, float], fold: int) -> None:
    assert contains(group, axis, fold)


def test_settings_of_the_icosahedron_differ() -> None:
    assert not contains("I1", (1, 0, GOLDEN), 5) and not contains("I2", (GOLDEN, 0, 1), 5)
    assert not contains("I3", (2, 0, 1), 5) and not contains("I4", (-2, 0, 1), 5)
    quarter = euler_to_matrix(torch.tensor([90.0, 0.0, 0.0], dtype=torch.float64))
    turned = quarter @ operators("I1") @ quarter.T
    assert (turned[:, None] - operators("I2")[None]).abs().amax((-1, -2)).amin(1).max() < 1e-12, "I1 is I2 turned 90 degrees about z"


@pytest.mark.parametrize("name", ["c4", " D2", "i", "i3", "t"])
def test_names_are_read_in_any_case(name: str) -> None:
    assert torch.equal(operators(name), operators(name.strip().upper()))
    assert torch.equal(operators("I"), operators("I2"))


@pytest.mark.parametrize("name", ["", "C", "C0", "D", "I5", "X3", "C-1", "C1v", "OH", "C1.5"])
def test_unknown_groups_are_named_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="unknown symmetry group") as error:
        operators(name)
    assert "\n" not in str(error.value) and "I4" in str(error.value) and repr(name) in str(error.value)


def test_what_is_given_out_is_a_copy() -> None:
    operators("D2").zero_()
    kept_directions("D2", 2).zero_()
    assert operators("D2")[0, 0, 0] == 1 and kept_directions("D2", 2)[-1] > 0


@pytest.mark.parametrize(("group", "order"), GROUPS.items())
def test_asymmetric_unit_is_a_fundamental_domain(group: str, order: int, rng: torch.Generator) -> None:
    points = sphere_points(40000, rng)
    inside = torch.stack([asymmetric_unit(group, points @ op) for op in operators(group)])
    assert inside.any(0).all(), "every direction has a mate inside"
    assert (inside.sum(0) == 1).float().mean() > 0.9999, "and but one"
    area = asymmetric_unit(group, points).double().mean() * order
    assert abs(area - 1) < 4 * math.sqrt(order / len(points)), "area · |G| = 4π"


@pytest.mark.parametrize("case", RELION)
def test_directions_are_those_relion_keeps(case: str) -> None:
    group, order = case.split()
    assert kept_directions(group, int(order)).tolist() == RELION[case]


@pytest.mark.parametrize(("case", "count"), RELION_COUNTS.items())
def test_as_many_directions_as_relion_keeps(case: tuple[str, int], count: int) -> None:
    kept = kept_directions(*case)
    assert len(kept) == count and (kept.diff() > 0).all()


@pytest.mark.parametrize("group", ["C1", "C3", "D2", "D7", "T", "O", "I1", "I2", "I3", "I4"])
def test_kept_directions_cover_the_sphere(group: str, rng: torch.Generator) -> None:
    """Any direction has a mate near a kept one: border pixels may be lost, but no more than one pixel deep."""
    order = 3
    kept = direction_vectors(directions(order))[kept_directions(group, order)]
    mates = torch.einsum("gij,nj->gni", operators(group), kept).reshape(-1, 3)
    gap = torch.rad2deg(torch.acos((sphere_points(4000, rng) @ mates.T).amax(1).clamp(max=1)))
    assert gap.max() < 2 * 7.47  # the largest pixel of order 3 has a radius of 7.47 degrees


def test_limited_tilt_keeps_side_or_top_views() -> None:
    tilt = directions(2)[:, 1]
    for limit in (30.0, 62.0):
        side, top = kept_directions("C1", 2, limit), kept_directions("C1", 2, -limit)
        assert ((tilt[side] >= limit - 1e-6) & (tilt[side] <= 180 - limit + 1e-6)).all()
        assert ((tilt[top] <= limit + 1e-6) | (tilt[top] >= 180 - limit - 1e-6)).all()
        assert torch.cat([side, top]).unique().numel() == 192
    assert len(kept_directions("C1", 2, 30.0)) == 168  # as RELION 3.1.3
    assert len(kept_directions("C1", 2, -30.0)) == 24
    assert torch.equal(kept_directions("D2", 2, -91.0), kept_directions("D2", 2))


def test_nearest_mate_is_equivalent_and_nearest(rng: torch.Generator) -> None:
    ops = operators("O")
    a, b = random_rotations(30, rng), random_rotations(30, rng)
    mate = nearest_mate(a, b, ops)
    torch.testing.assert_close(rotation_angle(mate, b), rotation_angle(a, b, ops), atol=1e-5, rtol=0)
    assert rotation_angle(mate, a, ops).max() < 1e-5


REAL = [
    ("parity_relion5/refine3d/run_it004", 2), ("parity_relion5/refine3d/run_it008", 4), ("parity_relion5/refine3d/run", 5),
    ("parity_relion5/class3d/run_it002", 2), ("relion_stars/tutorial_3.1/Class3D/job016/run_it025", 2),
    ("relion_stars/tutorial_3.1/Refine3D/job029/run", 7),
]  # fmt: skip


@pytest.mark.agree
@pytest.mark.parametrize(("run", "order"), REAL)
def test_directions_of_real_projects(run: str, order: int, shared_data: Path) -> None:
    """The same directions in the same order as RELION 3.1 and 5 files, and one row of the distribution for each."""
    sampling = starfile.read(shared_data / f"{run}_sampling.star")
    general, table = sampling["sampling_general"], sampling["sampling_directions"]
    assert general["rlnHealpixOrder"] == order
    kept = kept_directions(general["rlnSymmetryGroup"], order, float(general["rlnTiltAngleLimit"]))
    ours = directions(order)[kept]
    assert len(ours) == len(table)
    theirs = torch.from_numpy(table[["rlnAngleRot", "rlnAngleTilt"]].to_numpy(dtype=float))
    assert (direction_vectors(ours) - direction_vectors(theirs)).norm(dim=1).max() < 1e-6
    model = next(path for path in (shared_data / f"{run}{kind}_model.star" for kind in ("", "_half1")) if path.exists())
    if order < 6:  # the tutorial's last file is 100,000 rows
        assert len(starfile.read(model)["model_pdf_orient_class_1"]) == len(ours)
