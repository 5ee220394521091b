"""RELION's own programs on our files, and ours on RELION's: conventions are right if both make the same of the same file.

Debian's package `relion` (3.1.3) has the programs; it cannot read float16 stacks, so real particles are copied as float32 first.
"""
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.pipeline.oracle import in_sphere, plain_fsc, sphere
from torch import Tensor

from frazil.data import Images, Optics, Particles
from frazil.io.mrc import read_map, read_stack, write_mrc
from frazil.io.particles import make_particle_set, open_images, read_particles, write_particles
from frazil.io.star import read_star, write_star
from frazil.maths.fourier import image_ft
from frazil.maths.fsc import fsc, resolution_at
from frazil.simulate import Settings, Simulated, frequencies, phantom, project_volume, simulate_particles
from frazil.steps.reconstruct import ReconstructParams, make_target, reconstruct_poses

pytestmark = pytest.mark.agree
BOX, PIXEL = 48, 4.0


def relion(program: str, folder: Path, *arguments: object) -> None:
    """Run a program of RELION's in `folder`; skips the test where there is none, fails with what it said if it fails."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not on the PATH (Debian: apt install relion)")
    done = subprocess.run([program, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def written(made: Simulated, folder: Path) -> Particles:
    """Simulated particles as a stack and data.star in `folder`."""
    write_mrc(folder / "images.mrcs", made.single(), made.particles.optics[0].pixel_size, stack=True)
    names = [f"{i + 1:06d}@images.mrcs" for i in range(len(made.particles))]
    write_particles(folder / "data.star", make_particle_set(made.particles, names))
    return read_particles(folder / "data.star").particles


def our_map(images: Images, particles: Particles, symmetry: str = "C1") -> Tensor:
    """frazil's reconstruction in the box of optics group 1."""
    first = particles.optics[0]
    return reconstruct_poses(images, particles, make_target(first.box, first.pixel_size, ReconstructParams(symmetry=symmetry)))


@pytest.mark.parametrize("symmetry", ["C1", "D2", "T", "O", "I"])
def test_relion_reconstructs_what_we_simulate(tmp_path, symmetry):
    """Euler angles, sign of the shift, CTF with astigmatism, axes of the symmetry groups, the STAR and MRC files themselves."""
    n = 500 if symmetry == "C1" else 120
    made = simulate_particles(
        phantom(BOX, PIXEL, symmetry, seed=3), n, [Optics(PIXEL, BOX, voltage=200.0, cs=1.4)],
        Settings(snr=math.inf, shift_sd=8.0, astigmatism=3000.0, seed=2),
    )  # fmt: skip
    particles = written(made, tmp_path)
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf", "--sym", symmetry)
    theirs, ours, mask = read_map(tmp_path / "map.mrc").data, our_map(made.images, particles, symmetry), sphere(BOX)
    to_truth = plain_fsc(theirs, in_sphere(made.truth.data), mask)
    assert to_truth[:20].min() > 0.99 and to_truth[:20].mean() > 0.998
    assert plain_fsc(theirs, ours, mask)[:22].min() > (0.998 if symmetry == "C1" else 0.99)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_beam_tilt_and_odd_zernike_have_relions_sign(tmp_path, sign):
    """RELION removes the aberration that we simulated, and makes it worse if the file gives the opposite."""
    optics = Optics(PIXEL, BOX, voltage=200.0, cs=2.0, beam_tilt=(12.0, -9.0), odd_zernike=(0.0, -400.0, 300.0, 0.0, -200.0, 0.0))
    made = simulate_particles(phantom(BOX, PIXEL, seed=3), 400, [optics], Settings(snr=math.inf, seed=2))
    told = replace(optics, beam_tilt=tuple(sign * b for b in optics.beam_tilt), odd_zernike=tuple(sign * z for z in optics.odd_zernike))
    written(replace(made, particles=replace(made.particles, optics=(told,))), tmp_path)
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf")
    curve = plain_fsc(read_map(tmp_path / "map.mrc").data, in_sphere(made.truth.data), sphere(BOX))
    assert (curve[12:21].mean() > 0.998) == (sign > 0)


