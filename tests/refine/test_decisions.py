"""Sampling, convergence and the M-step's formulas: known answers and invariants (spec/refinement 2.5, 3.3, 3.4, 3.9, 4.5, 6)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frazil.maths import sphere
from frazil.maths.fourier import half_volume_radii
from frazil.maths.rotation import euler_to_matrix, matrix_to_euler, random_rotations, rotation_angle
from frazil.maths.symmetry import operators
from frazil.refine.convergence import Progress, coarse_window, first_below, next_sampling, resolution_shell_of, window_size
from frazil.refine.maximization import _by_shell_at_once, averages, by_shell, fsc_of_averages, gold_standard_spectra, shell_means, wiener_
from frazil.refine.sampling import Sampling, _near_by_products, _near_by_tree, make_grid, neighbours


@pytest.mark.parametrize("group", ["C1", "D2", "O"])
def test_neighbours_surround_the_prior_whatever_mate_it_is(group: str, rng: torch.Generator) -> None:
    sampling = Sampling(order=3, offset_range=4, offset_step=2, group=group, factor=0.0, sigma=7.5)
    grid = make_grid(sampling)
    prior = random_rotations(20, rng)
    found = neighbours(grid, prior)
    ops = operators(group)
    angle = rotation_angle(grid.coarse_rotations(found.orientation), prior[found.image], ops)
    assert float(angle.max()) < 3 * 7.5 * 2**0.5 + 1e-6  # direction and in-plane angle each within 3σ
    nearest = torch.full((20,), 999.0, dtype=torch.float64).scatter_reduce(0, found.image, angle, "amin")
    assert float(nearest.max()) < 7.5  # a grid point closer than a step
    mass = torch.zeros(20, dtype=torch.float64).index_add_(0, found.image, found.log_prior.exp())
    assert torch.allclose(mass, torch.ones(20, dtype=torch.float64))
    mates = neighbours(grid, prior @ ops[-1])
    assert torch.equal(mates.orientation, found.orientation) and torch.allclose(mates.log_prior, found.log_prior, atol=1e-6)


def test_perturbation_is_one_rigid_rotation_and_children_surround_their_parent() -> None:
    grid = make_grid(Sampling(order=2, offset_range=4, offset_step=2))
    turned = make_grid(Sampling(order=2, offset_range=4, offset_step=2, instance=0.4))
    o = torch.arange(0, grid.orientations, 97)
    assert torch.allclose(turned.coarse_rotations(o), grid.coarse_rotations(o) @ turned.perturbation, atol=1e-12)
    angles = [rotation_angle(grid.fine_rotations(o, torch.full_like(o, c)), grid.coarse_rotations(o)) for c in range(8)]
    assert float(torch.stack(angles).max()) < 15.0
    assert torch.allclose(turned.fine_shifts().reshape(-1, 4, 2).mean(1), turned.coarse_shifts(), atol=1e-12)


def test_sizes_and_resolution_follow_the_rules() -> None:
    p = Progress(iteration=4, shell=13, increment=13, high_fsc=True, ave_pmax=0.87)
    assert window_size(p, 64) == 42  # RELION 5 at this state: 42 (parity_relion5/refine3d 4 → 5)
    assert window_size(replace(p, high_fsc=False), 64) == 52 and window_size(p, 64, everything=True) == 64
    assert coarse_window(Sampling(order=2, offset_range=1, offset_step=1), 64, 3.54, 200, 42) == 22
    ssnr = torch.tensor([999.0, 50, 20, 9, 5, 3, 2, 1.2, 0.7, 0.5, 0.3])
    assert resolution_shell_of(ssnr) == 7
    assert resolution_shell_of(torch.where(torch.arange(11) == 4, 0.5, 2.0)) == 10  # a dip is jumped
    assert resolution_shell_of(torch.zeros(11)) == 5
    assert first_below(torch.tensor([1.0, 0.9, 0.4, 0.8]), 0.5) == 2


def test_sampling_gets_finer_only_when_settled_and_stops_when_fine_enough() -> None:
    sampling = Sampling(order=2, offset_range=20, offset_step=8)
    settled = Progress(iteration=5, shell=13, no_gain=1, no_change=1, accuracy_rotation=4.0, accuracy_shift=2.0, change_shift=1.0)
    assert next_sampling(replace(settled, no_gain=0), sampling, 4)[2] is False
    progress, finer, changed = next_sampling(settled, sampling, 4)
    assert changed and finer.order == 3 and finer.sigma is None and progress.no_gain == progress.no_change == 0
    assert finer.offset_step == pytest.approx(3.0) and finer.offset_range == pytest.approx(5.0)
    assert next_sampling(settled, replace(sampling, order=3), 4)[1].sigma == pytest.approx(2 * 1.875)
    progress, same, changed = next_sampling(replace(settled, accuracy_rotation=11.0), sampling, 4)
    assert progress.fine_enough and not changed and same == sampling
    assert (
        next_sampling(settled, sampling, 4, enough=8.0)[0].fine_enough
        and next_sampling(settled, sampling, 4, maximum_order=2)[0].fine_enough
    )


def test_wiener_has_its_limits(rng: torch.Generator) -> None:
    m, box, pad = 17, 16, 2.0
    data = torch.randn(2 * m + 1, 2 * m + 1, m + 1, generator=rng, dtype=torch.complex128)
    weight = 10 * torch.rand(data.shape, generator=rng, dtype=torch.float64) + 5
    radius = half_volume_radii(m)
    inside = radius <= m - 1
    strong, weak = data.clone(), data.clone()
    coverage = wiener_(strong, weight, torch.full((9,), 1e12, dtype=torch.float64), pad, box)
    assert torch.allclose(strong[inside], (data / weight)[inside], rtol=1e-6) and float(coverage.min()) == 1.0
    coverage = wiener_(weak, weight, torch.full((9,), 1e-18, dtype=torch.float64), pad, box)
    free = radius / pad < 4  # (the floor of a thousandth of the shell's mean denominator reaches into shell 4 from shell 5)
    assert torch.allclose(weak[free], (data / weight)[free], rtol=1e-6)  # shells below 5 are never regularised
    assert float(weak[radius / pad >= 4.5].abs().max()) < 1e-12 and float(coverage.max()) == 0.0
    assert float(strong[~inside].abs().max()) == 0.0


def test_gold_standard_spectra_and_the_joined_map() -> None:
    fsc = torch.tensor([1.0, 0.5, 1 / 7], dtype=torch.float64)
    tau2, ssnr = gold_standard_spectra(fsc, torch.full((3,), 2.0, dtype=torch.float64), 1.0, joined=False)
    assert torch.allclose(ssnr, torch.tensor([999.0, 1.0, 1 / 6], dtype=torch.float64)) and torch.allclose(tau2, 2 * ssnr)
    joined = gold_standard_spectra(fsc, torch.ones(3, dtype=torch.float64), 1.0, joined=True)[1]
    assert float(joined[2]) == pytest.approx(1.0)  # FSC 1/7 = 0.143 of the halves is SSNR 1 of the whole


def test_fsc_of_averages_is_one_for_equal_and_none_for_independent_sums(rng: torch.Generator) -> None:
    m = 33
    draw = lambda: torch.randn(2 * m + 1, 2 * m + 1, m + 1, generator=rng, dtype=torch.complex128)  # noqa: E731
    weight = torch.rand(2 * m + 1, 2 * m + 1, m + 1, generator=rng, dtype=torch.float64) + 0.1
    a, b = averages(draw(), weight, 2.0), averages(draw(), weight, 2.0)
    assert torch.allclose(fsc_of_averages(a, a, 32), torch.ones(17, dtype=torch.float64))
    assert float(fsc_of_averages(a, b, 32)[5:].abs().max()) < 0.15


def test_neighbours_by_products_are_those_by_tree(rng: torch.Generator) -> None:
    """What a GPU does, on the CPU: the same pairs, also where a particle has no direction in reach."""
    grid = make_grid(Sampling(order=3, offset_range=0, offset_step=1, group="D2", sigma=2.0))
    vectors = sphere.direction_vectors(grid.table[grid.pixels])
    mates = torch.einsum("nij,gjk->ngik", random_rotations(40, rng), operators("D2"))
    views = mates[:, :, 2].reshape(-1, 3)
    for reach in (6.0, 1.0):
        pairs = []
        for find in (_near_by_tree, _near_by_products):
            view, direction = find(vectors, views, 4, reach)
            pairs.append(sorted(zip(view.tolist(), direction.tolist(), strict=True)))
        assert pairs[0] == pairs[1]


def test_children_are_nest_children_times_in_plane_children() -> None:
    """Spec 6.1: sub-pixels slow, in-plane children fast; the children's mean is the parent."""
    grid = make_grid(Sampling(order=2, offset_range=0, offset_step=1, factor=0.0))
    assert grid.n_psi == 24 and grid.children == 8
    o, child = torch.tensor([5 * 24 + 3]), torch.arange(8)
    fine = matrix_to_euler(grid.fine_rotations(o.expand(8), child))
    torch.testing.assert_close(fine[::2, :2], sphere.directions(3)[20:24])
    torch.testing.assert_close(fine[:2, 2], torch.tensor([41.25, 48.75], dtype=torch.float64))
    flat = make_grid(Sampling(order=2, offset_range=0, offset_step=1, factor=0.0, flat=True, psi_step=12.0))
    turned = matrix_to_euler(flat.fine_rotations(torch.tensor([2, 2]), torch.arange(2)))
    assert flat.children == 2 and flat.n_psi == 30
    torch.testing.assert_close(turned[:, 2], torch.tensor([21.0, 27.0], dtype=torch.float64))


