"""Slices against the analytic transform of a blob, and the implementations against the float64 reference."""
from __future__ import annotations

import logging
import math

import pytest
import torch

from frazil.maths.fourier import padded_ft
from frazil.maths.rotation import euler_to_matrix
from frazil.ops import dispatch
from frazil.ops.project import Geometry, project

BOX, WIDTH = 24, 2.0  # a Gaussian blob of 2 px standard deviation in a box of 24


def blob(centre: torch.Tensor) -> torch.Tensor:
    """(BOX,)*3 Gaussian about the box centre + centre (xyz, px)."""
    c = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    r2 = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    return torch.exp(-r2 / (2 * WIDTH**2))


def blob_slices(centre, rotations, k):
    """What its slices must be: the transform of the projection, with the phase ramp of the rotated centre."""
    fall = torch.exp(-2 * (math.pi * WIDTH / BOX) ** 2 * k.square().sum(-1)) * (2 * math.pi * WIDTH**2) ** 1.5 / BOX**2
    turned = (rotations @ centre)[:, :2]
    return fall * torch.exp(-2j * math.pi / BOX * (turned @ k.T))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_slices_of_an_off_centre_blob_are_analytic_to_second_order(implementation, rotations, window, relative_error):
    r, k, centre = rotations(6), window(16), torch.tensor([1.5, -2.0, 0.7], dtype=torch.float64)
    errors = []
    for pad in (1, 2, 3):
        volume = padded_ft(blob(centre), pad, 8)
        errors.append(relative_error(project(volume, r, k, pad, implementation=implementation), blob_slices(centre, r, k)))
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[0] / errors[2] == pytest.approx(9, rel=0.3)


def test_slice_along_the_grid_axes_reads_the_volume_itself(half_volume, window):
    """Identity: S(kx, ky) = V(2 kx, 2 ky, 0); a quarter turn about y: p = Rᵀ(kx, ky, 0) = (0, 2 ky, ±2 kx)."""
    v, k = half_volume(9), window(8)
    kx, ky = k.long().unbind(-1)
    flat = project(v, torch.eye(3, dtype=torch.float64)[None], k, 2.0)[0]
    assert torch.equal(flat, v[9, 9 + 2 * ky, 2 * kx])
    turn = torch.tensor([[[0.0, 0, -1], [0, 1, 0], [1, 0, 0]]], dtype=torch.float64)
    assert torch.allclose(project(v, turn, k, 2.0)[0], v[9 - 2 * kx, 9 + 2 * ky, 0], atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_half_a_turn_of_psi_conjugates_the_slice_exactly(implementation, half_volume, rotations, window):
    v, r, k = half_volume(9, torch.complex64), rotations(5), window(8)
    turned = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)) @ r
    there, back = (project(v, rotation, k, 2.0, implementation=implementation) for rotation in (r, turned))
    assert torch.equal(back, there.conj())


def test_psi_is_the_in_plane_angle(half_volume, window):
    """A slice at psi holds at k what the slice at psi = 0 holds at k turned by the same angle (90°: exact pixels)."""
    v, k = half_volume(9), window(8)
    at = {tuple(x.tolist()): i for i, x in enumerate(k.long())}
    angles = torch.tensor([[40.0, 70.0, 0.0], [40.0, 70.0, 90.0]], dtype=torch.float64)
    still, turned = project(v, euler_to_matrix(angles), k, 2.0)
    for (kx, ky), i in at.items():  # rows 0, 1 at psi = 90°: (r1, −r0), so p(kx, ky) = p₀(−ky, kx)
        mate, flip = ((-ky, kx), False) if (-ky, kx) in at else ((ky, -kx), True)
        expected = still[at[mate]]
        assert torch.allclose(turned[i], expected.conj() if flip else expected, atol=1e-12)


@pytest.mark.parametrize("size", [6, 22, 32])
@pytest.mark.parametrize("geometry", [torch.float32, torch.float64])
def test_cpu_is_as_exact_as_torch(size, geometry, half_volume, rotations, window, relative_error):
    v, r, k = half_volume(size + 1), rotations(7), window(size)
    exact = project(v, r.to(geometry), k.to(geometry), 2.0, implementation="reference")
    assert relative_error(project(v, r.to(geometry), k.to(geometry), 2.0, implementation="cpu"), exact) < 1e-14
    v32, r32, k32 = v.to(torch.complex64), r.to(geometry), k.to(geometry)
    exact = project(v32.to(torch.complex128), r32, k32, 2.0, implementation="reference")
    plain = project(v32, r32, k32, 2.0, implementation="reference")
    fast = project(v32, r32, k32, 2.0, implementation="cpu")
    assert fast.dtype == torch.complex64
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact)


