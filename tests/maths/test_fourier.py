"""Transforms, pixel lists and half volumes (spec/refinement 1.1-1.4, 9.1.1, 2, 4, 5, 11, 16)."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.maths import fourier
from frazil.maths.filters import friedel_weights
from frazil.maths.fourier import (
    fourier_resample,
    full_half_plane,
    half_volume_radius,
    image_from_ft,
    image_ft,
    make_hermitian,
    map_from_half_volume,
    padded_ft,
    pixel_list,
    resolution_shell,
    round_half_away,
    shell_counts,
    shell_round,
    slabs,
)
from frazil.maths.gridding import sinc2
from frazil.maths.rotation import euler_to_matrix, random_rotations


def error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b."""
    return float((a - b).abs().square().sum().sqrt() / b.abs().square().sum().sqrt())


def test_rounding_is_away_from_zero() -> None:
    x = torch.tensor([2.5, 3.5, -2.5, 0.5, -0.5, 0.49999, 2.4, 0.0])
    assert shell_round(x).tolist() == [3, 4, -3, 1, -1, 0, 2, 0]
    assert [round_half_away(v) for v in (2.5, 3.5, -2.5, -2.4)] == [3, 4, -3, -2]
    assert resolution_shell(64, 3.54, 40.0) == 6 and resolution_shell(100, 1.0, 40.0) == 3


def test_image_transform_has_its_origin_at_the_box_centre() -> None:
    image = torch.zeros(16, 16, dtype=torch.float64)
    image[8, 8] = 3.0
    torch.testing.assert_close(image_ft(image), torch.full((16, 9), 3.0 / 256, dtype=torch.complex128))


@pytest.mark.parametrize("box", [8, 18])
def test_image_transform_is_the_written_sum(box: int, rng: torch.Generator) -> None:
    image = torch.randn(box, box, generator=rng, dtype=torch.float64)
    c = torch.arange(box, dtype=torch.float64) - box // 2
    ky, kx = 3, 2
    wave = torch.exp(-2j * math.pi / box * (kx * c[None, :] + ky * c[:, None]))
    torch.testing.assert_close(image_ft(image)[ky, kx], (image * wave).sum() / box**2)
    torch.testing.assert_close(image_from_ft(image_ft(image), box), image)


def test_parseval_on_the_stored_half(rng: torch.Generator) -> None:
    images = torch.randn(3, 18, 18, generator=rng, dtype=torch.float64)
    power = (image_ft(images).abs().square() * friedel_weights(18)).sum((-2, -1))
    torch.testing.assert_close(power, images.square().mean((-2, -1)), rtol=1e-12, atol=0)


