"""Movies on disk: TIFF (LZW, deflate, plain), MRC of any mode, EER; frames are decoded when asked for, several at a time.

    movie = open_movie("a.tiff");  movie.shape;  movie.load(0, 8)            # (8, H, W) in the type they are stored in

Row 0 is the bottom of the picture: TIFF is turned upside down, MRC and EER are as stored. Opening a movie reads headers only.
"""
from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.eer import UPSAMPLINGS, Corrupt, add_frame, frame_depths
from frazil.io.files import atomic_path, why
from frazil.io.mrc import HEADER_BYTES, read_header, write_mrc

TIFF, MRC, EER = (".tif", ".tiff"), (".mrc", ".mrcs", ".st"), (".eer",)
PACKED_TIFF = {(5760, 8184), (4092, 11520), (3838, 7420), (3710, 7676)}  # width, height in the file of 4-bit super-resolution frames
PACKED_MRC = 101
GROUPING = 32  # camera frames of an EER movie drawn as one frame


@dataclass(frozen=True)
class Movie:
    """A movie whose header was read. `load` decodes frames."""

    path: Path
    shape: tuple[int, int, int]  # frames, rows, columns
    pixel_size: float  # Å, 0 where the header says nothing
    kind: str  # "TIFF", "MRC" or "EER"
    decode: Callable[[int, int], np.ndarray] = field(repr=False)
    camera_frames: int = 0  # of EER movies
    dropped: list[int] = field(default_factory=list)  # camera frames of EER found corrupt so far, counted from 1

    def load(self, start: int, stop: int) -> Tensor:
        """(stop − start, H, W) frames: uint8, int8, int16 or float32. Raises BadInput naming the file where they cannot be read."""
        try:
            frames = self.decode(start, stop)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be read: {why(error)}") from error
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
            if isinstance(error, BadInput):
                raise
            said = " ".join(str(error).split())[:120]
            raise BadInput(f"{self.path}: frames {start + 1} to {stop} cannot be decoded ({said}); copy the movie again") from error
        if frames.shape != (stop - start, *self.shape[1:]):
            raise BadInput(f"{self.path}: frames {start + 1} to {stop} have another size than the first; copy the movie again")
        return torch.from_numpy(np.ascontiguousarray(_narrowed(frames)))


def open_movie(path: str | os.PathLike[str], *, threads: int = 1, grouping: int = GROUPING, upsampling: int = 1) -> Movie:
    """Header of a movie. `grouping` camera frames of EER make a frame, drawn at `upsampling` 1 (the camera's pixels), 2, 3 or −1.

    Raises BadInput naming the file: missing, not a movie, truncated, frames of unequal size, a single image of a movie format.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected a movie")
    ending = path.suffix.lower()
    if ending in TIFF:
        return _open_tiff(path, threads)
    if ending in EER:
        return _open_eer(path, threads, grouping, upsampling)
    if ending in MRC:
        return _open_mrc(path)
    raise BadInput(f"{path}: a movie is {', '.join((*TIFF, *MRC, *EER))}; convert it first")


def write_tiff(path: str | os.PathLike[str], frames: Iterable[np.ndarray], compression: str | None = "lzw") -> None:
    """Write frames (row 0 = bottom) as a TIFF movie, atomically; compression "lzw", "deflate" or None."""
    tifffile = _tifffile(Path(path))
    code = {"lzw": "lzw", "deflate": "adobe_deflate", None: None}[compression]
    with atomic_path(path) as tmp, tifffile.TiffWriter(tmp) as file:
        for frame in frames:
            file.write(np.ascontiguousarray(frame[::-1]), compression=code, photometric="minisblack", contiguous=False, metadata=None)


def write_mrc_movie(path: str | os.PathLike[str], frames: np.ndarray, pixel_size: float) -> None:
    """Write frames (n, H, W) of int8, int16, uint16 or float32 as an MRC stack, atomically."""
    import mrcfile

    if frames.dtype == np.float32:
        return write_mrc(path, frames, pixel_size, stack=True)
    if frames.dtype not in (np.int8, np.int16, np.uint16):
        raise ValueError(f"MRC movies are written as int8, int16, uint16 or float32, got {frames.dtype}")
    with atomic_path(path) as tmp, mrcfile.new(str(tmp), overwrite=True) as file:
        file.set_data(np.ascontiguousarray(frames))
        file.set_image_stack()
        file.voxel_size = pixel_size


def _narrowed(frames: np.ndarray) -> np.ndarray:
    """Frames in a type that the steps take: bytes and int16 as they are, uint16 where it fits, float32 otherwise."""
    if frames.dtype in (np.uint8, np.int8, np.int16, np.float32):
        return frames if frames.dtype.isnative else frames.astype(frames.dtype.newbyteorder("="))
    if frames.dtype.kind in "iu" and frames.size and frames.max() < 32768 and frames.min() >= -32768:
        return frames.astype(np.int16)
    if frames.dtype.kind not in "iuf":
        raise ValueError(f"pixels of type {frames.dtype} are not supported")
    return frames.astype(np.float32)


def unpack_nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """(…, width) uint8 from bytes that hold two pixels each, the first in the lower four bits."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    out[..., ::2], out[..., 1::2] = packed & 15, packed >> 4
    return out[..., :width]


