"""ops.compare: log-likelihoods as matrix products, dense candidates, significance (spec/refinement 2.1, 2.6–2.8, 10)."""
from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from frazil.ops.compare import Candidates, candidates, compare, significant

FAST = ["cpu", "triton"]
GPU = torch.cuda.is_available()


def place(implementation: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """On the GPU for Triton where there is one."""
    return [t.cuda() if implementation == "triton" and GPU else t for t in tensors]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().double() - exact.cpu().double()).norm() / exact.double().norm())


def arrays(rng: torch.Generator, s: int, b: int, p: int, shifts: int, dtype: torch.dtype = torch.complex128) -> list[torch.Tensor]:
    """Slices, images, power, phases; the phases are those of real shifts on a small grid."""
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    slices, images = (torch.randn(n, p, dtype=torch.complex128, generator=rng) for n in (s, b))
    power = torch.rand(b, p, dtype=torch.float64, generator=rng)
    k, shift = torch.randn(p, 2, generator=rng, dtype=torch.float64), torch.randn(shifts, 2, generator=rng, dtype=torch.float64)
    phases = torch.exp(-2j * math.pi * (k @ shift.T))
    return [slices.to(dtype), images.to(dtype), power.to(real), phases.to(dtype)]


def rows(rng: torch.Generator, r: int, s: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(s, (r,), generator=rng).sort().values, torch.randint(b, (r,), generator=rng)


def test_one_pixel_by_hand() -> None:
    """S = 1 + 2i, Y = 3 + i, Q = 2 and a quarter turn: conj(S) Y = 5 − 5i; times −i: −5 − 5i; |S|² Q = 10."""
    one = torch.tensor([[1 + 2j]], dtype=torch.complex64)
    phases = torch.tensor([[1, -1j]], dtype=torch.complex64)
    zero = torch.zeros(1, dtype=torch.int64)
    args = one, zero, zero, torch.tensor([[3 + 1j]], dtype=torch.complex64), torch.tensor([[2.0]]), phases
    for implementation in ("reference", *FAST):
        placed = place(implementation, *args)
        assert compare(*placed, implementation=implementation).tolist() == [[-5.0, -15.0]]
        ratio = compare(*placed, cc=True, implementation=implementation).cpu()
        torch.testing.assert_close(ratio, torch.tensor([[5.0, -5.0]]) / math.sqrt(10))


def test_expanded_distance_equals_the_direct_one(rng: torch.Generator) -> None:
    """Spec 9.1 item 9: ½ Σ |s c S − X_t|²/σ² = ½ Σ |X|²/σ² − score, to 1e-10 of it."""
    slices, images, _, phases = arrays(rng, 6, 4, 37, 5)
    scale = torch.randn(4, 37, dtype=torch.float64, generator=rng)  # s c
    sigma2 = torch.rand(37, dtype=torch.float64, generator=rng) + 0.1
    row_slice, row_image = rows(rng, 12, 6, 4)
    score = compare(slices, row_slice, row_image, scale * images / sigma2, scale**2 / (2 * sigma2), phases, implementation="cpu")
    shifted = images[row_image][:, :, None] * phases  # X_t
    direct = 0.5 * ((scale[row_image] * slices[row_slice])[:, :, None] - shifted).abs().square().div(sigma2[:, None]).sum(1)
    constant = 0.5 * (images[row_image].abs().square() / sigma2).sum(1, keepdim=True)
    assert ((constant - score) / direct - 1).abs().max() < 1e-10


@pytest.mark.parametrize("cc", [False, True])
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(7, 5, 37, 9, 6), (3, 2, 600, 1, 3)])  # s, b, p, T, r: no power of two; beyond one block of pixels
def test_compare_is_as_exact_as_torch(shape: tuple[int, ...], implementation: str, cc: bool, rng: torch.Generator) -> None:
    s, b, p, shifts, r = shape
    exact_args = arrays(rng, s, b, p, shifts)
    index = rows(rng, r, s, b)
    single = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in exact_args]

    def run(args: list[torch.Tensor], how: str) -> torch.Tensor:
        placed = place(how, args[0], *index, *args[1:])
        return compare(*placed, cc=cc, implementation=how)

    exact = run(exact_args, "reference")
    assert relative_error(run(exact_args, implementation), exact) < 1e-13
    assert relative_error(run(single, implementation), exact) <= 2 * relative_error(run(single, "reference"), exact)


