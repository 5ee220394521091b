"""What class2d and class3d do alike: going on from an iteration's files as the run itself did, and what is said when that cannot be."""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tests.jobs.classifying import BOX, PIXEL, classify, command, no_pictures, two_phantoms
from tests.jobs.refining import command as refinement
from tests.jobs.refining import density, iterations, warnings_of

import frazil.jobs.classify_run as runs
import frazil.steps.classify as step
from frazil.cli import main
from frazil.data import BadInput
from frazil.io.mrc import write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs import class2d, class3d
from frazil.jobs.class_report import class_report
from frazil.jobs.classify_files import resolutions
from frazil.jobs.classify_settings import ELSEWHERE, label_of, own_settings, read_own_settings
from frazil.jobs.entries import Entries
from frazil.jobs.record import read_json
from frazil.jobs.run import Options, Run
from frazil.maths.masks import soft_sphere

__all__ = ["no_pictures"]
MACHINE = ("--device", "cpu", "--threads", 1, "--gpu-memory", "1GB", "--quiet")  # no --seed: it is to come from the files
COARSE = ("--healpix-order", 1, "--oversampling", 1)
# What RELION has no labels for, none at its default.
OWN = ("--equal-filter", 0.3, "--no-auto-sampling", "--mask-edge", 3.5, "--mask-lowpass", "low.mrc", "--mask-lowpass-resolution", 50,
       "--reseed-below", 0.01, "--sigma-offset", 7, "--no-firstiter-cc", "--seed", 5)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few particles of two phantoms, and a mask."""
    folder = two_phantoms(tmp_path_factory.mktemp("classify_run") / "data", 20)
    write_mrc(folder / "mask.mrc", soft_sphere(BOX, 10.0, 3.0), PIXEL)
    write_mrc(folder / "low.mrc", (soft_sphere(BOX, 13.0, 3.0) - soft_sphere(BOX, 10.0, 3.0)).clamp(0, 1), PIXEL)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """Four iterations with unusual settings; run in the folder of the data, as the mask's name is relative to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data)
        return classify(data, data / "finished", *OWN, *COARSE, "--iterations", 4, "--mask", "mask.mrc", "--tau-fudge", 3)


