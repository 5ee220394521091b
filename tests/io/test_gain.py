"""Gain references and defects: orientation, inversion, size, formats."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.gain import fit_gain, gain_form, inverted, oriented, read_defects, read_gain, write_gain
from frazil.io.mrc import write_mrc

# As displayed, row 0 at the bottom: a letter F.
F = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]).flip(0)


def shown(data: torch.Tensor) -> list[str]:
    return ["".join("#" if v else "." for v in row) for row in data.flip(0).tolist()]


@pytest.mark.parametrize("turn, flip, picture", [
    (0, 0, ["###", "#..", "##.", "#.."]),
    (1, 0, ["####", ".#.#", "...#"]),  # clockwise: the stem lies on top
    (2, 0, ["..#", ".##", "..#", "###"]),
    (3, 0, ["#...", "#.#.", "####"]),
    (0, 1, ["#..", "##.", "#..", "###"]),
    (0, 2, ["###", "..#", ".##", "..#"]),
    (1, 1, ["...#", ".#.#", "####"]),
    (1, 2, ["####", "#.#.", "#..."]),
])  # fmt: skip
def test_orientations_as_displayed(turn: int, flip: int, picture: list[str]) -> None:
    assert shown(oriented(F, turn, flip)) == picture


def test_forms(tmp_path: Path, rng: torch.Generator) -> None:
    import tifffile

    gain = 1 + 0.1 * torch.rand(64, 72, generator=rng)
    gain[2, 3] = 0
    write_mrc(tmp_path / "g.mrc", gain, 1.0)
    assert torch.equal(read_gain(tmp_path / "g.mrc"), gain)
    counts = read_gain(tmp_path / "g.mrc", eer=True)  # EER references are counts
    assert counts[2, 3] == 0 and float(counts[0, 0] * gain[0, 0]) == pytest.approx(float(gain[gain > 0].mean()))
    tifffile.imwrite(tmp_path / "g.gain", gain.numpy())
    (tmp_path / "g.tif").write_bytes((tmp_path / "g.gain").read_bytes())
    assert torch.equal(read_gain(tmp_path / "g.gain", eer=True), gain)  # factors already, not turned over
    assert torch.equal(read_gain(tmp_path / "g.tif"), gain.flip(0))


def test_files_that_say_what_they_hold(tmp_path: Path, rng: torch.Generator) -> None:
    gain = 1 + 0.1 * torch.rand(64, 72, generator=rng)
    gain[2, 3] = 0
    for written in (False, True):
        write_gain(tmp_path / "g.mrc", gain, eer=written)
        for eer in (False, True):  # whatever the movies
            assert gain_form(tmp_path / "g.mrc", eer) == ("counts" if written else "factors")
            found = read_gain(tmp_path / "g.mrc", eer)
            assert torch.allclose(found / found[0, 0], gain / gain[0, 0], rtol=1e-5)
    assert torch.equal(inverted(torch.tensor([[2.0, 0.0, 4.0]])), torch.tensor([[1.5, 0.0, 0.75]]))


def test_sizes() -> None:
    gain = torch.arange(1.0, 17).reshape(4, 4)
    assert torch.equal(fit_gain(gain, (8, 8), "g", eer=True)[:2, :2], torch.full((2, 2), 1.0))
    assert fit_gain(gain, (2, 2), "g", eer=True)[0, 0] == (1 + 2 + 5 + 6) / 4
    with pytest.raises(BadInput, match="gain of 4 x 4 px, frames of 8 x 8"):
        fit_gain(gain, (8, 8), "g")
    with pytest.raises(BadInput, match="would fit turned by 90°"):
        fit_gain(torch.ones(4, 6), (6, 4), "g")


def test_defects(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("# comment\n1 0 2 3\n9 7 5 5\n")
    bad = read_defects(path, (8, 10))
    assert bad[:3, 1:3].all() and bad[7, 9] and int(bad.sum()) == 7
    assert torch.equal(read_defects(path, (8, 10), tiff=True), bad.flip(0))
    image = torch.zeros(64, 80)
    image[5, 70] = 1
    write_mrc(tmp_path / "d.mrc", image, 1.0)
    assert torch.equal(read_defects(tmp_path / "d.mrc", (64, 80)), image != 0)
    with pytest.raises(BadInput, match="defects of 80 x 64 px"):
        read_defects(tmp_path / "d.mrc", (80, 64))
    for text, said in (("CameraSize 5760 4092\n", "line 1: CameraSize is SerialEM"), ("BadColumns 5\n", "SerialEM"), ("1 2 3\n", "four "
        "whole numbers"),
                       ("20 0 1 1\n", "lies outside"), ("a b c d\n", "line 1")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(BadInput, match=said):
            read_defects(path, (8, 10))


def test_what_is_refused(tmp_path: Path) -> None:
    write_mrc(tmp_path / "n.mrc", np.full((64, 64), -1.0, np.float32), 1.0)
    with pytest.raises(BadInput, match="no positive"):
        read_gain(tmp_path / "n.mrc")
    with pytest.raises(BadInput, match="dm2mrc"):
        read_gain(tmp_path / "g.dm4")
    with pytest.raises(BadInput, match="no such file"):
        read_gain(tmp_path / "none.mrc")
