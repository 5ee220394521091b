"""frazil model-fsc: a model against its own density, against EMD-3488, and what is refused."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import read_star

gemmi = pytest.importorskip("gemmi", reason="gemmi is not installed")
BOX, PIXEL = 40, 1.2
EMD3488 = Path(os.environ.get("FRAZIL_EMD3488", "/tmp/ccpem/ccpem_utils-0.0.1.dev35/ccpem_utils_tests/test_data"))


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random coil of 60 residues in two chains, 20 Å across, in the middle of a box whose first voxel is at (100, 0, −20) Å."""
    rng, middle = np.random.default_rng(1), BOX // 2 * PIXEL + np.array([100.0, 0.0, -20.0])
    lines, serial = [], 1
    for chain in "AB":
        walk = rng.normal(size=(30, 3)).cumsum(0)
        walk = (walk - walk.mean(0)) / walk.std() * 5 + middle
        for number, place in enumerate(walk, 1):
            for name, offset in (("N", (-1.2, 0, 0)), ("CA", (0, 0, 0)), ("C", (1.2, 0.5, 0)), ("H", (0, 1, 0))):
                x, y, z = place + np.array(offset)
                atom = f"ATOM  {serial:5d}  {name:<3} ALA {chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
                lines.append(f"{atom}  1.00 30.00           {name[0]}")
                serial += 1
    (tmp_path / "model.pdb").write_text("\n".join([*lines, "END"]) + "\n")
    return tmp_path / "model.pdb"


@pytest.fixture
def maps(tmp_path: Path, model: Path) -> Path:
    """map.mrc and two noisy half maps at that place."""
    from frazil.io.models import density_from_model

    rng = torch.Generator().manual_seed(3)
    volume = density_from_model(model, BOX, PIXEL, 3.5, grid_origin=(100.0, 0.0, -20.0))
    halves = [volume.data + 0.4 * volume.data.std() * torch.randn(volume.data.shape, generator=rng) for _ in range(2)]
    for name, data in (("map", (halves[0] + halves[1]) / 2), ("half1", halves[0]), ("half2", halves[1])):
        write_mrc(tmp_path / f"{name}.mrc", data, PIXEL, origin=(100.0, 0.0, -20.0))
    return tmp_path


def result(folder: Path) -> dict:
    return next(e for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if e["event"] == "result")


def test_a_model_fits_its_own_density(maps, model):
    out = maps / "out"
    halves = ("--half1", maps / "half1.mrc", "--half2", maps / "half2.mrc")
    assert run("model-fsc", maps / "map.mrc", model, *halves, "--output", out, "--quiet") == 0
    found = result(out)
    assert 3.0 < found["crossing"] < 4.2 and found["crossing_half1"] == pytest.approx(found["crossing_half2"], abs=0.4)
    assert found["correlation"] > 0.9 and found["q_score"] > 0.5
    assert found["composition"]["atoms"] == 180 and found["composition"]["protein_residues"] == 60
    table = read_star(out / "qscore.star")
    assert list(table["chains"]["frazilChain"]) == ["A", "B"] and len(table["residues"]) == 60
    curve = read_star(out / "model_fsc.star")["fsc"]
    assert len(curve) == BOX // 2 + 1 and float(curve["frazilFscWork"][5]) > 0.8
    assert read_map(out / "model.mrc").origin == (100.0, 0.0, -20.0)
    assert (out / "report.html").read_text().count("<img") == 2
    assert not any(e["event"] == "warning" for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()))