def goes_on(start: Path, output: Path, *options: object) -> Path:
    """Continue a run with no options but these; the output directory."""
    assert main([str(word) for word in ["class3d", "--continue", start, "--output", output, *MACHINE, *options]]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], arguments: list[object], code: int = 2) -> str:
    """The one line a command that must fail with this code prints."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    return error


class TestSettings:
    @pytest.mark.parametrize("job", [class2d, class3d])
    def test_every_setting_comes_back(self, job, tmp_path):
        """Whatever RELION has no label for, so also options that are yet to come."""
        (tmp_path / "mask.mrc").touch()
        changed = {}
        for name, field in job.Params.model_fields.items():
            if name not in ELSEWHERE:
                other: dict[type, object] = {bool: not field.default, float: 0.25, int: 1}
                changed[name] = Path("mask.mrc") if "Path" in str(field.annotation) else other.get(type(field.default), 0.25)
        params = job.Params(**changed)
        written = {label: str(value) for label, value in own_settings(params).items()}
        assert {label_of(name) for name in changed} < set(written)
        general = Entries(tmp_path / "o.star", "x", "x", written)
        found = read_own_settings(job.Params(), general, tmp_path)
        assert found == {**changed, **({"mask_lowpass": tmp_path / "mask.mrc"} if "mask_lowpass" in changed else {})}
        assert "equal_filter" not in read_own_settings(class3d.Params(equal_filter=0.5), general, tmp_path)

    @pytest.mark.parametrize(
        ("label", "text", "reason"),
        [("frazilEqualFilter", "7", "less than or equal to 1"), ("frazilSigmaAng", "nan", "a finite number"),
         ("frazilAutoSampling", "perhaps", "a valid boolean")],
    )  # fmt: skip
    def test_values_that_cannot_be_are_named(self, tmp_path, label, text, reason):
        with pytest.raises(BadInput, match=f"o.star: _{label} is '{text}', but should be {reason}"):
            read_own_settings(class3d.Params(), Entries(tmp_path / "o.star", "x", "x", {label: text}), tmp_path)

    def test_continue_without_options_repeats_what_the_run_did_next(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        out = goes_on(finished / "run_it001_optimiser.star", tmp_path / "more")
        assert [event["iteration"] for event in iterations(out)] == [2, 3, 4]
        for k in (1, 2):
            a, b = (density(run / f"run_it004_class{k:03d}.mrc") for run in (out, finished))
            assert float((a - b).norm() / b.norm()) < 2e-3  # to the digits of the STAR files
        before, after = (read_json(run / "job.json") for run in (finished, out))
        same = set(before["parameters"]) - {"particles", "reference", "continue_", "mask", "mask_lowpass", "initial_lowpass"}
        assert {name: after["parameters"][name] for name in same} == pytest.approx({name: before["parameters"][name] for name in same})
        assert after["seed"] == before["seed"] == 5

    def test_continue_from_iteration_0_is_the_run_itself(self, data, finished, tmp_path, monkeypatch):
        """The first filter, the seed, what each particle is to begin in, the grey scale: none of them is in RELION's labels."""
        monkeypatch.chdir(data)
        out = goes_on(finished / "run_it000_optimiser.star", tmp_path / "more", "--iterations", 4)
        a, b = (density(run / "run_it002_class001.mrc") for run in (out, finished))
        assert float((a - b).norm() / b.norm()) < 2e-3
        other = goes_on(finished / "run_it000_optimiser.star", tmp_path / "other", "--iterations", 1, "--seed", 6)
        kinds = [read_star(run / "run_it001_data.star")["particles"]["rlnClassNumber"] for run in (finished, out, other)]
        assert (kinds[0] == kinds[1]).all() and not (kinds[0] == kinds[2]).all()  # another seed: other classes to begin with

    def test_a_class_that_was_seeded_anew_goes_on_so(self, data, tmp_path, monkeypatch):
        """Its map is that of the largest class: only the particles drawn for it make a difference between the two."""
        monkeypatch.chdir(data)
        out = classify(data, tmp_path / "run", *COARSE, "--reseed-below", 0.99, "--iterations", 5)
        marked = [(i, read_star(out / f"run_it{i:03d}_data.star")["particles"].get("frazilAssignedClass")) for i in range(2, 5)]
        n = next(i for i, column in marked if column is not None and column.max() > 0)
        assert torch.equal(*(density(out / f"run_it{n:03d}_class00{k}.mrc") for k in (1, 2)))
        more = goes_on(out / f"run_it{n:03d}_optimiser.star", tmp_path / "more")
        for k in (1, 2):
            a, b = (density(run / f"run_it{n + 1:03d}_class{k:03d}.mrc") for run in (more, out))
            assert float((a - b).norm() / b.norm()) < 2e-3

    def test_files_of_relion_have_no_settings_of_ours(self, data, finished, tmp_path, monkeypatch):
        """RELION 3.1 passes over labels it does not know: what it wrote itself goes on with our defaults."""
        monkeypatch.chdir(data)
        star = read_star(finished / "run_it002_optimiser.star", text=True)
        star["optimiser_general"] = {k: v for k, v in star["optimiser_general"].items() if not k.startswith("frazil")}
        write_star(tmp_path / "o_optimiser.star", star)
        used = read_json(goes_on(tmp_path / "o_optimiser.star", tmp_path / "more", "--iterations", 3) / "job.json")
        assert used["parameters"]["equal_filter"] == class3d.Params().equal_filter and used["parameters"]["auto_sampling"]
        assert used["parameters"]["tau_fudge"] == 3 and used["seed"] == 0