def test_triton_is_as_exact_as_torch(kernel_size, device, half_volume, rotations, window, relative_error):
    v, r, k = half_volume(kernel_size + 1, torch.complex64), rotations(4), window(kernel_size)
    exact = project(v.to(torch.complex128), r, k, 2.0, implementation="reference")
    plain = project(v, r, k, 2.0, implementation="reference")
    fast = project(v.to(device), r.to(device), k.to(device), 2.0, implementation="triton").cpu()
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact)
    double = project(v.to(device, torch.complex128), r.to(device), k.to(device), 2.0, implementation="triton").cpu()
    assert relative_error(double, exact) < 3e-14  # positions of up to 180 carry 180 × 2e-16 of rounding, and weights more


def test_triton_gives_zero_out_of_reach(device, half_volume, rotations):
    v, r = half_volume(5, torch.complex64).to(device), rotations(1).to(device)
    k = torch.tensor([[1.0, 0.5], [30.0, 0.0], [3e9, -1.0]], device=device)
    from frazil.ops.project.triton import project as run

    out = torch.empty(1, 3, dtype=v.dtype, device=device)
    run(v, Geometry(5, False), r, k, 2.0, out, None)
    assert out[0, 0] != 0 and (out[0, 1:] == 0).all()


def test_threads_do_not_change_the_slices(half_volume, rotations, window):
    v, r, k = half_volume(9, torch.complex64), rotations(40), window(8)
    one = project(v, r, k, 2.0, implementation="cpu")
    dispatch.set_threads(2)
    assert torch.equal(project(v, r, k, 2.0, implementation="cpu"), one)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_inputs_stay_and_out_is_filled(implementation, half_volume, rotations, window):
    v, r, k = half_volume(9, torch.complex64), rotations(3), window(8)
    before = [t.clone() for t in (v, r, k)]
    out = torch.full((3, len(k)), torch.nan, dtype=v.dtype)
    assert project(v, r, k, 2.0, out=out, implementation=implementation) is out
    assert torch.equal(out, project(v, r, k, 2.0, implementation=implementation))
    assert all(torch.equal(a, b) for a, b in zip(before, (v, r, k), strict=True))
    assert project(v, r[:0], k, 2.0, implementation=implementation).shape == (0, len(k))


def test_bad_arguments_are_refused(half_volume, rotations, window):
    v, r, k = half_volume(9), rotations(2), window(8)
    with pytest.raises(ValueError, match="half volume"):
        project(v[:-1], r, k, 2.0)
    with pytest.raises(ValueError, match="complex"):
        project(v.real, r, k, 2.0)
    with pytest.raises(ValueError, match="reaches"):
        project(v, r, k, 2.5)
    with pytest.raises(ValueError, match="orthonormal"):
        project(v, r * torch.nan, k, 2.0)
    with pytest.raises(ValueError, match="orthonormal"):
        project(v, 3 * r, k, 2.0)
    with pytest.raises(ValueError, match="coords"):
        project(v, r, k.T, 2.0)
    with pytest.raises(ValueError, match="rotations"):
        project(v, r[0], k, 2.0)
    with pytest.raises(ValueError, match="out must be"):
        project(v, r, k, 2.0, out=torch.empty(2, 3, dtype=v.dtype))


def test_dispatch_follows_device_wish_and_environment(half_volume, monkeypatch, caplog):
    monkeypatch.delenv("FRAZIL_OPS", raising=False)
    monkeypatch.setattr(dispatch, "_announced", set())
    v = half_volume(3)
    with caplog.at_level(logging.INFO, "frazil.ops"):
        assert [dispatch.pick(v, None, op="slices") for _ in range(3)] == ["cpu"] * 3
    assert [m.getMessage() for m in caplog.records] == ["slices runs its cpu implementation on cpu"]
    assert dispatch.pick(v, None, cpu_dtypes=(torch.complex64,)) == "reference"
    monkeypatch.setenv("FRAZIL_OPS", "reference")
    assert dispatch.pick(v, None) == "reference"
    assert dispatch.pick(v, "cpu") == "cpu"
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        dispatch.pick(v, "fast")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="GPU"):
        dispatch.pick(v, "triton")
    with pytest.raises(ValueError, match="at least 1"):
        dispatch.set_threads(0)


def test_workqueue_is_refused_with_threads(half_volume, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "THREADING_LAYER", "workqueue")
    assert dispatch.pick(half_volume(3), "cpu") == "cpu"  # one thread: harmless
    dispatch.set_threads(2)
    with pytest.raises(RuntimeError, match="workqueue"):
        dispatch.pick(half_volume(3), "cpu")


# ---- half planes (2D references) and stacks


def half_plane(m, rng, dtype=torch.complex128):
    """Random centred half plane with a Hermitian column x = 0."""
    plane = torch.randn(2 * m + 1, m + 1, dtype=torch.complex128, generator=rng)
    plane[:, 0] += plane[:, 0].flip(0).conj()
    return plane.to(dtype)