def test_odd_sides_and_a_start_instead_of_an_origin(maps, model):
    import mrcfile

    data = read_map(maps / "map.mrc").data[:39, :, :37].numpy()
    with mrcfile.new(maps / "odd.mrc") as file:
        file.set_data(data)
        file.voxel_size = 1.25
        file.header.nxstart, file.header.nystart, file.header.nzstart = 80, 0, -16
        file.header.cella.x, file.header.cella.y, file.header.cella.z = 37 * PIXEL, 40 * PIXEL, 39 * PIXEL
    # 80 · 1.2 = 96 Å, −16 · 1.2 = −19.2 Å: the model lies 4 and 0.8 Å off, which the curve shows; and is inside
    assert run("model-fsc", maps / "odd.mrc", model, "--output", maps / "odd", "--quiet") == 0
    assert result(maps / "odd")["q_score"] < 0.3


def test_a_model_fitted_to_half_1_is_noticed(maps, model, capsys):
    """FSC-work from a half map that the model explains better than the other one."""
    half = read_map(maps / "half2.mrc")
    noisy = half.data + 3 * half.data.std() * torch.randn(half.data.shape, generator=torch.Generator().manual_seed(5))
    write_mrc(maps / "bad.mrc", noisy, PIXEL, origin=half.origin)
    halves = ("--half1", maps / "half1.mrc", "--half2", maps / "bad.mrc")
    assert run("model-fsc", maps / "map.mrc", model, *halves, "--output", maps / "o") == 0
    assert "above FSC-free" in (maps / "o" / "report.html").read_text()


@pytest.mark.parametrize("arguments, told", [
    (["map.mrc", "model.pdb", "--ignore-origin"], "model.pdb: 180 of 180 atoms lie outside the map"),
    (["map.mrc", "model.pdb", "--half1", "half1.mrc"], "give both --half1 and --half2"),
    (["map.mrc", "model.pdb", "--half1", "half1.mrc", "--half2", "half1.mrc"], "is the same map as half1.mrc"),
    (["map.mrc", "model.pdb", "--half1", "half1.mrc", "--half2", "small.mrc"], "small.mrc: 32 x 32 x 32 px, but map.mrc has 40"),
    (["map.mrc", "model.pdb", "--half1", "half1.mrc", "--half2", "pixel.mrc"], "pixel.mrc: pixel size 1.3 Å, but map.mrc has 1.2 Å"),
    (["nan.mrc", "model.pdb"], "nan.mrc: holds values that are not finite"),
    (["none.mrc", "model.pdb"], "none.mrc: has no pixel size"),
    (["map.mrc", "model.pdb", "--mask", "pixel.mrc"], "make the mask on the map's grid"),
    (["map.mrc", "model.pdb", "--mask", "map.mrc"], "expected 0 to 1"),
    (["map.mrc", "map.mrc"], "cannot be read as an atomic model"),
    (["map.mrc", "no.pdb"], "no.pdb: no such file"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Data array contains")
def test_mistakes_are_one_line(arguments, told, maps, monkeypatch, capsys):
    monkeypatch.chdir(maps)
    data = read_map("map.mrc").data
    write_mrc("small.mrc", data[:32, :32, :32], PIXEL)
    write_mrc("pixel.mrc", data, 1.3)
    write_mrc("none.mrc", data, 0.0)
    hole = data.clone()
    hole[0, 0, 0] = float("nan")
    write_mrc("nan.mrc", hole, PIXEL)
    assert run("model-fsc", *arguments, "--output", "out") == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.strip().splitlines()) == 1


@pytest.mark.real
def test_haemoglobin_at_its_published_resolution(tmp_path):
    """EMD-3488 (3.2 Å) with 5NI1, from the sdist of ccpem_utils (see the README of the real data)."""
    if not (EMD3488 / "emd_3488.mrc").exists():
        pytest.skip("no EMD-3488: pip download --no-deps --no-binary :all: ccpem_utils, FRAZIL_EMD3488=…/ccpem_utils_tests/test_data")
    assert run("model-fsc", EMD3488 / "emd_3488.mrc", EMD3488 / "5ni1_updated.cif", "--output", tmp_path / "o", "--quiet") == 0
    found = result(tmp_path / "o")
    assert 3.1 < found["crossing"] < 3.35 and 0.55 < found["q_score"] < 0.8