def _tifffile(path: Path) -> Any:
    """The tifffile module, or a clear word about what to install."""
    try:
        import imagecodecs  # noqa: F401 (tifffile's LZW and EER)
        import tifffile
    except ImportError:
        raise BadInput(f"{path}: TIFF and EER movies need two more packages: pip install tifffile imagecodecs") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it complains about is said by us, in one line
    return tifffile


def _pages(path: Path) -> tuple[Any, list[Any]]:
    """(open TiffFile, its pages), checked against the length of the file."""
    tifffile = _tifffile(path)
    file = None
    try:
        file = tifffile.TiffFile(path)
        pages = list(file.pages)
    except Exception as error:  # noqa: BLE001 (whatever a broken file makes tifffile raise)
        if file is not None:
            file.close()
        if isinstance(error, OSError):
            raise BadInput(f"{path}: cannot be read: {why(error)}") from error
        raise BadInput(f"{path}: is not a TIFF file, or a truncated one; copy the movie again") from error
    try:
        if not pages:
            raise BadInput(f"{path}: holds no frames; copy the movie again")
        size, shape = path.stat().st_size, pages[0].shape
        if len(shape) != 2:
            raise BadInput(f"{path}: holds colour pictures ({' x '.join(map(str, shape))} values a frame); a movie is of grey frames")
        for number, page in enumerate(pages, 1):
            if page.shape != shape:
                raise BadInput(f"{path}: frame {number} is {' x '.join(map(str, page.shape[::-1]))} px, the first "
                    f"{' x '.join(map(str, shape[::-1]))}; "
                               f"frames of unequal size cannot be aligned")  # fmt: skip
            ends = [o + c for o, c in zip(page.dataoffsets, page.databytecounts, strict=True)]
            if not ends or max(ends) > size or min(page.databytecounts) == 0:
                raise BadInput(f"{path}: truncated in frame {number} of {len(pages)}; copy the movie again")
        if _next_page(file, pages[-1]):
            raise BadInput(f"{path}: truncated behind frame {len(pages)}; copy the movie again")
    except BaseException:
        file.close()
        raise
    return file, pages


def _next_page(file: Any, page: Any) -> int:
    """Where a page says that the next one begins; not 0 for the last page that could be read means that the file is cut off."""
    form, handle = file.tiff, file.filehandle
    handle.seek(page.offset)
    (entries,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    handle.seek(page.offset + form.tagnosize + entries * form.tagsize)
    return struct.unpack(form.offsetformat, handle.read(form.offsetsize))[0]


def _open_tiff(path: Path, threads: int) -> Movie:
    file, pages = _pages(path)
    with file:
        height, width = pages[0].shape
        packed = (width, height) in PACKED_TIFF and pages[0].dtype == np.uint8
        n = len(pages)
    # Another descriptor for decoding: os.pread needs no lock, so threads read and decode pages side by side.
    def decode(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, height, 2 * width if packed else width), pages[0].dtype.newbyteorder("="))
        handle = os.open(path, os.O_RDONLY)

        def one(i: int) -> None:
            page = pages[start + i]
            segments = zip(page.dataoffsets, page.databytecounts, strict=True)
            for index, (offset, count) in enumerate(segments):
                part, where, shape = page.decode(os.pread(handle, count, offset), index)
                top = where[2]
                frame = part.reshape(shape)[0, :, :, 0]
                rows = unpack_nibbles(frame, 2 * width) if packed else frame
                # Row 0 is the top in TIFF and the bottom here.
                bottom = height - top
                out[i, bottom - len(rows) : bottom] = rows[::-1]

        try:
            _in_threads(one, stop - start, threads)
        finally:
            os.close(handle)
        return out

    return Movie(path, (n, height, 2 * width if packed else width), 0.0, "TIFF", decode)


