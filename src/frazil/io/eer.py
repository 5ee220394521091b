"""EER: electron events of a Falcon camera, run-length coded, in a TIFF container (spec/processing 1.8).

Least significant bit first. Repeat: a run r; r pixels without an electron are passed; if r is not the largest that fits, an electron
lies in
the next pixel and a symbol gives its place within it, else the run goes on. With 8 + 4 bits a symbol follows every run, with other
depths only those that end in an electron. Symbols: two bits an axis (y above x), the upper one of each inverted; or one bit an axis,
inverted.
"""
from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frazil.data import BadInput
from frazil.io.files import atomic_path

COMPRESSIONS = {65000: (8, 2, 2), 65001: (7, 2, 2)}  # bits of a run and of the place along x and y; 65002 has them in tags
DEPTH_TAGS = (65007, 65008, 65009)
UPSAMPLINGS = {-1: 0.5, 1: 1.0, 2: 2.0, 3: 4.0}  # option → pixels of the picture a pixel of the camera


class Corrupt(ValueError):
    """A frame whose runs do not end at its last pixel."""


def add_frame(data: bytes, depths: tuple[int, int, int], out: np.ndarray, upsampling: int) -> None:
    """Add the electrons of one camera frame to `out` (uint8), which is max(1, upsampling factor) times the camera's size.

    Raises Corrupt for a frame that does not end where it should, ValueError where it has no such upsampling.
    """
    run_bits, horizontal, vertical = depths
    factor = int(max(1.0, UPSAMPLINGS[upsampling]))
    if factor > 1 << min(horizontal, vertical):
        raise ValueError(f"events with {horizontal} bit of sub-pixel position cannot be drawn {factor} times finer")
    height, width = out.shape[0] // factor, out.shape[1] // factor
    if (run_bits, horizontal, vertical) == (8, 2, 2):
        place, symbol = decode_fixed(data, height * width)
        y, x = place // width, place % width
        if factor > 1:
            level = factor.bit_length() - 1
            y, x = y * factor + ((symbol >> 2) >> (2 - level)), x * factor + ((symbol & 3) >> (2 - level))
        out.reshape(-1)[y * out.shape[1] + x] += 1  # a camera frame holds a pixel once at most
        return
    import imagecodecs

    padded = data + bytes(4 + len(data) % 2)
    try:
        imagecodecs.eer_decode(padded, out.shape, run_bits, horizontal, vertical, superres=factor.bit_length() - 1, out=out)
    except RuntimeError as error:
        raise Corrupt("its runs do not end at the last pixel") from error


