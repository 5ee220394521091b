"""MRC files: maps, images and stacks. Modes 0 (int8), 1 (int16), 2 (float32), 6 (uint16), 12 (float16); big or little endian.

Headers are read here, because thousands of stacks are opened in a row and not all carry the modern marks; writing is mrcfile's.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE
from mrcfile.mrcfile import MrcFile
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.files import atomic_path, why

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
WRITTEN_MODES = ("float32", "float16", "int8", "int16", "uint16")
HEADER_BYTES = 1024
LABELS_AT, LABEL_BYTES = 224, 80
STATISTICS_BLOCK = 1 << 24  # values
_IMOD_STAMP = 1146047817
_LARGEST_SIDE = 1 << 20
_SAME_SIZE = 0.01  # relative difference of pixel sizes along the axes that is rounding in the header


@dataclass(frozen=True)
class MrcHeader:
    """Where the pixels of an MRC file are and what they mean."""

    path: Path
    shape: tuple[int, int, int]  # sections, rows, columns as stored
    dtype: np.dtype  # as stored, byte order included
    offset: int  # bytes before the first pixel
    axes: tuple[int, int, int]  # which of x (1), y (2), z (3) the columns, rows and sections are
    pixel_size: tuple[float, float, float]  # Å, xyz; 0 where the header gives none
    origin: tuple[float, float, float]  # Å, xyz of the first voxel
    angles: tuple[float, float, float] = (90.0, 90.0, 90.0)  # degrees, of the cell: alpha, beta, gamma

    @property
    def image_bytes(self) -> int:
        """Bytes of one section."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize


