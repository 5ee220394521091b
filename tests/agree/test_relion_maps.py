"""RELION 3.1.3's mask and post-processing programs (Debian: apt install relion) and ours on the same files."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import read_star

pytestmark = [pytest.mark.agree, pytest.mark.real]
CURVES = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "part": "rlnFourierShellCorrelationParticleMaskFraction",
    "random": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "corrected": "rlnFourierShellCorrelationCorrected",
}


def relion(program: str, folder: Path, *arguments: object) -> None:
    """Run a program of RELION's; skips where there is none. What it writes is looked at, not its exit status: without ghostscript
    relion_postprocess fails after having written everything but the PDF."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not on the PATH (Debian: apt install relion)")
    subprocess.run([program, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Half maps of a real refinement of β-galactosidase (RELION 5.0.1, 64 px of 3.54 Å), their mean, and RELION's mask of it."""
    data = request.getfixturevalue("shared_data") / "parity_relion5" / "refine3d"
    place = tmp_path_factory.mktemp("relion")
    halves = []
    for half in (1, 2):
        shutil.copy(data / f"run_half{half}_class001_unfil.mrc", place)
        halves.append(read_map(data / f"run_half{half}_class001_unfil.mrc"))
    write_mrc(place / "mean.mrc", (halves[0].data + halves[1].data) / 2, halves[0].pixel_size)
    relion("relion_mask_create", place, "--i", "mean.mrc", "--o", "mask.mrc", "--ini_threshold", 0.03, "--extend_inimask", 3,
           "--width_soft_edge", 6, "--lowpass", 15, "--angpix", 3.54)  # fmt: skip
    return place


@pytest.mark.parametrize("threshold, extend, edge, lowpass", [
    (0.03, 3, 6, 15), (0.02, 0, 4, 20), (0.05, -2, 4, 15), (0.05, 2.5, 4.5, 0), (0.1, 1, 0, 12),
])  # fmt: skip
def test_masks_are_relions_voxel_by_voxel(folder, tmp_path, threshold, extend, edge, lowpass) -> None:
    filtering = ["--lowpass", lowpass] if lowpass else []
    relion("relion_mask_create", folder, "--i", "mean.mrc", "--o", tmp_path / "theirs.mrc", "--ini_threshold", threshold,
           "--extend_inimask", extend, "--width_soft_edge", edge, "--angpix", 3.54, *filtering)  # fmt: skip
    command = ["mask", folder / "mean.mrc", "--threshold", threshold, f"--extend={extend}", "--edge", edge, "--lowpass", lowpass,
               "--smallest", 0, "--output", tmp_path / "ours", "--quiet"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    theirs, ours = read_map(tmp_path / "theirs.mrc").data, read_map(tmp_path / "ours" / "mask.mrc").data
    assert abs(float(ours.sum() / theirs.sum()) - 1) < 0.005
    assert ((ours - theirs).abs() > 1e-4).sum() <= 2  # a voxel at the threshold may fall to either side


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[dict, dict, list[np.ndarray]]:
    """(RELION's postprocess.star, ours, RELION's random curves with other seeds) with the same mask and MTF."""
    mtf = folder / "mtf.star"
    frequency = np.linspace(0, 1, 41)
    rows = "\n".join(f"{f:.4f} {np.sinc(f / 2) * (1 - 0.3 * f):.6f}" for f in frequency)
    mtf.write_text(f"data_mtf\n\nloop_\n_rlnResolutionInversePixel #1\n_rlnMtfValue #2\n{rows}\n")
    seeds = []
    for seed in range(1, 9):
        (folder / f"seed{seed}" / "post").mkdir(parents=True, exist_ok=True)
        relion("relion_postprocess", folder, "--i", "run_half1_class001_unfil.mrc", "--mask", "mask.mrc", "--o", f"seed{seed}/post",
               "--angpix", 3.54, "--auto_bfac", "--autob_lowres", 20, "--mtf", "mtf.star", "--mtf_angpix", 1.77,
               "--random_seed", seed)  # fmt: skip
        seeds.append(read_star(folder / f"seed{seed}" / "post.star"))
    command = ["postprocess", folder / "run_half1_class001_unfil.mrc", "--mask", folder / "mask.mrc", "--fit-from", 20, "--mtf", mtf,
               "--mtf-pixel-size", 1.77, "--output", folder / "ours", "--quiet"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    return seeds[0], read_star(folder / "ours" / "postprocess.star"), [s["fsc"][CURVES["random"]].to_numpy(float) for s in seeds]


def test_curves_are_relions(both) -> None:
    theirs, ours, random = both
    apart = {name: np.abs(theirs["fsc"][label].to_numpy(float) - ours["fsc"][label].to_numpy(float)) for name, label in CURVES.items()}
    for name in ("unmasked", "masked", "part"):
        assert apart[name].max() < 2e-5, name  # their files have six digits
    assert list(theirs["fsc"].columns) == list(ours["fsc"].columns)
    mean, mine = np.mean(random, 0), ours["fsc"][CURVES["random"]].to_numpy(float)
    assert np.abs(mine - mean).max() < 0.03 and np.abs(mine - mean).mean() < 0.01
    assert apart["corrected"].mean() < 0.01


def test_random_phases_are_relions_but_for_their_noise(both) -> None:
    """No two runs of RELION with other seeds agree within the bar of 0.03 in so small a box: what can agree is the mean of several.

    Ours, the mean of 16 sets, lies closer to the mean of RELION's runs than any of these does to that of the others.
    """
    _, ours, random = both
    mine = ours["fsc"][CURVES["random"]].to_numpy(float)
    runs = np.stack(random)
    pairs = [np.abs(a - b).max() for i, a in enumerate(runs) for b in runs[:i]]
    assert min(pairs) > 0.03
    own = [np.abs(run - np.delete(runs, i, 0).mean(0)).max() for i, run in enumerate(runs)]
    assert np.abs(mine - runs.mean(0)).max() < min(own)


def test_resolution_is_relions(both) -> None:
    theirs, ours, _ = (x["general"] if isinstance(x, dict) else x for x in both)
    assert ours["rlnFinalResolution"] == pytest.approx(theirs["rlnFinalResolution"], abs=1e-3)
    assert ours["rlnRandomiseFrom"] == pytest.approx(theirs["rlnRandomiseFrom"], abs=1e-3)
    assert ours["rlnParticleBoxFractionSolventMask"] == pytest.approx(theirs["rlnParticleBoxFractionSolventMask"], abs=1e-4)


def test_guinier_plots_and_maps_are_relions(both, folder) -> None:
    theirs, ours, _ = both
    for column in ("Original", "MTFCorrected"):
        label = f"rlnLogAmplitudes{column}"
        a, b = (s["guinier"][label].to_numpy(float)[4:-1] for s in (theirs, ours))  # they leave out the table's first interval
        np.testing.assert_allclose(a, b, atol=5e-5)
    a, b = (read_map(folder / name).data for name in ("seed1/post_masked.mrc", "ours/postprocess_masked.mrc"))
    assert float(torch.corrcoef(torch.stack([a.ravel(), b.ravel()]))[0, 1]) > 0.99  # the weights hang on the random phases


def test_without_random_phases_b_factor_and_map_are_the_same(folder) -> None:
    """Phases random from the last shell but one on: nothing is corrected, and every number must agree.

    Otherwise the B-factor hangs on the random phases through the weights: with these maps RELION's own is −329 to −501 Å² by its seed.
    """
    (folder / "still" / "post").mkdir(parents=True, exist_ok=True)
    relion("relion_postprocess", folder, "--i", "run_half1_class001_unfil.mrc", "--mask", "mask.mrc", "--o", "still/post",
           "--angpix", 3.54, "--auto_bfac", "--autob_lowres", 15, "--randomize_at_A", 7.2)  # fmt: skip
    command = ["postprocess", folder / "run_half1_class001_unfil.mrc", "--mask", folder / "mask.mrc", "--fit-from", 15,
               "--randomise-from", 7.2, "--output", folder / "still_ours", "--quiet"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    theirs, ours = read_star(folder / "still" / "post.star"), read_star(folder / "still_ours" / "postprocess.star")
    a, b = (float(s["general"]["rlnBfactorUsedForSharpening"]) for s in (theirs, ours))
    assert b == pytest.approx(a, abs=0.05)
    a, b = (s["fsc"][CURVES["corrected"]].to_numpy(float) for s in (theirs, ours))
    np.testing.assert_allclose(a, b, atol=2e-5)
    one, two = (read_map(folder / name).data for name in ("still/post.mrc", "still_ours/postprocess.mrc"))
    assert float((one - two).norm() / one.norm()) < 1e-5