def decode_fixed(data: bytes, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, symbols) of the electrons of an 8 + 4 bit frame of so many pixels; symbols yyxx as quarters of a pixel. Raises Corrupt."""
    raw = np.frombuffer(data[: len(data) // 3 * 3], np.uint8).reshape(-1, 3).astype(np.uint16)
    units = np.empty((len(raw), 2), np.uint16)
    units[:, 0] = raw[:, 0] | (raw[:, 1] & 15) << 8
    units[:, 1] = raw[:, 1] >> 4 | raw[:, 2] << 4
    units = units.reshape(-1)
    if len(data) % 3 == 2:  # half a pair at the end is a whole unit
        units = np.append(units, np.uint16(data[-2] | (data[-1] & 15) << 8))
    run = units & 255
    electron = run < 255
    after = np.cumsum(run.astype(np.int64) + electron)
    place = after - electron
    end = int(np.searchsorted(place, pixels))
    if end == len(place) or place[end] != pixels:
        raise Corrupt("its runs do not end at the last pixel")
    keep = electron[:end]
    return place[:end][keep], ((units[:end] >> 8) ^ 10)[keep]


def encode_frame(place: np.ndarray, symbol: np.ndarray, pixels: int, depths: tuple[int, int, int] = (8, 2, 2)) -> bytes:
    """The bytes of a camera frame with electrons at `place` (rising, each once) and symbols (yyxx or yx, fractions of a pixel)."""
    run_bits, horizontal, vertical = depths
    sub_bits = horizontal + vertical
    longest = (1 << run_bits) - 1
    flip = 10 if sub_bits == 4 else 3
    gap = np.diff(np.concatenate([[-1], place, [pixels]])) - 1
    full, rest = gap // longest, gap % longest
    always = depths == (8, 2, 2)
    units = np.repeat(np.arange(len(gap)), full + 1)
    last = np.concatenate([[*(np.diff(units) > 0)], [True]]).astype(bool)
    value = np.where(last, rest[units], longest).astype(np.int64)
    symbols = np.concatenate([np.asarray(symbol, dtype=np.int64) ^ flip, [0]])[units]
    has_symbol = np.ones(len(units), bool) if always else last & (units < len(place))
    value |= np.where(last & has_symbol, symbols, 0) << run_bits
    length = run_bits + sub_bits * has_symbol
    bits = (value[:, None] >> np.arange(run_bits + sub_bits)) & 1
    stream = bits[np.arange(run_bits + sub_bits) < length[:, None]].astype(np.uint8)
    packed = np.packbits(stream, bitorder="little").tobytes()
    return packed + bytes(len(packed) % 2)


def write_eer(path: str | os.PathLike[str], frames: Sequence[bytes], shape: tuple[int, int], compression: int = 65000) -> None:
    """Write encoded camera frames of a (height, width) as an EER file: a little-endian TIFF with a page a frame."""
    if compression not in COMPRESSIONS:
        raise ValueError(f"EER is written with compression {', '.join(map(str, COMPRESSIONS))}, got {compression}")
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", 8))
        for number, data in enumerate(frames):
            start = file.tell()
            # 8 entries, then the pixels, then the next page.
            entries = [
                (256, 4, shape[1]), (257, 4, shape[0]), (258, 3, 1), (259, 3, compression), (262, 3, 1), (273, 4, start + 2 + 12 * 8 + 4),
                (278, 4, shape[0]), (279, 4, len(data)),
            ]  # fmt: skip
            following = start + 2 + 12 * 8 + 4 + len(data)
            table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
            file.write(struct.pack("<H", 8) + table + struct.pack("<I", following if number + 1 < len(frames) else 0) + data)


def events_of(counts: np.ndarray, camera_frames: int, rng: np.random.Generator) -> list[bytes]:
    """Encoded 8 + 4 bit camera frames whose electrons add up to `counts` (H, W), each electron in a random frame and quarter.

    Raises ValueError where a pixel has more electrons than there are frames: a camera frame holds a pixel once.
    """
    if counts.size and int(counts.max()) > camera_frames:
        raise ValueError(f"a pixel with {int(counts.max())} electrons needs as many camera frames, got {camera_frames}")
    flat = counts.reshape(-1)
    place = np.repeat(np.arange(flat.size), flat)
    turn = np.arange(len(place)) - np.repeat(np.cumsum(flat) - flat, flat)
    # Different frames for the electrons of one pixel: a random start, then one after the other.
    frame = (rng.integers(0, camera_frames, flat.size)[place] + turn) % camera_frames
    symbol = rng.integers(0, 16, len(place))
    return [encode_frame(place[frame == f], symbol[frame == f], flat.size) for f in range(camera_frames)]


def frame_depths(compression: int, tags: dict[int, int], path: Path) -> tuple[int, int, int]:
    """Bits of run, x and y of a page. Raises BadInput for one that is no EER frame."""
    if compression in COMPRESSIONS:
        return COMPRESSIONS[compression]
    if compression == 65002 and all(tag in tags for tag in DEPTH_TAGS):
        return tags[DEPTH_TAGS[0]], tags[DEPTH_TAGS[1]], tags[DEPTH_TAGS[2]]
    raise BadInput(f"{path}: its pages have TIFF compression {compression}; expected EER frames (65000, 65001 or 65002)")
