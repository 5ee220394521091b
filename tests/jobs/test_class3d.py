"""frazil class3d on a tiny simulated set: files, options, stopping and going on, bad input."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.jobs.classifying import BOX, FAST, PIXEL, classify, command, no_pictures, two_phantoms
from tests.jobs.refining import LOW, density, iterations, nothing_half_written, warnings_of

import frazil.steps.classify as step
from frazil.cli import main
from frazil.io.mrc import write_mrc
from frazil.io.particles import open_images, read_particles
from frazil.io.star import read_star, write_star
from frazil.jobs.class_report import class_report
from frazil.jobs.classify_files import read_classification
from frazil.jobs.record import read_json
from frazil.maths.masks import soft_sphere

__all__ = ["no_pictures"]
LAST = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Particles of two phantoms; poses.star has their true poses, references.star the two maps."""
    folder = two_phantoms(tmp_path_factory.mktemp("class3d") / "data", 60)
    tables = []
    for name in ("a", "b"):
        truth = read_star(folder / name / "truth.star", text=True)["particles"]
        truth["rlnImageName"] = truth["rlnImageName"].str.replace("@", f"@{name}/")
        tables.append(truth)
    optics = read_star(folder / "particles.star", text=True)["optics"]
    write_star(folder / "poses.star", {"optics": optics, "particles": pd.concat(tables, ignore_index=True)})
    maps = pd.DataFrame({"rlnReferenceImage": [f"{name}/reference_lowpass.mrc" for name in ("a", "b")]})
    write_star(folder / "references.star", {"": maps})
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """A whole classification, every iteration written."""
    return classify(data, data.parent / "finished", "--iterations", LAST)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line a command that must fail with code 2 prints."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    return error


