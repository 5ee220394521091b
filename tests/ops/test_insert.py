"""Insertion: the adjoint of project, conservation, and the implementations against the float64 reference."""
from __future__ import annotations

import pytest
import torch

from frazil.ops import dispatch
from frazil.ops.insert import cpu as insert_cpu
from frazil.ops.insert import insert_
from frazil.ops.project import project

IMPLEMENTATIONS = ["reference", "cpu", "triton"]


def volumes(m, dtype, device="cpu"):
    """Empty data and weight."""
    data = torch.zeros(2 * m + 1, 2 * m + 1, m + 1, dtype=dtype, device=device)
    return data, torch.zeros_like(data.real)


@pytest.fixture
def slices(rng):
    """slices(n, p, dtype): random values and weights."""

    def make(n, p, dtype=torch.complex128):
        values = torch.randn(n, p, dtype=torch.complex128, generator=rng).to(dtype)
        return values, torch.rand(n, p, dtype=torch.float64, generator=rng).to(values.real.dtype)

    return make


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex128, 1e-12), (torch.complex64, 1e-5)])
def test_insert_is_the_adjoint_of_project(implementation, dtype, tolerance, device, rng, rotations, window, slices):
    """Re⟨P v, s⟩ = Re⟨v, P* s⟩ over the stored elements, for any half array: no Hermitian plane (spec 9.1.6)."""
    place = device if implementation == "triton" else "cpu"
    m, k, r = 7, window(6).to(place), rotations(3).to(place)
    v = torch.randn(2 * m + 1, 2 * m + 1, m + 1, dtype=torch.complex128, generator=rng).to(place, dtype)
    s, w = (t.to(place) for t in slices(3, len(k), dtype))
    data, weight = volumes(m, dtype, place)
    insert_(data, weight, s, w, r, k, 2.0, implementation=implementation)
    sliced = project(v, r, k, 2.0, implementation=implementation)
    forward = (sliced.conj() * s).to(torch.complex128).sum().real
    backward = (v.conj() * data).to(torch.complex128).sum().real
    assert abs(forward - backward) < tolerance * sliced.norm() * s.norm()


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_weight_is_inserted_as_data_is_and_none_is_lost(implementation, rotations, window, slices):
    k, r = window(8), rotations(4)
    _, w = slices(4, len(k))
    data, weight = volumes(9, torch.complex128)
    insert_(data, weight, w + 0j, w, r, k, 2.0, implementation=implementation)
    assert torch.allclose(data.real, weight, atol=1e-13) and data.imag.abs().max() == 0
    assert float(weight.sum()) == pytest.approx(float(w.sum()), rel=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_insertion_adds_and_leaves_its_inputs(implementation, half_volume, rotations, window, slices):
    k, r, old = window(8), rotations(2), half_volume(9)
    s, w = slices(2, len(k))
    before = [t.clone() for t in (s, w, r, k)]
    empty, empty_weight = volumes(9, torch.complex128)
    data, weight = old.clone(), old.real.contiguous()
    insert_(empty, empty_weight, s, w, r, k, 2.0, implementation=implementation)
    insert_(data, weight, s, w, r, k, 2.0, implementation=implementation)
    assert torch.allclose(data, old + empty, atol=1e-13) and torch.allclose(weight, old.real + empty_weight, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, w, r, k), strict=True))


def _errors(size, n, implementation, place, rotations, window, slices, relative_error):
    """Errors of data and weight by this implementation in float32, and by the plain float32 reference."""
    k, r = window(size), rotations(n)
    s, w = slices(n, len(k), torch.complex64)
    exact, exact_weight = volumes(size + 1, torch.complex128)
    insert_(exact, exact_weight, s.to(torch.complex128), w.double(), r, k, 2.0, implementation="reference")
    errors = []
    for which, where in ((implementation, place), ("reference", "cpu")):
        data, weight = volumes(size + 1, torch.complex64, where)
        insert_(data, weight, *(t.to(where) for t in (s, w, r, k)), 2.0, implementation=which)
        errors.append((relative_error(data.cpu(), exact), relative_error(weight.cpu(), exact_weight)))
    return errors