def _in_threads(work: Callable[[int], None], count: int, threads: int) -> None:
    """work(0 … count − 1), by so many threads; the first error is raised."""
    if threads <= 1 or count <= 1:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(min(threads, count)) as pool:
        list(pool.map(work, range(count)))


def _open_mrc(path: Path) -> Movie:
    packed = _packed_header(path)
    if packed is not None:
        (n, height, width), offset = packed
        row = (width + 1) // 2

        def unpack(start: int, stop: int) -> np.ndarray:
            raw = np.fromfile(path, np.uint8, (stop - start) * height * row, offset=offset + start * height * row)
            return unpack_nibbles(raw.reshape(stop - start, height, row), width)

        return Movie(path, (n, height, width), 0.0, "MRC", unpack)
    header = read_header(path)
    n, height, width = header.shape

    def read(start: int, stop: int) -> np.ndarray:
        count = (stop - start) * height * width
        raw = np.fromfile(path, header.dtype, count, offset=header.offset + start * header.image_bytes)
        return raw.reshape(stop - start, height, width)

    return Movie(path, (n, height, width), header.pixel_size[0], "MRC", read)


def _packed_header(path: Path) -> tuple[tuple[int, int, int], int] | None:
    """((frames, rows, columns), bytes before the pixels) of an MRC file of mode 101; None for other files. Raises BadInput if truncated."""
    try:
        with open(path, "rb") as file:
            words = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {why(error)}") from error
    if words[3] != PACKED_MRC:
        return None
    width, height, n = (int(v) for v in words[:3])
    offset = HEADER_BYTES + int(words[23])
    if path.stat().st_size < offset + n * height * ((width + 1) // 2):
        raise BadInput(f"{path}: truncated: the header promises {n} frames; copy the movie again")
    return (n, height, width), offset


def _open_eer(path: Path, threads: int, grouping: int, upsampling: int) -> Movie:
    if upsampling not in UPSAMPLINGS:
        raise BadInput(f"EER upsampling is one of {', '.join(map(str, UPSAMPLINGS))}, got {upsampling}")
    file, pages = _pages(path)
    with file:
        camera = len(pages)
        page = pages[0]
        tags = {code: int(page.tags[code].value) for code in (65007, 65008, 65009) if code in page.tags}
        depths = frame_depths(int(page.compression), tags, path)
        height, width = page.shape
        segments = [list(zip(p.dataoffsets, p.databytecounts, strict=True)) for p in pages]
    fractions = camera // grouping
    if fractions < 1:
        raise BadInput(f"{path}: {camera} camera frames are fewer than the {grouping} that make a frame; give a smaller --eer-grouping")
    factor = UPSAMPLINGS[upsampling]
    drawn = (int(height * max(1, factor)), int(width * max(1, factor)))
    dropped: list[int] = []

    def decode(start: int, stop: int) -> np.ndarray:
        out = np.zeros((stop - start, *drawn), np.uint8)
        handle = os.open(path, os.O_RDONLY)

        def one(i: int) -> None:
            first = (start + i) * grouping
            for f in range(first, first + grouping):
                data = b"".join(os.pread(handle, count, offset) for offset, count in segments[f])
                try:
                    add_frame(data, depths, out[i], upsampling)
                except Corrupt:
                    if f + 1 not in dropped:
                        dropped.append(f + 1)

        try:
            _in_threads(one, stop - start, threads)
        finally:
            os.close(handle)
        if factor < 1:
            out = out.reshape(len(out), height // 2, 2, width // 2, 2).sum((2, 4), dtype=np.uint8)
        return out

    shape = (fractions, *(int(side * factor) for side in (height, width)))
    return Movie(path, (shape[0], shape[1], shape[2]), 0.0, "EER", decode, camera, dropped)
