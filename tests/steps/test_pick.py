"""Picking: planted templates, pure noise, low-pass, edges, CTF; CPU in float64 terms by way of the definition."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from frazil.data import Optics
from frazil.maths.fourier import image_from_ft
from frazil.maths.micrographs import blank_border, normalised
from frazil.maths.peaks import highest_apart, match_points
from frazil.simulate.micrographs import MicrographSettings, grey_scale, simulate_micrograph, slices, view_rotations
from frazil.simulate.phantom import phantom
from frazil.steps.pick import PickSettings, candidates, make_bank, match, prepare

PIXEL, BOX, SHAPE = 5.0, 40, (250, 310)
SOURCE = phantom(BOX, PIXEL, "C1", 3)


def templates(scale: float = 1.0, views: int = 3) -> torch.Tensor:
    rotation = view_rotations(MicrographSettings(views=views, seed=5))
    images = image_from_ft(slices(SOURCE, rotation, Optics(PIXEL, BOX)), BOX)
    return scale * images / images.std()


def planted(scale: float, noise: float, rng: torch.Generator, places: list[tuple[int, int]]) -> torch.Tensor:
    """Dark copies of the templates, in turn, at whole pixels, over noise."""
    image = noise * torch.randn(*SHAPE, generator=rng)
    for i, (x, y) in enumerate(places):
        picture = templates(scale)[i % 3]
        image[y - BOX // 2 : y + BOX // 2, x - BOX // 2 : x + BOX // 2] -= picture - picture[0, 0]
    return image


PLACES = [(50, 60), (150, 55), (250, 60), (60, 180), (160, 190), (255, 185)]


def picked(image, bank, threshold=0.3, edge=20.0, optics=None, defocus=None):
    found = candidates(match(prepare(image, bank, optics, defocus), bank), threshold, edge)
    kept = highest_apart(found.xy.numpy(), found.value.double().numpy(), 90 / PIXEL)
    return found.xy.numpy()[kept], found.value.numpy()[kept], found.psi.numpy()[kept], found.template.numpy()[kept]


@pytest.mark.parametrize("lowpass", [0.0, 20.0])
def test_planted_templates_are_found_with_fom_one(lowpass, rng):
    """Positions within half a work pixel, angle within half a step, the right template, FOM 1 ± 0.1, filtered or not."""
    scale = 0.5
    image = planted(scale, 1.0, rng, PLACES)
    bank = make_bank(templates(scale), PIXEL, SHAPE, PIXEL, PickSettings(130.0, lowpass))
    xy, value, psi, template = picked(image, bank, 0.55)
    pairs = match_points(xy, value.astype(float), np.array(PLACES, float), 2 * bank.grid.work_pixel / PIXEL)
    assert len(xy) == len(PLACES) and pairs.gains.all()
    assert pairs.distance.max() <= 0.5 * math.sqrt(2) * bank.grid.work_pixel / PIXEL
    assert all(template[i] == pairs.partner[i] % 3 for i in range(len(xy)))
    assert np.abs((psi + 180) % 360 - 180).max() <= 5.0
    # sd of the whole micrograph is a little above that of its noise
    assert abs(value.mean() - 1) < 0.1


def test_candidates_that_a_better_neighbour_beats_may_be_left_out(rng, monkeypatch):
    """With the least distance known fewer come, and the picks are the same; best first."""
    bank = make_bank(templates(0.5), PIXEL, SHAPE, PIXEL, PickSettings(130.0, 0.0))
    scores = match(prepare(planted(0.5, 1.0, rng, PLACES), bank), bank)
    monkeypatch.setattr("frazil.maths.peaks.FEW", 50)
    monkeypatch.setattr("frazil.steps.pick.MANY", 50)
    every, fewer = (candidates(scores, -3.0, 20.0, distance=d) for d in (0.0, 90.0))
    assert len(fewer.xy) < 0.6 * len(every.xy) and bool((fewer.value.diff() <= 0).all()) and every.area == fewer.area
    picks = [[getattr(found, name)[highest_apart(found.xy.numpy(), found.value.double().numpy(), 90 / PIXEL)].tolist()
              for name in ("xy", "value", "psi", "template")] for found in (every, fewer)]  # fmt: skip
    assert picks[0] == picks[1] and len(picks[0][0]) > 10


def test_detail_finer_than_the_lowpass_leaves_no_trace(rng):
    """Of the templates: sampled on the work grid it would fold back to coarse detail."""
    image = planted(0.5, 1.0, rng, PLACES)
    x = torch.arange(BOX) - BOX // 2
    stripes = torch.cos(2 * math.pi * PIXEL / 14 * x) * torch.exp(-(x[:, None].square() + x.square()) / 50)  # 14 Å, fine ends softly
    pictures = templates(0.5), templates(0.5) + 2 * stripes
    banks = [make_bank(p, PIXEL, SHAPE, PIXEL, PickSettings(130.0, 30.0)) for p in pictures]
    plain, fine = (match(prepare(image, bank), bank).value for bank in banks)
    assert (plain - fine).norm() < 0.02 * plain.norm()


def test_inverted_contrast_finds_nothing(rng):
    image = planted(0.5, 1.0, rng, PLACES)
    bank = make_bank(templates(0.5), PIXEL, SHAPE, PIXEL, PickSettings(130.0, 20.0, invert=False))
    xy, value, _, _ = picked(image, bank, 0.55)
    assert not match_points(xy, value.astype(float), np.array(PLACES, float), 5.0).gains.any()


def test_noise_alone_stays_below_the_expected_bound(rng):
    """⟨Aε⟩ has sd √(⟨A²⟩/n); the largest of many angles and places stays below about five of it."""
    image = torch.randn(*SHAPE, generator=rng)
    bank = make_bank(templates(0.5), PIXEL, SHAPE, PIXEL, PickSettings(130.0, 0.0))
    square = float(bank.power[0].sum())
    sd = math.sqrt(square / bank.n_mask)
    scores = match(prepare(image, bank), bank)
    highest = math.expm1(6.5 * sd - square / 2) / math.expm1(square / 2)
    assert float(scores.value.max()) < highest
    one = make_bank(templates(0.5)[:1], PIXEL, SHAPE, PIXEL, PickSettings(130.0, 0.0, angular_step=360))
    value = match(prepare(image, one), one).value[20:-20, 20:-20]
    at = math.expm1(1.0 * sd - float(one.power[0].sum()) / 2) / math.expm1(float(one.power[0].sum()) / 2)
    assert abs(float((value > at).float().mean()) - 0.159) < 0.03  # a normal variable exceeds one sd


def test_local_statistics_are_those_of_the_ring_written_out(rng):
    image = torch.randn(120, 140, generator=rng) + torch.linspace(0, 2, 140)
    bank = make_bank(templates(), PIXEL, (120, 140), PIXEL, PickSettings(100.0, 0.0))
    ready, x = prepare(image, bank), normalised(image, True)
    yy, xx = torch.meshgrid(torch.arange(120), torch.arange(140), indexing="ij")
    for y0, x0 in ((60, 70), (5, 130)):
        r = ((yy - y0) ** 2 + (xx - x0) ** 2).float().sqrt()
        ring = (r > 10.6) & (r < 13.4)  # 50 to 70 Å, off the soft pixel at either rim
        assert abs(float(ready.mu[y0, x0]) - float(x[ring].mean())) < 0.1
        assert abs(float(ready.sigma[y0, x0]) - float(x[ring].std())) < 0.1


def test_ncc_is_written_out(rng):
    """Coefficient of the disc's pixels, the median of their sum of squares over all places added to that sum."""
    image = torch.randn(100, 100, generator=rng) * torch.linspace(0.5, 2, 100)[:, None]
    bank = make_bank(templates()[:1], PIXEL, (100, 100), PIXEL, PickSettings(100.0, 0.0, angular_step=360, score="ncc"))
    scores = match(prepare(image, bank), bank)
    assert float(scores.value.abs().max()) <= 1
    h = bank.reach
    x = normalised(image, True)
    disc = (torch.arange(-h, h + 1)[:, None] ** 2 + torch.arange(-h, h + 1) ** 2).sqrt() < 10
    windows = x.unfold(0, 2 * h + 1, 1).unfold(1, 2 * h + 1, 1)[..., disc]  # places h … 99 − h
    sums = (windows - windows.mean(-1, keepdim=True)).square().sum(-1)
    usual = sums.median()  # those at the edge are much like the others
    kernel = bank.kernels(0, bank.psi)[0]
    for y0, x0 in ((40, 55), (75, 30)):
        window = x[y0 - h : y0 + h + 1, x0 - h : x0 + h + 1]
        expected = float((kernel * window).sum() / (sums[y0 - h, x0 - h] + usual).sqrt())
        assert float(scores.value[y0, x0]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("lowpass", [0.0, 20.0])
def test_z_has_the_same_noise_for_every_template(lowpass, rng):
    """In noise a weak copy of a template scores as the template, alone and beside it, where FOM gives it more. Planted ones stand out."""
    image = planted(0.5, 1.0, rng, PLACES)
    noise = torch.randn(*SHAPE, generator=rng)
    copies = templates(0.5)[:1] * torch.tensor([1.0, 0.2])[:, None, None]
    for score, gap in (("z", 0.0), ("fom", 2.0)):
        made = [make_bank(p, PIXEL, SHAPE, PIXEL, PickSettings(130.0, lowpass, 15, score)) for p in (copies[:1], copies[1:], copies)]
        strong, weak, both = (match(prepare(noise, bank), bank).value for bank in made)
        above = float(weak.max() - strong.max())
        assert above > gap if gap else (weak - strong).abs().max() < 1e-3 and (both - strong).abs().max() < 1e-3
    bank = make_bank(templates(0.5), PIXEL, SHAPE, PIXEL, PickSettings(130.0, lowpass, score="z"))
    usual = match(prepare(noise, bank), bank)
    assert abs(float(usual.value.median())) < 0.05
    xy, value, _, template = picked(image, bank, 5.0)
    pairs = match_points(xy, value.astype(float), np.array(PLACES, float), 2 * bank.grid.work_pixel / PIXEL)
    assert pairs.gains.sum() == len(PLACES) == pairs.gains[: len(PLACES)].sum() and value[len(PLACES) - 1] > 1.5 * float(usual.value.max())
    assert all(template[i] == pairs.partner[i] % 3 for i in np.flatnonzero(pairs.gains))


def test_faint_likeness_scores_less_than_a_particle(rng):
    """The same picture at a tenth of the background's contrast has the same coefficient, but is none of our particles."""
    image = torch.randn(200, 200, generator=rng)
    picture = templates(1.5)[0]
    for x0, factor in ((50, 1.0), (150, 0.03)):
        place = (slice(100 - BOX // 2, 100 + BOX // 2), slice(x0 - BOX // 2, x0 + BOX // 2))
        image[place] = factor * (0.3 * image[place] - (picture - picture[0, 0]))
    bank = make_bank(templates()[:1], PIXEL, (200, 200), PIXEL, PickSettings(100.0, 20.0, angular_step=360, score="ncc"))
    value = match(prepare(image, bank), bank).value
    scale = bank.grid.scale[1]
    strong, faint = (float(value[round(100 * scale) - 1 : round(100 * scale) + 2, round(x0 * scale) - 1 : round(x0 * scale) + 2].max())
                     for x0 in (50, 150))  # fmt: skip
    assert strong > 0.7 and faint < 0.4 * strong


def test_nothing_is_picked_past_the_edge_and_half_particles_are_seen(rng):
    image = planted(0.5, 0.6, rng, PLACES)[:, 60:].contiguous()  # the two particles at x = 50, 60 are cut
    bank = make_bank(templates(0.5), PIXEL, (250, 250), PIXEL, PickSettings(130.0, 20.0))
    xy, _, _, _ = picked(image, bank, -0.2, edge=0.0)
    assert (xy >= 0).all() and (xy <= 249).all()
    assert any(abs(x) < 3 and abs(y - 180) < 3 for x, y in xy)
    far, _, _, _ = picked(image, bank, -0.2, edge=100.0)
    assert (far >= 20).all() and (far <= 229).all()


def test_the_ctf_is_used(rng):
    """Simulated micrograph with CTF: with it picks are true and angles right, without it fewer."""
    optics = Optics(PIXEL, BOX, 300.0, 2.7, 0.1)
    settings = MicrographSettings((300, 300), SOURCE.diameter(), 25, 0.2, 3, True, 0.6, 0.0, 0, 0, False, 5)
    made = simulate_micrograph(SOURCE, optics, settings, 0)
    pictures = grey_scale(SOURCE, optics, settings) * image_from_ft(slices(SOURCE, view_rotations(settings), optics), BOX)
    bank = make_bank(pictures, PIXEL, (300, 300), PIXEL, PickSettings(settings.diameter, 20.0))
    n = len(made.xy)
    recalls, medians = [], []
    for with_ctf in (True, False):
        xy, value, psi, template = picked(made.image, bank, -5.0, 0.0, optics if with_ctf else None, made.defocus if with_ctf else None)
        pairs = match_points(xy[:n], value[:n].astype(float), made.xy.numpy(), 4.0)
        recalls.append(pairs.gains.sum() / n)
        medians.append(float(np.median(value[:n])))
        if with_ctf:
            good = pairs.partner >= 0
            off = psi[:n][good] - made.psi.numpy()[pairs.partner[good]]
            assert np.median(np.abs((off + 180) % 360 - 180)) <= 3.0
            assert (template[:n][good] == made.view.numpy()[pairs.partner[good]]).mean() > 0.85
    assert recalls[0] > 0.85
    assert 0.6 < medians[0] < 1.4 and medians[1] < medians[0] - 0.5


def test_copied_borders_are_seen(rng):
    image = torch.randn(200, 220, generator=rng)
    assert blank_border(image) == (0.0, 0.0, 0.0, 0.0)
    image[:12] = image[12]
    image[:, -9:] = image[:, -10:-9]
    top, bottom, left, right = blank_border(image)
    assert 12 <= top <= 14 and 9 <= right <= 11 and bottom == left == 0


def test_uncached_templates_give_the_same(rng):
    image = planted(0.5, 1.0, rng, PLACES)
    cached, small = (make_bank(templates(0.5), PIXEL, SHAPE, PIXEL, PickSettings(130.0, 20.0, cache_bytes=b)) for b in (1 << 30, 1 << 20))
    assert cached.cached and not small.cached
    a, b = (match(prepare(image, bank), bank).value for bank in (cached, small))
    assert (a - b).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("score", ["z", "fom"])
def test_a_lowpass_costs_no_recall_where_templates_are_coarse_views(score):
    """Table 1's shape: particles in all orientations, 12 views, SNR 0.1, ice, junk, carbon; recall at equal FDR from no filter to 20 Å."""
    from frazil.maths.rotation import euler_to_matrix
    from frazil.maths.sphere import directions

    pixel, box = 3.0, 80
    source, optics = phantom(box, pixel, "C1", 2), Optics(pixel, box)
    settings = MicrographSettings((720, 720), source.diameter(), 50, 0.1, 0, seed=3)
    made = [simulate_micrograph(source, optics, settings, i) for i in range(3)]
    angles = torch.cat([directions(0), torch.zeros(12, 1, dtype=torch.float64)], 1)
    pictures = grey_scale(source, optics, settings) * image_from_ft(slices(source, euler_to_matrix(angles), optics), box)
    recalls = {}
    for lowpass in (0.0, 20.0):
        bank = make_bank(pictures, pixel, (720, 720), pixel, PickSettings(settings.diameter, lowpass, 10.0, score))
        pairs, values = [], []
        for m in made:
            found = candidates(match(prepare(m.image, bank, optics, m.defocus), bank), 0.0, 20.0, 1.1)
            kept = highest_apart(found.xy.numpy(), found.value.double().numpy(), 0.65 * settings.diameter / pixel)
            values.append(found.value.double().numpy()[kept])
            pairs.append(match_points(found.xy.numpy()[kept], values[-1], m.xy.numpy(), 62 / pixel).gains)
        gains = np.concatenate(pairs)[np.argsort(-np.concatenate(values), kind="stable")].cumsum()
        right = np.flatnonzero(1 - gains / np.arange(1, len(gains) + 1) <= 0.25)
        recalls[lowpass] = gains[right[-1]] / sum(len(m.xy) for m in made)
    assert recalls[20.0] >= recalls[0.0] - 0.02 and recalls[20.0] > 0.8