@pytest.mark.parametrize("size", [6, 22, 32])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_cpu_is_as_exact_as_torch(size, workers, rotations, window, slices, relative_error):
    dispatch.set_threads(workers)
    fast, plain = _errors(size, 7, "cpu", "cpu", rotations, window, slices, relative_error)
    assert fast[0] <= 2 * plain[0] and fast[1] <= 2 * plain[1]


def test_triton_is_as_exact_as_torch(kernel_size, device, rotations, window, slices, relative_error):
    fast, plain = _errors(kernel_size, 4, "triton", device, rotations, window, slices, relative_error)
    assert fast[0] <= 2 * plain[0] and fast[1] <= 2 * plain[1]


@pytest.mark.parametrize("copies", [0, 1, 2, 3])
@pytest.mark.parametrize("precise", [torch.complex64, torch.complex128])
def test_every_way_to_share_the_work_gives_the_same_sum(copies, precise, monkeypatch, rotations, window, slices, relative_error):
    """Straight into the volume, or through one or more copies, in strips or not, and drained several times."""
    k, r = window(8), rotations(40)
    s, w = slices(40, len(k), torch.complex64)
    exact, exact_weight = volumes(9, torch.complex128)
    insert_(exact, exact_weight, s, w, r, k, 2.0, implementation="reference")
    monkeypatch.setattr(insert_cpu, "plan", lambda *_: copies)
    monkeypatch.setattr(insert_cpu, "RUN", 7)
    monkeypatch.setattr(insert_cpu, "numba_threads", lambda _: 6)
    data, weight = volumes(9, precise)
    insert_(data, weight, s, w, r, k, 2.0, implementation="cpu")
    assert relative_error(data, exact) < 1e-6 and relative_error(weight, exact_weight) < 1e-6


def test_sums_in_a_precise_volume_stay_precise(rotations, window, slices):
    """1 + many small float32 contributions: a float32 sum would lose them, float64 must not."""
    k, r = window(6)[:1], rotations(1)
    s, w = torch.full((1, 1), 1e-9, dtype=torch.complex64), torch.full((1, 1), 1e-9)
    data, weight = volumes(7, torch.complex128)
    data[7, 7, 0] = weight[7, 7, 0] = 1
    for _ in range(3):
        insert_(data, weight, s, w, r, k, 2.0, implementation="cpu")
    assert float(weight[7, 7, 0]) - 1 == pytest.approx(3e-9, rel=1e-6)


def test_work_plan_follows_memory_threads_and_size(monkeypatch):
    voxels = 131 * 131 * 66
    assert insert_cpu.plan(voxels, voxels - 1, 2, 4, False) == 0  # too little work to pay for a copy
    assert insert_cpu.plan(voxels, 10 * voxels, 2, 4, False) == 1
    assert insert_cpu.plan(voxels, 10 * voxels, 2, 4, True) == 0  # nothing to gain
    assert insert_cpu.plan(voxels, 10 * voxels, 16, 4, True) == 4
    monkeypatch.setattr(insert_cpu, "PRIVATE_BYTES", 2 * 16 * voxels)
    assert insert_cpu.plan(voxels, 10 * voxels, 16, 4, True) == 2
    for strips in (1, 2, 5, 9):
        edges = insert_cpu.strip_edges(9, strips)
        assert edges[0] == 0 and edges[-1] == 19 and (edges[1:] > edges[:-1]).all()


def test_same_bits_again_and_with_more_threads(rotations, window, slices):
    k, r = window(8), rotations(30)
    s, w = slices(30, len(k), torch.complex64)
    results = []
    for workers in (1, 2, 2, 4):
        dispatch.set_threads(workers)
        data, weight = volumes(9, torch.complex64)
        insert_(data, weight, s, w, r, k, 2.0, implementation="cpu")
        results.append((data, weight))
    assert all(torch.equal(d, results[0][0]) and torch.equal(w, results[0][1]) for d, w in results[1:])


