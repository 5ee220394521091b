"""RELION's own programs on our files, and ours on RELION's: conventions are right if both make the same of the same file.

Debian's package `relion` (3.1.3) has the programs; it cannot read float16 stacks, so real particles are copied as float32 first.
"""
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.pipeline.oracle import in_sphere, plain_fsc, sphere
from torch import Tensor

from frazil.data import Images, Optics, Particles
from frazil.io.mrc import read_map, read_stack, write_mrc
from frazil.io.particles import make_particle_set, match_by_image_name, open_images, read_particles, write_particles
from frazil.io.star import read_star, write_star
from frazil.maths.fourier import image_ft
from frazil.maths.fsc import fsc, resolution_at
from frazil.maths.rotation import rotation_angle
from frazil.maths.symmetry import operators
from frazil.simulate import Settings, Simulated, frequencies, phantom, project_volume, simulate_particles
from frazil.steps.reconstruct import ReconstructParams, make_target, reconstruct_poses

pytestmark = pytest.mark.agree
BOX, PIXEL = 48, 4.0
REPOSITORY = Path(__file__).resolve().parents[2]


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
    # Direct division, as ours; RELION 3.1's iterative gridding differs by a few thousandths of FSC near Nyquist.
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf", "--sym", symmetry, "--skip_gridding")
    theirs, ours, mask = read_map(tmp_path / "map.mrc").data, our_map(made.images, particles, symmetry), sphere(BOX)
    assert plain_fsc(theirs, in_sphere(made.truth.data), mask)[:20].mean() > 0.998
    curve = plain_fsc(theirs, ours, mask)
    assert curve[:24].mean() > 0.999 and curve[8:24].min() > 0.9995


TILTED = Optics(PIXEL, BOX, voltage=200.0, cs=2.0, beam_tilt=(12.0, -9.0), odd_zernike=(0.0, 0.0, 300.0, 0.0, 0.0, -200.0))
COMA = Optics(PIXEL, BOX, odd_zernike=(0.0, -800.0, 0.0, 0.0, -400.0, 0.0))  # Z1 takes the shift out of Z3
EVEN = Optics(PIXEL, BOX, even_zernike=(0.0, 150.0, 60.0, -120.0, 0.0, 2000.0))