def read_header(path: str | os.PathLike[str]) -> MrcHeader:
    """Header of an MRC file (.gz too), checked against the length of the file.

    Raises BadInput naming the file: missing, unreadable, not MRC, a mode that is not supported, truncated.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected an MRC file") from None
    except (OSError, EOFError) as error:
        raise BadInput(f"{path}: cannot be read: {why(error) if isinstance(error, OSError) else 'truncated'}") from error
    if len(raw) < HEADER_BYTES:
        raise BadInput(f"{path}: {len(raw)} bytes, shorter than an MRC header (1024); copy the file again")
    header = _parse(path, raw)
    held = size - header.offset
    if path.suffix != ".gz" and held < header.shape[0] * header.image_bytes:
        whole = max(held, 0) / header.image_bytes
        raise BadInput(f"{path}: truncated: the header promises {header.shape[0]} sections, the file holds {whole:.1f}; copy it again")
    return header


def read_mrc(path: str | os.PathLike[str]) -> Volume:
    """The pixels of any MRC file as float32 (z, y, x), or (n, y, x) for a stack, and its pixel size (0 if not given).

    Permuted axes are put right. Raises BadInput as read_header does.
    """
    header = read_header(path)
    return Volume(torch.from_numpy(_pixels(path, header)), header.pixel_size[0], header.origin)


def _pixels(path: str | os.PathLike[str], header: MrcHeader) -> np.ndarray:
    """The pixels as float32 (z, y, x), C order and writable; the array read from the file itself where it is that already."""
    count = math.prod(header.shape)
    try:
        if header.path.suffix == ".gz":
            with gzip.open(header.path) as file:
                file.seek(header.offset)
                stored = np.frombuffer(bytearray(file.read(count * header.dtype.itemsize)), header.dtype)
        else:
            stored = np.fromfile(header.path, header.dtype, count, offset=header.offset)
    except (OSError, EOFError) as error:
        raise BadInput(f"{path}: cannot be read: {why(error) if isinstance(error, OSError) else 'truncated'}") from error
    if stored.size < count:
        raise BadInput(f"{path}: truncated: {stored.size} of {count} pixels; copy it again")
    columns, rows, sections = header.axes
    place = [(sections, rows, columns).index(axis) for axis in (3, 2, 1)]
    return np.ascontiguousarray(stored.reshape(header.shape).transpose(place), dtype=np.float32)


def read_map(path: str | os.PathLike[str], *, anisotropic: bool = False) -> Volume:
    """A map (z, y, x) float32 with its pixel size in Å; the origin is where the header puts the first voxel (origin, else start · pixel).

    Raises BadInput as read_mrc does, and for a single image, axes that are not at right angles, values that are not finite, and,
    unless `anisotropic`, pixels that differ along the axes (read_header has their sizes; the volume then has that of x).
    """
    header = read_header(path)
    volume = Volume(torch.from_numpy(_pixels(path, header)), header.pixel_size[0], header.origin)
    if volume.data.shape[0] < 2:
        raise BadInput(f"{path}: is a single image {tuple(volume.data.shape[1:])}; expected a three-dimensional map")
    sizes = header.pixel_size
    if max(abs(angle - 90) for angle in header.angles) > 0.1:
        angles = ", ".join(f"{angle:g}" for angle in header.angles)
        raise BadInput(f"{path}: the cell angles are {angles} degrees; expected a map of a particle, with axes at right angles")
    if not anisotropic and max(sizes) - min(sizes) > _SAME_SIZE * max(sizes):
        shown = ", ".join(f"{s:.4g}" for s in sizes)
        raise BadInput(f"{path}: pixel sizes differ along x, y, z: {shown} Å; bring them together with `frazil map resample --pixel-size` "
                       f"or correct a wrong header with --force-pixel-size")  # fmt: skip
    if not all(math.isfinite(x) for x in torch.aminmax(volume.data)):  # a NaN is both; without the arrays that isfinite needs
        raise BadInput(f"{path}: holds values that are not finite (NaN or infinite)")
    return volume


def read_stack(path: str | os.PathLike[str]) -> Tensor:
    """(n, y, x) float32: every image of a stack. Raises BadInput as read_mrc does."""
    return read_mrc(path).data


def write_mrc(
    path: str | os.PathLike[str],
    array: Tensor | np.ndarray,
    pixel_size: float,
    mode: str = "float32",
    *,
    stack: bool = False,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    label: str = "",
) -> None:
    """Write a map (z, y, x), an image (y, x) or, with `stack`, images (n, y, x), atomically; `label`: up to 80 letters for the header.

    `mode` is "float32" (mode 2), "float16" (12), "int8" (0), "int16" (1) or "uint16" (6); integers are rounded to.
    pixel_size and origin (xyz) in Å. Raises BadInput naming the file if it cannot be written or the values do not fit the mode.
    """
    if mode not in WRITTEN_MODES:
        raise ValueError(f"mode must be one of {', '.join(WRITTEN_MODES)}, got {mode!r}")
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if mode != "float32" and values.size:
        limits = np.finfo(mode) if mode == "float16" else np.iinfo(mode)
        values = values if mode == "float16" else np.rint(values)
        low, high = (float(x) for x in as_float32(values).aminmax())
        if not (float(limits.min) <= low and high <= float(limits.max)):
            raise BadInput(f"{path}: values from {low:.3g} to {high:.3g} do not fit {mode}; write float32 or rescale them first")
    with atomic_path(path) as tmp, _new_file(tmp) as file:
        file.set_data(np.ascontiguousarray(values, dtype=mode))
        if values.ndim == 3:
            file.set_image_stack() if stack else file.set_volume()
        file.voxel_size = pixel_size
        for axis, value in zip("xyz", origin, strict=True):
            file.header.origin[axis] = value
        if label:
            file.add_label(label)


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """The lines of text in the header of an MRC file that are not empty. Raises BadInput as read_header does."""
    header = read_header(path)
    with _open(header.path) as file:
        raw = file.read(HEADER_BYTES)[LABELS_AT:]
    lines = (raw[i : i + LABEL_BYTES].split(b"\0")[0].decode("ascii", "replace").strip() for i in range(0, len(raw), LABEL_BYTES))
    return [line for line in lines if line]


def as_float32(values: np.ndarray) -> Tensor:
    """The values as float32, converted by torch where it knows their type: numpy is slow with float16."""
    if not values.flags.writeable or values.dtype.byteorder == ">" or values.dtype == np.uint16:
        values = values.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values)).float()


class _NewMrc(MrcFile):
    """mrcfile's file with statistics made in blocks by torch: its own take 20 s a gigabyte of float16."""

    def update_header_stats(self) -> None:
        """Minimum, maximum, mean and rms of the data in the header."""
        values = self.data
        if values is None or values.size == 0:
            self.reset_header_stats()
            return
        low, high, total, square, first = math.inf, -math.inf, 0.0, 0.0, None
        for block in np.array_split(values.reshape(-1), -(-values.size // STATISTICS_BLOCK)):
            part = as_float32(block)
            least, most = (float(x) for x in part.aminmax())
            low, high = min(low, least), max(high, most)
            first = float(part.mean()) if first is None else first  # differences to it: the square of a large mean would hide the rms
            part = part - first
            total += float(part.sum())
            square += float(torch.dot(part, part))
        mean = total / values.size
        header: Any = self.header
        header.dmin, header.dmax, header.dmean = low, high, (first or 0.0) + mean
        header.rms = math.sqrt(max(0.0, square / values.size - mean**2))


@contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    """A new mrcfile that is closed even if writing it fails (mrcfile itself leaves it open then)."""
    file = _NewMrc(str(path), mode="w+", overwrite=True)
    try:
        yield file
        file.close()
    except BaseException:
        with suppress(OSError):
            file._close_file()
        raise


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _parse(path: Path, raw: bytes) -> MrcHeader:
    """Header fields of the first 1024 bytes; the byte order is the one in which they make sense."""
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        fields = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        shape = (int(fields["nz"]), int(fields["ny"]), int(fields["nx"]))
        if 0 <= fields["mode"] <= 255 and all(0 < side <= _LARGEST_SIDE for side in shape) and 0 <= fields["nsymbt"] < 1 << 31:
            break
    else:
        raise BadInput(f"{path}: is not an MRC file (sizes or mode in its header make no sense)")
    mode = int(fields["mode"])
    if mode not in MODES:
        raise BadInput(f"{path}: MRC mode {mode} is not supported; expected one of {', '.join(map(str, MODES))}")
    kind = MODES[mode]
    words = np.frombuffer(raw, order + "i4")
    if mode == 0 and words[38] == _IMOD_STAMP and not words[39] & 1:
        kind = "u1"  # IMOD marks bytes as signed by this flag; without its stamp they are signed
    axes = (int(fields["mapc"]), int(fields["mapr"]), int(fields["maps"]))
    if axes == (0, 0, 0):
        axes = (1, 2, 3)
    if sorted(axes) != [1, 2, 3]:
        raise BadInput(f"{path}: axis order {axes} in the header is not a permutation of 1, 2, 3; is this an MRC file?")
    x, y, z = (float(fields["cella"][a]) / int(fields["m" + a]) if fields["m" + a] > 0 else 0.0 for a in "xyz")
    sizes = (x, y, z)
    if not all(math.isfinite(size) and size >= 0 for size in sizes):
        raise BadInput(f"{path}: the cell lengths in its header make no sense; is this an MRC file?")
    origin = (float(fields["origin"]["x"]), float(fields["origin"]["y"]), float(fields["origin"]["z"]))
    if not any(origin) and any(sizes):
        starts = {axis: int(fields[name]) for axis, name in zip(axes, ("nxstart", "nystart", "nzstart"), strict=True)}
        origin = (starts[1] * x, starts[2] * y, starts[3] * z)
    cell = tuple(float(fields["cellb"][a]) or 90.0 for a in ("alpha", "beta", "gamma"))  # 0 where a program did not care
    angles = cast(tuple[float, float, float], cell)
    return MrcHeader(path, shape, np.dtype(order + kind), HEADER_BYTES + int(fields["nsymbt"]), axes, sizes, origin, angles)
