"""frazil refine3d with input that is wrong: one clear line, exit code 2, nothing lost."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.jobs.refining import BOX, COUNT, PIXEL, command, copy_of, density, no_pictures, poke, refine, simulate, warnings_of

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.record import read_json

__all__ = ["no_pictures"]
Tables = dict


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("refine3d") / "data")


@pytest.fixture
def spoilt(data: Path, tmp_path: Path) -> Path:
    """A copy of the data to spoil."""
    return copy_of(data, tmp_path / "data")


def edit(folder: Path, change: Callable[[Tables], object]) -> None:
    """Change the tables of particles.star."""
    tables = read_star(folder / "particles.star", text=True)
    change(tables)
    write_star(folder / "particles.star", tables)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, output: Path, *options: object) -> str:
    """The one line that a refinement is refused with; checks the exit code and that nothing was made but the record of the failure."""
    capsys.readouterr()
    assert main(command(folder, output, *options, quiet=False)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in captured.err, captured.err
    made = {path.name for path in output.iterdir()} if output.exists() else set()
    assert made <= {"job.json", "state.json", "events.jsonl", "log.txt", "RELION_JOB_EXIT_FAILURE"}
    return lines[0]


def column(label: str, value: str, row: int | None = None) -> Callable[[Tables], object]:
    """A change of one column of the particles."""

    def change(tables: Tables) -> None:
        if row is None:
            tables["particles"][label] = value
        else:
            tables["particles"].loc[row, label] = value

    return change


def without(block: str, label: str) -> Callable[[Tables], object]:
    """A change that drops a column."""
    return lambda tables: tables.update({block: tables[block].drop(columns=label)})


@pytest.mark.parametrize("change, told", [
    (column("rlnImageName", "000003@stacks/gone.mrcs", 6), r"row 7: 000003@stacks/gone.mrcs: stack stacks/gone.mrcs not found"),
    (column("rlnImageName", "000041@stacks/mic0001.mrcs", 6), r"row 7: .* image 41 is out of range: the stack holds images 1 to 40"),
    (column("rlnImageName", "0@stacks/mic0001.mrcs", 6), r"row 7: .* image 0 is out of range"),
    (column("rlnImageName", "three@stacks/mic0001.mrcs", 6), r"row 7: .* expected rlnImageName as index@stack"),
    (column("rlnDefocusU", "nan", 6), r"row 7: _rlnDefocusU is 'nan'; expected a finite number"),
    (column("rlnRandomSubset", "1"), r"200 usable particles in half 1 and 0 in half 2; remove the column"),
    (lambda t: t["particles"].insert(1, "rlnRandomSubset", ["1", "2", "0", "2"] * 50),
     r"row 3: _rlnRandomSubset is 0; expected 1 or 2 in every row, or remove the column \(50 such rows\)"),
    (lambda t: t.update(particles=t["particles"].iloc[:0]), r"particles.star: holds no particles"),
    (lambda t: t.update(particles=t["particles"].iloc[:3]), r"3 usable particles of 3; two half sets need at least 4"),
    (lambda t: t.pop("particles"), r"no table of particles"),
    (without("particles", "rlnDefocusU"), r"label _rlnDefocusU is missing"),
    (without("particles", "rlnImageName"), r"label _rlnImageName is missing"),
    (without("optics", "rlnVoltage"), r"data_optics: label _rlnVoltage is missing \(kV\)"),
    (without("optics", "rlnSphericalAberration"), r"data_optics: label _rlnSphericalAberration is missing"),
    (without("optics", "rlnAmplitudeContrast"), r"data_optics: label _rlnAmplitudeContrast is missing"),
    (without("optics", "rlnImagePixelSize"), r"data_optics: label _rlnImagePixelSize is missing"),
    (lambda t: t["optics"].update({"rlnImageSize": ["31"]}), r"optics group 1 has an odd box of 31 px"),
    (lambda t: t["optics"].update({"rlnImageSize": ["64"]}), r"images are 32 px, the optics group says rlnImageSize 64"),
    (lambda t: t["optics"].update({"rlnImagePixelSize": ["4.0"]}), r"reference_lowpass.mrc: pixel size 5 Å, but the particles' is 4 Å"),
    (lambda t: t.update(particles=t["particles"].assign(rlnOpticsGroup="3")), r"row 1: _rlnOpticsGroup is 3; data_optics has \[1\]"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_mistakes_in_the_star_file_are_one_line(spoilt: Path, capsys, tmp_path, change, told) -> None:
    edit(spoilt, change)
    line = refused(capsys, spoilt, tmp_path / "run")
    assert re.search(told, line) and ("particles.star" in line or "reference_lowpass.mrc" in line), line


@pytest.mark.parametrize("text, told", [
    ("", "no data_ block"), ("data_\n", "no table of particles"), ("hello\n", "is this a STAR file"),
])  # fmt: skip
def test_files_that_are_no_particle_tables(spoilt: Path, capsys, tmp_path, text, told) -> None:
    (spoilt / "particles.star").write_text(text)
    assert told in refused(capsys, spoilt, tmp_path / "run")


def test_a_truncated_and_a_deleted_stack(spoilt: Path, capsys, tmp_path) -> None:
    stack = spoilt / "stacks" / "mic0002.mrcs"
    os.truncate(stack, 1024 + 12 * BOX * BOX * 4)
    line = refused(capsys, spoilt, tmp_path / "run")
    assert "truncated: the header promises 40 sections, the file holds 12.0" in line and "row 41" in line
    stack.unlink()
    assert "mic0002.mrcs not found" in refused(capsys, spoilt, tmp_path / "run")


def reference_of(kind: str, good: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(voxels, pixel size) of a wrong reference."""
    if kind == "nan":
        bad = good.clone()
        bad[3, 4, 5] = float("nan")
        return bad, PIXEL
    return {
        "box": (torch.nn.functional.pad(good, (4,) * 6), PIXEL),
        "odd": (good[:31, :31, :31], PIXEL),
        "not a cube": (good[:, :, :30], PIXEL),
        "pixel size": (good, 4.0),
        "no pixel size": (good, 0.0),
        "constant": (torch.full_like(good, 2.0), PIXEL),
        "image": (good[:1], PIXEL),
    }[kind]


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
@pytest.mark.parametrize("kind, told", [
    ("nan", "not finite"), ("box", "box 40 px, but the particles' is 32 px"), ("odd", "box of 31 px is odd"),
    ("not a cube", "30 x 32 x 32 voxels; expected a cube"), ("pixel size", "pixel size 4 Å, but the particles' is 5 Å"),
    ("no pixel size", "no pixel size in its header"), ("constant", "every voxel is 2"), ("image", "is a single image"),
])  # fmt: skip
def test_wrong_references(data: Path, capsys, tmp_path, kind, told) -> None:
    voxels, pixel_size = reference_of(kind, density(data / "reference.mrc"))
    write_mrc(tmp_path / "bad.mrc", voxels, pixel_size)
    line = refused(capsys, data, tmp_path / "run", "--reference", tmp_path / "bad.mrc")
    assert told in line and "bad.mrc" in line


