"""frazil fsc: the table, the resolutions, the files, and what it refuses."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import write_mrc
from frazil.io.star import read_star
from frazil.maths.filters import lowpass_map
from frazil.maths.fsc import fsc
from frazil.maths.masks import soft_sphere

BOX, PIXEL = 32, 2.5


@pytest.fixture
def halves(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy copies, a.mrc and b.mrc, of a signal that ends at 10 Å (shell 8)."""
    monkeypatch.chdir(tmp_path)
    signal = lowpass_map(torch.randn(BOX, BOX, BOX, generator=rng), PIXEL, 10.0, edge=0.5) * soft_sphere(BOX, 8, 4)
    signal = lowpass_map(signal, PIXEL, 10.0, edge=0.5)
    made = tuple(signal / signal.std() + 0.3 * torch.randn(BOX, BOX, BOX, generator=rng) for _ in range(2))
    for name, data in zip(("a.mrc", "b.mrc"), made, strict=True):
        write_mrc(name, data, PIXEL)
    return made


def test_the_table_holds_the_curve_and_the_resolution_is_right(halves, capsys) -> None:
    assert main(["fsc", "a.mrc", "b.mrc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = np.array([float(line.split()[2]) for line in lines[1 : 1 + BOX // 2]])
    assert np.allclose(found, fsc(*halves)[1:], atol=6e-5)
    assert "10.00 Å at FSC 0.143" in lines[-1]


def test_mask_and_files(halves, capsys) -> None:
    write_mrc("mask.mrc", soft_sphere(BOX, 10, 4), PIXEL)
    assert main(["fsc", "a.mrc", "b.mrc", "--mask", "mask.mrc", "--output", "out"]) == 0
    assert Path("out.png").read_bytes()[:4] == b"\x89PNG"
    table = read_star("out.star")["fsc"]
    masked, plain = (table[f"rlnFourierShellCorrelation{kind}Maps"].to_numpy(float) for kind in ("Masked", "Unmasked"))
    assert masked[6] > plain[6]  # the mask leaves noise out
    assert table["rlnAngstromResolution"].to_numpy(float)[8] == pytest.approx(10.0)
    shown = capsys.readouterr().out
    assert "corrected:" in shown and "masked:" in shown


def test_a_map_agrees_with_itself(halves, capsys) -> None:
    assert main(["fsc", "a.mrc", "a.mrc"]) == 0
    assert "mean FSC 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("second, options, told", [
    ("small.mrc", [], "small.mrc: box 16 px, but a.mrc has 32 px"),
    ("coarse.mrc", [], "coarse.mrc: pixel size 3 Å, but a.mrc has 2.5 Å"),
    ("b.mrc", ["--mask", "small.mrc"], "small.mrc: box 16 px"),
    ("b.mrc", ["--mask", "a.mrc"], "expected 0 to 1"),
    ("nan.mrc", [], "not finite"),
    ("cut.mrc", [], "truncated"),
    ("b.mrc", ["--output", "nowhere/out"], "folder does not exist"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_mistakes_are_one_line(halves, capsys, second, options, told) -> None:
    write_mrc("small.mrc", torch.rand(16, 16, 16), PIXEL)
    write_mrc("coarse.mrc", halves[0], 3.0)
    bad = halves[0].clone()
    bad[3, 4, 5] = float("nan")
    write_mrc("nan.mrc", bad, PIXEL)
    Path("cut.mrc").write_bytes(Path("a.mrc").read_bytes()[:-1000])
    assert main(["fsc", "a.mrc", second, *options]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1
