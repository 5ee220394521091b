"""frazil refine3d on a tiny simulated set: the files it leaves, and that every option does what it says."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.jobs.refining import (
    BOX,
    COUNT,
    HALVES,
    MAPS,
    PIXEL,
    angles_between,
    assert_same_maps,
    density,
    iterations,
    no_pictures,
    nothing_half_written,
    refine,
    simulate,
    warnings_of,
)

from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import ANGLES, read_particles
from frazil.io.star import read_star, write_star
from frazil.jobs.record import read_json
from frazil.jobs.refine_files import read_refinement
from frazil.jobs.refine_report import refine3d_report
from frazil.maths.fsc import corrected_fsc, fsc
from frazil.maths.masks import soft_sphere
from frazil.maths.sphere import direction_vectors
from frazil.maths.symmetry import operators
from frazil.simulate import compare_poses
from frazil.steps.refine3d import Job, Refine3dParams, iterate, make_engine

__all__ = ["no_pictures"]
UPDATED = {*ANGLES, "rlnOriginXAngst", "rlnOriginYAngst", "rlnClassNumber", "rlnNormCorrection", "rlnRandomSubset",
           "rlnLogLikeliContribution", "rlnMaxValueProbDistribution", "rlnNrOfSignificantSamples", "rlnGroupNumber"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated particles, with a column that frazil does not know."""
    folder = simulate(tmp_path_factory.mktemp("refine3d") / "data")
    tables = read_star(folder / "particles.star", text=True)
    particles = tables["particles"]
    assert isinstance(particles, pd.DataFrame)
    particles.insert(1, "labNotebookPage", [f"{i:04d}.50" for i in range(COUNT)])
    write_star(folder / "particles.star", tables)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """A whole refinement, with the files of every iteration."""
    return refine(data, data.parent / "finished", "--write-iterations")


@pytest.fixture(scope="module")
def mask(data: Path) -> Path:
    """A soft sphere about the particle, on the grid of the reference."""
    path = data.parent / "mask.mrc"
    write_mrc(path, soft_sphere(BOX, 9.0, 4.0), PIXEL)
    return path


def last(run: Path) -> dict:
    """The last recorded iteration."""
    return iterations(run)[-1]


# ---- files


