"""Scores of class averages: what a person sees must decide them; the fit itself; choosing by score."""
from __future__ import annotations

import torch

from frazil.data import Optics
from frazil.maths.class_features import NAMES, ClassFacts, class_features
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import image_from_ft
from frazil.maths.masks import radii, soft_circle
from frazil.maths.rotation import random_rotations
from frazil.simulate.phantom import phantom, project_phantom
from frazil.steps.rank import FITTED, area_under_curve, chosen, fit, rank, reasons

PIXEL, BOX, DIAMETER = 3.0, 64, 160.0


def scores(averages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    k = len(averages)
    facts = ClassFacts(torch.full((k,), 15.0), torch.full((k,), 1 / k), torch.full((k,), 3.0))
    resolved = lowpass_map(averages, PIXEL, 15.0, dims=2)  # as averages are, by their Wiener filter
    return rank(class_features(resolved * soft_circle(BOX, 25, 4), PIXEL, DIAMETER, facts))


def test_sharp_averages_score_high_and_noise_rings_and_edges_low(rng):
    """Cases of spec/processing 6.2, none of them of the sets that the weights were fitted to."""
    r, line = radii(BOX, 2), torch.arange(BOX, dtype=torch.float32) - BOX // 2
    kinds = [phantom(BOX, PIXEL, "I", 2), phantom(BOX, PIXEL, "C1", 9)]
    views = torch.cat([project_phantom(kind, random_rotations(6, rng), Optics(PIXEL, BOX)) for kind in kinds])
    good = image_from_ft(views, BOX)
    good = good / good.std((1, 2), keepdim=True) + 0.2 * torch.randn(12, BOX, BOX, generator=rng)
    noise = torch.randn(4, BOX, BOX, generator=rng)
    edge = torch.sigmoid(line)[:, None] + 0.05 * torch.randn(BOX, BOX, generator=rng)
    ring = torch.exp(-0.5 * ((r - 22) / 2) ** 2) + 0.1 * torch.randn(BOX, BOX, generator=rng)
    corner = torch.exp(-0.5 * (torch.hypot(line - 18.0, line[:, None] + 12.0) / 4) ** 2) + 0.1 * torch.randn(BOX, BOX, generator=rng)
    junk = torch.cat([noise, torch.stack([edge, ring, corner])])
    score, terms = scores(torch.cat([good, junk]))
    truth = torch.arange(len(score)) < 12
    assert area_under_curve(score, truth) > 0.97
    assert score[:12].min() > 0.6 and score[12:].max() < 0.3
    assert "edge" in reasons(terms[-1]) or "off centre" in reasons(terms[-1])


def test_scores_are_the_logistic_of_their_terms_and_empty_classes_score_0(rng):
    features = torch.randn(5, len(NAMES), generator=rng, dtype=torch.float64)
    features[3] = torch.nan
    score, terms = rank(features)
    assert torch.allclose(score[:3], torch.sigmoid(terms.sum(-1) + FITTED.bias)[:3]) and score[3] == 0
    far = features[:1].clone()
    far[0, NAMES.index("edge")] = 1e6
    assert rank(far)[1].abs().max() <= 3 * max(abs(w) for w in FITTED.weight) + 1e-9  # no feature alone decides everything


def test_the_fit_finds_what_separates_and_refuses_wrong_signs(rng):
    features = torch.randn(400, len(NAMES), generator=rng, dtype=torch.float64)
    contrast, edge, share = (features[:, NAMES.index(name)] for name in ("contrast", "edge", "share"))
    good = 2 * contrast - edge - share + 0.3 * torch.randn(400, generator=rng) > 0  # of a larger share is worse here: not believed
    found = fit(features, good, torch.ones(400), 1.0)
    weight = dict(zip(NAMES, found.weight, strict=True))
    assert weight["contrast"] > 1 and weight["edge"] < -0.5 and weight["share"] == 0
    assert area_under_curve(rank(features, found)[0], good) > 0.85


def test_classes_are_chosen_by_score_and_least_numbers():
    score, count = torch.tensor([0.9, 0.2, 0.6, 0.4, 0.8]), torch.tensor([10, 50, 20, 30, 0])
    assert chosen(score, count, 0.5).tolist() == [True, False, True, False, False]
    assert chosen(score, count, 0.5, particles=55).tolist() == [True, False, True, True, False]
    assert chosen(score, count, 0.95, classes=2).tolist() == [True, False, True, False, False]


def test_area_under_the_curve():
    assert area_under_curve(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, True, False])) == 1
    assert area_under_curve(torch.tensor([0.5, 0.5]), torch.tensor([True, False])) == 0.5