@pytest.mark.parametrize("optics", [TILTED, COMA, EVEN], ids=["beam tilt and trefoil", "coma", "even"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_aberrations_have_relions_sign_and_order(tmp_path, optics, sign):
    """RELION removes the aberration that we simulated, and makes it worse if the file gives the opposite."""
    made = simulate_particles(phantom(BOX, PIXEL, seed=3), 300, [optics], Settings(snr=math.inf, seed=2))
    told = replace(
        optics, beam_tilt=tuple(sign * b for b in optics.beam_tilt), odd_zernike=tuple(sign * z for z in optics.odd_zernike),
        even_zernike=tuple(sign * z for z in optics.even_zernike),
    )  # fmt: skip
    written(replace(made, particles=replace(made.particles, optics=(told,))), tmp_path)
    if optics is COMA:  # where a file has rlnBeamTiltX, RELION takes Z3⁻¹ and Z3¹ from it and leaves those of rlnOddZernike
        star = read_star(tmp_path / "data.star")
        star["optics"] = star["optics"].drop(columns=["rlnBeamTiltX", "rlnBeamTiltY"], errors="ignore")
        write_star(tmp_path / "data.star", star)
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf")
    curve = plain_fsc(read_map(tmp_path / "map.mrc").data, in_sphere(made.truth.data), sphere(BOX))
    if sign > 0:
        assert curve[12:21].mean() > 0.998
    else:
        assert curve[12:21].mean() < 0.95


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
    """755 real particles at the poses RELION 5 found: our map is relion_reconstruct's, and near RELION 5's own final map."""
    run = shared_data / "parity_relion5" / "refine3d"
    float32_particles(shared_data / "betagal_10204", tmp_path, run / "run_data.star")
    table = read_particles(tmp_path / "data.star")
    ours, mask = our_map(open_images(table), table.particles, "D2"), sphere(64)
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "map.mrc", "--ctf", "--sym", "D2", "--skip_gridding")
    direct = read_map(tmp_path / "map.mrc").data
    assert plain_fsc(direct, ours, mask)[:30].min() > 0.9998
    assert float((direct - ours)[mask > 0.5].norm() / ours[mask > 0.5].norm()) < 0.03  # mostly the last shells
    relion("relion_reconstruct", tmp_path, "--i", "data.star", "--o", "gridded.mrc", "--ctf", "--sym", "D2")
    assert plain_fsc(read_map(tmp_path / "gridded.mrc").data, ours, mask)[:22].min() > 0.998
    # RELION 5 summed over all poses of a posterior, not only the best; where the map is well determined that is the same.
    assert plain_fsc(read_map(run / "run_class001.mrc").data, ours, mask)[:12].min() > 0.999


def half_array_fsc(a: Tensor, b: Tensor) -> Tensor:
    """(N/2,) FSC as RELION sums it: every voxel of the half transform once, so those of kx = 0 weigh twice what the others do."""
    n = a.shape[-1]
    fa, fb = (torch.fft.rfftn(v.double()) for v in (a, b))
    line = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    radius = torch.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + torch.arange(n // 2 + 1, dtype=torch.float64) ** 2)
    shell = (radius + 0.5).long().flatten()
    total = [torch.zeros(2 * n, dtype=torch.float64).index_add_(0, shell, v.flatten())[: n // 2]
             for v in ((fa * fb.conj()).real, fa.abs().square(), fb.abs().square())]  # fmt: skip
    return total[0] / (total[1] * total[2]).sqrt()


def postprocessed(folder: Path, root: str, mask: Tensor, pixel_size: float) -> pd.DataFrame:
    """The FSC table of relion_postprocess on the half maps `root`_half1_class001_unfil.mrc and _half2_ in `folder`."""
    write_mrc(folder / "mask.mrc", mask, pixel_size)
    (folder / "post").mkdir()
    relion(
        "relion_postprocess", folder, "--i", f"{root}_half1_class001_unfil.mrc", "--mask", "mask.mrc", "--angpix", pixel_size,
        "--o", "post/post", "--adhoc_bfac", 0,
    )  # fmt: skip
    return read_star(folder / "post" / "post.star")["fsc"]


def test_postprocess_reads_half_maps(tmp_path):
    """relion_postprocess on two half maps gives our FSC, but for the double weight it gives to kx = 0, masked and unmasked."""
    made = simulate_particles(phantom(BOX, PIXEL, seed=3), 600, [Optics(PIXEL, BOX)], Settings(snr=0.3, seed=2))
    rows, halves = torch.arange(600), []
    for h in (0, 1):
        target = make_target(BOX, PIXEL, ReconstructParams())
        halves.append(reconstruct_poses(made.images, made.particles, target, rows[rows % 2 == h]))
        write_mrc(tmp_path / f"run_half{h + 1}_class001_unfil.mrc", halves[-1], PIXEL)
    mask = sphere(BOX)
    theirs = postprocessed(tmp_path, "run", mask, PIXEL)
    for label, maps in (("UnmaskedMaps", halves), ("MaskedMaps", [h * mask for h in halves])):
        column = theirs[f"rlnFourierShellCorrelation{label}"].to_numpy()[: BOX // 2]
        assert np.abs(column - half_array_fsc(*maps).numpy()).max() < 1e-4, label
        assert np.abs(column - fsc(*maps).numpy()[: BOX // 2]).max() < 0.02, label
    assert 2 * PIXEL <= resolution_at(fsc(*halves), 0.143, BOX, PIXEL) < 40


def frazil(folder: Path, *arguments: object) -> None:
    """Run a frazil command in `folder`; fails with its errors unless it ends well."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "frazil", *map(str, arguments), "--quiet", "--threads", "1"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_relion_reads_a_whole_run(tmp_path):
    """run_data.star, half maps, and the model, sampling and optimiser files of an iteration: RELION goes on from there to the same end."""
    if not (shutil.which("mpirun") and shutil.which("relion_refine_mpi")):
        pytest.skip("mpirun and relion_refine_mpi are not on the PATH (Debian: apt install relion)")
    frazil(tmp_path, "simulate", "--output", "data", "--particles", 160, "--box", 32, "--pixel-size", 5, "--symmetry", "D2", "--snr", 2,
           "--lowpass", 25, "--seed", 4)  # fmt: skip
    frazil(tmp_path, "refine3d", "data/particles.star", "--reference", "data/reference_lowpass.mrc", "--initial-lowpass", 25,
           "--symmetry", "D2", "--diameter", 120, "--offset-range", 3, "--output", "run", "--seed", 1, "--write-iterations",
           "--sample-to-accuracy")  # fmt: skip
    ours, mask = read_map(tmp_path / "run" / "run_class001.mrc").data, sphere(32)
    relion("relion_reconstruct", tmp_path, "--i", "run/run_data.star", "--o", "map.mrc", "--ctf", "--sym", "D2", "--skip_gridding")
    # The run's map sums over posteriors and is regularised; where it is well determined both are the same.
    assert plain_fsc(read_map(tmp_path / "map.mrc").data, ours, mask)[:9].min() > 0.97
    curve = postprocessed(tmp_path, "run/run", mask, 5.0)["rlnFourierShellCorrelationUnmaskedMaps"].to_numpy()
    halves = [read_map(tmp_path / "run" / f"run_half{h}_class001_unfil.mrc").data for h in (1, 2)]
    assert np.abs(curve[:16] - half_array_fsc(*halves).numpy()).max() < 1e-4
    last = sorted((tmp_path / "run").glob("run_it*_optimiser.star"))[-2]
    (tmp_path / "theirs").mkdir()
    relion(
        "mpirun", tmp_path, "--allow-run-as-root", "--oversubscribe", "-n", 3, "relion_refine_mpi", "--continue",
        last.relative_to(tmp_path), "--o", "theirs/run", "--j", 1,
    )  # fmt: skip
    theirs = read_map(tmp_path / "theirs" / "run_class001.mrc").data
    assert plain_fsc(theirs, ours, mask)[:10].min() > 0.98
    a, b = (read_particles(tmp_path / name / "run_data.star") for name in ("run", "theirs"))
    i, j = match_by_image_name(a, b)
    assert len(i) == 160
    angle = rotation_angle(a.particles.rotation[i], b.particles.rotation[j], operators("D2"))
    assert angle.median() < 1.0 and angle.quantile(0.9) < 4.0