def test_every_file_is_there_under_its_name(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {*MAPS, "run_data.star", "run_model.star", "run_optimiser.star", "run_sampling.star", "job.json", "state.json",
                     "events.jsonl", "log.txt", "checkpoint.pt", "RELION_JOB_EXIT_SUCCESS"}  # fmt: skip
    assert nothing_half_written(finished) and "RELION_JOB_EXIT_FAILURE" not in names
    count = last(finished)["iteration"]
    assert [event["iteration"] for event in iterations(finished)] == list(range(1, count + 1)) and last(finished)["converged"]
    for i in range(1, count):  # the last one has no number, as RELION's
        halves = [f"half{h}_{end}" for h in (1, 2) for end in ("class001.mrc", "model.star")]
        for end in ("data.star", "optimiser.star", "sampling.star", *halves):
            assert f"run_it{i:03d}_{end}" in names
    assert not any(name.startswith(f"run_it{count:03d}") for name in names)
    for name in MAPS:
        volume = read_map(finished / name)
        assert volume.data.shape == (BOX, BOX, BOX) and volume.pixel_size == pytest.approx(PIXEL)
    assert read_json(finished / "state.json")["state"] == "done"


def test_the_map_is_that_of_the_particles(data: Path, finished: Path) -> None:
    truth = density(data / "reference.mrc")
    curve = fsc(density(finished / "run_class001.mrc") * soft_sphere(BOX, 11, 3), truth * soft_sphere(BOX, 11, 3))
    assert curve[1:8].min() > 0.8
    poses, true = read_particles(finished / "run_data.star").particles, read_particles(data / "truth.star").particles
    assert compare_poses(true, poses, operators("C1")).angle.median() < 12


def test_the_table_keeps_every_column_and_has_the_results(data: Path, finished: Path) -> None:
    given, out = read_star(data / "particles.star", text=True), read_star(finished / "run_data.star", text=True)
    assert given["optics"].equals(out["optics"])
    before, after = given["particles"], out["particles"]
    assert list(after.columns[: len(before.columns)]) == list(before.columns)
    before["rlnImageName"] = before["rlnImageName"].str.replace("@", f"@{data}/")  # found from the folder the command ran in
    for label in set(before.columns) - UPDATED:
        assert after[label].equals(before[label]), label
    assert set(after.columns) == set(before.columns) | UPDATED
    typed = read_star(finished / "run_data.star")["particles"]
    assert sorted(typed["rlnRandomSubset"].value_counts()) == [COUNT // 2, COUNT // 2]
    assert (typed["rlnClassNumber"] == 1).all() and typed["rlnMaxValueProbDistribution"].between(0, 1).all()
    assert (typed["rlnNrOfSignificantSamples"] >= 1).all() and (typed["rlnNormCorrection"] > 0).all()
    assert typed["rlnMaxValueProbDistribution"].mean() == pytest.approx(last(finished)["pmax"], abs=0.1)


def test_the_model_has_the_spectra_of_the_maps(finished: Path) -> None:
    model, event = read_star(finished / "run_model.star"), last(finished)
    general, classes, spectra = model["model_general"], model["model_classes"], model["model_class_1"]
    assert general["rlnOriginalImageSize"] == BOX and general["rlnPixelSize"] == PIXEL and general["rlnNrGroups"] == 5
    assert general["rlnCurrentResolution"] == pytest.approx(event["resolution"])
    assert Path(classes["rlnReferenceImage"][0]) == finished / "run_class001.mrc"
    assert list(spectra["rlnSpectralIndex"]) == list(range(BOX // 2 + 1))
    assert list(spectra["rlnAngstromResolution"][:3]) == [999.0, BOX * PIXEL, BOX * PIXEL / 2]
    between = fsc(*(density(finished / name) for name in HALVES)).numpy()
    assert np.abs(spectra["rlnGoldStandardFsc"] - between)[9:15].max() < 0.25  # the maps are masked by a sphere, which correlates shells
    f = spectra["rlnGoldStandardFsc"].clip(0.001, 0.999)
    assert np.allclose(spectra["rlnSsnrMap"], 1 / (1 / np.minimum(np.sqrt(2 * f / (1 + f)), 0.999) - 1))
    assert np.allclose(spectra["rlnReferenceTau2"], spectra["rlnSsnrMap"] * spectra["rlnReferenceSigma2"])
    groups = model["model_groups"]
    assert list(groups["rlnGroupName"]) == [f"mic{m:04d}.mrc" for m in range(1, 6)] and list(groups["rlnGroupNrParticles"]) == [40] * 5
    noise = model["model_optics_group_1"]
    assert noise["rlnSigma2Noise"].tolist() == pytest.approx(event["sigma2_noise"][0])
    for m in range(1, 6):  # where RELION 3.1 looks
        assert model[f"model_group_{m}"].equals(noise)
    directions = read_star(finished / "run_sampling.star")["sampling_directions"]
    prior = model["model_pdf_orient_class_1"]["rlnOrientationDistribution"]
    assert len(prior) == len(directions) == 192 and prior.sum() == pytest.approx(1)
    vectors = direction_vectors(torch.tensor(directions[["rlnAngleRot", "rlnAngleTilt"]].to_numpy().tolist(), dtype=torch.float64))
    assert vectors.mean(0).norm() < 1e-3


def test_the_halves_of_an_iteration_count_their_own_particles(finished: Path) -> None:
    subset = read_star(finished / "run_it001_data.star")["particles"].groupby(["rlnRandomSubset", "rlnMicrographName"]).size()
    for h in (1, 2):
        groups = read_star(finished / f"run_it001_half{h}_model.star")["model_groups"]
        assert list(groups["rlnGroupNrParticles"]) == subset[h].tolist()


def test_the_optimiser_names_files_that_are_there(finished: Path) -> None:
    for root, converged in (("run_it002", 0), ("run", 1)):
        general = read_star(finished / f"{root}_optimiser.star")["optimiser_general"]
        for label in ("rlnModelStarFile", "rlnModelStarFile2", "rlnExperimentalDataStarFile", "rlnOrientSamplingStarFile"):
            assert Path(str(general[label])).is_file(), label
        assert general["rlnHasConverged"] == converged and general["rlnRandomSeed"] == 1 and general["rlnDoSplitRandomHalves"] == 1
    assert general["rlnCurrentIteration"] == last(finished)["iteration"]


@pytest.mark.parametrize("n", [0, 2])
def test_the_files_of_an_iteration_hold_all_the_next_one_needs(data: Path, finished: Path, n: int) -> None:
    state, particles = read_refinement(finished / f"run_it{n:03d}_optimiser.star", finished)
    assert state.progress.iteration == n
    params = Refine3dParams(initial_lowpass=25, diameter=120, offset_range=2, max_order=2)
    names = particles.image_names
    images = torch.stack([density_of_image(data, name) for name in names])
    following = iterate(Job(images, params, make_engine(params, seed=1)), state)
    for h in (1, 2):
        written = density(finished / f"run_it{n + 1:03d}_half{h}_class001.mrc")
        assert float((following.models[h - 1].maps[0] - written).norm() / written.norm()) < 1e-3
    assert following.progress.shell == round(BOX * PIXEL / iterations(finished)[n]["resolution"])


def test_iteration_0_is_written_only_where_iterations_are(data: Path, finished: Path, tmp_path: Path) -> None:
    halves = {f"_half{h}_{kind}" for h in (1, 2) for kind in ("model.star", "class001.mrc")}
    assert {path.name[9:] for path in finished.glob("run_it000*")} == {"_data.star", "_sampling.star", "_optimiser.star", *halves}
    out = refine(data, tmp_path / "run", "--iterations", 1)  # which ends unconverged, so that its last iteration is written
    assert [path.name for path in out.glob("run_it*_optimiser.star")] == ["run_it001_optimiser.star"]


def density_of_image(data: Path, name: str) -> torch.Tensor:
    """One particle image, named as in a STAR file."""
    number, _, stack = name.partition("@")
    start = 1024 + (int(number) - 1) * BOX * BOX * 4
    return torch.from_numpy(np.fromfile(data / stack, np.float32, BOX * BOX, offset=start)).reshape(BOX, BOX)


def test_the_report_has_all_its_plots(finished: Path) -> None:
    page = refine3d_report(finished).read_text()
    for title in ("Resolution", "Map", "Course of the refinement", "Viewing directions", "Spectra", "Parameters"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png;base64,") == 5 and "http" not in page.replace("http://www.w3.org", "")


# ---- options


def test_iterations_run_out_and_may_be_raised(data: Path, finished: Path, tmp_path: Path) -> None:
    out = refine(data, tmp_path / "run", "--iterations", 2)
    assert last(out)["iteration"] == 2 and not (out / "run_class001.mrc").exists()
    assert "not converged after 2 iterations" in warnings_of(out)[0]
    for name in ("run_it002_half1_class001.mrc", "run_it002_half2_class001.mrc"):
        assert torch.equal(density(out / name), density(finished / name))
    refine(data, out, "--resume")  # 999 iterations
    assert_same_maps(out, finished)
    assert [event["iteration"] for event in iterations(out)] == [event["iteration"] for event in iterations(finished)]


def test_the_mask_is_applied_to_the_references_but_not_to_the_final_map(data: Path, mask: Path, tmp_path: Path) -> None:
    outside = density(mask) == 0
    out = refine(data, tmp_path / "run", "--mask", mask, "--write-iterations")
    for h in (1, 2):
        assert density(out / f"run_it001_half{h}_class001.mrc")[outside].abs().max() == 0
    assert density(out / "run_class001.mrc")[outside].abs().max() > 0
    assert read_star(out / "run_optimiser.star")["optimiser_general"]["rlnSolventMaskName"] == str(mask)
    free = refine(data, tmp_path / "free", "--no-flatten-solvent", "--iterations", 1)
    assert density(free / "run_it001_half1_class001.mrc")[outside].abs().max() > 0


def test_without_a_mask_the_references_are_cut_to_the_diameter(finished: Path) -> None:
    line = torch.arange(BOX) - BOX // 2
    radius = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).double().norm(dim=0)
    reference = density(finished / "run_it001_half1_class001.mrc")
    assert reference[radius > 12 + 5].abs().max() == 0 and reference[radius < 12].abs().min() > 0  # 120 Å are 24 px, the edge is 5


def test_the_second_mask_sets_its_region_to_its_mean(data: Path, tmp_path: Path) -> None:
    second = torch.zeros(BOX, BOX, BOX)
    second[14:18, 14:18, 14:18] = 1
    write_mrc(tmp_path / "second.mrc", second, PIXEL)
    out = refine(data, tmp_path / "run", "--mask2", tmp_path / "second.mrc", "--iterations", 1)
    plain = refine(data, tmp_path / "plain", "--iterations", 1)
    inside, other = density(out / "run_it001_half1_class001.mrc"), density(plain / "run_it001_half1_class001.mrc")
    region = second > 0
    assert inside[region].std() < 1e-6 and inside[region].mean() == pytest.approx(float(other[region].mean()), rel=1e-4)
    assert torch.equal(inside[~region], other[~region])
    assert read_star(out / "run_it001_optimiser.star")["optimiser_general"]["rlnSolventMask2Name"] == str(tmp_path / "second.mrc")


def test_the_fsc_is_corrected_for_the_mask(data: Path, mask: Path, tmp_path: Path) -> None:
    out = refine(data, tmp_path / "run", "--mask", mask, "--solvent-correct-fsc")
    used = read_star(out / "run_model.star")["model_class_1"]["rlnGoldStandardFsc"].to_numpy()
    curves = corrected_fsc(*(density(out / name) for name in HALVES), density(mask), seed=1 + last(out)["iteration"])
    assert np.abs(used - curves.corrected.numpy()).max() < 1e-3
    assert np.abs(used - curves.unmasked.numpy()).max() > 0.05
    assert read_star(out / "run_optimiser.star")["optimiser_general"]["rlnDoSolventFscCorrection"] == 1


def test_the_first_iteration_is_by_cross_correlation_unless_told_otherwise(data: Path, finished: Path, tmp_path: Path) -> None:
    out = refine(data, tmp_path / "run", "--no-firstiter-cc", "--iterations", 1)
    first, usual = iterations(out)[0], iterations(finished)[0]
    assert usual["pmax"] == 1 and 0.05 < first["pmax"] < 1  # by cross-correlation the best sample takes all
    # The references of an iteration by cross-correlation are low-passed again; others are not.
    power = [fsc_power(density(run / "run_it001_half1_class001.mrc")) for run in (out, finished)]
    assert power[1][10:14].mean() < 0.02 * power[0][10:14].mean()


def fsc_power(volume: torch.Tensor) -> torch.Tensor:
    """(N/2,) mean power a shell of a map."""
    line = torch.fft.fftfreq(BOX, 1 / BOX)
    shell = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).norm(dim=0).round().long().reshape(-1)
    power = torch.fft.fftn(volume.double()).abs().square().reshape(-1)
    return torch.zeros(64, dtype=torch.float64).index_add_(0, shell, power)[: BOX // 2] / torch.bincount(shell, minlength=64)[: BOX // 2]


def test_particles_may_be_filled_with_noise_outside_the_mask(data: Path, tmp_path: Path) -> None:
    out = refine(data, tmp_path / "run", "--no-zero-mask", "--iterations", 2)
    zeros = refine(data, tmp_path / "zeros", "--iterations", 2)
    # Noise of variance 1/(1 + SNR) of the power everywhere; with zeros only within the mask, soft radius 12 to 17 of a box of 32.
    filled, cut = (np.mean(iterations(run)[1]["sigma2_noise"][0][12:16]) for run in (out, zeros))
    assert 1.2 < filled / cut < BOX**2 / (math.pi * 12**2)
    assert read_star(out / "run_it002_optimiser.star")["optimiser_general"]["rlnDoZeroMask"] == 0
    again = refine(data, tmp_path / "again", "--no-zero-mask", "--iterations", 2)
    assert torch.equal(density(again / "run_it002_half1_class001.mrc"), density(out / "run_it002_half1_class001.mrc"))


def test_padding_1_works_and_is_recorded(data: Path, tmp_path: Path) -> None:
    out = refine(data, tmp_path / "run", "--pad", 1)
    assert read_star(out / "run_model.star")["model_general"]["rlnPaddingFactor"] == 1
    sphere = soft_sphere(BOX, 11, 3)
    assert fsc(density(out / "run_class001.mrc") * sphere, density(data / "reference.mrc") * sphere)[1:7].min() > 0.7


@pytest.mark.parametrize("oversampling", [1, 2])
def test_oversampling_halves_the_steps_again(data: Path, tmp_path: Path, oversampling: int) -> None:
    out = refine(data, tmp_path / "run", "--oversampling", oversampling, "--iterations", 1)
    shift = read_particles(out / "run_it001_data.star").particles.shift
    step = 2 * PIXEL / 2**oversampling
    place = torch.remainder(shift - shift[0] + step / 4, step) - step / 4
    assert place.abs().max() < 1e-6  # every shift lies on the fine grid
    half = torch.remainder(shift - shift[0] + step / 4, 2 * step) - step / 4
    assert half.abs().max() > 0.9 * step  # and not all on a coarser one
    assert read_star(out / "run_it001_optimiser.star")["optimiser_general"]["rlnAdaptiveOversampleOrder"] == oversampling


def test_optics_groups_of_different_boxes_and_pixels_refine_together(tmp_path: Path) -> None:
    data = simulate(tmp_path / "data", "--optics-groups", 2)
    out = refine(data, tmp_path / "run")
    model = read_star(out / "run_model.star")
    assert [len(model[f"model_optics_group_{g}"]) for g in (1, 2)] == [17, 19]
    second = model["model_group_2"]  # RELION 3.1 wants all noise spectra on the shells of the model
    assert len(second) == 17 and model["model_general"]["rlnOriginalImageSize"] == BOX
    own = model["model_optics_group_2"]
    assert second["rlnSigma2Noise"][9] == own["rlnSigma2Noise"][round(9 * own["rlnResolution"][1] ** -1 / (BOX * PIXEL))]
    found, true = read_particles(out / "run_data.star").particles, read_particles(data / "truth.star").particles
    left = compare_poses(true, found, operators("C1"))
    for g in (0, 1):
        assert left.angle[true.group == g].median() < 12 and left.shift[true.group == g].median() < 0.6 * PIXEL


def test_the_search_is_local_from_the_start_if_its_order_says_so(data: Path, tmp_path: Path) -> None:
    given = read_particles(data / "truth.star").particles
    out = refine(data, tmp_path / "run", "--local-from-order", 2, "--iterations", 2, star="truth.star")
    found = read_particles(out / "run_it002_data.star").particles
    moved = angles_between(given.rotation, found.rotation)
    assert all(event["local"] and event["healpix_order"] == 2 for event in iterations(out))
    assert moved.max() < 2 * 60  # direction and in-plane angle each within 3 sd of 15 degrees, and half a step
    assert moved.median() < 12
    everywhere = refine(data, tmp_path / "everywhere", "--iterations", 2, star="truth.star")
    assert not any(event["local"] for event in iterations(everywhere))


@pytest.mark.parametrize("limit", [1, 2])
def test_orders_grow_up_to_the_limit_and_become_local_where_told(data: Path, tmp_path: Path, limit: int) -> None:
    out = refine(data, tmp_path / "run", "--healpix-order", 1, "--max-order", limit, "--local-from-order", 2)
    orders = [event["healpix_order"] for event in iterations(out)]
    assert set(orders) == set(range(1, limit + 1)) and orders == sorted(orders) and last(out)["converged"]
    assert [event["local"] for event in iterations(out)] == [order == 2 for order in orders]
    assert len(read_star(out / "run_sampling.star")["sampling_directions"]) == 12 * 4**limit


def test_half_sets_that_are_given_are_kept(data: Path, tmp_path: Path) -> None:
    tables = read_star(data / "particles.star", text=True)
    subset = ["1" if i % 5 else "2" for i in range(COUNT)]
    tables["particles"]["rlnRandomSubset"] = subset
    write_star(data / "halves.star", tables)
    out = refine(data, tmp_path / "run", "--iterations", 1, star="halves.star")
    assert read_star(out / "run_it001_data.star", text=True)["particles"]["rlnRandomSubset"].tolist() == subset


def test_the_resolution_told_is_the_first_crossing(tmp_path: Path) -> None:
    """A curve that dips below 0.143 and rises again: the window may go on to the rise, the resolution is before the dip (CONVENTIONS)."""
    from types import SimpleNamespace

    from frazil.jobs.refine3d import resolution

    curve = torch.tensor([1.0, 0.9, 0.9, 0.8, 0.1, 0.5, 0.5, 0.4, 0.0])
    model = SimpleNamespace(box=16, pixel_size=2.0, fsc=curve)
    progress = SimpleNamespace(shell=7)
    assert resolution(SimpleNamespace(joined=model, models=(model,), progress=progress)) == pytest.approx(32 / 3)
    assert resolution(SimpleNamespace(joined=None, models=(model,), progress=progress)) == pytest.approx(32 / 7)