class TestFiles:
    def test_all_are_there_under_relions_names(self, finished):
        names = {path.name for path in finished.iterdir()}
        for i in range(1, LAST + 1):
            ends = ("data.star", "model.star", "optimiser.star", "sampling.star", "class001.mrc", "class002.mrc")
            assert {f"run_it{i:03d}_{end}" for end in ends} <= names
        assert {"run_data.star", "checkpoint.pt", "events.jsonl", "job.json", "RELION_JOB_EXIT_SUCCESS"} <= names
        assert nothing_half_written(finished) and read_json(finished / "state.json")["state"] == "done"
        assert (finished / "run_data.star").read_text() == (finished / f"run_it{LAST:03d}_data.star").read_text()

    def test_the_images_are_found_from_what_was_written(self, finished):
        """The names in the input are relative to its folder; the output lies elsewhere."""
        open_images(read_particles(finished / "run_data.star")).check()

    def test_the_model_says_what_the_maps_are(self, finished):
        model, event = read_star(finished / f"run_it{LAST:03d}_model.star"), iterations(finished)[-1]
        general, classes = model["model_general"], model["model_classes"]
        assert general["rlnNrClasses"] == 2 and general["rlnReferenceDimensionality"] == 3 and general["rlnTau2FudgeFactor"] == 4
        assert classes["rlnClassDistribution"].sum() == pytest.approx(1, abs=1e-5)
        assert classes["rlnClassDistribution"].tolist() == pytest.approx(event["occupancy"], abs=1e-6)
        assert classes["rlnEstimatedResolution"].tolist() == pytest.approx(event["class_resolution"], rel=1e-5)
        assert general["rlnCurrentResolution"] == pytest.approx(min(event["class_resolution"]), rel=1e-5)
        for k in (1, 2):
            spectra = model[f"model_class_{k}"]
            assert list(spectra["rlnSpectralIndex"]) == list(range(BOX // 2 + 1)) and (spectra["rlnGoldStandardFsc"] == 0).all()
            shell = round(BOX * PIXEL / classes["rlnEstimatedResolution"][k - 1])
            assert (spectra["rlnSsnrMap"][1 : shell + 1] >= 1).all() and spectra["rlnSsnrMap"][shell + 1] < 1
            assert len(model[f"model_pdf_orient_class_{k}"]) == 192
            assert classes["rlnReferenceImage"][k - 1] == str(finished / f"run_it{LAST:03d}_class{k:03d}.mrc")
        assert (classes["rlnAccuracyRotations"] < 90).all()

    def test_particles_have_classes(self, finished):
        particles, event = read_star(finished / "run_data.star")["particles"], iterations(finished)[-1]
        assert particles["rlnClassNumber"].value_counts().reindex([1, 2], fill_value=0).tolist() == event["class_counts"]
        assert len(particles) == 120 and particles["rlnMaxValueProbDistribution"].between(0, 1).all()
        assert "rlnRandomSubset" not in particles

    def test_the_optimiser_says_it_is_a_classification(self, finished):
        general = read_star(finished / f"run_it{LAST:03d}_optimiser.star")["optimiser_general"]
        assert general["rlnDoAutoRefine"] == 0 and general["rlnDoSplitRandomHalves"] == 0 and general["rlnCurrentIteration"] == LAST
        for label in ("rlnModelStarFile", "rlnExperimentalDataStarFile", "rlnOrientSamplingStarFile"):
            assert Path(str(general[label])).is_file()

    def test_write_every(self, data, finished, tmp_path):
        out = classify(data, tmp_path / "run", "--iterations", LAST, "--write-every", 3)
        assert sorted(path.name[4:9] for path in out.glob("run_it*_model.star")) == ["it000", "it003", f"it{LAST:03d}"]
        assert torch.equal(density(out / f"run_it{LAST:03d}_class002.mrc"), density(finished / f"run_it{LAST:03d}_class002.mrc"))
        none = classify(data, tmp_path / "none", "--iterations", 2, "--write-every", 0)
        assert [path.name for path in none.glob("run_it*_model.star")] == ["run_it002_model.star"]

    def test_the_files_of_an_iteration_hold_all_the_next_one_needs(self, data, finished, monkeypatch):
        monkeypatch.chdir(data)
        state, _, general = read_classification(finished / "run_it002_optimiser.star", data)
        assert state.progress.iteration == 2 and state.model.classes == 2 and float(general["rlnTau2FudgeArg"]) == 4
        kept = torch.load(finished / "checkpoint.pt", weights_only=True)
        assert set(kept) >= {"model", "particles", "progress", "sampling", "assigned"}
        assert (state.particles.klass == read_particles(finished / "run_it002_data.star").particles.klass).all()

    def test_the_report_has_all_its_plots(self, data, finished):
        page = class_report(finished).read_text()
        for title in ("Maps", "Classes", "Course of the classification", "Viewing directions", "Iterations", "Parameters"):
            assert f"<h2>{title}</h2>" in page
        assert page.count("data:image/png;base64,") == 4 and "class 1" in page.replace("<td>1</td>", "class 1")


class TestClasses:
    def test_from_two_references_the_particles_are_told_apart(self, data, tmp_path):
        out = classify(data, tmp_path / "run", "--reference", data / "references.star", "--iterations", 3, "--no-firstiter-cc",
                       "--healpix-order", 2, without=("--classes",))  # fmt: skip
        particles = read_star(out / "run_data.star")["particles"]
        kind = np.where(particles["rlnImageName"].str.contains("/a/"), 1, 2)
        assert (particles["rlnClassNumber"] == kind).mean() > 0.9
        model = read_star(out / "run_it003_model.star")["model_classes"]
        assert (model["rlnClassDistribution"] - 0.5).abs().max() < 0.1
        assert iterations(out)[0]["changes_class"] > 0

    def test_with_known_poses_classes_alone(self, data, tmp_path):
        out = classify(data, tmp_path / "run", "--reference", data / "references.star", "--iterations", 2, "--no-firstiter-cc",
                       "--skip-align", star="poses.star", without=("--classes",))  # fmt: skip
        particles, truth = read_star(out / "run_data.star")["particles"], read_star(data / "poses.star")["particles"]
        kind = np.where(particles["rlnImageName"].str.contains("/a/"), 1, 2)
        assert (particles["rlnClassNumber"] == kind).mean() > 0.95
        for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst"):
            assert np.abs(particles[label] - truth[label]).max() < 1e-4
        assert read_star(out / "run_it002_optimiser.star")["optimiser_general"]["rlnDoSkipAlign"] == 1

    def test_masks(self, data, tmp_path):
        inner, low = soft_sphere(BOX, 6.0, 3.0), soft_sphere(BOX, 11.0, 3.0) - soft_sphere(BOX, 6.0, 3.0)
        write_mrc(tmp_path / "mask.mrc", inner, PIXEL)
        write_mrc(tmp_path / "low.mrc", low.clamp(0, 1), PIXEL)
        once = ("--iterations", 2, "--no-firstiter-cc")
        masked = classify(data, tmp_path / "masked", "--mask", tmp_path / "mask.mrc", *once)
        both = classify(data, tmp_path / "both", "--mask", tmp_path / "mask.mrc", "--mask-lowpass", tmp_path / "low.mrc",
                        "--mask-lowpass-resolution", 60, *once)  # fmt: skip
        outside = (inner == 0) & (low > 0.9)
        a, b = (density(run / "run_it001_class001.mrc") for run in (masked, both))
        assert a[outside].abs().max() == 0 and b[outside].abs().max() > 0
        assert read_star(masked / "run_it002_optimiser.star")["optimiser_general"]["rlnSolventMaskName"] == str(tmp_path / "mask.mrc")

    def test_a_class_that_empties_is_said_once_and_the_run_goes_on(self, data, tmp_path):
        rng = torch.Generator().manual_seed(3)
        write_mrc(tmp_path / "noise.mrc", 1e4 * torch.randn(BOX, BOX, BOX, generator=rng), PIXEL)
        names = [str(data / "a" / "reference_lowpass.mrc"), str(data / "b" / "reference_lowpass.mrc"), str(tmp_path / "noise.mrc")]
        write_star(tmp_path / "three.star", {"": pd.DataFrame({"rlnReferenceImage": names})})
        out = classify(data, tmp_path / "run", "--reference", tmp_path / "three.star", "--no-firstiter-cc", "--iterations", 3,
                       without=("--classes",))  # fmt: skip
        empty = [line for line in warnings_of(out) if "empty" in line]
        assert len(empty) == 1 and empty[0].startswith("class 3 is empty after iteration 1") and "--reseed-below" in empty[0]
        assert density(out / "run_it003_class003.mrc").abs().max() == 0
        model = read_star(out / "run_it003_model.star")["model_classes"]
        assert model["rlnClassDistribution"][2] == 0 and not (read_star(out / "run_data.star")["particles"]["rlnClassNumber"] == 3).any()
        anew = classify(data, tmp_path / "anew", "--reference", tmp_path / "three.star", "--no-firstiter-cc", "--iterations", 3,
                        "--reseed-below", 0.2, without=("--classes",))  # fmt: skip
        assert any("class 3 was almost empty after iteration 1 and starts anew" in line for line in warnings_of(anew))
        assert density(anew / "run_it002_class003.mrc").abs().max() > 0


class TestGoingOn:
    def test_a_run_cut_off_resumes_to_the_same_maps(self, data, finished, tmp_path, monkeypatch):
        true, count = step.iterate, []

        def dies(job, state):
            if len(count) == 2:
                raise MemoryError("cut off")
            count.append(1)
            return true(job, state)

        with monkeypatch.context() as patch:
            patch.setattr(step, "iterate", dies)
            assert main(command(data, tmp_path / "run", "--iterations", LAST)) == 1
        assert [event["iteration"] for event in iterations(tmp_path / "run")] == [1, 2]
        assert main(command(data, tmp_path / "run", "--iterations", LAST, "--resume")) == 0
        for k in (1, 2):
            name = f"run_it{LAST:03d}_class{k:03d}.mrc"
            assert torch.equal(density(tmp_path / "run" / name), density(finished / name))
        assert (tmp_path / "run" / "run_data.star").read_text() == (finished / "run_data.star").read_text()

    def test_more_iterations_of_a_finished_run(self, data, finished, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(finished, out)
        assert main(command(data, out, "--iterations", LAST + 1, "--resume")) == 0
        assert iterations(out)[-1]["iteration"] == LAST + 1 and (out / f"run_it{LAST + 1:03d}_class001.mrc").exists()

    def test_continue_goes_on_from_files_with_other_parameters(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)  # where the images are
        words = ["class3d", "--continue", finished / "run_it002_optimiser.star", "--output", tmp_path / "more", *FAST, "--quiet"]
        assert main([str(w) for w in [*words, "--iterations", 4, "--tau-fudge", 2, "--offset-range", 1]]) == 0
        assert [event["iteration"] for event in iterations(tmp_path / "more")] == [3, 4]
        model = read_star(tmp_path / "more" / "run_it004_model.star")["model_general"]
        general = read_star(tmp_path / "more" / "run_it004_optimiser.star")["optimiser_general"]
        sampling = read_star(tmp_path / "more" / "run_it004_sampling.star")["sampling_general"]
        assert model["rlnTau2FudgeFactor"] == 2 and sampling["rlnOffsetRange"] == pytest.approx(PIXEL)  # as given
        assert general["rlnParticleDiameter"] == 120 and model["rlnNrClasses"] == 2  # as they were

    def test_continue_repeats_what_the_run_itself_did_next(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        words = ["class3d", "--continue", finished / "run_it002_optimiser.star", "--output", tmp_path / "more", *FAST, "--quiet"]
        assert main([str(w) for w in [*words, "--iterations", 3]]) == 0
        for k in (1, 2):
            a, b = (density(run / f"run_it003_class{k:03d}.mrc") for run in (tmp_path / "more", finished))
            assert float((a - b).norm() / b.norm()) < 1e-3  # to the digits of the STAR files

    def test_continue_from_iteration_0_is_the_run_itself(self, data, finished, tmp_path, monkeypatch):
        """The seeds of the classes are no part of RELION's files: they are drawn anew from the same --seed. Nor is the first filter."""
        monkeypatch.chdir(data)
        kinds = {path.name[9:] for path in finished.glob("run_it000_*")}
        assert kinds == {"_data.star", "_model.star", "_optimiser.star", "_sampling.star", "_class001.mrc", "_class002.mrc"}
        words = ["class3d", "--continue", finished / "run_it000_optimiser.star", "--output", tmp_path / "more", *FAST, "--quiet"]
        assert main([str(w) for w in [*words, "--initial-lowpass", LOW]]) == 0
        assert [event["iteration"] for event in iterations(tmp_path / "more")] == list(range(1, LAST + 1))
        for k in (1, 2):
            a, b = (density(run / f"run_it002_class{k:03d}.mrc") for run in (tmp_path / "more", finished))
            assert float((a - b).norm() / b.norm()) < 2e-3  # to the digits of the STAR files

    def test_continue_from_iteration_0_filters_as_the_run_did(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        words = ["class3d", "--continue", finished / "run_it000_optimiser.star", "--output", tmp_path / "more", *FAST, "--quiet"]
        assert main([str(w) for w in [*words, "--iterations", 1]]) == 0
        assert iterations(tmp_path / "more")[0]["resolution"] == iterations(finished)[0]["resolution"]

    def test_iteration_0_as_relion_writes_it_is_refused(self, data, finished, tmp_path, monkeypatch, capsys):
        """RELION 3.1.3 writes no run_it000_sampling.star and continues neither from its own iteration 0 nor from ours."""
        monkeypatch.chdir(data)
        shutil.copytree(finished, tmp_path / "run")
        (tmp_path / "run" / "run_it000_sampling.star").unlink()
        settings = tmp_path / "run" / "run_it000_optimiser.star"
        settings.write_text(settings.read_text().replace(str(finished), str(tmp_path / "run")))
        line = refused(capsys, ["class3d", "--continue", str(settings), "--output", str(tmp_path / "more"), "--quiet"])
        assert "run_it000_sampling.star" in line and "neither" in line

    def test_continue_is_refused_where_it_makes_no_sense(self, data, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(data)
        start = ["class3d", "--continue", str(finished / "run_it002_optimiser.star"), "--output", str(tmp_path / "more"), "--quiet"]
        assert "--iterations is 2; raise it" in refused(capsys, [*start, "--iterations", "2"])
        assert "has 2 classes, --classes is 3" in refused(capsys, [*start, "--classes", "3"])
        assert "leave --reference out" in refused(capsys, [*start, "--reference", str(data / "a" / "reference.mrc")])
        particles = read_star(data / "particles.star", text=True)
        write_star(data / "fewer.star", {**particles, "particles": particles["particles"].iloc[:60]})
        assert "60 of its 60 particles are among the 120" in refused(capsys, [start[0], str(data / "fewer.star"), *start[1:]])

    def test_a_gpu_that_is_gone_ends_the_run_with_a_clear_line(self, data, tmp_path, monkeypatch, capsys):
        true, count = step.iterate, []

        def lost(job, state):
            if count:
                raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")
            count.append(1)
            return true(job, state)

        with monkeypatch.context() as patch:
            patch.setattr(step, "iterate", lost)
            assert main(command(data, tmp_path / "run", "--iterations", 2)) == 1
        line = capsys.readouterr().err.strip()
        assert "does not answer any more (CUDA error: unspecified launch failure)" in line and "--resume" in line
        assert "Traceback" not in line and len(line.splitlines()) == 1
        assert main(command(data, tmp_path / "run", "--iterations", 2, "--resume")) == 0

    def test_a_gpu_that_runs_out_of_memory_is_given_less(self, data, finished, tmp_path, monkeypatch):
        true, shrinks = step.expectation, []

        def short(*args, **more):
            shrinks.append(args[4].shrink)
            if len(shrinks) in (2, 3):  # twice in iteration 2
                raise torch.OutOfMemoryError("CUDA out of memory")
            return true(*args, **more)

        monkeypatch.setattr(step, "expectation", short)
        out = classify(data, tmp_path / "run", "--iterations", 2, "--equal-filter", 1)  # as two of LAST
        assert shrinks == [1, 1, 2, 4]
        a, b = (density(run / "run_it002_class001.mrc") for run in (out, finished))
        assert float((a - b).norm() / b.norm()) < 1e-3

    @pytest.mark.slow
    def test_two_processes_give_what_one_gives(self, data, finished, tmp_path):
        words = command(data, tmp_path / "run", "--iterations", LAST)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "frazil", *words]
        done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found = read_star(tmp_path / "run" / "run_data.star")["particles"]
        wanted = read_star(finished / "run_data.star")["particles"]
        assert (found["rlnImageName"] == wanted["rlnImageName"]).all()
        assert (found["rlnClassNumber"] == wanted["rlnClassNumber"]).mean() > 0.97
        for k in (1, 2):
            a, b = (density(run / f"run_it002_class{k:03d}.mrc") for run in (tmp_path / "run", finished))
            assert float((a - b).norm() / b.norm()) < 1e-3
        again = subprocess.run([*launch, "--resume"], capture_output=True, text=True, check=False, timeout=300)
        assert again.returncode == 0, again.stderr  # finished already


class TestBadInput:
    def test_more_classes_than_particles(self, data, tmp_path, capsys):
        line = refused(capsys, command(data, tmp_path / "run", "--classes", 121))
        assert "120 usable particles of 120 for --classes 121" in line

    def test_references_of_unequal_size(self, data, tmp_path, capsys):
        write_mrc(tmp_path / "small.mrc", torch.randn(24, 24, 24), PIXEL)
        for names, words in (
            (["a/reference.mrc", str(tmp_path / "small.mrc")], f"{tmp_path}/small.mrc: box 24 px, but"),
            (["a/reference.mrc", "gone.mrc"], "gone.mrc"),
        ):
            write_star(data / "wrong.star", {"": pd.DataFrame({"rlnReferenceImage": names})})
            line = refused(capsys, command(data, tmp_path / "run", "--reference", data / "wrong.star", without=("--classes",)))
            assert words in line
        line = refused(capsys, command(data, tmp_path / "run", "--reference", data / "references.star", "--classes", 3))
        assert "lists 2 references, --classes is 3" in line
        write_star(data / "wrong.star", {"": pd.DataFrame({"rlnMicrographName": ["a"]})})
        assert "no column _rlnReferenceImage" in refused(capsys, command(data, tmp_path / "run", "--reference", data / "wrong.star"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--skip-align", "--skip-rotate"), "--skip-align and --skip-rotate: give one"),
            (("--skip-align",), "has no orientations"),
            (("--sigma-ang", 5), "has no orientations"),
            (("--skip-rotate", "--sigma-ang", 5), "give one of the two"),
            (("--classes", 0), "--classes: should be greater than or equal to 1"),
            (("--tau-fudge", 0), "--tau-fudge"),
            (("--diameter", 0), "--diameter: should be above 0"),
            (("--reference", "gone.mrc"), "gone.mrc: no such file (--reference)"),
            (("--continue", "gone.star"), "gone.star: no such file (--continue)"),
            (("--symmetry", "Q3"), "--symmetry"),
            (("--reseed-below", 2), "--reseed-below"),
            (("--initial-lowpass", 1000), "leaves nothing of"),
            (("--initial-lowpass", "nan"), "--initial-lowpass: should be a finite number"),
            (("--tau-fudge", "inf"), "--tau-fudge: should be a finite number"),
            (("--diameter", "nan"), "--diameter: should be a finite number"),
            (("--strict-highres", 1000), "--strict-highres 1000 leaves nothing of"),
            (("--offset-range", 1000), "shifts of more than half the box"),
            (("--offset-range", 6, "--offset-step", 0.05), "45239 shifts of every orientation, at most 10000"),
        ],
    )
    def test_options(self, data, tmp_path, capsys, options, words):
        assert words in refused(capsys, command(data, tmp_path / "run", *options))
        assert not (tmp_path / "run" / "run_data.star").exists()

    def test_what_is_missing(self, data, tmp_path, capsys):
        rest = [str(w) for w in ("--output", tmp_path / "run", "--quiet")]
        assert "PARTICLES is missing" in refused(capsys, ["class3d", *rest])
        assert "--reference is missing" in refused(capsys, ["class3d", str(data / "particles.star"), *rest])

    @pytest.mark.parametrize("n", [0, 3])
    def test_an_auto_refinement_cannot_be_continued_as_a_classification(self, data, tmp_path, capsys, n):
        general = {"rlnDoAutoRefine": 1, "rlnModelStarFile": "x", "rlnCurrentIteration": n}
        optimiser = tmp_path / f"run_it{n:03d}_optimiser.star"
        write_star(optimiser, {"optimiser_general": general})
        line = refused(capsys, ["class3d", "--continue", str(optimiser), "--output", str(tmp_path / "run")])
        assert "is not of a classification" in line

