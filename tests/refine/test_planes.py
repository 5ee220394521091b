"""The M-step of 2D classes: the formulas, the volumes' M-step, centring and masks."""
from __future__ import annotations

import pytest
import torch

from frazil.maths.fourier import image_ft, pixel_list
from frazil.maths.fourier2d import half_plane_radii, hermitian_planes, padded_planes
from frazil.maths.rotation import euler_to_matrix
from frazil.ops.insert import insert_
from frazil.ops.project import project
from frazil.refine import planes
from frazil.refine.maximization import wiener_
from frazil.refine.model import Statistics
from frazil.refine.windows import Engine

N, PAD = 24, 2.0
ENGINE = Engine(diameter=-1.0, dtype=torch.float64, pad=PAD)


def picture(rng: torch.Generator, count: int = 2) -> torch.Tensor:
    """(count, N, N) smooth random images within a circle."""
    line = torch.arange(N, dtype=torch.float64) - N // 2
    fall = torch.exp(-(line[:, None] ** 2 + line**2) / (2 * 3.0**2))
    waves = torch.cos(line / 1.3) * torch.sin(line / 1.1 + 1)[:, None]
    return fall * (1 + (1 + torch.rand(count, 1, 1, dtype=torch.float64, generator=rng)) * waves)


def sums(data: torch.Tensor, weight: torch.Tensor) -> Statistics:
    """Statistics with these half planes and nothing else."""
    one = torch.zeros(1, dtype=torch.float64)
    k = len(data)
    return Statistics(data, weight, (one,), one, torch.ones(k, 1, dtype=torch.float64), 0.0, torch.zeros(k, 2), one, one, 0.0, 0.0, 0.0, 1)


def turned_slices(images: torch.Tensor, size: int, angles: torch.Tensor):
    """(K, n, p) slices of K images at n angles, the rotations and the pixels (p, 2)."""
    pixels = pixel_list(N, size)
    k = pixels.k()[: pixels.inside]
    r = euler_to_matrix(torch.stack([0 * angles, 0 * angles, angles], -1))
    reference = planes.reference_planes(images, size, ENGINE)
    return torch.stack([project(plane, r, k, PAD) for plane in reference]), r, k


