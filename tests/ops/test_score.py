"""ops.score: the children of chosen samples, against the formula and against a direct distance."""
from __future__ import annotations

import pytest
import torch

from frazil.ops.score import score

CHILDREN = (8, 4)


def case(rng: torch.Generator, dtype: torch.dtype, device: str = "cpu", n: int = 40, p: int = 23) -> tuple:
    """Random slices of 5 orientations, 7 images, 6 coarse shifts, n entries with runs of equal pairs."""
    c = torch.complex64 if dtype == torch.float32 else torch.complex128
    draw = lambda *shape: torch.randn(*shape, dtype=torch.complex128, generator=rng).to(c)  # noqa: E731
    o, i = torch.randint(5, (n,), generator=rng), torch.randint(7, (n,), generator=rng)
    order = torch.argsort(o * 7 + i, stable=True)
    t = torch.randint(6, (n,), generator=rng)
    prior = torch.randn(n, dtype=torch.float64, generator=rng).to(dtype)
    power = torch.rand(7, p, dtype=torch.float64, generator=rng).to(dtype)
    parts = (draw(5 * 8, p), o[order], i[order], t, prior, draw(7, p), power, draw(p, 24))
    return tuple(x.to(device) for x in parts)


def double(parts: tuple) -> tuple:
    return tuple(x.cpu().to(torch.complex128) if x.is_complex() else x.cpu().double() if x.is_floating_point() else x.cpu() for x in parts)


@pytest.mark.parametrize("cc", [False, True])
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_score_is_as_exact_as_torch(implementation: str, cc: bool, rng: torch.Generator) -> None:
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    parts = case(rng, torch.float32, device)
    exact = score(*double(parts), children=CHILDREN, cc=cc, implementation="reference")
    plain = score(*(x.cpu() for x in parts), children=CHILDREN, cc=cc, implementation="reference")
    fast = score(*parts, children=CHILDREN, cc=cc, implementation=implementation).cpu()
    error = lambda x: (x.double() - exact).norm() / exact.norm()  # noqa: E731
    assert error(fast) <= 2 * error(plain) + 1e-7


def test_score_differences_are_those_of_the_squared_distances(rng: torch.Generator) -> None:
    """score = ½‖X‖² − ½‖g S − X_t‖² with Y = g X, Q = g²/2: the expansion of the likelihood (spec 2.2)."""
    slices, o, i, t, _, x, gain, _ = case(rng, torch.float64)
    phases = torch.polar(torch.ones(23, 24, dtype=torch.float64), torch.rand(23, 24, dtype=torch.float64, generator=rng) * 6)
    value = score(slices, o, i, t, torch.zeros(len(o), dtype=torch.float64), gain * x, 0.5 * gain**2, phases, children=CHILDREN)
    for e in (0, 11, 39):
        for j in (0, 7):
            for u in (0, 3):
                moved = x[i[e]] * phases[:, t[e] * 4 + u]
                distance = 0.5 * (gain[i[e]] * slices[o[e] * 8 + j] - moved).abs().square().sum()
                assert torch.isclose(value[e, j, u], 0.5 * x[i[e]].abs().square().sum() - distance, rtol=1e-10)


def test_other_numbers_of_children(rng: torch.Generator) -> None:
    slices, o, i, t, prior, x, q, phases = case(rng, torch.float64)
    whole = score(slices, o, i, t, prior, x, q, phases, children=(8, 4))
    single = score(slices[::8].contiguous(), o, i, t, prior, x, q, phases[:, ::4].contiguous(), children=(1, 1))
    assert torch.allclose(single[:, 0, 0], whole[:, 0, 0], rtol=1e-12)


def test_nothing_to_score_and_inputs_unchanged(rng: torch.Generator) -> None:
    parts = case(rng, torch.float32)
    before = [x.clone() for x in parts]
    score(*parts, children=CHILDREN)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))
    none = [parts[0], *(x[:0] for x in parts[1:5]), *parts[5:]]
    assert score(*none, children=CHILDREN).shape == (0, 8, 4)


def test_bad_entries_are_refused(rng: torch.Generator) -> None:
    parts = list(case(rng, torch.float32))
    with pytest.raises(ValueError, match="shift must lie"):
        score(*parts[:3], parts[3] + 6, *parts[4:], children=CHILDREN)
    with pytest.raises(ValueError, match="must not decrease"):
        score(parts[0], parts[1].flip(0), *parts[2:], children=CHILDREN)
