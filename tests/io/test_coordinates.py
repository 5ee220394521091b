"""Coordinates of other programs: round trips, conventions by hand, bad files."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from frazil.data import BadInput
from frazil.io.coordinates import CLASS, PIXEL, PSI, SCORE, X, Y, read_coordinates, root, write_coordinates, write_cs
from frazil.io.star import write_star

TABLE = pd.DataFrame({X: [100.5, 20.25], Y: [40.0, 300.75], SCORE: [0.9, 0.1], CLASS: [2, 1], PSI: [10.0, -95.0]})


@pytest.mark.parametrize("ending", [".star", ".csv", ".box", ".cbox"])
def test_round_trip(ending, tmp_path):
    write_coordinates(tmp_path / f"mic{ending}", TABLE, box=64)
    (name, found), = read_coordinates(tmp_path / f"mic{ending}").items()
    assert name == "mic"
    for label in (X, Y, SCORE):
        assert np.allclose(found[label], TABLE[label], atol=0.01)


def test_cryosparc_keeps_fractions_of_the_sides(tmp_path):
    write_cs(tmp_path / "p.cs", {"J1/a.mrc": TABLE, "J1/b.mrc": TABLE[:1]}, {"J1/a.mrc": (400, 200), "J1/b.mrc": (400, 200)})
    rows = np.load(tmp_path / "p.cs")
    assert rows["location/center_x_frac"][0] == pytest.approx(100.5 / 200) and rows["location/center_y_frac"][0] == pytest.approx(0.1)
    found = read_coordinates(tmp_path / "p.cs")
    assert list(found) == ["J1/a.mrc", "J1/b.mrc"]
    assert np.allclose(found["J1/a.mrc"][[X, Y, SCORE, PSI]], TABLE[[X, Y, SCORE, PSI]], atol=1e-3)


def test_corners_become_centres(tmp_path):
    (tmp_path / "m.box").write_text("10 20 64 32\n0\t0\t64\t64\t-1\n")
    assert read_coordinates(tmp_path / "m.box")["m"][[X, Y]].to_numpy().tolist() == [[42, 36], [32, 32]]


def test_headings_and_plain_columns(tmp_path):
    (tmp_path / "topaz.txt").write_text("image_name\tx_coord\ty_coord\tscore\na\t1\t2\t3.5\nb\t4\t5\t-1\n")
    found = read_coordinates(tmp_path / "topaz.txt")
    assert list(found) == ["a", "b"] and found["a"][SCORE].tolist() == [3.5]
    (tmp_path / "plain.csv").write_text("1.5, 2\n3, 4\n")
    assert read_coordinates(tmp_path / "plain.csv")["plain"][[X, Y]].to_numpy().tolist() == [[1.5, 2], [3, 4]]


def test_lists_and_folders(tmp_path):
    write_coordinates(tmp_path / "a_autopick.star", TABLE)
    write_star(tmp_path / "autopick.star", {"coordinate_files": pd.DataFrame(
        {"rlnMicrographName": ["m/a.mrc"], "rlnMicrographCoordinates": [str(tmp_path / "a_autopick.star")]})})  # fmt: skip
    assert list(read_coordinates(tmp_path / "autopick.star")) == ["m/a.mrc"]
    assert root("x/y/a_autopick.star") == root("m/a.mrc") == "a"


@pytest.mark.real
def test_the_folder_of_a_picking_run_is_its_list(tmp_path):
    """It also holds logs and tables of other things, which are no coordinates."""
    write_coordinates(tmp_path / "mic_autopick.star", TABLE)
    write_star(tmp_path / "autopick.star", {"": pd.DataFrame({
        "rlnMicrographName": ["mic.mrc"], "rlnMicrographCoordinates": [str(tmp_path / "mic_autopick.star")]})})  # fmt: skip
    (tmp_path / "log.txt").write_text("2026-11-23 INFO 1 of 1 micrographs\n")
    found = read_coordinates(tmp_path)
    assert list(found) == ["mic.mrc"] and len(found["mic.mrc"]) == 2


def test_reads_relions_own(shared_data):
    file = shared_data / "relion_stars/tutorial_3.1/AutoPick/job011/Movies/20170629_00048_frameImage_autopick.star"
    (name, found), = read_coordinates(file).items()
    assert name == "20170629_00048_frameImage" and found[X][0] == 824.041181 and found[CLASS][0] == 3


@pytest.mark.parametrize("name, text, message", [
    ("a.box", "1 2\n", "expected 4 or more"), ("a.box", "a b c d\n", "expected 4 or more numbers"), 
    ("a.csv", "p,q\n1,2\n", "heading with x and y"),
    ("a.csv", "x,y\n1,abc\n", "row 1"), ("a.cs", "nonsense", "cryoSPARC"), ("a.cs", "", "it is empty"),
    ("a.cs", "PK\x03\x04 no archive", "cryoSPARC"),
    ("a.star", "data_\n\nloop_\n_rlnOther\n1\n", "_rlnCoordinateX"), ("missing.star", None, "no such file"),
])  # fmt: skip
def test_bad_files(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        read_coordinates(tmp_path / name)


def test_an_archive_is_no_table_of_cryosparc(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.cs")
    with pytest.raises(BadInput, match="archive of several arrays"):
        read_coordinates(tmp_path / "a.cs")


def test_a_pixel_size_of_cryosparc_is_kept(tmp_path):
    kinds = [("location/micrograph_path", "S20"), ("location/micrograph_shape", "<u4", (2,)), ("location/center_x_frac", "<f4"),
             ("location/center_y_frac", "<f4"), ("location/micrograph_psize_A", "<f4")]  # fmt: skip
    with open(tmp_path / "p.cs", "wb") as file:
        np.save(file, np.array([(b"J1/a.mrc", (100, 200), 0.5, 0.25, 1.5)], dtype=kinds))
    (table,) = read_coordinates(tmp_path / "p.cs").values()
    assert table[PIXEL].tolist() == [1.5] and table[[X, Y]].to_numpy().tolist() == [[100.0, 25.0]]
