"""SerialEM's .mdoc and EPU's .xml, real ones where they are there."""
from __future__ import annotations

from pathlib import Path

import pytest

from frazil.data import BadInput
from frazil.io.sessions import epu_beside, read_epu, read_mdoc


@pytest.mark.real
def test_real_mdoc(shared_data: Path) -> None:
    (one,) = read_mdoc(shared_data / "formats" / "frame_set_single.mdoc")
    assert one.movie == "s_mmm_00993_33.0_Oct08_07.39.05.tif" and one.frames == 12
    assert (one.pixel_size, one.voltage) == (1.2827, 300) and one.dose == pytest.approx(12 * 0.63824)
    assert one.image_shift == (2.69654, -0.304661) and one.gain.endswith(".dm4")


@pytest.mark.real
def test_real_xml(shared_data: Path) -> None:
    one = read_epu(shared_data / "relion_stars" / "em_testdata" / "FoilHole_5850127_Data_5798426_5798428_20221104_061329.xml")
    assert one.pixel_size == pytest.approx(1.285195) and one.voltage == 300 and one.dose == pytest.approx(63.994, abs=1e-3)
    assert one.image_shift == pytest.approx((0.247715, -0.0371778), abs=1e-6)


def test_beside(tmp_path: Path) -> None:
    (tmp_path / "a_Data_1.xml").write_text("<x/>")
    assert epu_beside(tmp_path / "a_Data_1_Fractions.tiff") == tmp_path / "a_Data_1.xml"
    assert epu_beside(tmp_path / "a_Data_1_EER.eer") == tmp_path / "a_Data_1.xml"
    assert epu_beside(tmp_path / "b.tiff") is None


@pytest.mark.parametrize("content, said", [
    (b"\xff\xfe\x00binary", "is not a text file"), (b"just words\n", "line 1: expected `key = value`"), (b"Voltage = 300\n", "names no "
        "movie"),
    (b"[FrameSet = 0]\nSubFramePath = a.tif\nPixelSpacing = wide\n", "PixelSpacing"),
])  # fmt: skip
def test_broken_mdoc(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.mdoc").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        read_mdoc(tmp_path / "a.mdoc")


DOSE = "<MicroscopeImage><CustomData><Pair><Key>Dose</Key><Value>{}</Value></Pair></CustomData></MicroscopeImage>"


def test_dose_of_xml(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(DOSE.format("24e20"))
    assert read_epu(tmp_path / "a.xml").dose == pytest.approx(24)


@pytest.mark.parametrize("content, said", [
    ("<a><b></a>", "is not XML"), ("<other/>", "MicroscopeImage"), (DOSE.format("much"), "Dose is 'much'; expected a number"),
    (DOSE.format("inf"), "Dose is 'inf'"), ('<?xml version="1.0" encoding="no-such"?><a/>', "is not XML"),
])  # fmt: skip
def test_broken_xml(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(BadInput, match=said):
        read_epu(tmp_path / "a.xml")
