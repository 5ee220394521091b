"""A score in (0, 1) for each 2D class, with its reasons (spec/processing 6.2): a logistic model of the features of maths/class_features.py.

    score = 1 / (1 + exp(−b − Σ_j w_j z_j)),    z_j = (feature_j − centre_j) / spread_j, cut to ±3

The reasons are the terms w_j z_j themselves. The weights were fitted by bench/rank.py to averages whose truth is known: simulated
micrographs with junk, and β-galactosidase with its atomic model; how well they separate sets not fitted to is in docs/steps/rank.md.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.maths.class_features import NAMES

FAR = 3.0  # standard deviations at which a feature stops counting for more
MATTERS = 0.4  # least term (in logits) that is named as a reason
WORDS = {
    "resolution": ("well resolved for its size", "poorly resolved for its size"),
    "relative": ("among the best resolved of the run", "worse resolved than the best of the run"),
    "share": ("many particles", "few particles"),
    "contrast": ("stands out from its solvent", "hardly stands out from its solvent"),
    "detail": ("fine detail in the particle only", "as much fine detail in the solvent"),
    "edge": ("clear of the mask's edge", "density at the mask's edge"),
    "touching": ("ends inside the mask", "goes on beyond the mask"),
    "fragments": ("in one piece", "in pieces"),
    "area": ("of the usual size", "not of the usual size"),
    "centring": ("centred", "off centre"),
    "compactness": ("of compact shape", "of ragged shape"),
    "accuracy": ("aligns well", "aligns badly, or not known"),
}


@dataclass(frozen=True)
class Weights:
    """A fitted model; tensors in the order of NAMES."""

    centre: tuple[float, ...]
    spread: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float


# To s1 to s4 of bench/rank.py and both runs of β-galactosidase, in the order of NAMES. Resolution and accuracy got no weight: streaks of
# carbon and ice are as well resolved as particles, and what a good average has of both shows in contrast and detail.
FITTED = Weights(
    centre=(2.161, -0.3975, -0.8917, 1.838, 0.4034, 0.1275, 0.1087, 0.0305, 0.3555, 0.1277, 0.8671, 2.65),
    spread=(0.2898, 0.2966, 1.533, 0.5344, 0.424, 0.1667, 0.1498, 0.08379, 0.3367, 0.1948, 0.07049, 1.436),
    weight=(0, 0, 0.1639, 0.7182, 0.4438, -0.9847, -0.8622, -0.6945, -0.4905, -0.9394, 0.6122, 0),
    bias=-1.123,
)


def rank(features: Tensor, weights: Weights = FITTED) -> tuple[Tensor, Tensor]:
    """(score (K,), terms (K, len(NAMES))) float64 of class_features; an empty class has score 0 and terms 0."""
    z = standardised(features, weights)
    terms = torch.nan_to_num(z) * torch.tensor(weights.weight, dtype=torch.float64)
    score = torch.sigmoid(terms.sum(-1) + weights.bias)
    return torch.where(torch.isfinite(features).all(-1), score, torch.zeros_like(score)), terms


def standardised(features: Tensor, weights: Weights) -> Tensor:
    """(K, len(NAMES)) z of the module's formula."""
    centre, spread = (torch.tensor(v, dtype=torch.float64) for v in (weights.centre, weights.spread))
    return ((features.double() - centre) / spread).clamp(-FAR, FAR)


def reasons(terms: Tensor, most: int = 4) -> str:
    """What counted for (+) and against (−) a class, the weightiest first."""
    order = terms.abs().argsort(descending=True).tolist()
    weighty = [j for j in order if abs(float(terms[j])) >= MATTERS][:most]
    return ", ".join(f"+ {WORDS[NAMES[j]][0]}" if terms[j] > 0 else f"− {WORDS[NAMES[j]][1]}" for j in weighty)


def chosen(score: Tensor, count: Tensor, least: float, particles: int = 0, classes: int = 0) -> Tensor:
    """(K,) bool: classes of at least a score, and further ones from the best down until there are so many particles and classes.

    count (K,): particles of each class; classes without any are never chosen.
    """
    kept = (score >= least) & (count > 0)
    for k in torch.argsort(score, descending=True, stable=True).tolist():
        if int(count[kept].sum()) >= particles and int(kept.sum()) >= classes:
            break
        kept[k] = kept[k] | (count[k] > 0)
    return kept


def fit(features: Tensor, good: Tensor, importance: Tensor, penalty: float) -> Weights:
    """The model that predicts `good` (n,) bool from features (n, F): logistic regression with a ridge penalty, by Newton's method.

    importance (n,): weight of each class. Weights whose sign contradicts the feature's meaning are set to 0 and the rest fitted again.
    """
    x = features.double()
    centre, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    wanted = torch.tensor([1.0 if name in POSITIVE else -1.0 for name in NAMES], dtype=torch.float64)
    plain = Weights(tuple(centre.tolist()), tuple(spread.tolist()), (0.0,) * len(NAMES), 0.0)
    z = torch.cat([standardised(x, plain), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    used = torch.ones(len(NAMES) + 1, dtype=torch.bool)
    while True:
        solution = _newton(z[:, used], good.double(), importance.double(), penalty)
        w = torch.zeros(len(NAMES) + 1, dtype=torch.float64)
        w[used] = solution
        wrong = w[:-1] * wanted < 0
        if not bool(wrong.any()):
            return Weights(plain.centre, plain.spread, tuple(w[:-1].tolist()), float(w[-1]))
        used[:-1] &= ~wrong


POSITIVE = ("resolution", "relative", "share", "contrast", "detail", "compactness")  # more is better; of the others less is


def _newton(z: Tensor, y: Tensor, importance: Tensor, penalty: float) -> Tensor:
    """(F + 1,) ridge logistic regression; the last column is the bias, which is free."""
    w = torch.zeros(z.shape[1], dtype=torch.float64)
    ridge = torch.full_like(w, penalty)
    ridge[-1] = 1e-6
    for _ in range(50):
        p = torch.sigmoid(z @ w)
        gradient = z.T @ (importance * (p - y)) + ridge * w
        curve = z.T @ ((importance * p * (1 - p))[:, None] * z) + torch.diag(ridge)
        step = torch.linalg.solve(curve, gradient)
        w = w - step
        if float(step.abs().max()) < 1e-10:
            break
    return w


def area_under_curve(score: Tensor, good: Tensor) -> float:
    """Probability that a good class scores higher than a bad one (ties count half)."""
    a, b = score[good.bool()].double(), score[~good.bool()].double()
    if not len(a) or not len(b):
        return float("nan")
    return float(((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean())
