"""Micrographs: their STAR tables (optics groups, CTF), and their pixels as MRC of any mode or TIFF.

    found = read_micrographs("CtfFind/job003/micrographs_ctf.star")
    for i in range(len(found)):  pixels = read_micrograph(found.file(i));  found.optics[found.group[i]], found.defocus[i], found.has_ctf[i]

The first row of an MRC file is the bottom of the picture, of a TIFF file the top: TIFF is turned upside down on reading, as IMOD, EMAN2 and
RELION do, so that coordinates mean the same in both.
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.io.files import why
from frazil.io.images import find_stack
from frazil.io.mrc import HEADER_BYTES, MODES, read_header
from frazil.io.star import Block, as_table, first_table, read_star

TIFF = (".tif", ".tiff")
PACKED = 101  # MRC mode: two pixels of 4 bits a byte
DEFOCUS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")
_PIXEL_LABELS = ("rlnMicrographPixelSize", "rlnImagePixelSize", "rlnPixelSize", "rlnMicrographOriginalPixelSize")
_NATIVE = {"u1": torch.uint8, "i1": torch.int8, "i2": torch.int16, "u2": torch.uint16, "f2": torch.float16, "f4": torch.float32}


@dataclass(frozen=True)
class Micrographs:
    """A table of micrographs: what frazil understands of it and everything else as it was."""

    path: Path  # the STAR file (or the image itself)
    names: tuple[str, ...]  # as in the file
    optics: tuple[Optics, ...]  # pixel_size 0 where neither table nor header gives one
    group: Tensor  # (n,) int64, index into optics
    defocus: Tensor  # (n, 3) float64: u, v in Å, angle in degrees; NaN where the table has no CTF
    phase_shift: Tensor  # (n,) float64 degrees
    table: pd.DataFrame  # data_micrographs, every column text as in the file
    optics_table: pd.DataFrame  # data_optics, every column text; empty if there is none
    blocks: dict[str, Block] = field(default_factory=dict)  # any further blocks

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_ctf(self) -> Tensor:
        """(n,) bool: which micrographs have a defocus."""
        return torch.isfinite(self.defocus).all(-1)

    def file(self, index: int) -> Path:
        """Where the image is. Raises BadInput naming it if it is nowhere."""
        name = self.names[index]
        found = Path(name) if Path(name).is_absolute() and Path(name).is_file() else find_stack(name, self.path)
        if found is None:
            raise BadInput(f"{name}: no such file (row {index + 1} of {self.path}); run in the project folder, or correct the name")
        return found

    def optics_of(self, index: int) -> Optics:
        """Optics of a micrograph."""
        return self.optics[int(self.group[index])]


def read_micrographs(path: str | os.PathLike[str], pixel_size: float | None = None, constants: bool = True) -> Micrographs:
    """Micrographs of a STAR file (RELION ≥ 3.1 with data_optics, or one table), or a single image file.

    `pixel_size` (Å) replaces what files say. Without it and without one in the table, it is taken from the image's header. Voltage, Cs
    and amplitude contrast may be missing where there is no CTF, or where `constants` is False, for callers that have their own: 300 kV,
    2.7 mm and 0.1 stand there then. Raises BadInput naming file, row and label: no such table, no micrographs, names listed twice, optics
    groups that are not there, numbers that are none, a CTF without the microscope's constants.
    """
    path = Path(path)
    if path.suffix.lower() in (".mrc", ".map", *TIFF):
        star: dict[str, Block] = {"micrographs": pd.DataFrame({"rlnMicrographName": [str(path.resolve())]}, dtype="str")}
    else:
        star = dict(read_star(path, text=True))
    found = first_table(star, "rlnMicrographName")
    if found is None:
        raise BadInput(f"{path}: has no table with _rlnMicrographName; expected a STAR file of micrographs")
    block, table = found
    if not len(table):
        raise BadInput(f"{path}: data_{block} holds no micrographs")
    names = tuple(table["rlnMicrographName"])
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadInput(f"{path}: {twice} is listed twice; remove one of the rows")
    optics_block = as_table(star["optics"]) if "optics" in star else None
    has_ctf = all(label in table for label in DEFOCUS[:2])
    rows, group = _optics_rows(table, optics_block, path)
    optics = tuple(_optics(row, k, path, has_ctf and constants, pixel_size) for k, row in enumerate(rows, 1))
    defocus = torch.full((len(table), 3), math.nan, dtype=torch.float64)
    if has_ctf:
        columns = [_numbers(table, label, path) for label in DEFOCUS[:2]] + [_numbers(table, DEFOCUS[2], path, 0.0)]
        defocus = torch.from_numpy(np.stack(columns, -1))
        defocus[~torch.isfinite(defocus).all(-1)] = math.nan
    phase = torch.from_numpy(np.nan_to_num(_numbers(table, "rlnPhaseShift", path, 0.0)))
    others = {key: value for key, value in star.items() if key not in (block, "optics")}
    made = Micrographs(path, names, optics, group, defocus, phase, table, pd.DataFrame() if optics_block is None else optics_block, others)
    return _with_header_pixels(made)


def read_micrograph(path: str | os.PathLike[str]) -> Tensor:
    """(y, x) pixels in the type they are stored in (4-bit ones as uint8), first row = bottom of the picture.

    Raises BadInput naming the file: missing, not an image, truncated, several sections (a movie), complex values, too small.
    """
    return read_micrograph_into(path, None)


def read_micrograph_into(path: str | os.PathLike[str], buffer: Tensor | None) -> Tensor:
    """As read_micrograph; where `buffer` (uint8, one axis) is long enough the pixels are read into it and the answer is a view of it."""
    path = Path(path)
    if path.suffix.lower() in TIFF:
        return _read_tiff(path)
    mode = _mrc_mode(path)
    if mode == PACKED:
        return _read_packed(path)
    header = read_header(path)
    sections, h, w = header.shape
    if sections != 1:
        raise BadInput(f"{path}: holds {sections} sections; expected one image (is this a movie? correct its motion first)")
    if min(h, w) < 32:
        raise BadInput(f"{path}: is {w} x {h} px; expected a micrograph")
    size, kind = header.image_bytes, header.dtype.str[1:]
    if path.suffix == ".gz" or header.dtype.byteorder == ">" or header.axes[:2] != (1, 2):
        from frazil.io.mrc import read_mrc

        return read_mrc(path).data[0]
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
    target = buffer[:size]
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(header.offset)
            view = memoryview(target.numpy().data)
            got = 0
            while got < size and (n := file.readinto(view[got:])):
                got += n
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {why(error)}") from error
    if got < size:
        raise BadInput(f"{path}: truncated: {got} of {size} bytes of pixels; copy it again")
    return target.view(_NATIVE[kind]).view(h, w)


def micrograph_header(path: str | os.PathLike[str]) -> tuple[tuple[int, int], float]:
    """((y, x) px, pixel size in Å or 0) without reading the pixels. Raises BadInput as read_micrograph does."""
    path = Path(path)
    if path.suffix.lower() in TIFF:
        return _tiff_shape(path), 0.0
    if _mrc_mode(path) == PACKED:
        with open(path, "rb") as file:
            words = np.frombuffer(file.read(HEADER_BYTES), "<i4")
        cell, intervals = float(words[10:11].view("<f4")[0]), int(words[7])
        return (int(words[1]), int(words[0])), cell / intervals if intervals > 0 else 0.0
    header = read_header(path)
    return (header.shape[1], header.shape[2]), header.pixel_size[0]


# ---- tables


def _optics_rows(table: pd.DataFrame, optics_table: pd.DataFrame | None, path: Path) -> tuple[list[dict[str, str]], Tensor]:
    """(a mapping label → text for each group, (n,) index of each micrograph's)."""
    if optics_table is None:  # RELION 3.0 and before, or no optics at all: the columns are in the table itself
        labels = [c for c in (*_PIXEL_LABELS, "rlnDetectorPixelSize", "rlnMagnification", "rlnVoltage", "rlnSphericalAberration",
                              "rlnAmplitudeContrast") if c in table]  # fmt: skip
        if not labels:
            return [{}], torch.zeros(len(table), dtype=torch.int64)
        keys = table[labels].drop_duplicates()
        order = {tuple(row): k for k, row in enumerate(keys.itertuples(index=False))}
        group = [order[tuple(row)] for row in table[labels].itertuples(index=False)]
        return [dict(zip(labels, map(str, row), strict=True)) for row in keys.itertuples(index=False)], torch.tensor(group)
    rows = [{str(k): str(v) for k, v in row.items()} for row in optics_table.to_dict("records")]
    numbers = [row.get("rlnOpticsGroup", str(k)) for k, row in enumerate(rows, 1)]
    if "rlnOpticsGroup" not in table:
        if len(rows) != 1:
            raise BadInput(f"{path}: {len(rows)} optics groups but no column _rlnOpticsGroup in the table of micrographs; add it")
        return rows, torch.zeros(len(table), dtype=torch.int64)
    place = {number: k for k, number in enumerate(numbers)}
    unknown = next(((i, g) for i, g in enumerate(table["rlnOpticsGroup"], 1) if g not in place), None)
    if unknown:
        raise BadInput(f"{path}: row {unknown[0]}: optics group {unknown[1]} is not in data_optics; add it there")
    return rows, torch.tensor([place[g] for g in table["rlnOpticsGroup"]])


def _optics(row: dict[str, str], number: int, path: Path, needs_constants: bool, pixel_size: float | None) -> Optics:
    """One optics group; pixel size 0 if unknown."""
    def value(label: str, default: float | None) -> float:
        if label not in row:
            if default is None:
                raise BadInput(f"{path}: optics group {number}: label _{label} is missing, but the micrographs have a CTF; add it")
            return default
        try:
            return float(row[label])
        except ValueError:
            raise BadInput(f"{path}: optics group {number}: _{label} is {row[label]!r}; expected a number") from None

    size = next((value(label, 0.0) for label in _PIXEL_LABELS if label in row), 0.0)
    if not size and value("rlnMagnification", 0.0) > 0:
        size = value("rlnDetectorPixelSize", 0.0) * 1e4 / value("rlnMagnification", 1.0)
    size = pixel_size or size
    if size < 0 or not math.isfinite(size):
        raise BadInput(f"{path}: optics group {number}: the pixel size is {size}; expected Å per pixel, above 0")
    standard: tuple[float | None, float | None, float | None] = (None, None, None) if needs_constants else (300.0, 2.7, 0.1)
    voltage, cs, contrast = (value(label, default) for label, default in
                             zip(("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"), standard, strict=True))  # fmt: skip
    return Optics(size, 0, voltage, cs, contrast, row.get("rlnOpticsGroupName", f"opticsGroup{number}"))


def _numbers(table: pd.DataFrame, label: str, path: Path, default: float | None = None) -> np.ndarray:
    """(n,) float64 of a column; text that is no number is NaN for 'nan', '' and 'none', else BadInput."""
    if label not in table:
        return np.full(len(table), math.nan if default is None else default)
    numbers = np.empty(len(table))
    for i, text in enumerate(table[label].tolist()):
        try:
            numbers[i] = math.nan if str(text).strip().lower() in ("", "none", "<na>", "null") else float(text)
        except ValueError:
            raise BadInput(f"{path}: row {i + 1}: _{label} is {text!r}; expected a number") from None
    return numbers


def _with_header_pixels(found: Micrographs) -> Micrographs:
    """Pixel sizes that the table does not give, from the header of the first readable image of the group."""
    optics = list(found.optics)
    for g, item in enumerate(optics):
        if item.pixel_size > 0:
            continue
        for i in torch.nonzero(found.group == g)[:5, 0].tolist():
            try:
                optics[g] = replace(item, pixel_size=micrograph_header(found.file(i))[1])
            except BadInput:
                continue
            break
    return replace(found, optics=tuple(optics))


# ---- pixels


def _mrc_mode(path: Path) -> int | None:
    """Mode word of a plain MRC file, None where it cannot be told (read_header says why). Complex modes are refused here."""
    try:
        with open(path, "rb") as file:
            raw = file.read(16)
    except OSError:
        return None
    mode = int(np.frombuffer(raw, "<i4")[3]) if len(raw) == 16 and path.suffix != ".gz" else None
    if mode in (3, 4):
        raise BadInput(f"{path}: MRC mode {mode} holds complex values; expected an image (modes {', '.join(map(str, MODES))}, {PACKED})")
    return mode


def _read_packed(path: Path) -> Tensor:
    """4-bit pixels, the low half of a byte first; rows of odd length end in half a byte."""
    with open(path, "rb") as file:
        head = np.frombuffer(file.read(HEADER_BYTES), "<i4")
        if len(head) < HEADER_BYTES // 4:
            raise BadInput(f"{path}: shorter than an MRC header (1024 bytes); copy the file again")
        w, h, sections, extra = int(head[0]), int(head[1]), int(head[2]), int(head[23])
        if sections != 1 or not (0 < w < 1 << 20 and 0 < h < 1 << 20 and extra >= 0):
            raise BadInput(f"{path}: {sections} sections of {w} x {h} px; expected one image")
        file.seek(HEADER_BYTES + extra)
        row = (w + 1) // 2
        packed = np.frombuffer(file.read(row * h), np.uint8)
    if packed.size < row * h:
        raise BadInput(f"{path}: truncated: {packed.size} of {row * h} bytes of pixels; copy it again")
    packed = packed.reshape(h, row)
    return torch.from_numpy(np.stack([packed & 15, packed >> 4], -1).reshape(h, 2 * row)[:, :w].copy())


def _tifffile(path: Path):
    try:
        import tifffile
    except ImportError:
        raise BadInput(f"{path}: TIFF needs the package tifffile (pip install tifffile imagecodecs), or convert it to MRC") from None
    return tifffile


def _tiff_shape(path: Path) -> tuple[int, int]:
    tifffile = _tifffile(path)
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) != 1:
                raise BadInput(f"{path}: holds {len(file.pages)} pages; expected one image (is this a movie?)")
            shape = file.pages[0].shape
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read as TIFF: {error}") from error
    if len(shape) != 2:
        raise BadInput(f"{path}: has {len(shape)} axes {shape}; expected a grey image")
    return int(shape[0]), int(shape[1])


def _read_tiff(path: Path) -> Tensor:
    """Pixels of a one-page grey TIFF, turned upside down."""
    _tiff_shape(path)
    try:
        pixels = _tifffile(path).imread(path)
    except Exception as error:  # noqa: BLE001 (its codecs raise errors of their own kinds)
        raise BadInput(f"{path}: cannot be read as TIFF: {error}") from error
    if pixels.dtype.kind not in "uif":
        raise BadInput(f"{path}: holds {pixels.dtype} pixels; expected numbers")
    kind = pixels.dtype.str[1:]
    pixels = np.ascontiguousarray(pixels[::-1], dtype=kind if kind in _NATIVE else np.float32)
    return torch.from_numpy(pixels)