def test_magnification_matrix_is_relions(tmp_path):
    optics = Optics(PIXEL, BOX, magnification=(1.03, 0.012, 0.004, 0.98))
    made = simulate_particles(phantom(BOX, PIXEL, seed=3), 400, [optics], Settings(snr=math.inf, seed=2, astigmatism=2000.0))
    written(made, tmp_path)
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf")
    curve = plain_fsc(read_map(tmp_path / "map.mrc").data, in_sphere(made.truth.data), sphere(BOX))
    assert curve[8:21].mean() > 0.998


def test_projections_are_relions(tmp_path):
    """The same map at the same poses with the same CTF: relion_project and frazil's trilinear slices agree pixel by pixel."""
    made = simulate_particles(phantom(BOX, PIXEL, seed=5), 12, [Optics(PIXEL, BOX)], Settings(snr=math.inf, seed=6, shift_sd=0.0))
    written(made, tmp_path)
    write_mrc(tmp_path / "truth.mrc", made.truth.data, PIXEL)
    relion("relion_project", tmp_path, "--i", "truth.mrc", "--o", "theirs", "--ang", "data.star", "--angpix", PIXEL)
    theirs = image_ft(read_stack(tmp_path / "theirs.mrcs").double())
    ours = project_volume(made.truth, read_particles(tmp_path / "data.star").particles.rotation, made.particles.optics[0])
    use = frequencies(BOX).norm(dim=-1) < BOX / 2 - 1
    difference = (theirs - ours)[:, use].abs().square().sum(1).sqrt() / ours[:, use].abs().square().sum(1).sqrt()
    assert difference.max() < 2e-3


def float32_particles(data: Path, folder: Path, star: Path) -> Particles:
    """Copies of a real particle file with float32 stacks, paths relative to `folder`."""
    (folder / "stacks").mkdir()
    for stack in sorted({name.split("@")[1] for name in read_star(star)["particles"]["rlnImageName"]}):
        write_mrc(folder / stack, read_stack(data / stack), 3.54, stack=True)
    blocks = read_star(star)
    write_star(folder / "data.star", {"optics": blocks["optics"], "particles": blocks["particles"]})
    return read_particles(folder / "data.star").particles


@pytest.mark.real
def test_real_particles_at_relions_poses(tmp_path, shared_data):
    """755 real particles at the poses RELION 5 found: our map is relion_reconstruct's, and RELION 5's own half map up to its filter."""
    run = shared_data / "parity_relion5" / "refine3d"
    float32_particles(shared_data / "betagal_10204", tmp_path, run / "run_data.star")
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf", "--sym", "D2")
    table = read_particles(tmp_path / "data.star")
    ours, mask = our_map(open_images(table), table.particles, "D2"), sphere(64)
    curve = plain_fsc(read_map(tmp_path / "map.mrc").data, ours, mask)
    assert curve[:28].min() > 0.999
    final = read_map(run / "run_class001.mrc").data
    assert plain_fsc(final, ours, mask)[:16].min() > 0.95


def test_postprocess_reads_half_maps(tmp_path):
    """relion_postprocess on two half maps gives the same unmasked FSC and resolution as frazil."""
    made = simulate_particles(phantom(BOX, PIXEL, seed=3), 600, [Optics(PIXEL, BOX)], Settings(snr=0.3, seed=2))
    rows = torch.arange(600)
    halves = []
    for h in (0, 1):
        target = make_target(BOX, PIXEL, ReconstructParams())
        halves.append(reconstruct_poses(made.images, made.particles, target, rows[rows % 2 == h]))
        write_mrc(tmp_path / f"run_half{h + 1}_class001_unfil.mrc", halves[-1], PIXEL)
    arguments = ("--i", "run_half1_class001_unfil.mrc", "--angpix", PIXEL, "--auto_mask", "--o", "post", "--adhoc_bfac", 0)
    relion("relion_postprocess", tmp_path, *arguments)
    theirs = read_star(tmp_path / "post.star")["fsc"]["rlnFourierShellCorrelationUnmaskedMaps"].to_numpy()
    ours = fsc(*halves)
    # RELION's shells are those of rounded |k|, as ours; the last one holds Nyquist.
    assert np.abs(theirs[: BOX // 2] - ours.numpy()[: BOX // 2]).max() < 2e-3
    assert 2 * PIXEL <= resolution_at(ours, 0.143, BOX, PIXEL) < 40