def test_chunks_of_rows_do_not_show(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arrays(rng, 9, 4, 21, 6)
    index = rows(rng, 50, 9, 4)
    whole = compare(args[0], *index, *args[1:], implementation="reference")
    from frazil.ops.compare import cpu, triton
    monkeypatch.setattr(cpu, "WORK_BYTES", 1)
    monkeypatch.setattr(triton, "work_bytes", lambda: 2 * 21 * 8 * 20)
    for implementation in FAST:
        placed = place(implementation, args[0], *index, *args[1:])
        assert relative_error(compare(*placed, implementation=implementation), whole) < 1e-13


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_no_rows_give_no_scores(implementation: str, rng: torch.Generator) -> None:
    args = place(implementation, *arrays(rng, 3, 2, 8, 4, torch.complex64))
    none = torch.empty(0, dtype=torch.int64, device=args[0].device)
    assert compare(args[0], none, none, *args[1:], implementation=implementation).shape == (0, 4)


def test_bad_arguments_are_refused(rng: torch.Generator) -> None:
    slices, images, power, phases = arrays(rng, 3, 2, 8, 4)
    up, down, zero = torch.tensor([0, 2]), torch.tensor([2, 0]), torch.tensor([0, 0])
    for args in [(slices, down, zero, images, power, phases), (slices, up, up, images, power, phases),
                 (slices, up + 1, zero, images, power, phases), (slices, up, zero[:1], images, power, phases),
                 (slices[:, :7], up, zero, images, power, phases), (slices, up, zero, images, power.float(), phases),
                 (slices, up, zero, images, power, phases.T)]:
        with pytest.raises(ValueError):
            compare(*args)
    prior, prior_shift = torch.zeros(2, 3), torch.zeros(2, 4)
    for kwargs in ({"depth": 0.0}, {"fraction": 0.0}, {"batch": 0}):
        with pytest.raises(ValueError):
            candidates(slices, images, power, phases, prior, prior_shift, **kwargs)
    with pytest.raises(ValueError):
        candidates(slices, images, power, phases, prior.T, prior_shift)


def dense(rng: torch.Generator, h: int, b: int, p: int, shifts: int, dtype: torch.dtype = torch.complex128) -> list[torch.Tensor]:
    """Arguments of candidates, with priors of which a quarter exclude."""
    args = arrays(rng, h, b, p, shifts, dtype)
    args[1] = args[1] * 0.6  # a range of L that depth cuts in the middle
    prior, prior_shift = torch.randn(2, h, generator=rng), torch.randn(b, shifts, generator=rng)
    prior[torch.rand(2, h, generator=rng) < 0.25] = -torch.inf
    prior_shift[torch.rand(b, shifts, generator=rng) < 0.25] = -torch.inf
    return [*args, prior.to(args[2].dtype), prior_shift.to(args[2].dtype)]


def table(found: Candidates, b: int, h: int, shifts: int) -> torch.Tensor:
    """(b, T, 2h) of L, NaN where not listed; also checks the order of the list."""
    out = torch.full((b, shifts, 2 * h), torch.nan, dtype=torch.float64)
    image, hypothesis, shift = (x.cpu() for x in (found.image, found.hypothesis, found.shift))
    key = (image * shifts + shift) * 2 * h + hypothesis
    assert bool((key[1:] > key[:-1]).all())
    out[image, shift, hypothesis] = found.value.cpu().double()
    return out


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_candidates_are_those_of_brute_force(implementation: str, rng: torch.Generator) -> None:
    """Slice by slice, mates built as the complex conjugates that psi + 180° gives, through `compare`."""
    h, b, p, shifts, depth = 70, 3, 11, 4, 5.0
    args = dense(rng, h, b, p, shifts)
    both = torch.cat([args[0], args[0].conj()])
    pairs = torch.arange(2 * h).repeat_interleave(b), torch.arange(b).repeat(2 * h)
    score = compare(both, *pairs, *args[1:4], implementation="reference").view(2 * h, b, shifts).permute(1, 2, 0)
    full = score + args[4].reshape(-1) + args[5][:, :, None]
    best = full.amax((1, 2))
    expected = torch.where(full >= best[:, None, None] - depth, full, torch.nan)
    found = candidates(*place(implementation, *args), depth=depth, batch=2, implementation=implementation)
    assert 10 < len(found.image) < 0.5 * expected.numel()
    torch.testing.assert_close(table(found, b, h, shifts), expected, rtol=1e-12, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(found.best.cpu(), best)
    assert not found.left_out.any()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_cc_lists_the_one_best_correlation(implementation: str, rng: torch.Generator) -> None:
    h, b, p, shifts = 5, 4, 11, 3
    slices, images, power, phases, prior, prior_shift = dense(rng, h, b, p, shifts)
    slices[4] = slices[1]  # a tie, of which the first must be listed
    both = torch.cat([slices, slices.conj()])
    cross = ((both.conj()[:, None] * images)[:, :, None] * phases.T).real.sum(-1)  # (2h, b, T)
    norm = (both.abs().square()[:, None] * power).sum(-1)
    value = (cross / norm.sqrt()[:, :, None]).permute(1, 2, 0)
    value = value.masked_fill(prior.reshape(-1).isneginf(), -torch.inf).masked_fill(prior_shift.isneginf()[:, :, None], -torch.inf)
    placed = place(implementation, slices, images, power, phases, prior, prior_shift)
    found = candidates(*placed, cc=True, implementation=implementation)
    assert found.image.tolist() == list(range(b))
    at = value.reshape(b, -1).argmax(1)
    assert (found.shift.cpu() * 2 * h + found.hypothesis.cpu()).tolist() == at.tolist()
    torch.testing.assert_close(found.value.cpu(), value.reshape(b, -1).amax(1))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_an_image_with_everything_excluded_has_no_candidates(implementation: str, rng: torch.Generator) -> None:
    args = dense(rng, 5, 3, 8, 2)
    args[5] = torch.zeros_like(args[5])
    args[5][1] = -torch.inf
    for options in ({}, {"fraction": 0.9}, {"cc": True}):
        found = candidates(*place(implementation, *args), implementation=implementation, **options)
        assert set(found.image.tolist()) == {0, 2}
        assert found.best.isneginf().tolist() == [False, True, False]
    args[4] = torch.full_like(args[4], -torch.inf)
    assert len(candidates(*place(implementation, *args), implementation=implementation).image) == 0


@pytest.mark.parametrize("implementation", FAST)
def test_float32_candidates_agree_with_float64(implementation: str, rng: torch.Generator) -> None:
    h, b, p, shifts = 40, 3, 50, 2
    args = dense(rng, h, b, p, shifts)
    single = [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in args]
    exact = table(candidates(*args, depth=1e4, implementation="reference"), b, h, shifts)
    plain = table(candidates(*single, depth=1e4, implementation="reference"), b, h, shifts)
    fast = table(candidates(*place(implementation, *single), depth=1e4, tf32=False, implementation=implementation), b, h, shifts)
    listed = ~exact.isnan()
    assert relative_error(fast[listed], exact[listed]) <= 2 * relative_error(plain[listed], exact[listed])


@pytest.mark.parametrize("implementation", FAST)
def test_fraction_keeps_all_that_is_significant_and_accounts_for_the_rest(implementation: str, rng: torch.Generator) -> None:
    h, b, p, shifts, fraction = 150, 3, 11, 3, 0.99
    args = dense(rng, h, b, p, shifts)
    args[1] = args[1] * 0.3  # flat: hundreds of hypotheses matter
    args[0] = args[0] * 0.7
    exact = candidates(*args, fraction=fraction, implementation="reference")
    everything = candidates(*args, implementation="reference")
    found = candidates(*place(implementation, *args), fraction=fraction, implementation=implementation)
    want, have, whole = (~table(x, b, h, shifts).isnan() for x in (exact, found, everything))
    assert bool((have | ~want).all()), "a significant hypothesis is missing"
    assert want.sum() <= have.sum() < 0.5 * (want.sum() + whole.sum())
    weight = (table(everything, b, h, shifts) - exact.best[:, None, None]).exp().nan_to_num(0)
    # Known to half a bin (26/128/2 = 10 %), and to 2 % of the mass that may be left out.
    error = found.left_out.cpu() - (weight * ~have).sum((1, 2))
    assert bool((error.abs() <= 0.11 * (weight * ~have).sum((1, 2)) + 0.02 * (1 - fraction) * weight.sum((1, 2))).all())
    # With left_out, `significant` of the short list is `significant` of the whole one.
    short = significant(found.image, found.value, b, fraction, left_out=found.left_out)
    long = significant(everything.image, everything.value, b, fraction)
    for name in ("log_norm", "pmax"):
        torch.testing.assert_close(getattr(short, name).cpu(), getattr(long, name), rtol=0, atol=2e-3)
    assert abs(int(short.keep.sum()) - int(long.keep.sum())) <= 0.02 * int(long.keep.sum())


@pytest.mark.parametrize("implementation", FAST)
def test_most_keeps_the_largest_and_accounts_for_the_rest(implementation: str, rng: torch.Generator) -> None:
    h, b, p, shifts, most = 150, 3, 11, 3, 40
    args = dense(rng, h, b, p, shifts)
    args[1], args[0] = args[1] * 0.3, args[0] * 0.7  # flat: hundreds of hypotheses matter
    everything = candidates(*args, implementation="reference")
    exact = candidates(*args, fraction=0.9999, most=most, implementation="reference")
    assert torch.bincount(exact.image).tolist() == [most] * b
    found = candidates(*place(implementation, *args), fraction=0.9999, most=most, implementation=implementation)
    want, have = (~table(x, b, h, shifts).isnan() for x in (exact, found))
    assert bool((have | ~want).all()), "one of the largest is missing"
    assert int(have.sum()) < 1.5 * int(want.sum())
    weight = (table(everything, b, h, shifts) - everything.best[:, None, None]).exp().nan_to_num(0)
    for c, listed in ((exact, want), (found, have)):
        rest = (weight * ~listed).sum((1, 2))
        assert bool((rest > 1e-3).all())
        torch.testing.assert_close(c.left_out.cpu(), rest, rtol=1e-9 if c is exact else 0.11, atol=0)


def naive(image: torch.Tensor, value: torch.Tensor, n: int, fraction: float) -> tuple[list, list, list, list]:
    """Sort, sum until the fraction is reached, include ties."""
    keep, norm, best, pmax = [False] * len(value), [], [], []
    for i in range(n):
        mine = sorted(((v, k) for k, v in enumerate(value.tolist()) if image[k] == i), key=lambda x: -x[0])
        if not mine or mine[0][0] == -math.inf:
            norm.append(-math.inf), best.append(-1), pmax.append(0.0)
            continue
        top = mine[0][0]
        total = math.fsum(math.exp(v - top) for v, _ in mine)
        run, theta = 0.0, math.inf
        for v, _ in mine:
            if run >= fraction * total:
                break
            run, theta = run + math.exp(v - top), v
        for v, k in mine:
            keep[k] = v >= theta
        norm.append(top + math.log(total)), best.append(min(k for v, k in mine if v == top)), pmax.append(1 / total)
    return keep, norm, best, pmax


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_significant_is_the_naive_sort(implementation: str, fraction: float, rng: torch.Generator) -> None:
    n, m = 6, 400
    image = torch.randint(n - 1, (m,), generator=rng)  # the last image has none
    value = 3 * torch.randn(m, generator=rng, dtype=torch.float64) + 5e4
    value = torch.where(torch.rand(m, generator=rng) < 0.5, value.round(), value)  # many ties
    value[torch.rand(m, generator=rng) < 0.1] = -torch.inf
    value[image == 2] = -torch.inf
    found = significant(image, value, n, fraction, implementation=implementation)
    keep, norm, best, pmax = naive(image, value, n, fraction)
    assert found.keep.tolist() == keep
    assert found.best.tolist() == best
    torch.testing.assert_close(found.log_norm, torch.tensor(norm, dtype=torch.float64))
    torch.testing.assert_close(found.pmax, torch.tensor(pmax, dtype=torch.float64))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_significant_ties_limits_and_tables(implementation: str, rng: torch.Generator) -> None:
    value = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]).double()
    image = torch.zeros(5, dtype=torch.int64)
    assert significant(image, value, 1, 0.2, implementation=implementation).keep.tolist() == [False, True, True, True, False]
    assert significant(image, value, 1, 0.99, 2, implementation=implementation).keep.tolist() == [False, True, True, False, False]
    assert significant(image, value, 1, 1.0, implementation=implementation).keep.all()
    assert significant(image, value, 1, 1e-9, implementation=implementation).keep.sum() == 3  # never empty, ties stay together
    assert not significant(image[:0], value[:0], 2, implementation=implementation).pmax.any()
    # Rows of T values each: the same as the flattened list; adding a constant to an image changes nothing (spec 9.1 item 10).
    owner = torch.randint(4, (30,), generator=rng)
    wide = 2 * torch.randn(30, 7, generator=rng)
    a = significant(owner, wide, 4, 0.95, implementation=implementation)
    b = significant(owner.repeat_interleave(7), (wide.double() + owner[:, None] * 100).reshape(-1), 4, 0.95, implementation=implementation)
    assert a.keep.shape == (30, 7) and torch.equal(a.keep.reshape(-1), b.keep) and torch.equal(a.best, b.best)
    torch.testing.assert_close(a.pmax, b.pmax, rtol=1e-5, atol=0)
    kept = torch.zeros(4, dtype=torch.float64).index_add_(0, owner.repeat_interleave(7)[b.keep],
        ((wide.double() + owner[:, None] * 100).reshape(-1) - b.log_norm[owner.repeat_interleave(7)]).exp()[b.keep])
    assert bool((kept >= 0.95).all()) and bool((kept <= 1).all())
    with pytest.raises(ValueError):
        significant(owner, wide, 3)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_inputs_are_unchanged(implementation: str, rng: torch.Generator) -> None:
    args = place(implementation, *dense(rng, 4, 3, 9, 2, torch.complex64))
    index = place(implementation, *rows(rng, 5, 4, 3))
    before = [x.clone() for x in (*args, *index)]
    compare(args[0], *index, *args[1:4], implementation=implementation)
    compare(args[0], *index, *args[1:4], cc=True, implementation=implementation)
    candidates(*args, implementation=implementation)
    found = candidates(*args, cc=True, implementation=implementation)
    value = found.value.clone()
    significant(found.image, found.value, 3)
    assert all(torch.equal(x, y) for x, y in zip((*args, *index, found.value), (*before, value), strict=True))