def sphere(box: int, value: float = 1.0) -> torch.Tensor:
    """A hard sphere of half the box."""
    line = torch.arange(box) - box // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return (x**2 + y**2 + z**2 < (box / 4) ** 2).float() * value


@pytest.mark.parametrize("option", ["--mask", "--mask2"])
@pytest.mark.parametrize("voxels, pixel_size, told", [
    (sphere(36), PIXEL, "box 36 px"), (sphere(BOX), 4.0, "pixel size 4 Å"),
    (sphere(BOX, 1.5), PIXEL, "values run from 0 to 1.5, expected 0 to 1"), (sphere(BOX) - 0.5, PIXEL, "expected 0 to 1"),
    (sphere(BOX, 0.0), PIXEL, "every voxel is 0"), (sphere(BOX)[:, :, 1:], PIXEL, "expected a cube"),
], ids=["box", "pixel size", "above 1", "below 0", "empty", "not a cube"])  # fmt: skip
def test_wrong_masks(data: Path, capsys, tmp_path, option, voxels, pixel_size, told) -> None:
    write_mrc(tmp_path / "mask.mrc", voxels, pixel_size)
    line = refused(capsys, data, tmp_path / "run", option, tmp_path / "mask.mrc")
    assert told in line and "mask.mrc" in line


@pytest.mark.parametrize("options, told", [
    (["--symmetry", "Q7"], "--symmetry: "),
    (["--symmetry", "C0"], "--symmetry: "),
    (["--diameter", "0"], "--diameter: should be above 0, or -1 for the whole box (got 0"),
    (["--diameter", "-20"], "--diameter: should be above 0"),
    (["--solvent-correct-fsc"], "--solvent-correct-fsc needs --mask"),
    (["--reference", "gone.mrc"], "gone.mrc: no such file (--reference)"),
    (["--mask", "gone.mrc"], "gone.mrc: no such file (--mask)"),
    (["--initial-lowpass", "500"], "--initial-lowpass 500 leaves nothing"),
    (["--max-order", "1"], "--max-order 1 is below --healpix-order 2"),
    (["--local-from-order", "2"], "has no orientations (_rlnAngleRot, …) for the search to be local from the start"),
    (["--healpix-order", "9"], "--healpix-order: should be less than or equal to 7"),
    (["--device", "cuda:77"], "--device: cuda:77"),
])  # fmt: skip
def test_wrong_options(data: Path, capsys, tmp_path, options, told) -> None:
    assert told in refused(capsys, data, tmp_path / "run", *options)


def test_a_mistake_mended_needs_no_new_directory(data: Path, capsys, tmp_path) -> None:
    out = tmp_path / "run"
    refused(capsys, data, out, "--symmetry", "Q7")
    refine(data, out, "--iterations", 1)
    assert read_json(out / "state.json")["state"] == "done" and not (out / "RELION_JOB_EXIT_FAILURE").exists()


