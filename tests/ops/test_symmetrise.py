"""Point-group sums: exact on the grid, exact for symmetric maps up to interpolation, all implementations alike."""
from __future__ import annotations

import math

import pytest
import torch

from frazil.maths.fourier import half_volume_radii, padded_ft
from frazil.ops import dispatch
from frazil.ops.symmetrise import symmetrise

IMPLEMENTATIONS = ["reference", "cpu", "triton"]


def about_z(fold: int) -> torch.Tensor:
    """(fold, 3, 3) rotations of C_n."""
    rows = []
    for i in range(fold):
        c, s = math.cos(2 * math.pi * i / fold), math.sin(2 * math.pi * i / fold)
        rows.append([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def operators(rotations):
    """operators(g): the identity, somewhere in the middle, and g − 1 random rotations."""

    def make(g):
        r = rotations(g)
        r[g // 2] = torch.eye(3, dtype=torch.float64)
        return r

    return make


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quarter_turns_add_up_exact_voxels(implementation, device, half_volume):
    """C4 about z maps the grid on itself: B(x, y, z) ← Σ B at (x, y), (−y, x), (−x, −y), (y, −x), inside |p| ≤ M − 1."""
    m = 5
    place = device if implementation == "triton" else "cpu"
    d, w = half_volume(m), half_volume(m, torch.float64)
    out, out_weight = symmetrise(d.to(place), w.to(place), about_z(4).to(place), implementation=implementation)

    def at(volume, x, y, z):
        return volume[z + m, y + m, x] if x >= 0 else volume[m - z, m - y, -x].conj()

    for z in range(-m, m + 1):
        for y in range(-m, m + 1):
            for x in range(m + 1):
                turns = [(x, y), (-y, x), (-x, -y), (y, -x)] if x * x + y * y + z * z <= (m - 1) ** 2 else [(x, y)]
                assert abs(out[z + m, y + m, x].cpu() - sum(at(d, a, b, z) for a, b in turns)) < 1e-12
                assert abs(out_weight[z + m, y + m, x].cpu() - sum(at(w, a, b, z) for a, b in turns)) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_a_symmetric_volume_is_multiplied_by_the_order(implementation, relative_error):
    """Three blobs on a ring, 120° apart: the sum over C3 is three times their transform, up to interpolation."""
    box, c = 24, torch.arange(24, dtype=torch.float64) - 12
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    centres = about_z(3) @ torch.tensor([3.0, 0, 1], dtype=torch.float64)
    ring = sum(torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - e) ** 2) / 8) for a, b, e in centres.tolist())
    errors = []
    for pad in (1, 2):
        v = padded_ft(ring, pad, box // 2 - 2)
        ball = half_volume_radii(v.shape[-1] - 1) <= v.shape[-1] - 3
        out, _ = symmetrise(v, v.real.contiguous(), about_z(3), implementation=implementation)
        errors.append(relative_error(out[ball], 3 * v[ball]))
    assert errors[1] < 0.03 and errors[0] / errors[1] == pytest.approx(4, rel=0.35)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_it_is_a_sum_not_a_mean_and_only_inside(implementation, operators, half_volume):
    m = 7
    d = torch.ones_like(half_volume(m))
    out, weight = symmetrise(d, d.real.contiguous(), operators(5), implementation=implementation)
    radius = half_volume_radii(m)
    assert torch.allclose(weight, torch.where(radius <= m - 1, 5.0, 1.0).double())
    assert torch.allclose(out, weight + 0j)


@pytest.mark.parametrize("m", [6, 13, 35])
def test_cpu_is_as_exact_as_torch(m, operators, half_volume, relative_error):
    """35: more than one tile in every direction."""
    r = operators(4)
    d, w = half_volume(m, torch.complex64), half_volume(m, torch.float32)
    exact = symmetrise(d.to(torch.complex128), w.double(), r, implementation="reference")
    plain = symmetrise(d, w, r, implementation="reference")
    fast = symmetrise(d, w, r, implementation="cpu")
    double = symmetrise(d.to(torch.complex128), w.double(), r, implementation="cpu")
    for i in (0, 1):
        assert fast[i].dtype == (d, w)[i].dtype
        assert relative_error(fast[i], exact[i]) <= 2 * relative_error(plain[i], exact[i])
        assert relative_error(double[i], exact[i]) < 1e-14


def test_triton_is_as_exact_as_torch(kernel_size, device, operators, half_volume, relative_error):
    m = kernel_size + 1
    r = operators(3)
    d, w = half_volume(m, torch.complex64), half_volume(m, torch.float32)
    exact = symmetrise(d.to(torch.complex128), w.double(), r, implementation="reference")
    plain = symmetrise(d, w, r, implementation="reference")
    fast = symmetrise(d.to(device), w.to(device), r.to(device), implementation="triton")
    for i in (0, 1):
        assert relative_error(fast[i].cpu(), exact[i]) <= 2 * relative_error(plain[i], exact[i])


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_inputs_stay_and_threads_do_not_matter(implementation, operators, half_volume):
    d, w, r = half_volume(9, torch.complex64), half_volume(9, torch.float32), operators(6)
    before = [t.clone() for t in (d, w, r)]
    one = symmetrise(d, w, r, implementation=implementation)
    dispatch.set_threads(2)
    two = symmetrise(d, w, r, implementation=implementation)
    if implementation == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (d, w, r), strict=True))


def test_c1_is_a_copy(half_volume):
    d, w = half_volume(5), half_volume(5, torch.float64)
    out, out_weight = symmetrise(d, w, about_z(1))
    assert torch.equal(out, d) and torch.equal(out_weight, w) and out.data_ptr() != d.data_ptr()


def test_bad_arguments_are_refused(half_volume):
    d, w = half_volume(5), half_volume(5, torch.float64)
    with pytest.raises(ValueError, match="half volume"):
        symmetrise(d[1:], w, about_z(2))
    with pytest.raises(ValueError, match="weight must be"):
        symmetrise(d, w.float(), about_z(2))
    with pytest.raises(ValueError, match="identity"):
        symmetrise(d, w, about_z(2)[1:])
    with pytest.raises(ValueError, match="not a rotation"):
        symmetrise(d, w, torch.cat([about_z(1), 2 * about_z(1)]))
    with pytest.raises(ValueError, match="operators"):
        symmetrise(d, w, about_z(2)[0])
