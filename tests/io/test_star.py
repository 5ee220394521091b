"""STAR files: what is read, what is written, and that nothing is lost in between."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import string
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frazil.data import BadInput
from frazil.io.star import first_table, read_star, write_star


def read_text(tmp_path, content: str, **options):
    path = tmp_path / "t.star"
    path.write_bytes(content.encode())
    return read_star(path, **options)


LOOP = """# made by hand
# version 30001

data_things

loop_
_rlnMicrographName #1
_rlnVoltage #2
_rlnSomethingNew #3
_rlnClassNumber
007 300.000000 a 1
"two words.mrc" 2e2 "" -2
"""


def test_loops_keep_labels_order_and_comments(tmp_path):
    star = read_text(tmp_path, LOOP)
    table = star["things"]
    assert list(table.columns) == ["rlnMicrographName", "rlnVoltage", "rlnSomethingNew", "rlnClassNumber"]
    assert table["rlnMicrographName"].tolist() == ["007", "two words.mrc"]  # names are never numbers
    assert table["rlnVoltage"].tolist() == [300.0, 200.0] and table["rlnClassNumber"].dtype == np.int64
    assert table["rlnSomethingNew"].tolist() == ["a", ""] and table["rlnClassNumber"].tolist() == [1, -2]
    assert star.comment == "# made by hand" and star.skipped_rows == 0


def test_text_mode_changes_no_character(tmp_path):
    table = read_text(tmp_path, LOOP, text=True)["things"]
    assert table["rlnVoltage"].tolist() == ["300.000000", "2e2"]


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t.rstrip("\n"), lambda t: t + "\n \n\n"]
)
def test_line_ends_marks_and_blank_lines_do_not_matter(tmp_path, change):
    pd.testing.assert_frame_equal(read_text(tmp_path, change(LOOP))["things"], read_text(tmp_path, LOOP)["things"])


def test_lists_hold_typed_values(tmp_path):
    star = read_text(tmp_path, 'data_job\n\n_rlnA 5 # five\n_rlnB   1.50\n_rlnC ""\n_rlnD "30 degrees"\n_rlnE free text\n_rlnFName 12\n')
    assert star["job"] == {"rlnA": 5, "rlnB": 1.5, "rlnC": "", "rlnD": "30 degrees", "rlnE": "free text", "rlnFName": "12"}
    assert isinstance(star["job"]["rlnA"], int) and isinstance(star["job"]["rlnB"], float)


def test_quotes_inside_words_are_letters(tmp_path):
    table = read_text(tmp_path, "data_\nloop_\n_rlnA\n_rlnB\nO'Neill/x.mrc it's\n'a b' \"say \"hi\", now\"\n")[""]
    assert table.to_numpy().tolist() == [["O'Neill/x.mrc", "it's"], ["a b", 'say "hi", now']]


def test_repeated_tables_are_all_kept(tmp_path):
    star = read_text(tmp_path, "data_x\nloop_\n_a\n1\n2\ndata_x\nloop_\n_a\n3\ndata_x\n_b 4\n")
    assert list(star) == ["x", "x#2", "x#3"] and star["x#2"]["a"].tolist() == [3] and star["x#3"] == {"b": 4}
    write_star(tmp_path / "out.star", star)
    assert (tmp_path / "out.star").read_text().count("data_x\n") == 3
    assert list(read_star(tmp_path / "out.star")) == ["x", "x#2", "x#3"]


def test_a_stray_short_row_is_left_out_and_counted(tmp_path):
    with pytest.warns(UserWarning, match="t.star: 1 lines with too few values left out, first line 6"):
        star = read_text(tmp_path, "data_\nloop_\n_a\n_b\n1 2\n:\n3 4\n")
    assert star[""]["a"].tolist() == [1, 3] and star.skipped_rows == 1


def test_short_and_long_rows_do_not_cancel(tmp_path):
    """One value too few here and one too many there: the total is right, the rows are not."""
    with pytest.warns(UserWarning):
        star = read_text(tmp_path, "data_\nloop_\n_a\n_b\n1\n2 3 4\n5 6\n")
    assert star[""].to_numpy().tolist() == [[2, 3], [5, 6]] and star.long_line == 6


def test_text_behind_a_table_is_no_row(tmp_path):
    with pytest.warns(UserWarning, match="1 lines"):
        star = read_text(tmp_path, "data_a\nloop_\n_a\n_b\n1 2\n\n kk= 1 local resolution= 3.2\n\ndata_b\n_c 1\n")
    assert star["a"].to_numpy().tolist() == [[1, 2]] and star["b"] == {"c": 1} and star.long_line == 0


def test_empty_loops_have_columns(tmp_path):
    star = read_text(tmp_path, "data_a\nloop_\n_a #1\n_b #2\n\ndata_b\n_c 1\n")
    assert list(star["a"].columns) == ["a", "b"] and len(star["a"]) == 0 and star["b"] == {"c": 1}
    write_star(tmp_path / "out.star", star)
    assert list(read_star(tmp_path / "out.star")["a"].columns) == ["a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no data_ block"),
        ("# nothing\n", "no data_ block"),
        ("hello world\n", "line 1: expected a data_ block, found 'hello world'"),
        ("data_a\nloop_\n1 2\n", "line 3: loop_ without labels"),
        ("data_a\nloop_\n_x\n_x\n1 2\n", "label _x is listed twice"),
        ("data_a\n_x\n", "line 2: label _x has no value"),
        ("data_a\nwhat is this\n", "line 2: 'what is this' belongs to no loop_"),
        ("data_a\n\0\n", "is not a text file"),
    ],
)
def test_what_is_no_star_file_is_told_in_one_line(tmp_path, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        read_text(tmp_path, content)
    assert "t.star" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="gone.star: cannot be read: no such file"):
        read_star(tmp_path / "gone.star")
    with pytest.raises(BadInput, match="it is a folder"):
        read_star(tmp_path)


def test_values_are_written_as_relion_wants_them(tmp_path):
    table = pd.DataFrame({"i": [1, -20], "f": [1.0, 1 / 3], "s": ["a", "b c"], "b": [True, False]})
    write_star(tmp_path / "o.star", {"t": table, "l": {"x": 3, "y": 0.1, "z": None, "on": True}}, comment="hello\nthere")
    lines = (tmp_path / "o.star").read_text().splitlines()
    assert lines[:5] == ["# hello", "# there", "", "# version 30001", ""] and lines.count("# version 30001") == 2
    assert lines[lines.index("data_t") + 2 :][:5] == ["loop_ ", "_i #1 ", "_f #2 ", "_s #3 ", "_b #4 "]
    assert [line.split(None, 2) for line in lines if "0.33" in line] == [["-20", "0.3333333333333333", '"b c"            0 ']]
    assert "           1          1.0            a            1 " in lines  # columns stand 12 wide
    assert [line.split() for line in lines if line.startswith("_") and "#" not in line] == [
        ["_x", "3"],
        ["_y", "0.1"],
        ["_z", '""'],
        ["_on", "1"],
    ]


def test_a_line_break_or_a_missing_value_cannot_be_written(tmp_path):
    for values in (["a\nb"], [None]):
        with pytest.raises(ValueError):
            write_star(tmp_path / "o.star", {"t": pd.DataFrame({"s": values}, dtype="str")})
    assert os.listdir(tmp_path) == []


WORDS = st.text(alphabet=string.ascii_letters + string.digits + "_#'\"@/.- \té\xa0", max_size=12).filter(
    lambda w: not ("' " in w or "'\t" in w) and not ('" ' in w or '"\t' in w)
)
FLOATS = st.floats(width=64, allow_nan=False)
COLUMNS = st.sampled_from([("rlnImageName", WORDS), ("rlnX", FLOATS), ("rlnY", st.integers(-(2**53), 2**53)), ("other", FLOATS)])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), comment=st.sampled_from(["", "# one", "# one\n# two"]))
def test_what_is_written_is_read_again(tmp_path_factory, data, rows, comment):
    path = tmp_path_factory.mktemp("star") / "t.star"
    kinds = data.draw(st.lists(COLUMNS, min_size=1, max_size=4, unique_by=lambda c: c[0]))
    table = pd.DataFrame({name: data.draw(st.lists(kind, min_size=rows, max_size=rows)) for name, kind in kinds})
    settings_block = {name: data.draw(kind) for name, kind in kinds}
    write_star(path, {"general": settings_block, "particles": table}, comment=comment)
    star = read_star(path)
    assert star.comment == comment and star["general"] == settings_block
    assert list(star["particles"].columns) == list(table.columns)
    for name in table:
        assert star["particles"][name].tolist() == table[name].tolist()
        assert star["particles"][name].dtype.kind == table[name].dtype.kind or name == "rlnImageName"


def test_every_star_file_of_real_projects_survives(shared_data, tmp_path):
    files = [
        f
        for folder in ("relion_stars", "parity_relion5", "formats", "betagal_10204")
        for f in sorted((shared_data / folder).rglob("*.star"))
    ]
    assert len(files) > 80
    for file in files:
        for text in (True, False):
            with pytest.warns(UserWarning) if file.name in ("relion_locres_fscs.star",) or "Refine3D/job029/job" in str(file) else _quiet():
                star = read_star(file, text=text)
            write_star(tmp_path / "o.star", star, comment=star.comment)
            again = read_star(tmp_path / "o.star", text=text)
            assert list(again) == list(star) and again.comment == star.comment
            for name, block in star.items():
                if isinstance(block, dict):
                    assert again[name] == block
                else:
                    pd.testing.assert_frame_equal(again[name], block)


def _quiet():
    import contextlib

    return contextlib.nullcontext()


def test_local_resolution_tables_are_read_whole(shared_data):
    with pytest.warns(UserWarning, match="74 lines"):
        star = read_star(shared_data / "relion_stars/tutorial_3.1/LocalRes/job031/relion_locres_fscs.star")
    assert len(star) == 74 and {len(table) for table in star.values()} == {129}


def test_first_table_finds_a_column(tmp_path):
    star = read_text(tmp_path, "data_a\n_c 1\ndata_b\nloop_\n_c\n1\n")
    assert first_table(star, "c")[0] == "b" and first_table(star, "d") is None


def test_a_write_the_kernel_refuses_leaves_nothing(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    try:
        with pytest.raises(BadInput, match="big.star: cannot be written"):
            write_star(tmp_path / "big.star", {"t": pd.DataFrame({"x": np.arange(5000)})})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(shutil.which("relion_star_handler") is None, reason="relion_star_handler (Debian package relion) is not installed")
def test_relion_reads_what_is_written(tmp_path):
    values = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7}
    values |= {"rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": 1.25, "rlnImageSize": 64, "rlnImageDimensionality": 2}
    optics = pd.DataFrame({label: [value] for label, value in values.items()})
    table = pd.DataFrame({"rlnImageName": [f"{i + 1:06d}@s.mrcs" for i in range(3)], "rlnOpticsGroup": [1, 1, 1],
                          "rlnDefocusU": [10000.0, 12345.678901, 1e-7], "rlnClassNumber": [1, 2, 3]})  # fmt: skip
    write_star(tmp_path / "in.star", {"optics": optics, "particles": table})
    done = subprocess.run(
        ["relion_star_handler", "--i", "in.star", "--o", "out.star", "--select", "rlnClassNumber", "--minval", "2", "--maxval", "3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    back = read_star(tmp_path / "out.star")
    assert back["particles"]["rlnClassNumber"].tolist() == [2, 3] and back["optics"]["rlnVoltage"].tolist() == [300]
    assert back["particles"]["rlnDefocusU"].tolist() == pytest.approx([12345.678901, 1e-7])