def test_strided_and_conjugated_views_are_read_right(rng: torch.Generator) -> None:
    slices, images, power, phases = arrays(rng, 4, 3, 9, 2)
    index = rows(rng, 5, 4, 3)
    views = slices.conj(), *index, images.T.contiguous().T, power[:, :].T.contiguous().T, phases.T.contiguous().T
    copies = [x.resolve_conj().contiguous() for x in views]
    for implementation in FAST:
        assert torch.equal(compare(*place(implementation, *views), implementation=implementation),
                           compare(*place(implementation, *copies), implementation=implementation))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: real sizes")
def test_real_sizes_on_a_gpu(rng: torch.Generator) -> None:
    args = arrays(rng, 500, 200, 2800, 84, torch.complex64)
    index = rows(rng, 4000, 500, 200)
    gpu = [x.cuda() for x in (args[0], *index, *args[1:])]
    exact = compare(*[x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x for x in gpu],
                    implementation="reference")
    plain = compare(*gpu, implementation="reference")
    assert relative_error(compare(*gpu), exact) <= 2 * relative_error(plain, exact)
    few = dense(rng, 1500, 40, 700, 21, torch.complex64)
    for options in ({}, {"fraction": 0.999}, {"cc": True}):
        found = candidates(*[x.cuda() for x in few], batch=16, tf32=False, **options)
        on_cpu = candidates(*few, tf32=False, **options)
        assert abs(len(found.image) - len(on_cpu.image)) <= 0.01 * len(on_cpu.image)
        torch.testing.assert_close(found.best.cpu(), on_cpu.best, rtol=1e-4, atol=1e-2)
        a = significant(found.image, found.value, 40, left_out=found.left_out)
        b = significant(on_cpu.image, on_cpu.value, 40, left_out=on_cpu.left_out)
        torch.testing.assert_close(a.pmax.cpu(), b.pmax, rtol=0.02, atol=1e-3)