def test_children_cover_the_rotations_no_coarser_than_their_step(rng: torch.Generator) -> None:
    """A random rotation near a coarse sample is within a fine step of some child."""
    grid = make_grid(Sampling(order=2, offset_range=0, offset_step=1, factor=0.0))
    every = torch.arange(grid.orientations)
    coarse = grid.coarse_rotations(every)
    target = euler_to_matrix(torch.rand(10, 3, generator=rng, dtype=torch.float64) * torch.tensor([360.0, 180.0, 360.0]))
    for t in target:
        near = rotation_angle(coarse, t).argsort()[:40]
        fine = grid.fine_rotations(near.repeat_interleave(8), torch.arange(8).repeat(40))
        assert rotation_angle(fine, t).min() < 1.2 * sphere.angular_step(3)


def test_several_half_volumes_at_once_are_each_on_its_own(rng: torch.Generator) -> None:
    """Shell means and the Wiener filter of a stack, and of every other volume of one (a view), against one volume at a time."""
    m, pad, box = 9, 2.0, 8
    weight = torch.rand(6, 2 * m + 1, 2 * m + 1, m + 1, generator=rng) * torch.tensor([0.0, 1, 10, 100, 1, 3])[:, None, None, None]
    data = torch.randn(2, *weight.shape, generator=rng)
    data = torch.complex(data[0], data[1]) * (weight > 0)
    tau2 = torch.rand(6, box // 2 + 1, generator=rng, dtype=torch.float64)
    for some in (slice(None), slice(1, None, 2)):
        for how in ({}, {"strict": True}, {"floor": True}):
            assert torch.equal(shell_means(weight[some], pad, 5, **how), torch.stack([shell_means(w, pad, 5, **how) for w in weight[some]]))
        assert torch.allclose(shell_means(data[some], pad, 5), shell_means(data[some].abs().square(), pad, 5), rtol=1e-6)
        together = data.clone()
        coverage = wiener_(together[some], weight[some], tau2[some], pad, box)
        for i, k in enumerate(range(6)[some]):
            one = data[k].clone()
            assert torch.equal(wiener_(one, weight[k], tau2[k], pad, box), coverage[i])
            assert torch.equal(one, together[k])
    assert float(together[1].abs().max()) > 0 and not torch.equal(together, data)
    empty = data[0].clone()
    assert float(wiener_(empty, weight[0], tau2[0], pad, box).abs().max()) == 0 and float(empty.abs().max()) == 0


def test_one_histogram_of_all_classes_is_one_each(rng: torch.Generator) -> None:
    shell, values = torch.randint(0, 6, (500,), generator=rng), torch.rand(3, 500, generator=rng)
    assert torch.allclose(_by_shell_at_once(shell, values, 5), by_shell(shell, values, 5), rtol=1e-12)
    assert by_shell(shell, values, 5)[1, 2] == pytest.approx(float(values[1][shell == 2].double().sum()))


@pytest.mark.parametrize("flat", [False, True])
def test_rotations_made_at_once_are_those_made_when_wanted(flat: bool, rng: torch.Generator) -> None:
    sampling = Sampling(order=1, offset_range=4, offset_step=2, group="D2" if not flat else "C1", flat=flat, psi_step=12.0, instance=0.3)
    grid = make_grid(sampling)
    made = grid.with_rotations()
    assert made.made is not None and grid.made is None
    o = torch.randint(0, grid.orientations, (50,), generator=rng)
    child = torch.randint(0, grid.children, (50,), generator=rng)
    assert torch.allclose(made.coarse_rotations(o), grid.coarse_rotations(o), atol=1e-15)
    assert torch.allclose(made.fine_rotations(o, child), grid.fine_rotations(o, child), atol=1e-15)
