"""Reconstruction from true poses against the phantom (spec/refinement 9.2.0 and 9.2 a)."""
import math
from dataclasses import replace

import pytest
import torch
from tests.pipeline.oracle import PAD, in_sphere, plain_fsc, plain_map, shells, sphere, sums_of_true_poses, transform, true_pose_map

from frazil.data import Optics
from frazil.refine.maximization import map_variance
from frazil.simulate import Settings, phantom, simulate_particles
from frazil.steps.reconstruct import ReconstructParams, make_target, reconstruct_poses

BOX, PIXEL = 32, 4.0


def test_noiseless_map_is_the_phantom():
    box = 48
    made = simulate_particles(phantom(box, PIXEL), 1500, [Optics(PIXEL, box)], Settings(snr=math.inf, shift_sd=6.0, seed=3))
    found, truth, mask = true_pose_map(made), in_sphere(made.truth.data), sphere(box, 0.45, 0.05)
    curve = plain_fsc(found, truth, mask)
    # 0.999 to 0.9 Nyquist (shell 21.6); the phantom is bright up to Nyquist, where trilinear interpolation is at its worst.
    assert curve[:22].min() > 0.999
    assert curve[:24].min() > 0.995
    a, b = found[mask > 0.5], truth[mask > 0.5]
    assert 0.98 < float((a * b).sum() / b.square().sum()) < 1.02
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9995


HARD = Optics(
    PIXEL, BOX, voltage=200.0, cs=2.0, beam_tilt=(12.0, -9.0), odd_zernike=(0.0, -400.0, 300.0, 0.0, -200.0, 0.0),
    even_zernike=(0.0, 150.0, 0.0, -120.0), magnification=(1.03, 0.01, 0.005, 0.98),
)  # fmt: skip


def frazils_map(made, particles=None, **params):
    """What `frazil reconstruct` makes of simulated particles."""
    target = make_target(made.truth.data.shape[-1], made.truth.pixel_size, ReconstructParams(**params))
    return reconstruct_poses(made.images, particles or made.particles, target)


@pytest.mark.parametrize("optics", [Optics(PIXEL, BOX), HARD], ids=["plain", "aberrations and magnification"])
def test_frazil_reconstruct_gives_the_phantom(optics):
    made = simulate_particles(phantom(BOX, PIXEL), 600, [optics], Settings(snr=math.inf, shift_sd=6.0, seed=3))
    curve = plain_fsc(frazils_map(made), in_sphere(made.truth.data), sphere(BOX))
    assert curve[:14].min() > 0.998
    if optics is HARD:  # each aberration matters: without it the map is worse
        for left_out in ("beam_tilt", "odd_zernike", "even_zernike", "magnification"):
            wrong = replace(optics, **{left_out: getattr(Optics(1.0), left_out)})
            spoilt = frazils_map(made, replace(made.particles, optics=(wrong,)))
            assert plain_fsc(spoilt, in_sphere(made.truth.data), sphere(BOX))[8:14].mean() < curve[8:14].mean() - 0.001, left_out


@pytest.mark.parametrize("name", ["C4", "D2", "O"])
def test_symmetry_operators_and_poses_belong_together(name):
    """Few particles and many operators: the map is right only if A and A·R are equivalent as section 6.3 says."""
    shape = phantom(BOX, PIXEL, name)
    made = simulate_particles(shape, 150, [Optics(PIXEL, BOX)], Settings(snr=math.inf, seed=3))
    curve = plain_fsc(true_pose_map(made, group=name), made.truth.data, sphere(BOX))
    assert curve[:15].min() > 0.998


def test_optics_groups_of_other_box_and_pixel_give_the_same_map():
    shape = phantom(BOX, PIXEL)
    optics = [Optics(PIXEL, BOX), Optics(3.0, 48), Optics(3.5, 40)]
    made = simulate_particles(shape, 900, optics, Settings(snr=math.inf, shift_sd=6.0, scale_sd=0.2, per_micrograph=30, seed=5))
    found, mask = true_pose_map(made), sphere(BOX, 0.45, 0.05)
    assert plain_fsc(found, made.truth.data, mask)[:15].min() > 0.998
    # Were a group's grey scale off by u² (here 1.27 and 1.2), the slope would show it.
    for g in range(3):
        alone = plain_map(*sums_of_true_poses(made.images, made.particles, made, only=g), BOX)
        slope = float((alone * made.truth.data * mask).sum() / (made.truth.data.double().square() * mask).sum())
        assert 0.97 < slope < 1.03


def test_noise_of_the_map_is_what_the_weights_say():
    """The variance of a shell is σ²_ref (3.2), to the few per cent by which ⟨1/W⟩ exceeds 1/⟨W⟩; and FSC to truth follows the SSNR."""
    shape = phantom(BOX, PIXEL)
    # A CTF of 1 and even views, so that W is smooth.
    flat = Optics(PIXEL, BOX, cs=0.0, amplitude_contrast=1.0)
    no_ctf = {"defocus": (0.0, 0.0), "defocus_sd": 0.0, "astigmatism": 0.0}
    made = simulate_particles(shape, 1200, [flat], Settings(snr=0.05, seed=2, **no_ctf))
    data, weight = sums_of_true_poses(made.images, made.particles, made)
    found = plain_map(data, weight, BOX)
    clean = simulate_particles(shape, 1200, [flat], Settings(snr=math.inf, seed=2, **no_ctf))
    signal = true_pose_map(clean) * float(made.truth.data.norm() / clean.truth.data.norm())
    shell = shells(BOX).flatten()
    count = torch.bincount(shell)[: BOX // 2 + 1]
    noise = transform(found - signal).abs().square().flatten() / 2
    variance = torch.zeros(2 * BOX, dtype=torch.float64).index_add_(0, shell, noise)[: BOX // 2 + 1] / count
    expected = map_variance(weight, PAD, BOX)
    ratio = (variance / expected)[6:15]
    assert ratio.min() > 0.9 and ratio.max() < 1.25
    assert 0.98 < ratio.mean() < 1.12
    power = transform(made.truth.data).abs().square().flatten() / 2
    ssnr = torch.zeros(2 * BOX, dtype=torch.float64).index_add_(0, shell, power)[: BOX // 2 + 1] / count / expected
    curve = plain_fsc(found, made.truth.data)
    assert (curve - torch.sqrt(ssnr / (1 + ssnr)))[2:15].abs().max() < 0.06


def test_a_wrong_sign_anywhere_is_seen():
    """The oracle itself must be able to fail: shift, in-plane angle, defocus and handedness reversed each spoil the map."""
    shape = phantom(BOX, PIXEL)
    made = simulate_particles(shape, 300, [Optics(PIXEL, BOX)], Settings(snr=math.inf, seed=3, astigmatism=3000.0))
    p = made.particles
    wrong = {
        "shift": -p.shift,
        "rotation": p.rotation.mT.contiguous(),
        "defocus": torch.stack([p.defocus[:, 1], p.defocus[:, 0], p.defocus[:, 2]], -1),
    }
    right = plain_fsc(true_pose_map(made), made.truth.data, sphere(BOX))
    for name, value in wrong.items():
        curve = plain_fsc(true_pose_map(made, type(p)(**{**p.__dict__, name: value})), made.truth.data, sphere(BOX))
        assert curve[4:14].mean() < right[4:14].mean() - 0.002, name