def test_references_give_the_transform_of_the_image(rng):
    """An unturned slice of a reference is the image's own transform, but for the interpolation's correction (spec 9.3: some %)."""
    images = picture(rng)
    slices, _, k = turned_slices(images, 16, torch.zeros(1, dtype=torch.float64))
    kx, ky = k.long().unbind(-1)
    own = image_ft(images)[:, ky % N, kx]
    assert float((slices[:, 0] - own).norm() / own.norm()) < 0.05


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noiseless_slices_give_the_image_back(rng, noise):
    """All classes at once, sums of unlike weight: V = B/W, mask of N/2, sinc². A strong prior shrinks, a weak one does not."""
    images, size = picture(rng), N
    angles = torch.rand(200, generator=rng, dtype=torch.float64) * 360
    slices, r, k = turned_slices(images, size, angles)
    data = torch.zeros(2, 2 * 25 + 1, 26, dtype=torch.complex128)
    weight = torch.zeros_like(data.real)
    for i, w in enumerate((1.0, 7.0)):
        each = torch.full((len(r), len(k)), w, dtype=torch.float64)
        insert_(data[i], weight[i], slices[i] * w, each, r, k, PAD)
    tau2 = torch.full((2, N // 2 + 1), 1e-12 if noise else 1e6, dtype=torch.float64)
    made = planes.reconstruct_planes(sums(data, weight), tau2, N, ENGINE, "cpu")
    error = (made.maps - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    if noise:
        assert error.min() > 0.2  # shells from 5 on are gone
    else:  # integer frequencies leave the peak about the origin badly sampled: 5 % of the scale, in RELION too
        for a, b in zip(made.maps, images, strict=True):
            assert float((a * b).sum() / (b * b).sum()) == pytest.approx(1, abs=0.07)
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.999
    assert made.data_vs_prior.shape == made.sigma2_map.shape == made.coverage.shape == (2, N // 2 + 1)
    full = slice(1, N // 2)
    assert torch.allclose(made.data_vs_prior[:, full], (tau2 / made.sigma2_map)[:, full], rtol=1e-12)  # both are κ W means
    ratio = made.sigma2_map[0, full] / made.sigma2_map[1, full]
    assert torch.allclose(ratio, torch.full_like(ratio, 7.0), rtol=1e-9)


def test_division_is_that_of_volumes(rng):
    """A volume with one class's plane at z = 0 divides as the plane does, with κ = P² for P³."""
    m = 13
    inside = half_plane_radii(m) <= m - 1
    data = torch.randn(1, 2 * m + 1, m + 1, dtype=torch.complex128, generator=rng) * inside
    weight = (torch.rand(1, 2 * m + 1, m + 1, dtype=torch.float64, generator=rng) + 0.5) * inside
    tau2 = torch.rand(1, 7, dtype=torch.float64, generator=rng) + 0.1
    flat, _ = planes.divide(data, weight, tau2, PAD)
    volume = torch.zeros(2 * m + 1, 2 * m + 1, m + 1, dtype=torch.complex128)
    volume_weight = torch.full(volume.shape, 1.0, dtype=torch.float64)  # elsewhere some weight, so that shell floors stay low
    volume[m], volume_weight[m] = data[0], weight[0]
    solid = volume.clone()
    wiener_(solid, volume_weight, tau2[0] / PAD, PAD, 12)
    assert torch.allclose(flat[0], solid[m], atol=1e-12)


def test_empty_class_becomes_zeros(rng):
    data = torch.zeros(2, 27, 14, dtype=torch.complex128)
    weight = torch.zeros_like(data.real)
    weight[0], data[0] = 1.0, 1.0
    made = planes.reconstruct_planes(sums(data, weight), torch.ones(2, N // 2 + 1, dtype=torch.float64), N, ENGINE, "cpu")
    assert made.maps[0].abs().max() > 0 and made.maps[1].abs().max() == 0
    assert made.sigma2_map[1].max() == 0 and bool(torch.isfinite(made.maps).all())


def test_signal_power_of_white_images(rng):
    """τ² of white noise of variance v is v/(2N²) in the mean, whatever the shell (spec 9.1.2), before the sinc² correction's edge gain."""
    v = 4.0
    images = v**0.5 * torch.randn(400, N, N, dtype=torch.float64, generator=rng)
    correction = planes.interpolation(N, ENGINE)
    power = planes.plane_power(planes.reference_planes(images * correction, N, ENGINE), N, ENGINE.pad).mean(0)
    assert torch.allclose(power[1:-1], torch.full_like(power[1:-1], v / (2 * N**2)), rtol=0.1)


def test_centring_moves_the_mass_to_the_middle():
    """An off-centre blob on a constant background comes to the centre to half a pixel; no farther than the reach; a centred one stays."""
    line = torch.arange(N, dtype=torch.float64) - N // 2
    def blob(x, y):
        return torch.exp(-((line - x) ** 2 + (line[:, None] - y) ** 2) / 8) - 0.05

    maps = torch.stack([blob(3, -2), blob(0, 0), blob(8, 0)])
    everywhere = torch.ones(N, N)
    shift = planes.centre_offsets(maps, 5.0, everywhere)
    assert shift.tolist() == [[-3, 2], [0, 0], [-5, 0]]
    there = planes.moved(maps, shift)
    assert torch.allclose(there[0][8:17, 8:17], blob(0, 0)[8:17, 8:17], atol=1e-12)
    assert planes.centre_offsets(torch.zeros(1, N, N), 5.0, everywhere).tolist() == [[0, 0]]
    beside = blob(0, 0) + blob(9, 0)  # a neighbour counts only where the mask lets it
    near = (line**2 + line[:, None] ** 2 < 36).to(torch.float32)
    assert planes.centre_offsets(beside[None], 9.0, everywhere)[0, 0] < -3
    assert planes.centre_offsets(beside[None], 9.0, near).tolist() == [[0, 0]]


def test_solvent_masks(rng):
    maps = picture(rng)
    flat = planes.flatten_planes(maps, 2.0, 20.0, 2.0, None)
    assert torch.equal(flat[:, N // 2, N // 2], maps[:, N // 2, N // 2]) and flat[:, 0].abs().max() == 0
    mask = torch.zeros(N, N)
    mask[:, :5] = 1
    assert torch.equal(planes.flatten_planes(maps, 2.0, 20.0, 2.0, mask), maps * mask)
    region = torch.zeros(N, N, dtype=torch.float64)
    region[3:6, 3:6] = 1
    filled = planes.flatten_planes(maps, 2.0, 20.0, 2.0, torch.ones(N, N), region)
    assert torch.allclose(filled[:, 3:6, 3:6], maps[:, 3:6, 3:6].mean((1, 2), keepdim=True).expand(-1, 3, 3))


def test_hermitian_before_all(rng):
    """Sums of a real image's slices, made Hermitian, are the transform of a real image: planes give it without imaginary part."""
    ft = padded_planes(picture(rng), PAD, 8)
    assert torch.allclose(hermitian_planes(ft)[..., 0], 2 * ft[..., 0] - torch.nn.functional.pad(ft[:, 17:18, 0], (17, 17)), atol=1e-14)
