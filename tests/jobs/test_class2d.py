"""frazil class2d on a tiny set of known classes: files, the sheet, stopping and going on, bad input."""
from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.jobs.refining import FAST, iterations, nothing_half_written, warnings_of, with_defaults

import frazil.steps.class2d as vdam_step
import frazil.steps.classify as step
from frazil.cli import main
from frazil.io.mrc import read_stack, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.class2d import Params, first_look
from frazil.jobs.class_report import class_report
from frazil.jobs.class_sheet import last_stack, plot_averages
from frazil.jobs.classify_files import read_classification, seeded_anew
from frazil.jobs.record import read_json
from frazil.jobs.run import Options, Run
from frazil.maths.masks import soft_circle
from frazil.simulate.averages import agreement, particles_of, pictures

BOX, PIXEL, KINDS, COUNT, LAST = 32, 4.0, 2, 150, 4
SMALL = ("--classes", 3, "--diameter", 100, "--iterations", LAST, "--psi-step", 20, "--offset-range", 3, "--max-significant", 60,
         "--write-every", 1, *FAST)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_numba_thread():
    import numba

    numba.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of particles of two pictures, particles.star; truth.mrcs holds the pictures. The kind is the image's number modulo 2."""
    folder, generator = tmp_path_factory.mktemp("class2d"), torch.Generator().manual_seed(5)
    truth = pictures(KINDS, BOX, generator)
    images, particles, _ = particles_of(truth, COUNT, PIXEL, 1.0, 0.7, generator)
    write_mrc(folder / "stack.mrcs", images, PIXEL, stack=True)
    write_mrc(folder / "truth.mrcs", truth, PIXEL, stack=True)
    optics = pd.DataFrame({
        "rlnOpticsGroupName": ["a"], "rlnOpticsGroup": [1], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX], "rlnImageDimensionality": [2],
    })  # fmt: skip
    table = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(COUNT)], "rlnMicrographName": "m.mrc", "rlnOpticsGroup": 1,
        **{f"rlnDefocus{x}": particles.defocus[:, i].numpy() for i, x in enumerate(("U", "V", "Angle"))},
    })  # fmt: skip
    write_star(folder / "particles.star", {"optics": optics, "particles": table})
    return folder


