"""The simulator against closed formulae: everything else in tests/pipeline leans on it."""
import math

import pytest
import torch
from torch.testing import assert_close

from frazil.data import BadInput, Optics, Volume
from frazil.maths.fourier import image_from_ft, image_ft
from frazil.maths.rotation import euler_to_matrix, random_rotations, rotation_angle
from frazil.maths.symmetry import operators
from frazil.simulate import (
    Phantom,
    Settings,
    compare_poses,
    density,
    frequencies,
    make_noise,
    noise_spectrum,
    phantom,
    project_phantom,
    project_volume,
    simulate_particles,
)

EYE = torch.eye(3, dtype=torch.float64)[None]
FLAT = Optics(4.0, 32, cs=0.0, amplitude_contrast=1.0)  # with defocus 0 its CTF is 1
NO_CTF = Settings(snr=math.inf, shift_sd=0, defocus=(0, 0), defocus_sd=0, astigmatism=0)


def one_blob(place: tuple[float, float, float], sigma: float = 6.0) -> Phantom:
    return Phantom(*(torch.tensor(v, dtype=torch.float64) for v in ([list(place)], [sigma], [1e4])))


def clean_image(shape: Phantom, rotation: torch.Tensor, optics: Optics) -> torch.Tensor:
    return image_from_ft(project_phantom(shape, rotation, optics).to(torch.complex128), optics.box)[0]


def test_density_is_the_gaussian_at_every_voxel():
    volume = density(one_blob((8.0, -4.0, 12.0)), 32, 4.0).data.double()
    z, y, x = torch.meshgrid(*[(torch.arange(32, dtype=torch.float64) - 16) * 4] * 3, indexing="ij")
    r2 = (x - 8) ** 2 + (y + 4) ** 2 + (z - 12) ** 2
    truth = 1e4 / (2 * math.pi * 36) ** 1.5 * torch.exp(-r2 / 72)
    assert (volume - truth).abs().max() < 1e-4 * truth.max()


