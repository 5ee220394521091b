"""Atomic writing and MRC files."""

from __future__ import annotations

import errno
import gzip
import os
import resource
import signal

import mrcfile
import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.files import atomic_path, write_text
from frazil.io.mrc import read_header, read_map, read_mrc, read_stack, write_mrc


@pytest.fixture
def small_files():
    """Files of more than 8 kB cannot be written: the kernel refuses as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as tmp:
        tmp.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with atomic_path(target) as tmp:
        tmp.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_atomic_path_says_why_it_cannot_write(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere/a.txt: cannot be written: its folder does not exist"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")


def test_a_full_disk_at_the_rename_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match=r"map.mrc: cannot be written: the disk is full"):
        write_mrc(tmp_path / "map.mrc", noise(4, 4, 4), 1.0)
    assert os.listdir(tmp_path) == []


def test_a_write_the_kernel_refuses_leaves_nothing(tmp_path, small_files):
    write_mrc(tmp_path / "small.mrc", noise(8, 8, 8), 1.0)
    with pytest.raises(BadInput, match=r"big.mrc: cannot be written"):
        write_mrc(tmp_path / "big.mrc", noise(32, 32, 32), 1.0)
    assert os.listdir(tmp_path) == ["small.mrc"]


@pytest.mark.parametrize("mode, number", [("float32", 2), ("float16", 12)])
def test_maps_round_trip(tmp_path, mode, number):
    data = noise(4, 5, 6)
    before = data.copy()
    write_mrc(tmp_path / "m.mrc", torch.from_numpy(data), 1.37, mode, origin=(1.0, 2.0, 3.0))
    volume = read_map(tmp_path / "m.mrc")
    assert torch.equal(volume.data, torch.from_numpy(data.astype(mode).astype(np.float32)))
    assert volume.pixel_size == pytest.approx(1.37, rel=1e-6) and volume.origin == (1.0, 2.0, 3.0)
    assert np.array_equal(data, before)
    with mrcfile.open(tmp_path / "m.mrc") as file:
        assert file.header.mode == number and file.is_volume()
    assert mrcfile.validate(tmp_path / "m.mrc")


@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "u2", "f2"])
def test_every_mode_and_byte_order_reads_back(tmp_path, dtype):
    data = (np.arange(2 * 3 * 4).reshape(2, 3, 4) * 5 - (0 if dtype == "u2" else 60)).astype(dtype)
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(data)
        file.set_image_stack()
        file.voxel_size = 2.0
    raw = (tmp_path / "m.mrc").read_bytes()
    header = np.frombuffer(raw[:1024], mrcfile.dtypes.HEADER_DTYPE).astype(mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">"))
    (tmp_path / "big.mrc").write_bytes(header.tobytes() + data.astype(data.dtype.newbyteorder(">")).tobytes())
    for name in ("m.mrc", "big.mrc"):
        assert np.array_equal(read_stack(tmp_path / name).numpy(), data.astype(np.float32))
        assert read_mrc(tmp_path / name).pixel_size == 2.0


def test_unsigned_bytes_of_imod(tmp_path):
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(np.array([[[-1, 5]]], np.int8))
    raw = bytearray((tmp_path / "m.mrc").read_bytes())
    raw[152:160] = np.array([1146047817, 0], "<i4").tobytes()
    (tmp_path / "m.mrc").write_bytes(raw)
    assert read_mrc(tmp_path / "m.mrc").data.flatten().tolist() == [255.0, 5.0]


def test_permuted_axes_are_put_right(tmp_path):
    right = noise(2, 3, 4)  # z y x
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(np.ascontiguousarray(right.transpose(2, 0, 1)))  # sections x, rows z, columns y
        file.header.mapc, file.header.mapr, file.header.maps = 2, 3, 1
        file.header.mx, file.header.my, file.header.mz = 4, 3, 2
        file.header.cella.x, file.header.cella.y, file.header.cella.z = 8.0, 6.0, 4.0
        file.header.nxstart, file.header.nystart, file.header.nzstart = 10, 20, 30  # along y, z, x
    volume = read_map(tmp_path / "m.mrc")
    assert np.array_equal(volume.data.numpy(), right) and volume.pixel_size == 2.0
    assert volume.origin == (60.0, 20.0, 40.0)


def test_extended_headers_and_gzip(tmp_path):
    data = noise(3, 16, 16)
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(data)
        file.voxel_size = 2.5
        file.set_extended_header(np.zeros(768, "V1"))
    (tmp_path / "m.map.gz").write_bytes(gzip.compress((tmp_path / "m.mrc").read_bytes()))
    for name in ("m.mrc", "m.map.gz"):
        assert np.array_equal(read_map(tmp_path / name).data.numpy(), data)
    (tmp_path / "cut.map.gz").write_bytes((tmp_path / "m.map.gz").read_bytes()[:-400])
    with pytest.raises(BadInput, match="cut.map.gz: .*truncated"):
        read_mrc(tmp_path / "cut.map.gz")


def test_bad_files_are_named_with_the_reason(tmp_path):
    write_mrc(tmp_path / "good.mrcs", noise(10, 4, 4), 1.0, stack=True)
    good = (tmp_path / "good.mrcs").read_bytes()
    (tmp_path / "short.mrcs").write_bytes(good[: 1024 + 64 * 7 + 32])
    (tmp_path / "tiny.mrc").write_bytes(b"abc")
    (tmp_path / "text.mrc").write_bytes(b"data_particles loop_ " * 100)
    complex_mode = bytearray(good)
    complex_mode[12] = 4
    (tmp_path / "complex.mrc").write_bytes(complex_mode)
    with pytest.raises(BadInput, match=r"short.mrcs: truncated: the header promises 10 sections, the file holds 7.5"):
        read_header(tmp_path / "short.mrcs")
    with pytest.raises(BadInput, match=r"tiny.mrc: 3 bytes"):
        read_mrc(tmp_path / "tiny.mrc")
    with pytest.raises(BadInput, match=r"text.mrc: is not an MRC file"):
        read_mrc(tmp_path / "text.mrc")
    with pytest.raises(BadInput, match=r"complex.mrc: MRC mode 4 is not supported"):
        read_mrc(tmp_path / "complex.mrc")
    with pytest.raises(BadInput, match=r"none.mrc: no such file"):
        read_mrc(tmp_path / "none.mrc")
    with pytest.raises(BadInput, match="cannot be read: it is a folder"):
        read_mrc(tmp_path)


@pytest.mark.filterwarnings("ignore:Data array contains")  # mrcfile says so too
def test_maps_that_are_none(tmp_path):
    write_mrc(tmp_path / "image.mrc", noise(4, 4), 1.0)
    with pytest.raises(BadInput, match="single image"):
        read_map(tmp_path / "image.mrc")
    hole = noise(4, 4, 4)
    hole[1, 1, 1] = np.nan
    write_mrc(tmp_path / "hole.mrc", hole, 1.0)
    with pytest.raises(BadInput, match="not finite"):
        read_map(tmp_path / "hole.mrc")
    with mrcfile.new(tmp_path / "flat.mrc") as file:
        file.set_data(noise(4, 4, 4))
        file.voxel_size = (1.0, 1.0, 2.0)
    with pytest.raises(BadInput, match="pixel sizes differ"):
        read_map(tmp_path / "flat.mrc")


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(BadInput, match="do not fit float16"):
        write_mrc(tmp_path / "m.mrc", np.full((2, 2, 2), 1e6, np.float32), 1.0, "float16")
    assert os.listdir(tmp_path) == []


def test_real_maps_and_stacks(shared_data):
    volume = read_map(shared_data / "parity_relion5" / "ref.mrc")
    assert volume.data.shape == (64, 64, 64) and volume.pixel_size == pytest.approx(3.54, rel=1e-5)
    half = read_stack(shared_data / "betagal_10204" / "stacks" / "20170629_00028_frameImage.mrcs")
    assert half.shape == (259, 64, 64) and 0.5 < float(half.std()) < 2
    assert read_stack(shared_data / "formats" / "relion31.mrcs").shape == (5, 256, 256)  # no MAP mark, no machine stamp
    movie = read_mrc(shared_data / "apoferritin_10146" / "May08_03.05.02.mrc")
    assert movie.data.shape == (1, 1200, 1240) and movie.pixel_size == pytest.approx(1.5)
    assert float(movie.data.min()) >= 0  # uint16


@pytest.mark.parametrize("mode", ["float32", "float16", "int16", "uint16"])
def test_statistics_in_the_header_are_those_of_the_values(tmp_path, monkeypatch, mode):
    monkeypatch.setattr("frazil.io.mrc.STATISTICS_BLOCK", 100)  # many blocks
    values = 1000 + torch.randn(7, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    write_mrc(tmp_path / "x.mrc", values, 1.0, mode)
    with mrcfile.open(tmp_path / "x.mrc") as file:
        stored, header = file.data.astype(np.float64), file.header
        found = [float(header[name]) for name in ("dmin", "dmax", "dmean", "rms")]
    assert found == pytest.approx([stored.min(), stored.max(), stored.mean(), stored.std()], rel=1e-5)


@pytest.mark.parametrize("mode, number", [("int8", 0), ("int16", 1), ("uint16", 6)])
def test_integer_modes_round_and_refuse_what_does_not_fit(tmp_path, mode, number):
    write_mrc(tmp_path / "m.mrc", np.array([[[0.4, 1.6], [99.5, 100.4]]] * 2, np.float32), 1.0, mode)
    assert read_map(tmp_path / "m.mrc").data[0].flatten().tolist() == [0, 2, 100, 100]
    with mrcfile.open(tmp_path / "m.mrc") as file:
        assert file.header.mode == number
    with pytest.raises(BadInput, match=f"values from -1e.06 to -?0 do not fit {mode}"):
        write_mrc(tmp_path / "m.mrc", np.full((2, 2, 2), -1e6, np.float32) * np.arange(2), 1.0, mode)


def test_unequal_pixels_are_read_on_request_and_oblique_cells_never(tmp_path):
    with mrcfile.new(tmp_path / "flat.mrc") as file:
        file.set_data(noise(4, 4, 4))
        file.voxel_size = (1.0, 1.0, 2.0)
    assert read_map(tmp_path / "flat.mrc", anisotropic=True).data.shape == (4, 4, 4)
    with mrcfile.open(tmp_path / "flat.mrc", "r+") as file:
        file.header.cellb.beta = 104.0
    with pytest.raises(BadInput, match="cell angles are 90, 104, 90 degrees"):
        read_map(tmp_path / "flat.mrc", anisotropic=True)
