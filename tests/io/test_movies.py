"""Movies of every container: round trips, orientation, packed pixels, and what is refused."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.eer import Corrupt, decode_fixed, encode_frame, events_of, write_eer
from frazil.io.movie_table import MotionRecord, read_motion, write_motion
from frazil.io.movies import open_movie, unpack_nibbles, write_mrc_movie, write_tiff

F = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], np.uint8)  # row 0 is the bottom: a letter F


def counts(rng: np.random.Generator, frames: int = 5, height: int = 40, width: int = 56) -> np.ndarray:
    return rng.poisson(2, (frames, height, width)).astype(np.uint8)


@pytest.mark.parametrize("compression", ["lzw", "deflate", None])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_tiff_comes_back_upside_up(tmp_path: Path, np_rng: np.random.Generator, compression: str | None, dtype: type) -> None:
    import tifffile

    frames = counts(np_rng).astype(dtype)
    frames[:, :5, :4] = F
    write_tiff(tmp_path / "a.tif", frames, compression)
    movie = open_movie(tmp_path / "a.tif", threads=3)
    assert movie.shape == (5, 40, 56) and np.array_equal(movie.load(0, 5).numpy(), frames)
    assert np.array_equal(movie.load(2, 4).numpy(), frames[2:4])
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif", key=1)[::-1], frames[1])  # on disk the top row comes first


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float32])
def test_mrc_modes(tmp_path: Path, np_rng: np.random.Generator, dtype: type) -> None:
    frames = counts(np_rng).astype(dtype)
    write_mrc_movie(tmp_path / "a.mrcs", frames, 0.8)
    movie = open_movie(tmp_path / "a.mrcs")
    assert movie.pixel_size == pytest.approx(0.8) and np.array_equal(movie.load(1, 4).numpy(), frames[1:4])


def test_large_counts_of_uint16_become_float(tmp_path: Path) -> None:
    write_mrc_movie(tmp_path / "a.mrcs", np.full((2, 8, 8), 40000, np.uint16), 1.0)
    assert open_movie(tmp_path / "a.mrcs").load(0, 2).float().max() == 40000


def test_four_bits(tmp_path: Path) -> None:
    """A ramp 0…15, first pixel in the lower bits; MRC mode 101."""
    ramp = np.arange(16, dtype=np.uint8)
    assert np.array_equal(unpack_nibbles((ramp[::2] | ramp[1::2] << 4)[None], 16)[0], ramp)
    header = np.zeros(256, "<i4")
    header[:4] = 15, 2, 3, 101
    row = np.append(ramp[:15], 0).astype(np.uint8)
    (tmp_path / "a.mrc").write_bytes(header.tobytes() + (row[::2] | row[1::2] << 4).tobytes() * 6)
    movie = open_movie(tmp_path / "a.mrc")
    assert movie.shape == (3, 2, 15) and np.array_equal(movie.load(1, 2).numpy()[0, 1], ramp[:15])


@pytest.mark.parametrize("depths, compression", [((8, 2, 2), 65000), ((7, 2, 2), 65001)])
def test_eer_round_trip_with_long_gaps(tmp_path: Path, np_rng: np.random.Generator, depths, compression: int) -> None:
    """Runs that saturate, sub-pixel places, sums over camera frames: equal to what was encoded, electron by electron."""
    side, camera = 64, 7
    place = [np.sort(np_rng.choice(side * side, 9, replace=False)) for _ in range(camera)]
    place[0] = np.array([0, 254, 255, 256, 511, 512, 1000, 3000, side * side - 1])  # about the longest run, and the ends
    symbol = [np_rng.integers(0, 16, 9) for _ in range(camera)]
    data = [encode_frame(p, s, side * side, depths) for p, s in zip(place, symbol, strict=True)]
    write_eer(tmp_path / "a.eer", data, (side, side), compression)
    for upsampling, factor in ((1, 1), (2, 2), (3, 4)):
        wanted = np.zeros((2, side * factor, side * factor), np.uint8)
        for f in range(6):
            y = place[f] // side * factor + (symbol[f] >> 2) * factor // 4
            x = place[f] % side * factor + (symbol[f] & 3) * factor // 4
            np.add.at(wanted[f // 3], (y, x), 1)
        movie = open_movie(tmp_path / "a.eer", grouping=3, upsampling=upsampling, threads=2)
        assert movie.shape == wanted.shape and movie.camera_frames == 7
        assert np.array_equal(movie.load(0, 2).numpy(), wanted)
    half = open_movie(tmp_path / "a.eer", grouping=3, upsampling=-1)
    assert half.shape == (2, 32, 32) and int(half.load(0, 2).sum()) == 54


def test_events_add_up_to_counts(tmp_path: Path, np_rng: np.random.Generator) -> None:
    frame = np_rng.poisson(0.4, (32, 32))
    write_eer(tmp_path / "a.eer", events_of(frame, 12, np_rng), (32, 32))
    assert np.array_equal(open_movie(tmp_path / "a.eer", grouping=12).load(0, 1).numpy()[0], frame)


def test_a_corrupt_camera_frame_is_dropped_and_named(tmp_path: Path) -> None:
    good = encode_frame(np.array([5, 77]), np.array([1, 2]), 1024)
    with pytest.raises(Corrupt):
        decode_fixed(good[:-4], 1024)
    write_eer(tmp_path / "a.eer", [good, good[:-4] + bytes(2), good, good], (32, 32))
    movie = open_movie(tmp_path / "a.eer", grouping=2)
    assert movie.load(0, 2).sum(dim=(1, 2)).tolist() == [2, 4] and movie.dropped == [2]


def test_what_is_refused(tmp_path: Path, np_rng: np.random.Generator) -> None:
    import tifffile

    frames = counts(np_rng)
    write_tiff(tmp_path / "a.tif", frames)
    whole = (tmp_path / "a.tif").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 300, 4, 0):
        (tmp_path / "cut.tif").write_bytes(whole[:cut])
        with pytest.raises(BadInput, match=r"cut\.tif: (truncated|is not a TIFF|holds no frames)"):
            open_movie(tmp_path / "cut.tif")
    (tmp_path / "bad.tif").write_bytes(whole[:300] + bytes(np_rng.integers(0, 256, 400, dtype=np.uint8)) + whole[700:])
    with pytest.raises(BadInput, match=r"bad\.tif: "):
        open_movie(tmp_path / "bad.tif").load(0, 5)
    with tifffile.TiffWriter(tmp_path / "uneven.tif") as file:
        for side in (8, 9):
            file.write(np.zeros((side, 8), np.uint8), photometric="minisblack")
    with pytest.raises(BadInput, match="frame 2 is 8 x 9 px, the first 8 x 8"):
        open_movie(tmp_path / "uneven.tif")
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((3, 8, 8, 3), np.uint8), photometric="rgb")
    with pytest.raises(BadInput, match=r"holds colour pictures \(8 x 8 x 3 values a frame\)"):
        open_movie(tmp_path / "rgb.tif")
    write_mrc_movie(tmp_path / "a.mrcs", frames.astype(np.int8), 1.0)
    (tmp_path / "a.mrcs").write_bytes((tmp_path / "a.mrcs").read_bytes()[:-100])
    with pytest.raises(BadInput, match="truncated"):
        open_movie(tmp_path / "a.mrcs")
    write_eer(tmp_path / "a.eer", [encode_frame(np.array([3]), np.array([0]), 64)] * 4, (8, 8))
    with pytest.raises(BadInput, match="smaller --eer-grouping"):
        open_movie(tmp_path / "a.eer", grouping=5)
    (tmp_path / "cut.eer").write_bytes((tmp_path / "a.eer").read_bytes()[:-40])
    with pytest.raises(BadInput, match=r"cut\.eer"):
        open_movie(tmp_path / "cut.eer", grouping=2)
    for name in ("none.tif", "a.dm4"):
        with pytest.raises(BadInput, match=name):
            open_movie(tmp_path / name)


@pytest.mark.parametrize("local", [True, False])
def test_motion_that_was_cut_off_anywhere_is_seen(tmp_path: Path, rng: torch.Generator, recwarn, local: bool) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hot = torch.tensor([[3, 4], [10, 2]])
    record = MotionRecord({"rlnImageSizeX": 20, "rlnImageSizeZ": 4}, random(4, 2), torch.tensor([True, False, True, True]),
                          random(2, 18) if local else None, hot, random(4, 9, 2), random(9, 2))  # fmt: skip
    path = tmp_path / "m.star"
    write_motion(path, record, "a comment")
    found, whole = read_motion(path, whole=True), path.read_bytes()
    assert torch.equal(found.track[found.observed], record.track[record.observed]) and torch.equal(found.hot, hot)
    between = [found.start() for found in re.finditer(b"\n# version", whole)]  # where nothing looks torn
    for end in [*range(0, len(whole) - 20, 41), *range(len(whole) - 20, len(whole) - 1), *between]:
        path.write_bytes(whole[:end])
        with pytest.raises(BadInput):
            read_motion(path, whole=True)
    assert not recwarn.list
