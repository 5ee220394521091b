"""TIFF movies: pages checked against the length of the file, frames decoded by threads.

Row 0 of what is decoded is the bottom of the picture; in a TIFF it is the top.
"""
from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from frazil.data import BadInput
from frazil.io.files import why

PACKED_TIFF = {(5760, 8184), (4092, 11520), (3838, 7420), (3710, 7676)}  # width, height in the file of 4-bit super-resolution frames


def unpack_nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """(…, width) uint8 from bytes that hold two pixels each, the first in the lower four bits."""
    out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    out[..., ::2], out[..., 1::2] = packed & 15, packed >> 4
    return out[..., :width]


def load_tifffile(path: Path) -> Any:
    """The tifffile module, or a clear word about what to install."""
    try:
        import imagecodecs  # noqa: F401 (tifffile's LZW and EER)
        import tifffile
    except ImportError:
        raise BadInput(f"{path}: TIFF and EER movies need two more packages: pip install tifffile imagecodecs") from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it complains about is said by us, in one line
    return tifffile


def pages_of(path: Path) -> tuple[Any, list[Any]]:
    """(open TiffFile, its pages), checked against the length of the file."""
    tifffile = load_tifffile(path)
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
            if page.shape != shape or len(shape) != 2:
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


def tiff_frames(path: Path, threads: int = 1) -> tuple[tuple[int, int, int], Callable[[int, int], np.ndarray]]:
    """((frames, rows, columns), decode) of a movie whose header is read; decode(start, stop) → (stop − start, rows, columns) as stored."""
    file, pages = pages_of(path)
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
            in_threads(one, stop - start, threads)
        finally:
            os.close(handle)
        return out

    return (n, height, 2 * width if packed else width), decode


def in_threads(work: Callable[[int], None], count: int, threads: int) -> None:
    """work(0 … count − 1), by so many threads; the first error is raised."""
    if threads <= 1 or count <= 1:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(min(threads, count)) as pool:
        list(pool.map(work, range(count)))
