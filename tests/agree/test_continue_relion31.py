"""--continue of what the installed RELION 3.1.3 wrote: its own iterations, and iterations with which it continued a run of ours."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests.jobs.refining import BOX, LOW, iterations, simulate
from torch import Tensor

from frazil.cli import main
from frazil.io.star import Star, read_star
from frazil.jobs.classify_files import read_classification
from frazil.jobs.record import read_json

RELION = shutil.which("relion_refine")
pytestmark = [pytest.mark.agree, pytest.mark.skipif(RELION is None, reason="relion_refine is not installed")]
COMMON = ("--iter", 2, "--particle_diameter", 120, "--ctf", "--K", 2, "--offset_range", 3, "--offset_step", 2, "--oversampling", 1,
          "--norm", "--scale", "--zero_mask", "--flatten_solvent", "--random_seed", 1, "--j", 1)  # fmt: skip
OURS = ("--device", "cpu", "--threads", "1", "--quiet", "--write-every", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few particles on two micrographs, with the folder of the stacks beside the table."""
    folder = simulate(tmp_path_factory.mktemp("relion31") / "data", "--particles", 40, "--per-micrograph", 30)
    (folder / "rel").mkdir()  # RELION writes into folders only, and into none that it would have to make
    return folder


def relion(folder: Path, *options: object) -> None:
    """relion_refine in a folder."""
    words = [str(RELION), *map(str, options)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module", params=["class3d", "class2d"])
def theirs(request: pytest.FixtureRequest, data: Path) -> tuple[str, Path]:
    """(job, root of the files) of two iterations by RELION 3.1.3."""
    root = f"rel/{request.param}"
    more = ("--ref", "reference_lowpass.mrc", "--ini_high", LOW, "--sym", "C1", "--tau2_fudge", 4, "--healpix_order", 1, "--firstiter_cc")
    flat = ("--psi_step", 20, "--tau2_fudge", 2)
    relion(data, "--i", "particles.star", "--o", root, *COMMON, *(more if request.param == "class3d" else flat))
    return request.param, data / root


def mean_noise(model: Star) -> Tensor:
    """Mean of the noise of RELION's two micrographs over the particles."""
    spectra = [torch.tensor(model[f"model_group_{m}"]["rlnSigma2Noise"].to_numpy(float)) for m in (1, 2)]
    a, b = model["model_groups"]["rlnGroupNrParticles"]
    return (a * spectra[0] + b * spectra[1]) / (a + b)


def test_relions_own_iterations_go_on(data, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    job, root = theirs
    star = read_star(f"{root}_it001_model.star")
    assert "rlnNrOpticsGroups" not in star["model_general"]  # else this test tests nothing
    state, _, _ = read_classification(Path(f"{root}_it001_optimiser.star"), data)
    assert len(state.model.sigma2) == 1 and torch.allclose(state.model.sigma2[0], mean_noise(star))
    assert state.model.scales.tolist() == star["model_groups"]["rlnGroupScaleCorrection"].tolist()
    words = [job, "--continue", f"{root}_it001_optimiser.star", "--iterations", "2", "--output", str(tmp_path / "more")]
    assert main([*words, *OURS]) == 0
    assert [event["iteration"] for event in iterations(tmp_path / "more")] == [2]
    # The two differ in their random perturbation and seeds; the noise, which hardly depends on these, is the same.
    mean = mean_noise(read_star(f"{root}_it002_model.star"))
    found = torch.tensor(read_star(tmp_path / "more" / "run_it002_model.star")["model_optics_group_1"]["rlnSigma2Noise"].to_numpy(float))
    shells = slice(8, BOX // 2)  # where there is next to no signal
    assert float((found[shells] / mean[shells] - 1).abs().max()) < 0.1


def test_an_iteration_with_which_relion_continued_ours_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    words = ["class3d", "particles.star", "--reference", "reference_lowpass.mrc", "--classes", "2", "--healpix-order", "1",
             "--diameter", "120", "--initial-lowpass", str(LOW), "--offset-range", "3", "--equal-filter", "0.2", "--iterations", "2",
             "--output", "ours"]  # fmt: skip
    assert main([*words, *OURS]) == 0
    relion(data, "--continue", "ours/run_it002_optimiser.star", "--iter", 3, "--o", "rel/ours", "--j", 1)
    general = read_star(data / "rel/ours_it003_optimiser.star")["optimiser_general"]
    assert not any(label.startswith("frazil") for label in general)  # it passes our labels over, and does not write them again
    words = ["class3d", "--continue", "rel/ours_it003_optimiser.star", "--iterations", "4", "--output", str(tmp_path / "more"), *OURS]
    assert main(words) == 0
    assert [event["iteration"] for event in iterations(tmp_path / "more")] == [4]
    assert read_json(tmp_path / "more" / "job.json")["parameters"]["tau_fudge"] == 4.0
