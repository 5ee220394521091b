"""Micrographs: every MRC mode, TIFF upside down, tables with and without CTF, bad files."""
from __future__ import annotations

import mrcfile
import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.micrographs import micrograph_header, read_micrograph, read_micrographs

IMAGE = np.arange(40 * 50).reshape(40, 50) % 100


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "float32", "float16"])
def test_modes(kind, tmp_path):
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(IMAGE.astype(kind))
        file.voxel_size = 1.5
    found = read_micrograph(tmp_path / "m.mrc")
    assert str(found.dtype) == f"torch.{kind}" and np.array_equal(found.to(torch.float32).numpy(), IMAGE.astype(np.float32))
    assert micrograph_header(tmp_path / "m.mrc") == ((40, 50), 1.5)


def test_four_bits_low_half_first(tmp_path):
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(np.zeros((40, 25), np.int8))
    raw = bytearray((tmp_path / "m.mrc").read_bytes())
    raw[0:4], raw[12:16] = (50).to_bytes(4, "little"), (101).to_bytes(4, "little")
    pixels = (np.arange(40 * 50) % 16).astype(np.uint8).reshape(40, 25, 2)
    raw[1024:] = (pixels[..., 0] | pixels[..., 1] << 4).tobytes()
    (tmp_path / "m.mrc").write_bytes(raw)
    assert np.array_equal(read_micrograph(tmp_path / "m.mrc").numpy(), pixels.reshape(40, 50))


def test_tiff_is_turned_upside_down(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "m.tif", IMAGE.astype(np.uint16))
    assert np.array_equal(read_micrograph(tmp_path / "m.tif").to(torch.int32).numpy(), IMAGE[::-1])


def test_tables_with_missing_ctf_and_mixed_pixels(tmp_path):
    (tmp_path / "m.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnOpticsGroupName\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n"
        "_rlnMicrographPixelSize\n1 a 300 2.7 0.1 0.8\n7 b 200 1.4 0.1 1.2\n\n"
        "data_micrographs\n\nloop_\n_rlnMicrographName\n_rlnOpticsGroup\n"
        "_rlnDefocusU\n_rlnDefocusV\n_rlnDefocusAngle\nx.mrc 7 10000 9000 30\ny.mrc 1 nan nan 0\n"
    )
    found = read_micrographs(tmp_path / "m.star")
    assert [o.pixel_size for o in found.optics] == [0.8, 1.2] and found.group.tolist() == [1, 0]
    assert found.has_ctf.tolist() == [True, False] and found.defocus[0].tolist() == [10000, 9000, 30]


@pytest.mark.real
def test_relions_own_table(shared_data):
    found = read_micrographs(next((shared_data / "relion_stars/tutorial_3.1/CtfFind").rglob("micrographs_ctf.star")))
    assert found.optics[0].pixel_size == 0.885 and bool(found.has_ctf.all()) and found.defocus[0, 0] == 10863.857422


@pytest.mark.parametrize("text, message", [
    ("data_micrographs\n\nloop_\n_rlnMicrographName\nx.mrc\nx.mrc\n", "twice"), ("data_\n\nloop_\n_rlnOther\n1\n", "rlnMicrographName"),
    ("data_micrographs\n\nloop_\n_rlnMicrographName\n_rlnDefocusU\n_rlnDefocusV\nx.mrc abc 1\n", "_rlnVoltage"),
    ("data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnMicrographPixelSize\n1 1.0\n\n"
     "data_micrographs\n\nloop_\n_rlnMicrographName\n_rlnOpticsGroup\nx.mrc 3\n",
     "optics group 3"),
])  # fmt: skip
def test_bad_tables(text, message, tmp_path):
    (tmp_path / "m.star").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_micrographs(tmp_path / "m.star")


def test_bad_images(tmp_path):
    with mrcfile.new(tmp_path / "movie.mrc") as file:
        file.set_data(np.zeros((3, 40, 40), np.int8))
    with mrcfile.new(tmp_path / "cut.mrc") as file:
        file.set_data(np.zeros((40, 40), np.float32))
    (tmp_path / "cut.mrc").write_bytes((tmp_path / "cut.mrc").read_bytes()[:3000])
    for name, message in (("movie.mrc", "3 sections"), ("cut.mrc", "truncated"), ("none.mrc", "no such file")):
        with pytest.raises(BadInput, match=message):
            read_micrograph(tmp_path / name)
