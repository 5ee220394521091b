"""frazil postprocess: its files, and what it refuses."""
from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tests.jobs.halves import BOX, PIXEL, WRONG_HALVES, write_halves, write_wrong_mtfs

from frazil.cli import main
from frazil.io.mrc import read_map
from frazil.io.star import read_star
from frazil.jobs.record import read_events

pytestmark = pytest.mark.filterwarnings("ignore:Data array contains NaN")


@pytest.fixture
def halves(tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Half maps and faulty ones in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_wrong_mtfs(tmp_path)
    return write_halves(tmp_path, rng)


def test_all_files_are_written_and_agree(halves, capsys) -> None:
    assert main(["postprocess", "half1.mrc", "half2.mrc", "--mask", "mask.mrc", "--output", "run", "--fit-from", "30", "--half-maps"]) == 0
    star = read_star("run/postprocess.star")
    assert list(star) == ["general", "fsc", "guinier"]
    curve = star["fsc"]["rlnFourierShellCorrelationCorrected"].to_numpy(float)
    assert len(curve) == BOX // 2 + 1
    last = int(np.argmax(curve < 0.143)) - 1
    assert star["general"]["rlnFinalResolution"] == pytest.approx(BOX * PIXEL / last)
    points = ElementTree.parse("run/postprocess_fsc.xml").getroot().findall("coordinate")
    assert [float(p.findtext("y", "")) for p in points] == pytest.approx(curve[1:], abs=1e-6)
    assert float(points[0].findtext("x", "")) == pytest.approx(1 / (BOX * PIXEL), abs=1e-6)
    data, masked = (read_map(f"run/postprocess{end}.mrc") for end in ("", "_masked"))
    torch.testing.assert_close(masked.data, data.data * read_map("mask.mrc").data)
    one, two = (read_map(f"run/postprocess_half{h}.mrc").data for h in (1, 2))
    torch.testing.assert_close((one + two) / 2, data.data, atol=1e-4, rtol=1e-4)
    assert data.pixel_size == pytest.approx(PIXEL)
    assert Path("run/RELION_JOB_EXIT_SUCCESS").exists() and Path("run/plots/guinier.png").read_bytes()[:4] == b"\x89PNG"
    assert "resolution" in capsys.readouterr().out and "Guinier" in Path("run/report.html").read_text()
    event = next(e for e in read_events(Path("run")) if e["event"] == "postprocess")
    assert event["resolution"] == pytest.approx(star["general"]["rlnFinalResolution"])


def test_second_half_is_found_by_name_and_a_mask_can_be_made(halves) -> None:
    assert main(["postprocess", "half1.mrc", "--auto-mask", "--output", "run", "--quiet"]) == 0
    assert read_star("run/postprocess.star")["general"]["rlnUnfilteredMapHalf2"] == "half2.mrc"
    assert 0 < float(read_map("run/mask.mrc").data.mean()) < 0.9


def test_without_a_mask_it_says_so(halves, capsys) -> None:
    assert main(["postprocess", "half1.mrc", "half2.mrc", "--output", "run"]) == 0
    assert "no mask" in capsys.readouterr().err and not Path("run/postprocess_masked.mrc").exists()


def test_a_missing_pixel_size_can_be_given(halves, capsys) -> None:
    assert main(["postprocess", "bare1.mrc", "half2.mrc", "--output", "a"]) == 2
    assert "no pixel size" in capsys.readouterr().err
    assert main(["postprocess", "bare1.mrc", "half2.mrc", "--mask", "mask.mrc", "--pixel-size", "3", "--output", "b", "--quiet"]) == 0
    assert read_map("b/postprocess.mrc").pixel_size == pytest.approx(3.0)
    assert main(["postprocess", "bare1.mrc", "half2.mrc", "--mask", "mask.mrc", "--pixel-size", "2", "--output", "c"]) == 2
    assert "mask.mrc: pixel size 3 Å" in capsys.readouterr().err


def test_identical_halves_are_told(halves, capsys) -> None:
    Path("copy.mrc").write_bytes(Path("half1.mrc").read_bytes())
    assert main(["postprocess", "half1.mrc", "copy.mrc", "--mask", "mask.mrc", "--output", "run"]) == 0
    assert "identical" in capsys.readouterr().err


@pytest.mark.parametrize("second, options, told", WRONG_HALVES)
def test_mistakes_are_one_line(halves, capsys, second, options, told) -> None:
    assert main(["postprocess", "half1.mrc", second, *options, "--output", "run", "--quiet"]) == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1


def test_a_name_without_half1_is_not_guessed(halves, capsys) -> None:
    assert main(["postprocess", "mean.mrc", "--output", "run", "--quiet"]) == 2
    assert "give both half maps" in capsys.readouterr().err
