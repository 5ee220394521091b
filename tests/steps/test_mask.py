"""Masks against geometry."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.masks import radii, soft_edge
from frazil.steps.mask import (
    BLUR_FACTOR,
    VOLUME_PER_DALTON,
    MaskParams,
    combine,
    filtered,
    grow,
    keep_components,
    make_mask,
    soften,
    spread,
    threshold_curve,
)

BOX = 64


def ball(radius: float, box: int = BOX) -> torch.Tensor:
    """Voxels within a radius of the centre."""
    return radii(box, 3, dtype=torch.float64) <= radius


def params(**values) -> MaskParams:
    """Parameters, defaults but for those given."""
    return MaskParams.model_validate(values)


def test_a_grown_ball_has_the_volume_of_the_larger_one_and_a_cosine_edge() -> None:
    mask = make_mask(ball(15), 2.0, params(extend=5.0, edge=6.0))
    low, high = (4 / 3 * math.pi * r**3 * 8 for r in (19.5, 20))  # growth takes distances below 5, not 5
    assert low < mask.volume < high
    assert mask.seed_volume == pytest.approx(4 / 3 * math.pi * 15**3 * 8, rel=0.01)
    assert mask.mass == pytest.approx(mask.seed_volume / VOLUME_PER_DALTON / 1000)
    line = mask.data[BOX // 2, BOX // 2, BOX // 2 :]
    assert ((mask.data >= 0) & (mask.data <= 1)).all() and (line.diff() <= 0).all()
    first = int((line == 1).sum())  # voxels inside along x
    expected = soft_edge(torch.arange(0, 7, dtype=torch.float64), 0, 6).float()
    torch.testing.assert_close(line[first - 1 : first + 6], expected, atol=1e-6, rtol=0)
    assert mask.warnings == ()


def test_shrinking_undoes_growing_of_a_slab() -> None:
    slab = torch.zeros(20, 20, 20, dtype=torch.bool)
    slab[8:12] = True
    assert grow(slab, 2.5)[6:14].all() and int(grow(slab, 2.5).sum()) == 8 * 400
    assert torch.equal(grow(grow(slab, 2.5), -2.5), slab)
    assert torch.equal(grow(slab, 2.0), grow(slab, 1.5)) and torch.equal(grow(slab, 0), slab)  # nearer than, not as near as


def test_edge_is_one_half_at_half_its_width() -> None:
    plane = torch.zeros(32, 32, 32, dtype=torch.bool)
    plane[:10] = True
    line = soften(plane, 8.0)[:, 5, 5]
    assert line[9] == 1 and line[13].item() == pytest.approx(0.5) and line[17] == 0 and line[16] > 0
    assert torch.equal(soften(plane, 0.0), plane.float())


def test_small_components_go_and_are_counted() -> None:
    inside = ball(9)
    inside[2:4, 2:4, 2:4] = True
    inside[60, 60, 60] = True
    kept, sizes, dropped = keep_components(inside, 0, 0.001)
    assert sizes == (int(ball(9).sum()), 8) and dropped == 1 and not kept[60, 60, 60] and kept[2, 2, 2]
    kept, sizes, dropped = keep_components(inside, 1, 0.0)
    assert torch.equal(kept, ball(9)) and dropped == 2 and len(sizes) == 1
    assert keep_components(torch.zeros_like(inside))[1:] == ((), 0)


def test_components_of_a_full_box_leave_the_argument_alone() -> None:
    """A mask that fills its bounding box would be written to if it were not copied."""
    inside = torch.zeros(8, 8, 8, dtype=torch.bool)
    inside[0], inside[7], inside[4, 4, 4] = True, True, True
    before = inside.clone()
    kept, sizes, dropped = keep_components(inside, smallest=0.1)
    assert torch.equal(inside, before)
    assert sizes == (64, 64)
    assert dropped == 1
    assert not kept[4].any()
    assert torch.equal(kept[[0, 7]], before[[0, 7]])


def test_sets() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = {name: combine(a, b, name).tolist() for name in ("and", "or", "and-not", "or-not")}
    assert found == {"and": [1, 0, 0, 0], "or": [1, 1, 1, 0], "and-not": [0, 1, 0, 0], "or-not": [1, 1, 0, 1]}


def test_thresholds_proposed_leave_the_particle(rng: torch.Generator) -> None:
    """A ball of density 1 in noise: the knee lies between noise and ball, the mass gives the volume asked for."""
    data = soften(ball(18), 4.0) + 0.05 * torch.randn(BOX, BOX, BOX, generator=rng)
    mass = 4 / 3 * math.pi * 18**3 / VOLUME_PER_DALTON / 1000
    curve = threshold_curve(data, 1.0, mass)
    assert 0.1 < curve.proposals["knee"] < 0.6
    volume = float((data >= curve.proposals["mass"]).sum())
    assert volume == pytest.approx(mass * 1000 * VOLUME_PER_DALTON * BLUR_FACTOR, rel=0.03)
    assert (curve.volume.diff() <= 0).all()
    assert threshold_curve(torch.ones(8, 8, 8), 1.0).proposals == {}


def test_atoms_are_inside() -> None:
    points = torch.tensor([[20.0, 30.0, 40.0], [-5.0, 0.0, 0.0]])  # xyz; the second is outside the box
    made = spread(points, BOX, 3.0)
    assert made[40, 30, 20] and made[42, 30, 20] and not made[43, 30, 20] and int(made.sum()) < 125


def test_lowpass_is_put_on_a_whole_shell(rng: torch.Generator) -> None:
    data = torch.randn(32, 32, 32, generator=rng)
    torch.testing.assert_close(filtered(data, 1.0, 3.9), filtered(data, 1.0, 4.1))  # 32/3.9 and 32/4.1 both round to 8
    assert torch.equal(filtered(data, 1.0, 0.0), data) and torch.equal(filtered(data, 1.0, 1.5), data)


def test_what_is_warned_about() -> None:
    def told(inside: torch.Tensor, **values) -> str:
        return " ".join(make_mask(inside, 2.0, params(**values)).warnings)

    assert "touches the edge" in told(ball(29), extend=2.0)
    assert "of the box" in told(ball(31), extend=2.0)
    assert "less than fits" in told(ball(10), mass=1000.0) and "more than fits" in told(ball(10), mass=1.0)
    assert "too tight" in told(ball(10), edge=2.0, resolution=8.0) and "--edge 4" in told(ball(10), edge=2.0, resolution=8.0)
    two = ball(6) | ball(6).roll(20, 0)
    assert "2 separate parts" in told(two) and "separate" not in told(two, largest=1)


def test_inverted_is_the_rest() -> None:
    plain, other = (make_mask(ball(10), 1.0, params(invert=invert)).data for invert in (False, True))
    torch.testing.assert_close(plain + other, torch.ones_like(plain))