def test_projection_along_z_is_the_sum_over_z():
    shape = phantom(32, 4.0, seed=2)
    expected = image_ft(density(shape, 32, 4.0).data.double().sum(0)).clone()
    expected[16], expected[:, 16] = 0, 0  # Nyquist is left out
    assert_close(project_phantom(shape, EYE, FLAT)[0].to(torch.complex128), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("angles", [(0, 0, 90), (0, 90, 0), (35, 71, -128)])
def test_a_blob_appears_where_the_rotation_matrix_puts_it(angles):
    place = torch.tensor([20.0, 8.0, -12.0], dtype=torch.float64)
    rotation = euler_to_matrix(torch.tensor([angles], dtype=torch.float64))
    image = clean_image(one_blob(tuple(place.tolist())), rotation, FLAT).clamp(min=0)
    line = (torch.arange(32, dtype=torch.float64) - 16) * 4
    found = torch.stack([(image.sum(0) * line).sum(), (image.sum(1) * line).sum()]) / image.sum()
    assert_close(found, (rotation[0] @ place)[:2], rtol=0, atol=0.02)


def test_moving_the_image_by_plus_shift_centres_the_particle():
    made = simulate_particles(one_blob((0, 0, 0)), 5, [FLAT], Settings(**{**NO_CTF.__dict__, "shift_sd": 12.0}))
    line = (torch.arange(32, dtype=torch.float64) - 16) * 4
    images = made.single().double().clamp(min=0)
    total = images.sum((1, 2))
    place = torch.stack([(images.sum(1) * line).sum(1) / total, (images.sum(2) * line).sum(1) / total], -1)
    assert made.particles.shift.abs().max() > 8
    assert_close(place + made.particles.shift, torch.zeros(5, 2, dtype=torch.float64), rtol=0, atol=0.05)


def test_magnification_samples_the_slice_at_m_times_k():
    matrix = (1.06, 0.03, -0.02, 0.97)
    shape, rotation = phantom(32, 4.0, seed=2), random_rotations(2, torch.Generator().manual_seed(1))
    optics = Optics(4.0, 32, magnification=matrix)
    k = frequencies(32).reshape(-1, 2) @ torch.tensor(matrix, dtype=torch.float64).reshape(2, 2).T / 128
    p = torch.cat([k, torch.zeros(len(k), 1, dtype=torch.float64)], -1) @ rotation[1]
    envelope = torch.exp(-2 * (math.pi * shape.sigma * p.norm(dim=-1)[:, None]) ** 2) * shape.mass
    direct = (envelope * torch.exp(-2j * math.pi * (p @ shape.centre.T))).sum(-1).reshape(32, 17) / (4 * 128**2)
    direct[16], direct[:, 16] = 0, 0
    error = project_phantom(shape, rotation, optics)[1] - direct
    assert error.abs().max() < 1e-5 * direct.abs().max()


@pytest.mark.parametrize("defocus", [(10000.0, 10000.0, 0.0), (14000.0, 11000.0, 40.0)])
def test_images_carry_the_ctf_of_the_specification(defocus):
    optics = Optics(2.0, 32, voltage=200.0, cs=1.4, amplitude_contrast=0.07)
    u, v, angle = defocus
    made = simulate_particles(phantom(32, 2.0), 1, [optics], Settings(
        snr=math.inf, shift_sd=0, defocus=((u + v) / 2,) * 2, defocus_sd=0, astigmatism=0, seed=5))  # fmt: skip
    k = frequencies(32) / 64
    lam = 12.2643247 / math.sqrt(2e5 * (1 + 0.978466e-6 * 2e5))
    k2 = k.square().sum(-1)
    gamma = -math.pi * lam * k2 * (u + v) / 2 + math.pi / 2 * 1.4e7 * lam**3 * k2**2 - math.asin(0.07)
    expected = project_phantom(phantom(32, 2.0), made.particles.rotation, optics)[0] * -torch.sin(gamma)
    assert_close(image_ft(made.single()[0].double()), expected.to(torch.complex128), rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.sin(-gamma[0, 0]) > 0  # protein is white


@pytest.mark.parametrize("name", ["C1", "C4", "D2", "D7", "T", "O", "I"])
def test_symmetric_phantoms_have_their_symmetry_and_no_more(name):
    shape = phantom(32, 4.0, name, seed=3)
    assert 0.5 * 128 < shape.diameter() < 0.75 * 128
    group = operators(name)
    rotation = random_rotations(1, torch.Generator().manual_seed(4))
    images = project_phantom(shape, rotation @ group, Optics(4.0, 32))
    first = project_phantom(shape, rotation, Optics(4.0, 32))
    assert (images - first).abs().max() < 1e-4 * first.abs().max()
    # Ten degrees away is another image, even where only 40 Å is seen (k <= 3 per box).
    turned = project_phantom(shape, rotation @ euler_to_matrix(torch.tensor([3.0, 9.0, 4.0], dtype=torch.float64)), Optics(4.0, 32))
    low = (frequencies(32).norm(dim=-1) < 5) & (frequencies(32).norm(dim=-1) > 0.5)
    assert (turned - first)[0, low].norm() > 0.03 * first[0, low].norm()


def test_optics_groups_see_one_density_on_one_grey_scale():
    optics = [Optics(4.0, 32, name="a"), Optics(3.0, 48, name="b"), Optics(4.0, 40, name="c")]
    shape, rotation = phantom(32, 4.0), random_rotations(1, torch.Generator().manual_seed(4))
    made = simulate_particles(shape, 9, optics, Settings(snr=0.5, per_micrograph=2))
    assert [s.shape[-1] for s in made.images.stacks] == [32, 48, 40]
    assert made.particles.group.unique().tolist() == [0, 1, 2]
    members = torch.nonzero(made.particles.group == 1)[:, 0]
    assert made.images[members].shape == (len(members), 48, 48)
    with pytest.raises(ValueError, match="one optics group"):
        made.images[torch.arange(9)]
    # X_g(k) u² = V(k/u): at the same 1/Å the same value, u = 144/128; integer k of both at multiples of 9 and 8.
    a, b = (project_phantom(shape, rotation, o, 4.0)[0] for o in optics[:2])
    assert_close(b[9, 9] * (144 / 128) ** 2, a[8, 8], rtol=1e-4, atol=0)


def test_signal_and_noise_have_the_stated_variance():
    optics, shape = [Optics(4.0, 32)], phantom(32, 4.0)
    noisy = simulate_particles(shape, 400, optics, Settings(snr=0.25, seed=7))
    clean = simulate_particles(shape, 400, optics, Settings(snr=math.inf, seed=7))
    factor = float(noisy.truth.data.norm() / clean.truth.data.norm())
    signal = factor * clean.single()
    noise = noisy.single() - signal
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.01
    assert abs(float(signal.var(dim=(1, 2)).mean()) - 0.25) < 0.003
    assert_close(noisy.particles.rotation, clean.particles.rotation)
    again = simulate_particles(shape, 400, optics, Settings(snr=0.25, seed=7))
    assert torch.equal(again.single(), noisy.single())


@pytest.mark.parametrize("coloured", [False, True])
def test_noise_has_the_stated_spectrum(coloured):
    spectrum = noise_spectrum(32, coloured)
    noise = make_noise(600, spectrum, torch.Generator().manual_seed(1))
    assert abs(float(noise.var()) - 1) < 0.01
    power = image_ft(noise.double()).abs().square().mean(0)
    k = frequencies(32)
    shell = (k.norm(dim=-1) + 0.5).floor().long()
    use = (shell <= 16) & (k[..., 0] > 0) & (k[..., 0] < 16)
    for r in range(1, 17):
        count = int((use & (shell == r)).sum()) * 600
        assert abs(float(power[use & (shell == r)].mean() / 2 / spectrum[r]) - 1) < 5 / math.sqrt(count)
    if coloured:
        assert spectrum[1] > 3 * spectrum[16]
    else:
        assert_close(spectrum, torch.full((17,), 1 / (2 * 32**2), dtype=torch.float64))


def test_micrographs_share_scale_and_defocus():
    shape = phantom(32, 4.0)
    settings = Settings(snr=math.inf, scale_sd=0.2, per_micrograph=20, defocus_sd=50.0, astigmatism=400.0)
    made = simulate_particles(shape, 200, [Optics(4.0, 32)], settings)
    p = made.particles
    assert len(p.micrographs) == 10 == len(made.scale)
    assert abs(float(made.scale[p.micrograph].mean()) - 1) < 1e-9 and 0.1 < made.scale.std() < 0.35
    for m in range(10):
        mine = p.defocus[p.micrograph == m]
        assert mine[:, :2].mean(1).std() < 100 and len(mine[:, 2].unique()) == 1
        assert (mine[:, 0] >= mine[:, 1]).all()
    flat = simulate_particles(shape, 200, [Optics(4.0, 32)], Settings(**{**settings.__dict__, "scale_sd": 0.0}))
    ratio = made.single().flatten(1).norm(dim=1) / flat.single().flatten(1).norm(dim=1)
    assert_close(ratio.double(), made.scale[p.micrograph], rtol=1e-4, atol=0)


def test_preferred_views_crowd_round_the_x_axis():
    made = simulate_particles(phantom(32, 4.0), 400, [Optics(4.0, 32)], Settings(preferred=0.7))
    view = made.particles.rotation[:, 2]
    near = (view[:, 0] > math.cos(math.radians(35))).double().mean()
    assert 0.6 < near < 0.85  # 0.7 · 0.9 + 0.3 · 0.09
    assert_close(made.particles.rotation @ made.particles.rotation.mT, EYE.expand(400, 3, 3), rtol=0, atol=1e-9)
    even = simulate_particles(phantom(32, 4.0), 400, [Optics(4.0, 32)], Settings()).particles.rotation[:, 2]
    assert even.mean(0).norm() < 0.12


def test_the_engines_projections_come_close_to_the_exact_ones():
    shape = phantom(32, 4.0)
    optics = Optics(4.0, 32)
    rotation = random_rotations(8, torch.Generator().manual_seed(4))
    exact = project_phantom(shape, rotation, optics)
    near = project_volume(density(shape, 32, 4.0), rotation, optics)
    inside = frequencies(32).norm(dim=-1) < 15
    error = (near - exact)[:, inside].norm() / exact[:, inside].norm()
    assert error < 0.03  # trilinear interpolation at padding 2: 1 to 2.5 % (spec 9.3)
    assert error > 1e-4  # and it is not the same computation


def test_poses_are_compared_modulo_symmetry_and_a_common_move():
    rng = torch.Generator().manual_seed(2)
    group = operators("D2")
    true = simulate_particles(phantom(32, 4.0, "D2"), 60, [Optics(4.0, 32)], Settings()).particles
    turn = euler_to_matrix(torch.tensor([0.7, 1.1, -0.4], dtype=torch.float64))
    wobble = euler_to_matrix(torch.tensor([[0.0, 0.3, 0.0]], dtype=torch.float64))
    mates = group[torch.randint(4, (60,), generator=rng)]
    moved = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    mate = true.rotation @ mates  # as true as the true rotation
    shift = true.shift + torch.einsum("nij,j->ni", mate[:, :2], moved)
    found = type(true)(**{**true.__dict__, "rotation": wobble @ mate @ turn, "shift": shift})
    left = compare_poses(true, found, group)
    assert abs(float(left.angle.median()) - 0.3) < 0.05
    assert rotation_angle(left.rotation, turn) < 0.2
    assert_close(left.translation, moved, rtol=0, atol=1e-6)
    assert left.shift.max() < 1e-6
    # The moved phantom is what those poses see.
    shape = phantom(32, 4.0, seed=9)
    before = project_phantom(shape, mate[:1], FLAT)[0]
    after = project_phantom(shape.moved(turn, moved), mate[:1] @ turn, FLAT)[0]
    k = frequencies(32) / 128
    ramp = torch.exp(-2j * math.pi * (k @ (shift - true.shift)[0]))
    assert (before * ramp - after).abs().max() < 1e-4 * before.abs().max()


def test_bad_wishes_are_named():
    for optics in (Optics(4.0, 31), Optics(4.0)):
        with pytest.raises(BadInput, match="even"):
            simulate_particles(phantom(32, 4.0), 5, [optics])
    with pytest.raises(BadInput, match="at least one particle"):
        simulate_particles(phantom(32, 4.0), 0, [Optics(4.0, 32)])
    with pytest.raises(BadInput, match="Q9"):
        phantom(32, 4.0, "Q9")


def test_a_map_can_be_the_source():
    volume = Volume(density(phantom(32, 4.0), 32, 4.0).data, 4.0)
    before = volume.data.clone()
    made = simulate_particles(volume, 6, [Optics(4.0, 32)], Settings(snr=math.inf))
    exact = simulate_particles(phantom(32, 4.0), 6, [Optics(4.0, 32)], Settings(snr=math.inf))
    assert (made.single() - exact.single()).norm() < 0.05 * exact.single().norm()
    assert torch.equal(volume.data, before) and torch.equal(made.truth.data, before)