def test_a_directory_that_holds_another_run_is_left_alone(data: Path, capsys, tmp_path) -> None:
    other = tmp_path / "other"
    simulate(other, "--particles", 4)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    assert main(command(data, other)) == 2
    assert "holds a simulate run, not a refine3d run; choose another --output" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    assert main(command(data, mine, "--resume")) == 2
    assert "is not empty and holds no frazil run" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_unusable_images_are_dropped_counted_and_listed(data: Path, spoilt: Path, tmp_path) -> None:
    poke(spoilt / "stacks" / "mic0001.mrcs", 3, float("nan"))
    poke(spoilt / "stacks" / "mic0001.mrcs", 7, 2.5)
    poke(spoilt / "stacks" / "mic0005.mrcs", 0, float("inf"))
    out = refine(spoilt, tmp_path / "run", "--iterations", 1)
    names = [f"{n}@{spoilt}/stacks/mic000{m}.mrcs" for n, m in (("000004", 1), ("000008", 1), ("000001", 5))]
    reasons = ["not finite", "constant", "not finite"]
    assert (out / "dropped_particles.txt").read_text().splitlines() == [f"{n}\t{r}" for n, r in zip(names, reasons, strict=True)]
    assert any(w.startswith("3 of 200 particles are constant or hold NaN and are left out (first: row 4,") for w in warnings_of(out))
    kept = read_star(out / "run_it001_data.star")["particles"]["rlnImageName"].tolist()
    assert len(kept) == COUNT - 3 and not set(names) & set(kept)
    # The result is that of a STAR file without them.
    short = [name.replace(f"{spoilt}/", "") for name in names]
    edit(spoilt, lambda t: t.update(particles=t["particles"][~t["particles"]["rlnImageName"].isin(short)]))
    clean = refine(spoilt, tmp_path / "clean", "--iterations", 1)
    assert torch.equal(density(out / "run_it001_half1_class001.mrc"), density(clean / "run_it001_half1_class001.mrc"))
    assert not (clean / "dropped_particles.txt").exists()


def test_nothing_is_listed_as_dropped_by_a_run_that_is_refused(spoilt: Path, capsys, tmp_path) -> None:
    poke(spoilt / "stacks" / "mic0001.mrcs", 3, 0.0)
    edit(spoilt, column("rlnRandomSubset", "2"))
    assert "0 usable particles in half 1 and 0" not in (line := refused(capsys, spoilt, tmp_path / "run"))
    assert "0 usable particles in half 1 and 199 in half 2" in line


def test_what_is_probably_a_mistake_is_warned_of(spoilt: Path, tmp_path) -> None:
    edit(spoilt, column("rlnImageName", "000001@stacks/mic0001.mrcs", 1))
    stack = spoilt / "stacks" / "mic0001.mrcs"
    for micrograph in range(1, 6):
        stack = spoilt / "stacks" / f"mic{micrograph:04d}.mrcs"
        write_mrc(stack, 30 * read_map(stack).data + 100, PIXEL, stack=True)
    told = warnings_of(refine(spoilt, tmp_path / "wide", "--diameter", 500, "--iterations", 1))
    assert any("--diameter 500 is larger than the box (160 Å)" in line for line in told)
    assert any("1 of 200 rows repeat the image of an earlier row" in line for line in told)
    assert any("particles look un-normalised: background mean 10" in line for line in told)
    told = warnings_of(refine(spoilt, tmp_path / "narrow", "--diameter", 12, "--iterations", 1))
    assert any("--diameter 12 is only a few pixels" in line for line in told)


def test_good_input_is_not_warned_of(data: Path, tmp_path) -> None:
    told = warnings_of(refine(data, tmp_path / "run", "--iterations", 1))
    assert len(told) == 1 and told[0].startswith("not converged after 1 iterations")


def test_groups_without_particles_do_not_matter(data: Path, spoilt: Path, tmp_path) -> None:
    def change(tables: Tables) -> None:
        row = tables["optics"].iloc[0].to_dict()
        first = {**row, "rlnOpticsGroup": "7", "rlnOpticsGroupName": "empty", "rlnImageSize": "51", "rlnImagePixelSize": "1.1"}
        tables["optics"] = type(tables["optics"])([first, row])

    edit(spoilt, change)
    out = refine(spoilt, tmp_path / "run", "--iterations", 2)
    same = refine(data, tmp_path / "same", "--iterations", 2)
    for name in ("run_it002_half1_class001.mrc", "run_it002_half2_class001.mrc"):
        assert torch.allclose(density(out / name), density(same / name), atol=1e-6)


def test_the_installed_program_says_the_same(data: Path, tmp_path) -> None:
    words = command(data, tmp_path / "run", "--symmetry", "Q7")
    done = subprocess.run([sys.executable, "-m", "frazil", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: --symmetry: ")