def test_white_noise_has_half_over_n_squared_per_component(rng: torch.Generator) -> None:
    n = 32
    index, shell = full_half_plane(n)
    power = image_ft(torch.randn(500, n, n, generator=rng, dtype=torch.float64)).abs().square().flatten(1).mean(0)[index]
    spectrum = torch.bincount(shell, power, minlength=n // 2 + 1) / (2 * shell_counts(n))
    spread = 1 / (shell_counts(n) * 500).sqrt()
    # Pixels that are their own mates (0 and on the Nyquist lines) are real, but have the same power.
    assert ((spectrum * 2 * n**2 - 1).abs()[1:] < 5 * spread[1:]).all()


def test_positive_offset_moves_the_content_by_plus_o() -> None:
    """X_t = X exp(−2πi k·o/N) (spec 1.4): the blob at −o comes to the centre."""
    n, o = 24, torch.tensor([3.0, -2.0], dtype=torch.float64)  # xy, px
    c = torch.arange(n, dtype=torch.float64) - n // 2
    blob = torch.exp(-((c[None, :] + o[0]).square() + (c[:, None] + o[1]).square()) / 8)
    ky = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None]
    kx = torch.arange(n // 2 + 1, dtype=torch.float64)[None]
    moved = image_from_ft(image_ft(blob) * torch.exp(-2j * math.pi / n * (kx * o[0] + ky * o[1])), n)
    assert divmod(int(moved.argmax()), n) == (n // 2, n // 2)


@pytest.mark.parametrize(("box", "size"), [(16, 16), (16, 10), (18, 6), (20, 14)])
def test_pixel_list_holds_each_independent_pixel_once(box: int, size: int) -> None:
    found = pixel_list(box, size)
    expected = set()
    for ky in range(-size // 2 + 1, size // 2 + 1):
        for kx in range(0, size // 2 + 1):
            if math.floor(math.hypot(kx, ky) + 0.5) <= size // 2 and (kx > 0 or ky >= 0):
                expected.add((kx, ky))
    pixels = list(zip(found.kx.tolist(), found.ky.tolist(), strict=True))
    assert len(set(pixels)) == len(pixels) and set(pixels) == expected
    assert pixels[0] == (0, 0)
    k2 = found.k().square().sum(-1)
    assert (k2.diff() >= 0).all()
    assert found.inside == int((k2.sqrt() <= size / 2).sum()) and (found.shell == (k2.sqrt() + 0.5).floor()).all()


def test_pixel_list_points_into_the_transform(rng: torch.Generator) -> None:
    n = 16
    ft = image_ft(torch.randn(n, n, generator=rng, dtype=torch.float64))
    full = torch.fft.fft2(torch.fft.ifftshift(image_from_ft(ft, n))) / n**2
    found = pixel_list(n, 12)
    torch.testing.assert_close(ft.flatten()[found.index], full[found.ky % n, found.kx])


def test_smaller_window_is_a_prefix() -> None:
    big = pixel_list(32, 24)
    for size in (4, 10, 16, 24):
        small = pixel_list(32, size)
        count = big.count_inside(size)
        assert count == small.inside
        assert torch.equal(big.index[:count], small.index[:count])


def test_shell_counts_are_half_of_the_plane() -> None:
    """In the shells below Nyquist every pixel and its mate are one of the list."""
    n = 20
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    shell = ((k[:, None].square() + k[None].square()).sqrt() + 0.5).floor().long().flatten()
    whole = torch.bincount(shell, minlength=n)[: n // 2]
    assert shell_counts(n)[0] == 1
    assert torch.equal(2 * shell_counts(n)[1 : n // 2].long(), whole[1:])


def every_voxel(m: int) -> Tensor:
    """(2M+1, 2M+1, M+1) |p| written out, to check the slabs against."""
    c, x = torch.arange(-m, m + 1).double(), torch.arange(m + 1).double()
    return (c[:, None, None] ** 2 + c[None, :, None] ** 2 + x**2).sqrt()


def test_slabs_cover_a_half_volume_in_order() -> None:
    pieces = list(slabs(7, most=500))
    assert len(pieces) > 2
    torch.testing.assert_close(torch.cat([r for _, r in pieces]), every_voxel(7))
    assert [i for part, _ in pieces for i in range(part.start, part.stop)] == list(range(15))


@pytest.mark.parametrize(("box", "pad", "r_max"), [(6, 2, 3), (8, 1, 4), (6, 3, 2), (10, 1.5, 4)])
def test_padded_transform_is_the_written_sum(box: int, pad: float, r_max: int, rng: torch.Generator) -> None:
    volume = torch.randn(box, box, box, generator=rng, dtype=torch.float64)
    half = padded_ft(volume, pad, r_max)
    m = half_volume_radius(pad, r_max)
    assert half.shape == (2 * m + 1, 2 * m + 1, m + 1)
    big = round_half_away(pad * box)
    c = torch.arange(box, dtype=torch.float64) - box // 2
    p = torch.arange(-m, m + 1, dtype=torch.float64)
    wave = torch.exp(-2j * math.pi / big * p[:, None] * c)
    expected = torch.einsum("zyx,az,by,cx->abc", volume.to(wave), wave, wave, wave[m:]) / box**2
    expected[every_voxel(m) > m - 1] = 0
    torch.testing.assert_close(half, expected, atol=1e-12, rtol=0)


def test_central_section_is_the_projection(rng: torch.Generator) -> None:
    """At P = 1 and no rotation the z = 0 plane is the transform of Σ_z v, exactly."""
    volume = torch.randn(12, 12, 12, generator=rng, dtype=torch.float64)
    half, pixels = padded_ft(volume, 1, 6), pixel_list(12, 12)
    m, count = half.shape[-1] - 1, pixels.inside
    plane = half[m, pixels.ky[:count] + m, pixels.kx[:count]]
    torch.testing.assert_close(plane, image_ft(volume.sum(0)).flatten()[pixels.index[:count]])


@pytest.mark.parametrize("pad", [1, 1.5, 2])
def test_back_to_the_map(pad: float, blobs) -> None:
    """A band-limited map survives the round trip; a cut-off keeps what a low-pass keeps."""
    volume = blobs.map()
    torch.testing.assert_close(map_from_half_volume(padded_ft(volume, pad, 12), pad, 24), volume, atol=2e-4, rtol=0)
    low = map_from_half_volume(padded_ft(volume, pad, 5), pad, 24)
    assert low.mean().item() == pytest.approx(volume.mean().item(), abs=2e-3)
    assert 0.05 < error(low, volume) < 0.5


def test_a_wave_at_the_nyquist_frequency_comes_back_whole() -> None:
    """At P = 1 frequencies N/2 and −N/2 are one element of the grid, but two of the half volume."""
    stripes = ((-1.0) ** torch.arange(8, dtype=torch.float64)).expand(8, 8, 8)
    for axis in (0, 1, 2):
        volume = stripes.movedim(2, axis).contiguous()
        torch.testing.assert_close(map_from_half_volume(padded_ft(volume, 1, 4), 1, 8), volume)


def test_transforms_leave_their_input_alone(blobs, rng: torch.Generator) -> None:
    volume, image = blobs.map(), torch.randn(16, 16, generator=rng)
    half = padded_ft(volume, 2, 6)
    copies = volume.clone(), image.clone(), half.clone()
    image_from_ft(image_ft(image), 16), map_from_half_volume(half, 2, 24), make_hermitian(half), fourier_resample(volume, 20)
    assert all(torch.equal(a, b) for a, b in zip(copies, (volume, image, half), strict=True))


def test_hermitian_merge_sums_mates(rng: torch.Generator) -> None:
    half = torch.randn(7, 7, 4, generator=rng, dtype=torch.complex128)
    half[3, 3, 0] = 2.0
    merged = make_hermitian(half)
    assert merged[3, 3, 0] == 2.0, "the origin is its own mate and is not counted twice"
    plane = merged[:, :, 0]
    torch.testing.assert_close(plane, plane.flip(0, 1).conj())
    torch.testing.assert_close(plane[5, 1], half[5, 1, 0] + half[1, 5, 0].conj())
    torch.testing.assert_close(merged[:, :, 1:], half[:, :, 1:])
    weight = torch.rand(7, 7, 4, generator=rng)
    assert make_hermitian(weight)[2, 6, 0] == weight[2, 6, 0] + weight[4, 0, 0]


def test_slices_are_the_analytic_projections_and_the_error_falls_with_padding(blobs, trilinear, rng: torch.Generator) -> None:
    """Spec 9.1.4: any orientation, P = 1, 2, 3; without the sinc² correction they are wrong."""
    pixels = pixel_list(24, 20)
    k, rotations = pixels.k()[: pixels.inside], random_rotations(40, rng)
    truth = blobs.slices(rotations, k)
    errors = {}
    for pad in (1, 2, 3):
        plain = trilinear.gather(padded_ft(blobs.map(), pad, 12), rotations, k, pad)
        corrected = trilinear.gather(padded_ft(blobs.map() / sinc2(24, pad, "separable", dtype=torch.float64), pad, 12), rotations, k, pad)
        errors[pad] = error(corrected, truth)
        assert errors[pad] < 0.8 * error(plain, truth)
    assert errors[2] < 0.035 and errors[3] < 0.6 * errors[2] and errors[2] < 0.4 * errors[1]


def test_slice_of_a_moved_volume_has_the_phase_of_the_turned_shift(blobs, trilinear, rng: torch.Generator) -> None:
    pixels = pixel_list(24, 16)
    k, rotations = pixels.k()[: pixels.inside], random_rotations(5, rng)
    volume = blobs.map() / sinc2(24, 2, dtype=torch.float64)
    moved = padded_ft(blobs.map().roll((1, -1, 2), (0, 1, 2)) / sinc2(24, 2, dtype=torch.float64), 2, 12)  # by z 1, y −1, x 2
    seen = (rotations @ torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64))[:, :2]
    ramp = torch.exp(-2j * math.pi / 24 * (seen @ k.T))
    still = trilinear.gather(padded_ft(volume, 2, 12), rotations, k, 2)
    found = trilinear.gather(moved, rotations, k, 2)
    assert error(found, still * ramp) < 0.03 < 0.3 < error(found, still * ramp.conj())


def test_turning_the_map_and_the_poses_changes_nothing(blobs, trilinear, rng: torch.Generator) -> None:
    """Spec 9.1.11: V turned by R and poses A Rᵀ give the same slices; so does the mirrored map with mirrored poses."""
    pixels = pixel_list(24, 16)
    k, poses = pixels.k()[: pixels.inside], random_rotations(20, rng)
    turn = euler_to_matrix(torch.tensor([40.0, 65.0, -20.0], dtype=torch.float64))
    corrected = [b.map() / sinc2(24, 2, dtype=torch.float64) for b in (blobs, blobs.turned(turn), blobs.turned(-torch.eye(3).double()))]
    still, turned, inverted = (padded_ft(v, 2, 12) for v in corrected)
    reference = trilinear.gather(still, poses, k, 2)
    assert error(trilinear.gather(turned, poses @ turn.T, k, 2), reference) < 0.04
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    assert error(trilinear.gather(inverted, half_turn @ poses, k, 2), reference) < 1e-3  # (x, y) → −(x, y) and v(−r): the same view
    assert error(trilinear.gather(inverted, poses, k, 2), reference) > 0.3


def test_opposite_in_plane_angle_is_the_conjugate_slice(blobs, trilinear) -> None:
    k = pixel_list(24, 16).k()
    half = padded_ft(blobs.map(), 2, 12)
    a = euler_to_matrix(torch.tensor([[20.0, 70.0, 15.0], [20.0, 70.0, 195.0]], dtype=torch.float64))
    one, other = trilinear.gather(half, a, k, 2)
    torch.testing.assert_close(one, other.conj())


@pytest.mark.parametrize(("old", "new"), [(24, 18), (18, 24), (24, 17), (24, 24)])
def test_resampling_keeps_a_band_limited_map(old: int, new: int) -> None:
    """Waves of up to 5 cycles a box, sampled from the box centre, on either grid."""

    def sampled(n: int) -> Tensor:
        c = (torch.arange(n, dtype=torch.float64) - n // 2) / n * 2 * math.pi
        z, y, x = c[:, None, None], c[None, :, None], c[None, None, :]
        return 2.0 + torch.cos(3 * x + 2 * y - z + 0.3) + torch.sin(5 * y + 4 * z) * 0.5

    torch.testing.assert_close(fourier_resample(sampled(old), new), sampled(new))
    torch.testing.assert_close(fourier_resample(sampled(old)[old // 2], new), sampled(new)[new // 2])


def test_a_stack_as_deep_as_wide_can_be_resampled_as_images(rng: torch.Generator) -> None:
    stack = torch.randn(12, 12, 12, generator=rng, dtype=torch.float64)
    small = fourier_resample(stack, 8, dims=2)
    assert small.shape == (12, 8, 8)
    torch.testing.assert_close(small[5], fourier_resample(stack[5], 8))
    assert fourier_resample(stack, 8).shape == (8, 8, 8)


@pytest.mark.parametrize(("box", "pad", "r_max"), [(16, 2.0, 8), (16, 2.0, 5), (12, 1.0, 6)])
def test_transforms_by_products_are_those_by_ffts(rng: torch.Generator, monkeypatch, box: int, pad: float, r_max: int) -> None:
    """What a GPU does, on the CPU, in one chunk and in many."""
    big, m = round_half_away(pad * box), half_volume_radius(pad, r_max)
    volume = torch.randn(box, box, box, generator=rng, dtype=torch.float64)
    half = padded_ft(volume, pad, r_max)
    hermitian = make_hermitian(half * torch.randn(half.shape, generator=rng, dtype=torch.float64))
    back = map_from_half_volume(hermitian, pad, box)
    for elements in (fourier.PRODUCT, 1):
        monkeypatch.setattr(fourier, "PRODUCT", elements)
        torch.testing.assert_close(fourier._inside_sphere_(fourier._padded_by_products(volume / box**2, big, m)), half)
        torch.testing.assert_close(fourier._cropped_by_products(hermitian, big, box, box**2 / big**3), back)