class TestRelion31:
    def test_a_model_as_relion_31_writes_it_goes_on_alike(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        model = read_star(finished / "run_it002_model.star", text=True)
        del model["model_general"]["rlnNrOpticsGroups"], model["model_optics_group_1"]
        settings = read_star(finished / "run_it002_optimiser.star", text=True)
        settings["optimiser_general"]["rlnModelStarFile"] = str(tmp_path / "r_model.star")
        write_star(tmp_path / "r_model.star", model)
        write_star(tmp_path / "r_optimiser.star", settings)
        out = goes_on(tmp_path / "r_optimiser.star", tmp_path / "more", "--iterations", 3)
        a, b = (density(run / "run_it003_class001.mrc") for run in (out, finished))
        assert float((a - b).norm() / b.norm()) < 2e-3


class TestRecord:
    def test_job_and_report_show_what_was_used(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        out = goes_on(finished / "run_it003_optimiser.star", tmp_path / "more", "--tau-fudge", 2)
        job = read_json(out / "job.json")
        wanted = {"iterations": 4, "tau_fudge": 2.0, "diameter": 120.0, "classes": 2, "equal_filter": 0.3, "auto_sampling": False}
        assert wanted.items() <= job["parameters"].items()
        assert job["parameters"]["mask"] == str(data / "mask.mrc") and "mask" in job["inputs"]
        assert job["asked"]["iterations"] == 25 and job["asked"]["classes"] == 1
        drawn = []
        monkeypatch.setattr("frazil.jobs.class_report.plot_class_slices", lambda *a: drawn.append(a[3]))
        monkeypatch.setattr("frazil.jobs.class_report.write_plots", lambda folder, figures: {})
        page = class_report(out).read_text()
        assert drawn == [120.0]  # Å of the crop
        for line in ("<td>diameter</td><td>120.0</td>", "<td>equal_filter</td><td>0.3</td>", "<td>seed</td><td>5</td>"):
            assert line in page
        again = ["class3d", "--continue", finished / "run_it003_optimiser.star", "--tau-fudge", 2, "--output", out, *MACHINE, "--resume"]
        assert main([str(word) for word in again]) == 0  # finished: what was asked is compared, not what was used
        assert read_json(out / "job.json") == job

    def test_as_many_classes_as_references_are_recorded(self, data, tmp_path):
        names = [str(data / name / "reference_lowpass.mrc") for name in ("a", "b", "b")]
        write_star(tmp_path / "refs.star", {"": pd.DataFrame({"rlnReferenceImage": names})})
        out = classify(data, tmp_path / "run", *COARSE, "--reference", tmp_path / "refs.star", "--iterations", 1, without=("--classes",))
        assert read_json(out / "job.json")["parameters"]["classes"] == 3

    def test_a_continued_run_cut_off_resumes(self, data, finished, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        true, count = step.iterate, []

        def dies(job, state):
            if count:
                raise MemoryError("cut off")
            count.append(1)
            return true(job, state)

        words = ["class3d", "--continue", finished / "run_it002_optimiser.star", "--output", tmp_path / "more", *MACHINE]
        with monkeypatch.context() as patch:
            patch.setattr(step, "iterate", dies)
            assert main([str(word) for word in words]) == 1
        assert main([str(word) for word in [*words, "--resume"]]) == 0
        assert [event["iteration"] for event in iterations(tmp_path / "more")] == [3, 4]
        a, b = (density(run / "run_it004_class001.mrc") for run in (tmp_path / "more", finished))
        assert float((a - b).norm() / b.norm()) < 2e-3
        assert read_json(tmp_path / "more" / "job.json")["parameters"]["equal_filter"] == 0.3


class TestMasks:
    def test_they_are_found_beside_the_files_from_another_folder(self, data, finished, tmp_path, monkeypatch):
        """All files of an iteration in one folder, started from a third one."""
        job, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
        job.mkdir(), elsewhere.mkdir()
        for file in [*finished.glob("run_it003_*"), data / "mask.mrc", data / "low.mrc"]:
            shutil.copy(file, job)
        table = read_star(job / "run_it003_data.star", text=True)
        names = table["particles"]["rlnImageName"].str
        table["particles"]["rlnImageName"] = names.replace(r"@\S*?([ab]/stacks)", rf"@{data}/\1", regex=True)
        write_star(job / "run_it003_data.star", table)
        settings = job / "run_it003_optimiser.star"
        settings.write_text(settings.read_text().replace(str(finished), "Class3D/job007"))
        monkeypatch.chdir(elsewhere)
        out = goes_on(settings, tmp_path / "more")
        used = read_json(out / "job.json")["parameters"]
        assert used["mask"] == str(job / "mask.mrc") and used["mask_lowpass"] == str(job / "low.mrc")
        a, b = (density(run / "run_it004_class001.mrc") for run in (out, finished))
        assert float((a - b).norm() / b.norm()) < 2e-3

    def test_one_that_is_gone_is_named_with_its_label(self, data, finished, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(finished, tmp_path / "run")
        start = tmp_path / "run" / "run_it003_optimiser.star"
        line = refused(capsys, ["class3d", "--continue", start, "--output", "more"])
        assert f"{start}: the file low.mrc it names (_frazilMaskLowpass) is neither in" in line
        line = refused(capsys, ["class3d", "--continue", start, "--mask-lowpass", data / "low.mrc", "--output", "other"])
        assert "the file mask.mrc it names (_rlnSolventMaskName)" in line


class TestDevice:
    def lost(self, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int, ready: Callable[[], bool] = lambda: True) -> None:
        """Let the device go after so many iterations: whatever is done with it, and copied off it, fails from then on.

        ready: what the files have to say before.
        """
        true, copy, count, gone = step.iterate, runs.host_copy, [], []

        def iterate(job, state):
            if len(count) == after:
                end = time.monotonic() + 20
                while not ready() and time.monotonic() < end:
                    time.sleep(0.01)
                gone.append(1)
                raise error
            count.append(1)
            return true(job, state)

        def host_copy(state):
            made = copy(state)

            def get():
                if gone:
                    raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore of it")
                return made()

            return get

        monkeypatch.setattr(step, "iterate", iterate)
        monkeypatch.setattr(runs, "host_copy", host_copy)

    @pytest.mark.parametrize("rest", [runs.REST, 1e9])
    def test_what_is_kept_is_said_and_a_resumed_run_goes_on_from_there(self, data, tmp_path, monkeypatch, capsys, rest):
        """An iteration of this size is kept soon after it was made. Were it not, the last were lost: nothing can be copied then."""
        words, path = command(data, tmp_path / "run", *COARSE, "--iterations", 6), tmp_path / "run" / "checkpoint.pt"
        number = lambda: torch.load(path, weights_only=True)["progress"]["iteration"] if path.exists() else 0  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(runs, "REST", rest)
            ready = (lambda: number() == 4) if rest < 100 else path.exists
            self.lost(patch, torch.AcceleratorError("CUDA error: unspecified launch failure\nmore of it"), 4, ready)
            line = refused(capsys, words, 1)
        kept = number()
        assert kept == 4 if rest < 100 else 1 <= kept < 4
        assert f"iteration {kept} was kept: --resume with --output {tmp_path / 'run'} goes on from there" in line
        assert main([*words, "--resume"]) == 0
        assert [event["iteration"] for event in iterations(tmp_path / "run")] == [*range(1, 5), *range(kept + 1, 7)]

    def test_nothing_kept_is_said(self, data, tmp_path, monkeypatch, capsys):
        words = command(data, tmp_path / "run", *COARSE, "--iterations", 2)
        with monkeypatch.context() as patch:
            self.lost(patch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 0)
            assert "no iteration was kept: --resume with" in refused(capsys, words, 1)
        assert main([*words, "--resume"]) == 0

    @pytest.mark.parametrize(
        "message",
        ["Triton Error [CUDA]: unspecified launch failure", "cuFFT error: CUFFT_EXEC_FAILED", "CUDA error: device-side assert triggered",
         "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", "CUBLAS_STATUS_INTERNAL_ERROR"],
    )  # fmt: skip
    def test_libraries_say_in_their_own_ways_that_a_device_is_lost(self, message, tmp_path):
        run = Run("class3d", class3d.Params(), runs_options(tmp_path))
        run.kept = 7
        with pytest.raises(runs.DeviceLost, match="does not answer any more") as caught, runs.device_errors(run):
            raise RuntimeError(message + "\nand more")
        assert message in str(caught.value) and "iteration 7 was kept" in str(caught.value)

    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), torch.AcceleratorError("CUDA error: out of memory"),
         RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
         RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED")],
    )  # fmt: skip
    def test_used_up_memory_is_no_lost_device(self, error, tmp_path):
        run = Run("class3d", class3d.Params(), runs_options(tmp_path))
        with pytest.raises(runs.DeviceLost, match="too little memory") as caught, runs.device_errors(run):
            raise error
        assert "does not answer" not in str(caught.value)

    def test_other_errors_stay_what_they_are(self, tmp_path):
        run = Run("class3d", class3d.Params(), runs_options(tmp_path))
        with pytest.raises(RuntimeError, match="shape mismatch") as caught, runs.device_errors(run):
            raise RuntimeError("shape mismatch")
        assert not isinstance(caught.value, runs.DeviceLost)


def runs_options(folder: Path) -> Options:
    """Of a run on the CPU."""
    return Options(output=folder / "run", device="cpu")


class TestBadFiles:
    def test_a_star_file_that_is_no_optimiser(self, finished, tmp_path, capsys):
        for kind in ("data", "model", "sampling"):
            path = finished / f"run_it002_{kind}.star"
            line = refused(capsys, ["class3d", "--continue", path, "--output", tmp_path / kind])
            assert f"{path}: has no data_optimiser_general; expected the optimiser.star of a Class2D or Class3D iteration" in line

    @pytest.mark.parametrize(
        ("file", "block", "label"),
        [
            ("optimiser", "optimiser_general", "rlnExperimentalDataStarFile"), ("optimiser", "optimiser_general", "rlnCurrentIteration"),
            ("optimiser", "optimiser_general", "rlnOrientSamplingStarFile"), ("model", "model_general", "rlnCurrentResolution"),
            ("model", "model_general", "rlnOrientationalPriorMode"), ("sampling", "sampling_general", "rlnSamplingPerturbInstance"),
            ("model", "model_classes", "rlnClassDistribution"), ("model", "model_general", "rlnTau2FudgeFactor"),
        ],
    )  # fmt: skip
    def test_a_label_that_is_missing(self, data, finished, tmp_path, monkeypatch, capsys, file, block, label):
        monkeypatch.chdir(data)
        shutil.copytree(finished, tmp_path / "run")
        path = tmp_path / "run" / f"run_it002_{file}.star"
        settings = tmp_path / "run" / "run_it002_optimiser.star"
        settings.write_text(settings.read_text().replace(str(finished), str(tmp_path / "run")))
        star = read_star(path, text=True)
        del star[block][label]
        write_star(path, star)
        line = refused(capsys, ["class3d", "--continue", settings, "--output", tmp_path / "more"])
        assert f"{path}: data_{block} has no" in line and f"_{label}" in line

    def test_a_label_that_holds_no_number(self, data, finished, tmp_path, capsys):
        star = read_star(finished / "run_it002_optimiser.star", text=True)
        star["optimiser_general"]["rlnCurrentIteration"] = "two"
        write_star(tmp_path / "x_optimiser.star", star)
        line = refused(capsys, ["class3d", "--continue", tmp_path / "x_optimiser.star", "--output", tmp_path / "more"])
        assert "_rlnCurrentIteration of data_optimiser_general is 'two'; expected a number" in line

    def test_a_list_of_no_references(self, data, tmp_path, capsys):
        (tmp_path / "none.star").write_text("data_\n\nloop_\n_rlnReferenceImage #1\n\n")
        words = command(data, tmp_path / "run", "--reference", tmp_path / "none.star", without=("--classes",))
        assert "none.star: lists no map, its column _rlnReferenceImage has no rows" in refused(capsys, list(words))

    @pytest.mark.parametrize("damage", ["empty", "cut", "text", "parts"])
    def test_a_damaged_checkpoint(self, data, finished, tmp_path, monkeypatch, capsys, damage):
        monkeypatch.chdir(data)
        out = tmp_path / "run"
        shutil.copytree(finished, out)
        state = read_json(out / "state.json")
        (out / "state.json").write_text(json.dumps({**state, "state": "stopped"}))
        spoil(out / "checkpoint.pt", damage)
        words = [*command(data, out, *OWN, *COARSE, "--iterations", 4, "--mask", "mask.mrc", "--tau-fudge", 3), "--resume"]
        line = refused(capsys, list(words))
        if damage == "parts":
            assert "was written by another version of frazil" in line
            return
        assert f"{out}/checkpoint.pt: is damaged" in line and "delete the file to start from the beginning" in line
        assert f"--continue {out}/run_it004_optimiser.star" in line
        (out / "checkpoint.pt").unlink()
        assert main(words) == 0 and iterations(out)[-1]["iteration"] == 4

    def test_a_damaged_checkpoint_of_a_refinement(self, data, tmp_path, capsys):
        words = refinement(data / "a", tmp_path / "run", "--iterations", 1, "--healpix-order", 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("frazil.jobs.refine3d.refine3d_report", lambda folder: None)
            assert main(words) == 0
        for damage in ("cut", "parts"):
            spoil(tmp_path / "run" / "checkpoint.pt", damage)
            words[words.index("--iterations") + 1] = "2"
            line = refused(capsys, [*words, "--resume"])
            assert "checkpoint.pt" in line and "--continue" not in line
            assert ("is damaged" in line) == (damage == "cut")


def spoil(path: Path, damage: str) -> None:
    """Damage a checkpoint in one of the ways that happen."""
    content = path.read_bytes()
    if damage == "parts":
        torch.save({"progress": {"iteration": 1}}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"no checkpoint at all\n" * 50}[damage])


class TestEmptyClasses:
    @pytest.fixture(scope="class")
    def emptied(self, data: Path) -> Path:
        """A run whose third class starts from noise and empties at once; that is too late to start it anew in the last iteration."""
        write_mrc(data / "noise.mrc", 1e4 * torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(3)), PIXEL)
        names = [str(data / "a" / "reference_lowpass.mrc"), str(data / "b" / "reference_lowpass.mrc"), str(data / "noise.mrc")]
        write_star(data / "three.star", {"": pd.DataFrame({"rlnReferenceImage": names})})
        return classify(data, data / "emptied", *COARSE, "--reference", data / "three.star", "--no-firstiter-cc", "--iterations", 1,
                        "--reseed-below", 0.05, without=("--classes",))  # fmt: skip

    def test_they_have_no_resolution(self, emptied):
        classes = read_star(emptied / "run_it001_model.star")["model_classes"]
        assert classes["rlnEstimatedResolution"].tolist()[2] == float("inf") and classes["rlnEstimatedResolution"][:2].max() < 200
        assert iterations(emptied)[-1]["class_resolution"][2] is None
        said = (emptied / "log.txt").read_text()
        assert f"class 3: 0 particles (0.0 %), empty, {emptied}/run_it001_class003.mrc" in said
        page = class_report(emptied).read_text()
        assert "<td>empty</td>" in page and page.count("data:image/png;base64,") == 4

    def test_no_option_is_advised_that_was_given(self, emptied):
        line = next(line for line in warnings_of(emptied) if "class 3 is empty" in line)
        assert "--reseed-below" not in line and "fewer --classes may do" in line

    def test_what_relion_wrote_of_one_can_be_continued(self, data, emptied, tmp_path, monkeypatch):
        monkeypatch.chdir(data)
        model = read_star(emptied / "run_it001_model.star", text=True)
        model["model_classes"].loc[2, "rlnOverallFourierCompleteness"] = "-nan"
        write_star(tmp_path / "m.star", model)
        settings = read_star(emptied / "run_it001_optimiser.star", text=True)
        settings["optimiser_general"]["rlnModelStarFile"] = str(tmp_path / "m.star")
        write_star(tmp_path / "o_optimiser.star", settings)
        out = goes_on(tmp_path / "o_optimiser.star", tmp_path / "more", "--iterations", 2, "--reseed-below", 0)
        assert density(out / "run_it002_class003.mrc").abs().max() == 0

    def test_a_class_is_empty_where_its_map_is(self):
        maps = torch.zeros(3, 4, 4, 4)
        maps[:2] = 1
        share, spectra = torch.tensor([1.0, 0, 0]), torch.zeros(3, 17)
        model = SimpleNamespace(box=32, pixel_size=2.0, data_vs_prior=spectra, pdf_class=share, maps=maps)
        assert torch.isinf(resolutions(SimpleNamespace(model=model))).tolist() == [False, False, True]