def in_plane(degrees):
    """(n, 3, 3) rotations by psi alone."""
    psi = torch.as_tensor(degrees, dtype=torch.float64)
    return euler_to_matrix(torch.stack([0 * psi, 0 * psi, psi], -1))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_turned_gaussian_is_analytic_to_second_order(implementation, window, relative_error):
    """The rows of an image of an off-centre Gaussian, turned by psi: its transform has the phase ramp of the turned centre."""
    r, k, centre = in_plane([0.0, 17.0, 73.0, 154.0, -100.0]), window(16), torch.tensor([1.5, -2.0], dtype=torch.float64)
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    picture = torch.exp(-((line[None] - centre[0]) ** 2 + (line[:, None] - centre[1]) ** 2) / (2 * WIDTH**2))
    fall = torch.exp(-2 * (math.pi * WIDTH / BOX) ** 2 * k.square().sum(-1)) * 2 * math.pi * WIDTH**2 / BOX**2
    exact = fall * torch.exp(-2j * math.pi / BOX * ((r[:, :2, :2] @ centre) @ k.T))
    errors = []
    for pad in (1, 2, 3):
        m = pad * 8 + 1
        p = torch.cartesian_prod(torch.arange(-m, m + 1, dtype=torch.float64), torch.arange(m + 1, dtype=torch.float64)).flip(-1)
        waves = torch.exp(-2j * math.pi * p[:, :1] * line / (pad * BOX)), torch.exp(-2j * math.pi * p[:, 1:] * line / (pad * BOX))
        plane = torch.einsum("px,py,yx->p", *waves, picture + 0j).reshape(2 * m + 1, m + 1) / BOX**2
        errors.append(relative_error(project(plane, r, k, pad, implementation=implementation), exact))
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[0] / errors[2] == pytest.approx(9, rel=0.3)


def test_plane_is_the_middle_of_a_volume(rng, half_volume, window):
    """A volume's slices about z only read its plane z = 0, and bilinear is trilinear there; the tilt of a rotation is not looked at."""
    v, k, r = half_volume(9), window(8), in_plane([3.0, 90.0, 200.0])
    flat = project(v[9], r, k, 2.0)
    assert torch.allclose(flat, project(v, r, k, 2.0), atol=1e-12)
    assert torch.allclose(flat, project(v[9], r, k, 2.0, implementation="reference"), atol=1e-12)
    tilted = r.clone()
    tilted[:, :2, 2] = 0.5
    assert torch.equal(project(v[9], tilted, k, 2.0), flat)


@pytest.mark.parametrize("implementation", ["reference", "cpu", "triton"])
def test_slices_of_a_stack_are_those_of_its_members(implementation, device, rng, half_volume, rotations, window):
    place = device if implementation == "triton" else "cpu"
    k, r, which = window(6).to(place), rotations(5).to(place), torch.tensor([2, 0, 2, 1, 0], device=place)
    for stack in (torch.stack([half_plane(7, rng) for _ in range(3)]), torch.stack([half_volume(7) for _ in range(3)])):
        stack = stack.to(place)
        turn = r if stack.ndim == 4 else in_plane([10.0, 20, 30, 40, 50]).to(place)
        together = project(stack, turn, k, 2.0, which=which, implementation=implementation)
        for i, s in enumerate(which.tolist()):
            alone = project(stack[s], turn[i : i + 1], k, 2.0, implementation=implementation)[0]
            assert torch.equal(together[i], alone)


@pytest.mark.parametrize("size", [6, 22, 32])
def test_cpu_planes_are_as_exact_as_torch(size, rng, window, relative_error):
    plane, r, k = half_plane(size + 1, rng), in_plane([1.0, 50.0, 170.0, 260.0]), window(size)
    exact = project(plane, r, k, 2.0, implementation="reference")
    assert relative_error(project(plane, r, k, 2.0, implementation="cpu"), exact) < 1e-14
    single = plane.to(torch.complex64)
    exact = project(single.to(torch.complex128), r, k, 2.0, implementation="reference")
    plain = project(single, r, k, 2.0, implementation="reference")
    assert relative_error(project(single, r, k, 2.0, implementation="cpu"), exact) <= 2 * relative_error(plain, exact)


def test_triton_planes_are_as_exact_as_torch(kernel_size, device, rng, window, relative_error):
    plane, r, k = half_plane(kernel_size + 1, rng, torch.complex64), in_plane([1.0, 50.0, 170.0, 260.0]), window(kernel_size)
    exact = project(plane.to(torch.complex128), r, k, 2.0, implementation="reference")
    plain = project(plane, r, k, 2.0, implementation="reference")
    fast = project(plane.to(device), r.to(device), k.to(device), 2.0, implementation="triton").cpu()
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact)


def test_bad_stacks_are_refused(rng, window):
    stack, k, r = torch.stack([half_plane(9, rng)] * 2), window(8), in_plane([0.0, 1.0])
    with pytest.raises(ValueError, match="half plane"):
        project(stack[0, 1:], r, k, 2.0)
    with pytest.raises(ValueError, match="half plane"):
        project(stack[0], r, k, 2.0, which=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="which must be"):
        project(stack, r, k, 2.0, which=torch.tensor([0]))
    with pytest.raises(ValueError, match="names volumes 0 to 2 of 2"):
        project(stack, r, k, 2.0, which=torch.tensor([0, 2]))
