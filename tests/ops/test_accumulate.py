"""ops.accumulate: posterior-weighted sums in slice space (spec/refinement 3.1, 3.8, 1.6)."""
from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from frazil.ops.accumulate import Sums, accumulate
from frazil.ops.compare import compare

FAST = ["cpu", "triton"]
GPU = torch.cuda.is_available()
ROUNDING = 2.4e-7
FIELDS = ("data", "weight", "cross", "power", "rows")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().to(exact.dtype) - exact.cpu()).norm() / exact.cpu().norm())


def arguments(rng: torch.Generator, s: int, b: int, p: int, shifts: int, r: int) -> dict:
    """Arguments of accumulate in float64; the last slice is never used."""
    def real(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=rng)

    def complexes(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.complex128, generator=rng)

    shell = torch.arange(p).float().sqrt().long()
    return {"slices": complexes(s, p), "row_slice": torch.randint(s - 1, (r,), generator=rng).sort().values,
            "row_image": torch.randint(b, (r,), generator=rng), "weights": real(r, shifts),
            "phases": torch.exp(6.28j * real(p, shifts)), "masked": complexes(b, p), "gain": real(b, p), "unmasked": complexes(b, p),
            "inverse": real(b, p), "shell": shell, "n_shells": int(shell[-1]) + 2, "scale_pixels": (shell > 1) & (shell < 4)}


def convert(args: dict, how: str, single: bool) -> dict:
    """To single precision, and to the GPU for Triton where there is one."""
    def one(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        if single:
            x = x.to(torch.complex64) if x.is_complex() else x.float() if x.is_floating_point() else x
        return x.cuda() if how == "triton" and GPU else x
    return {k: one(v) for k, v in args.items()}


def run(args: dict, how: str, single: bool = False) -> Sums:
    return accumulate(**convert(args, how, single), implementation=how)


def test_one_row_by_hand() -> None:
    """Γ = (½, ¼), E = (1, i): A = ½ + ¼ i, γ = ¾; F A = (2 + i)/... with F = 4: 2 + i; conj(S) F A of S = 1 + 2i: 4 − 3i."""
    c64 = torch.complex64
    zero = torch.zeros(1, dtype=torch.int64)
    args = {"slices": torch.tensor([[1 + 2j]], dtype=c64), "row_slice": zero, "row_image": zero, "weights": torch.tensor([[0.5, 0.25]]),
            "phases": torch.tensor([[1, 1j]], dtype=c64), "masked": torch.tensor([[4 + 0j]], dtype=c64), "gain": torch.tensor([[2.0]]),
            "unmasked": torch.tensor([[0 + 8j]], dtype=c64), "inverse": torch.tensor([[4.0]]), "shell": zero + 1, "n_shells": 3,
            "scale_pixels": torch.tensor([True])}
    for how in ("reference", *FAST):
        found = run(args, how)
        assert found.data.tolist() == [[-2 + 4j]]  # (½ + ¼ i)(8 i)
        assert found.weight.tolist() == [[3.0]]
        assert found.cross.tolist() == [0.0, 4.0, 0.0]
        assert found.power.tolist() == [0.0, 7.5, 0.0]  # ¾ · 5 · 2
        assert found.rows.tolist() == [[4.0, 7.5, 4.0, 7.5]]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(6, 4, 37, 9, 7), (3, 2, 300, 1, 4)])  # s, b, p, T, r; the second beyond one block of pixels
def test_accumulate_is_as_exact_as_torch(shape: tuple[int, ...], implementation: str, rng: torch.Generator) -> None:
    args = arguments(rng, *shape)
    exact, plain = run(args, "reference"), run(args, "reference", single=True)
    double, single = run(args, implementation), run(args, implementation, single=True)
    for name in FIELDS:
        truth = getattr(exact, name)
        assert relative_error(getattr(double, name), truth) < 1e-13, name
        # The reference sums rows in float64, the fast versions a chunk of rows in float32: allow two of its roundings.
        assert relative_error(getattr(single, name), truth) <= max(2 * relative_error(getattr(plain, name), truth), ROUNDING), name
    assert double.cross.dtype == single.cross.dtype == torch.float64 and single.data.dtype == torch.complex64