def command(data: Path, output: Path, *options: object) -> list[str]:
    """The command line of a small classification; `options` replace those of its own that they name."""
    return ["class2d", *map(str, [data / "particles.star", *with_defaults(SMALL, options), "--output", output]), "--quiet"]


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """A whole classification, every iteration written, with its pictures."""
    out = data / "finished"
    assert main(command(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def gradients(data: Path) -> Path:
    """A whole run of gradient steps, every iteration written."""
    out = data / "gradients"
    assert main(command(data, out, "--method", "vdam", "--write-every", 1)) == 0
    return out


def asked(folder: Path) -> Run:
    """A run that has not begun, with no options but where it is."""
    return Run("class2d", Params(), Options(output=folder / "asked", device="cpu"))


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
            ends = ("data.star", "model.star", "optimiser.star", "sampling.star", "classes.mrcs")
            assert {f"run_it{i:03d}_{end}" for end in ends} <= names
        assert {"run_data.star", "run_unmasked_classes.mrcs", "classes.png", "report.html", "checkpoint.pt"} <= names
        assert nothing_half_written(finished)

    def test_the_model_says_what_the_averages_are(self, finished):
        model, event = read_star(finished / f"run_it{LAST:03d}_model.star"), iterations(finished)[-1]
        general, classes = model["model_general"], model["model_classes"]
        assert general["rlnReferenceDimensionality"] == 2 and general["rlnNrClasses"] == 3 and general["rlnTau2FudgeFactor"] == 2
        assert classes["rlnReferenceImage"].tolist() == [f"{k:06d}@{finished}/run_it{LAST:03d}_classes.mrcs" for k in (1, 2, 3)]
        assert classes["rlnClassDistribution"].tolist() == pytest.approx(event["occupancy"], abs=1e-6)
        assert classes["rlnEstimatedResolution"].tolist() == pytest.approx(event["class_resolution"], rel=1e-5)
        assert len(set(classes["rlnAccuracyRotations"])) == 3 and (classes["rlnAccuracyRotations"] <= 30).all()
        assert all(classes[f"rlnClassPriorOffset{x}"].abs().max() < 3 * PIXEL for x in "XY")
        masked, plain = read_stack(finished / f"run_it{LAST:03d}_classes.mrcs"), read_stack(finished / "run_unmasked_classes.mrcs")
        assert masked.shape == plain.shape == (3, BOX, BOX)
        middle = soft_circle(BOX, 100 / (2 * PIXEL), 5.0)
        assert torch.allclose(masked, plain * middle, atol=1e-6)
        sampling = read_star(finished / f"run_it{LAST:03d}_sampling.star")["sampling_general"]
        assert sampling["rlnIs3DSampling"] == 0 and sampling["rlnPsiStep"] == 20

    def test_particles_are_told_apart(self, finished):
        particles = read_star(finished / "run_data.star")["particles"]
        found = torch.tensor(particles["rlnClassNumber"].to_numpy(dtype=int)) - 1
        kind = torch.tensor([int(name.split("@")[0]) for name in particles["rlnImageName"]]) % 2
        assert agreement(found, kind) > 0.9
        assert (particles["rlnAngleTilt"].abs() < 1e-4).all() and particles["rlnAnglePsi"].abs().max() > 30

    def test_files_of_an_iteration_are_read_back(self, data, finished, monkeypatch):
        monkeypatch.chdir(data)
        state, _, general = read_classification(finished / "run_it002_optimiser.star", data)
        assert state.model.maps.shape == (3, BOX, BOX) and state.sampling.flat and state.sampling.coarse_step == 20
        assert state.model.prior_offset is not None and general["rlnDoCenterClasses"] == "1" and general["rlnDoGradientRefine"] == "0"


class TestSheet:
    def test_the_report_shows_the_averages(self, finished):
        page = class_report(finished).read_text()
        assert "<h2>Class averages</h2>" in page and "<h2>Classes</h2>" in page and "<h2>Viewing directions</h2>" not in page
        assert (finished / "classes.png").read_bytes() == (finished / "plots" / "averages.png").read_bytes()
        assert last_stack(finished) == finished / f"run_it{LAST:03d}_classes.mrcs"

    def test_classes_come_by_falling_count_and_empty_ones_not_at_all(self):
        averages = torch.stack([torch.full((8, 8), float(k)) + torch.eye(8) for k in range(4)]).numpy()
        figure = plot_averages(averages, np.array([5, 0, 70, 6]), np.array([20.0, 999, 9.4, 12.0]), 2.0)
        (ax,) = figure.axes
        assert [text.get_text() for text in ax.texts if ":" in text.get_text()] == ["3: 70\n9 Å", "4: 6\n12 Å", "1: 5\n20 Å"]
        assert [float(np.asarray(image.get_array())[0, 1]) for image in ax.images] == [2.0, 3.0, 0.0]

    def test_many_classes_go_on_rows_of_ten(self):
        figure = plot_averages(np.random.default_rng(1).normal(size=(23, 8, 8)), np.arange(1, 24), np.full(23, 10.0), 2.0)
        places = [image.get_extent() for image in figure.axes[0].images]
        assert len(places) == 23 and len({left for left, _, _, _ in places}) == 10 and len({bottom for _, _, bottom, _ in places}) == 3


class TestGoingOn:
    @pytest.mark.parametrize(("method", "module", "name"), [("em", step, "iterate"), ("vdam", vdam_step, "gradient_step")])
    def test_a_run_cut_off_resumes_to_the_same_averages(self, data, tmp_path, monkeypatch, method, module, name):
        options = ("--method", method, "--write-every", 0)
        assert main(command(data, tmp_path / "whole", *options)) == 0
        true, count = getattr(module, name), []

        def dies(job, state):
            if len(count) == 2:
                raise MemoryError("cut off")
            count.append(1)
            return true(job, state)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dies)
            assert main(command(data, tmp_path / "run", *options)) == 1
        assert main(command(data, tmp_path / "run", *options, "--resume")) == 0
        a, b = (read_stack(tmp_path / run / f"run_it{LAST:03d}_classes.mrcs") for run in ("run", "whole"))
        assert torch.equal(a, b)
        assert [event["iteration"] for event in iterations(tmp_path / "run")] == [1, 2, 3, 4]

    def test_continue_goes_on_from_files(self, data, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(data)
        start = ["class2d", "--continue", str(finished / "run_it003_optimiser.star"), "--output", str(tmp_path / "more"), "--quiet"]
        assert main([*start, "--iterations", "4", "--write-every", "1", *map(str, FAST)]) == 0
        a, b = (read_stack(run / "run_it004_classes.mrcs") for run in (tmp_path / "more", finished))
        assert float((a - b).norm() / b.norm()) < 2e-3  # to the digits of the STAR files
        start[-2] = str(tmp_path / "other")
        assert "--iterations is 3; raise it" in refused(capsys, [*start, "--iterations", "3"])
        assert "has 3 classes, --classes is 5" in refused(capsys, [*start, "--classes", "5"])
        start[-2] = str(tmp_path / "third")
        assert "`frazil class2d` continues it" in refused(capsys, ["class3d", *start[1:]])

    def test_continue_without_options_repeats_what_the_run_did_next(self, data, tmp_path, monkeypatch):
        """Also with settings that RELION has no label for, and the seed."""
        monkeypatch.chdir(data)
        own = ("--mask-edge", 3.5, "--reseed-below", 0.3, "--initial-lowpass", 30, "--firstiter-cc", "--seed", 8)
        assert main(command(data, tmp_path / "run", *own)) == 0
        for n in (0, 2):
            words = ["class2d", "--continue", tmp_path / "run" / f"run_it{n:03d}_optimiser.star", "--output", tmp_path / f"more{n}"]
            assert main([str(w) for w in [*words, "--device", "cpu", "--threads", 1, "--quiet"]]) == 0
            a, b = (read_stack(run / f"run_it{LAST:03d}_classes.mrcs") for run in (tmp_path / f"more{n}", tmp_path / "run"))
            assert float((a - b).norm() / b.norm()) < 2e-3  # to the digits of the STAR files
            used = read_json(tmp_path / f"more{n}" / "job.json")
            assert used["parameters"]["mask_edge"] == 3.5 and used["parameters"]["iterations"] == LAST and used["seed"] == 8

    def test_how_long_a_run_explores_is_in_its_files_and_relions_do_not(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        path = finished / "run_it001_optimiser.star"
        assert first_look(asked(tmp_path), Params(continue_=path))[1].explore == Params().explore > 0
        blocks = read_star(path)
        del blocks["optimiser_general"]["frazilExplore"]
        theirs = finished / "theirs_optimiser.star"  # beside the files it names
        write_star(theirs, blocks)
        assert first_look(asked(tmp_path), Params(continue_=theirs))[1].explore == 0
        assert first_look(asked(tmp_path), Params(continue_=theirs, explore=0.3))[1].explore == 0.3

    def test_two_classes_with_one_average_are_told_apart_again(self, data, finished, tmp_path, monkeypatch):
        """A class that started anew as a copy of another: files do not say which particles were to be whose."""
        monkeypatch.chdir(data)
        state, params, _ = first_look(asked(tmp_path), Params(continue_=finished / "run_it002_optimiser.star"))
        assert state is not None and seeded_anew(state, params, 1).assigned is None
        maps, klass = state.model.maps.clone(), torch.arange(COUNT) % 3
        maps[2] = maps[0]
        twins = replace(state, model=replace(state.model, maps=maps), poses=replace(state.poses, klass=klass))
        assigned = seeded_anew(twins, params, 1).assigned
        assert assigned is not None and (assigned[klass == 1] == -1).all()
        counts = torch.bincount(assigned[klass != 1], minlength=3)
        assert counts[1] == 0 and counts.min() == 0 and counts[[0, 2]].min() > 30
        gone = replace(twins, model=replace(twins.model, pdf_class=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)))
        assert seeded_anew(gone, params, 1).assigned is None  # empty classes are alike, too

    @pytest.mark.parametrize("n", [0, 2])
    def test_a_gradient_run_continues_with_its_momenta(self, data, gradients, tmp_path, monkeypatch, n):
        monkeypatch.chdir(data)
        words = ["class2d", "--continue", gradients / f"run_it{n:03d}_optimiser.star", "--output", tmp_path / "more", "--quiet"]
        assert main([str(w) for w in [*words, "--write-every", 1, *FAST]]) == 0
        assert [event["iteration"] for event in iterations(tmp_path / "more")] == list(range(n + 1, LAST + 1))
        for name in ("1moment", "2moment", "classes"):
            a, b = (read_stack(run / f"run_it{LAST:03d}_{name}.mrcs") for run in (tmp_path / "more", gradients))
            assert float((a - b).norm() / b.norm()) < 2e-3, name  # to the digits of the STAR files
        general = read_star(tmp_path / "more" / f"run_it{LAST:03d}_optimiser.star")["optimiser_general"]
        assert general["rlnDoGradientRefine"] == 1  # --method came from the files, too

    def test_without_the_momenta_the_averages_would_be_others(self, data, gradients, tmp_path, monkeypatch, capsys):
        """What the test before would not see if momenta made no difference; and a run of another method begins its gradients anew."""
        monkeypatch.chdir(data)
        shutil.copytree(gradients, tmp_path / "run")
        model = read_star(tmp_path / "run" / "run_it002_model.star", text=True)
        model["model_classes"] = model["model_classes"].drop(columns=["rlnGradMoment1", "rlnGradMoment2"])
        write_star(tmp_path / "run" / "run_it002_model.star", model)
        settings = read_star(tmp_path / "run" / "run_it002_optimiser.star", text=True)
        settings["optimiser_general"]["rlnModelStarFile"] = str(tmp_path / "run" / "run_it002_model.star")
        write_star(tmp_path / "run" / "run_it002_optimiser.star", settings)
        words = ["class2d", "--continue", tmp_path / "run" / "run_it002_optimiser.star", "--output", tmp_path / "more"]
        assert main([str(w) for w in [*words, "--write-every", 1, *FAST]]) == 0
        assert "the gradients begin anew" in capsys.readouterr().err
        a, b = (read_stack(run / f"run_it{LAST:03d}_classes.mrcs") for run in (tmp_path / "more", gradients))
        assert float((a - b).norm() / b.norm()) > 0.01

    def test_momenta_of_another_padding_are_refused(self, data, gradients, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(data)
        words = ["class2d", "--continue", gradients / "run_it002_optimiser.star", "--output", tmp_path / "more", "--quiet", "--pad", 1]
        assert "run_it002_1moment.mrcs: momenta of 68 x 67 px, expected 36 x 35" in refused(capsys, [str(w) for w in words])

    def test_momenta_are_there_under_relions_names(self, gradients):
        classes = read_star(gradients / "run_it002_model.star")["model_classes"]
        assert str(classes["rlnGradMoment1"][2]).endswith("000003@" + str(gradients / "run_it002_1moment.mrcs"))
        first, second = (read_stack(gradients / f"run_it002_{i}moment.mrcs") for i in (1, 2))
        assert len(first) == 2 * len(classes) and len(second) == len(classes)
        assert (second[..., 1::2] == 0).all() and (second[..., ::2] > 0).all()
        kept = torch.load(gradients / "checkpoint.pt", weights_only=True)["moments"]
        last = read_stack(gradients / f"run_it{LAST:03d}_1moment.mrcs")
        assert torch.equal(torch.view_as_real(kept["first"]).flatten(-2).flatten(0, 1), last)

    def test_from_given_averages(self, data, tmp_path):
        options = ("--reference", data / "truth.mrcs", "--classes", KINDS, "--initial-lowpass", 12, "--iterations", 2, "--write-every", 0)
        assert main(command(data, tmp_path / "run", *options)) == 0
        particles = read_star(tmp_path / "run" / "run_data.star")["particles"]
        kind = np.array([(int(name.split("@")[0]) - 1) % 2 + 1 for name in particles["rlnImageName"]])
        assert (particles["rlnClassNumber"] == kind).mean() > 0.95

    def test_a_class_that_empties_is_said(self, data, tmp_path):
        stack = torch.cat([read_stack(data / "truth.mrcs"), 1e4 * torch.randn(1, BOX, BOX, generator=torch.Generator().manual_seed(1))])
        write_mrc(tmp_path / "three.mrcs", stack, PIXEL, stack=True)
        options = ("--reference", tmp_path / "three.mrcs", "--initial-lowpass", 12, "--iterations", 2)
        assert main(command(data, tmp_path / "run", *options)) == 0
        assert [line[:26] for line in warnings_of(tmp_path / "run") if "empty" in line] == ["class 3 is empty after ite"]
        assert read_stack(tmp_path / "run" / "run_it002_classes.mrcs")[2].abs().max() == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--classes", COUNT + 1), f"{COUNT} usable particles of {COUNT} for --classes {COUNT + 1}"),
            (("--classes", 0), "--classes: should be greater than or equal to 1"),
            (("--skip-align",), "has no orientations"),
            (("--method", "sgd"), "--method"),
            (("--psi-step", 0), "--psi-step"),
            (("--diameter", 0), "--diameter: should be above 0"),
            (("--iterations", -1), "--iterations"),
            (("--mask", "gone.mrc"), "gone.mrc: no such file (--mask)"),
            (("--inactivity-threshold", 1), "--inactivity-threshold"),
        ],
    )
    def test_options(self, data, tmp_path, capsys, options, words):
        assert words in refused(capsys, command(data, tmp_path / "run", *options))

    @pytest.mark.filterwarnings("ignore:Data array contains NaN")
    def test_references_and_masks_that_do_not_fit(self, data, tmp_path, capsys):
        write_mrc(tmp_path / "small.mrcs", torch.randn(3, 24, 24), PIXEL, stack=True)
        write_mrc(tmp_path / "coarse.mrcs", torch.randn(3, BOX, BOX), 2 * PIXEL, stack=True)
        write_mrc(tmp_path / "high.mrc", torch.full((BOX, BOX), 3.0), PIXEL)
        write_mrc(tmp_path / "cube.mrc", torch.ones(BOX, BOX, BOX), PIXEL)
        write_mrc(tmp_path / "nan.mrcs", torch.full((3, BOX, BOX), torch.nan), PIXEL, stack=True)
        for option, file, words in (
            ("--reference", tmp_path / "small.mrcs", "images of 24 x 24 px, but the particles' box is 32 px"),
            ("--reference", tmp_path / "coarse.mrcs", "pixel size 8 Å, but the particles' is 4 Å"),
            ("--reference", data / "truth.mrcs", "holds 2 averages, --classes is 3"),
            ("--reference", tmp_path / "nan.mrcs", "NaN or infinite"),
            ("--mask", tmp_path / "high.mrc", "values run from 3 to 3"),
            ("--mask", tmp_path / "cube.mrc", "is 32 x 32 x 32 px; a mask for the averages is one image"),
        ):
            assert words in refused(capsys, command(data, tmp_path / "run", option, file))

    def test_what_is_missing(self, tmp_path, capsys):
        assert "PARTICLES is missing" in refused(capsys, ["class2d", "--output", str(tmp_path / "run"), "--quiet"])