def test_bad_arguments_are_refused(rotations, window, slices):
    k, r = window(8), rotations(2)
    s, w = slices(2, len(k))
    data, weight = volumes(9, torch.complex128)
    with pytest.raises(ValueError, match="weight must be"):
        insert_(data, weight.float(), s, w, r, k, 2.0)
    with pytest.raises(ValueError, match="contiguous"):
        insert_(data.mT.contiguous().mT, weight, s, w, r, k, 2.0)
    with pytest.raises(ValueError, match="must be \\(2"):
        insert_(data, weight, s[:1], w, r, k, 2.0)
    with pytest.raises(ValueError, match="less precise"):
        insert_(data.to(torch.complex64), weight.float(), s, w, r, k, 2.0)
    with pytest.raises(ValueError, match="less precise"):
        insert_(data, weight, s, w.float(), r, k, 2.0)
    with pytest.raises(ValueError, match="reaches"):
        insert_(data, weight, s, w, r, k, 3.0)
    assert data.abs().max() == 0 and weight.abs().max() == 0


# ---- half planes (2D references) and stacks


def stacks(k, m, flat, dtype, device="cpu"):
    """Empty stacks of data and weight."""
    data = torch.zeros(k, *(2 * m + 1,) * (1 if flat else 2), m + 1, dtype=dtype, device=device)
    return data, torch.zeros_like(data.real)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.complex128, 1e-12), (torch.complex64, 1e-5)])
def test_insert_into_a_stack_is_the_adjoint_of_its_slices(implementation, flat, dtype, tolerance, device, rng, rotations, window, slices):
    place = device if implementation == "triton" else "cpu"
    m, k, r, which = 7, window(6).to(place), rotations(4).to(place), torch.tensor([1, 0, 1, 2], device=place)
    data, weight = stacks(3, m, flat, dtype, place)
    v = torch.randn(data.shape, dtype=torch.complex128, generator=rng).to(place, dtype)
    s, w = (t.to(place) for t in slices(4, len(k), dtype))
    insert_(data, weight, s, w, r, k, 2.0, which=which, implementation=implementation)
    sliced = project(v, r, k, 2.0, which=which, implementation=implementation)
    forward, backward = ((a.conj() * b).to(torch.complex128).sum().real for a, b in ((sliced, s), (v, data)))
    assert abs(forward - backward) < tolerance * sliced.norm() * s.norm()
    for member in range(3):  # nothing is lost or goes to another member
        assert float(weight[member].sum()) == pytest.approx(float(w[which == member].sum()), rel=1e3 * tolerance)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_planes_are_the_same_bits_at_any_number_of_threads(workers, rng, rotations, window, slices, monkeypatch):
    k, r, which = window(8), rotations(30), torch.randint(3, (30,), generator=rng)
    s, w = slices(30, len(k), torch.complex64)
    results = []
    for threads in (1, workers):
        monkeypatch.setattr(insert_cpu, "numba_threads", lambda _, threads=threads: threads)
        data, weight = stacks(4, 9, True, torch.complex128)
        insert_(data, weight, s, w, r, k, 2.0, which=which, implementation="cpu")
        results.append((data, weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1][3].abs().max() == 0


@pytest.mark.parametrize("precise", [torch.complex64, torch.complex128])
def test_cpu_planes_are_as_exact_as_torch(precise, rng, rotations, window, slices, relative_error):
    k, r = window(22), rotations(7)
    s, w = slices(7, len(k), torch.complex64)
    exact, exact_weight = stacks(1, 23, True, torch.complex128)
    insert_(exact[0], exact_weight[0], s, w, r, k, 2.0, implementation="reference")
    data, weight = stacks(1, 23, True, precise)
    insert_(data[0], weight[0], s, w, r, k, 2.0, implementation="cpu")
    assert relative_error(data, exact) < 1e-6 and relative_error(weight, exact_weight) < 1e-6