@pytest.mark.parametrize("implementation", FAST)
def test_chunks_and_long_slices_do_not_show(implementation: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice with many rows (split into pieces), others with few, some cut by the end of a chunk."""
    args = arguments(rng, 4, 3, 20, 5, 60)
    args["row_slice"] = torch.tensor([0] * 45 + [1] * 10 + [2] * 5)
    from frazil.ops.accumulate import cpu, triton
    monkeypatch.setattr(cpu, "WORK_BYTES", 1)
    monkeypatch.setattr(triton, "work_bytes", lambda: 4 * 20 * 8 * 25)
    monkeypatch.setattr(triton, "PIECE", 8)
    exact, found = run(args, "reference"), run(args, implementation)
    for name in FIELDS:
        assert relative_error(getattr(found, name), getattr(exact, name)) < 1e-13, name


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_no_rows_give_zeros(implementation: str, rng: torch.Generator) -> None:
    found = run(arguments(rng, 3, 2, 8, 4, 0), implementation, single=True)
    assert found.data.shape == (3, 8) and found.rows.shape == (0, 4)
    assert not any(getattr(found, name).any() for name in FIELDS)


@pytest.mark.parametrize("implementation", FAST)
def test_accumulate_is_the_adjoint_of_compare(implementation: str, rng: torch.Generator) -> None:
    """d/dS of Σ Γ·score is D − 2 W' S with U = Y, C = Q, since the score is linear in S but for its power term."""
    args = arguments(rng, 5, 4, 23, 6, 11)
    slices = args["slices"].clone().requires_grad_()
    pair = args["row_slice"], args["row_image"]
    score = compare(slices, *pair, args["unmasked"], args["inverse"], args["phases"], implementation="reference")
    (args["weights"] * score).sum().backward()
    found = run(args, implementation)
    torch.testing.assert_close(found.data.cpu() - 2 * found.weight.cpu() * args["slices"], slices.grad, rtol=1e-12, atol=1e-12)
    # And the inner product itself: Σ Γ cross = Re <S, D>, which F = U makes the sum of `cross` too.
    same = run({**args, "masked": args["unmasked"], "gain": args["inverse"]}, implementation)
    inner = (args["slices"].conj() * same.data.cpu()).real.sum()
    assert abs(inner - same.cross.sum().cpu()) < 1e-11 * same.cross.abs().sum()
    assert abs((args["slices"].abs().square() * same.weight.cpu()).sum() / same.power.sum().cpu() - 1) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_residual_from_sums_is_the_direct_residual(implementation: str, rng: torch.Generator) -> None:
    """Σ Γ |X_t − s c S|² = Σ γ |X|² − 2 cross + power, a shell and a row, which is how noise and norm are estimated (3.8, 1.6)."""
    args = arguments(rng, 5, 4, 23, 6, 11)
    gain = torch.randn(4, 23, dtype=torch.float64, generator=rng)  # s c
    x = args["masked"]
    found = run({**args, "masked": gain * x, "gain": gain**2}, implementation)
    i, k = args["row_image"], args["row_slice"]
    shifted = x[i][:, :, None] * args["phases"]
    residual = (args["weights"][:, None, :] * (shifted - (gain[i] * args["slices"][k])[:, :, None]).abs().square()).sum(2)  # (r, p)
    image_power = args["weights"].sum(1)[:, None] * x[i].abs().square()
    rows = image_power.sum(1) - 2 * found.rows[:, 0].cpu() + found.rows[:, 1].cpu()
    torch.testing.assert_close(rows, residual.sum(1), rtol=1e-11, atol=0)
    shells = torch.zeros(2, args["n_shells"], dtype=torch.float64)
    shells.index_add_(1, args["shell"], torch.stack([image_power.sum(0), residual.sum(0)]))
    torch.testing.assert_close(shells[0] - 2 * found.cross.cpu() + found.power.cpu(), shells[1], rtol=1e-11, atol=1e-11)


def test_more_weight_scales_all_sums(rng: torch.Generator) -> None:
    args = arguments(rng, 4, 3, 12, 5, 8)
    once, twice = run(args, "cpu"), run({**args, "weights": 2 * args["weights"]}, "cpu")
    for name in FIELDS:
        torch.testing.assert_close(getattr(twice, name), 2 * getattr(once, name))
    assert not once.data[3].any() and not once.weight[3].any()  # no row, no sum


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_inputs_are_unchanged(implementation: str, rng: torch.Generator) -> None:
    args = convert(arguments(rng, 4, 3, 9, 2, 6), implementation, single=True)
    before = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    accumulate(**args, implementation=implementation)
    assert all(torch.equal(args[k], v) for k, v in before.items())


def test_bad_arguments_are_refused(rng: torch.Generator) -> None:
    good = arguments(rng, 4, 3, 9, 2, 6)
    for change in ({"row_slice": good["row_slice"].flip(0) + torch.arange(6).flip(0)}, {"row_image": good["row_image"] + 3},
                   {"weights": good["weights"][:5]}, {"gain": good["gain"][:, :8]}, {"n_shells": 1}, {"unmasked": good["inverse"]},
                   {"scale_pixels": good["shell"]}, {"phases": good["phases"].T}, {"weights": good["weights"].float()}):
        with pytest.raises(ValueError):
            accumulate(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU: real sizes")
def test_real_sizes_on_a_gpu(rng: torch.Generator) -> None:
    args = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments(rng, 500, 200, 2800, 84, 4000).items()}
    exact, plain, fast = run(args, "reference"), run(args, "reference", single=True), run(args, "triton", single=True)
    for name in FIELDS:
        truth = getattr(exact, name)
        assert relative_error(getattr(fast, name), truth) <= max(2 * relative_error(getattr(plain, name), truth), 4 * ROUNDING), name
