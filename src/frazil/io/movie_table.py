"""STAR files of movies: the list that import writes, and what motion correction found for one movie, with RELION's labels."""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.io.eer import UPSAMPLINGS
from frazil.io.images import find_stack
from frazil.io.star import Star, as_table, first_table, read_star, read_whole_star, write_star

NAME, ORIGINAL, UPSAMPLING = "rlnMicrographMovieName", "rlnMicrographOriginalPixelSize", "rlnEERUpsampling"
NOT_OBSERVED = -9999.0


@dataclass(frozen=True)
class MovieTable:
    """A list of movies with their optics groups."""

    path: Path
    names: tuple[str, ...]  # as in the file
    optics: tuple[Optics, ...]  # pixel_size: rlnMicrographOriginalPixelSize
    group: Tensor  # (n,) int64, index into optics
    optics_table: pd.DataFrame  # every column text
    table: pd.DataFrame  # every column text

    def file(self, index: int) -> Path:
        """Where the movie is. Raises BadInput naming it if it is nowhere."""
        found = find_stack(self.names[index], self.path)
        if found is None:
            raise BadInput(f"{self.names[index]}: no such file (row {index + 1} of {self.path}); run in the project folder, or correct "
                f"the name")
        return found


def read_movies(path: str | os.PathLike[str]) -> MovieTable:
    """Movies of a STAR file of RELION ≥ 3.1. Raises BadInput naming file, row and label."""
    path = Path(path)
    star = read_star(path, text=True)
    found = first_table(star, NAME)
    if found is None:
        raise BadInput(f"{path}: has no table with _{NAME}; expected movies.star, `frazil import` makes one")
    table, optics = found[1], star.get("optics")
    if optics is None:
        raise BadInput(f"{path}: has no data_optics (RELION 3.0 or before); import the movies again with `frazil import`")
    optics = as_table(optics)
    if not len(table):
        raise BadInput(f"{path}: lists no movies")
    names = tuple(table[NAME])
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadInput(f"{path}: {twice} is listed twice; remove one of the rows")
    number = optics["rlnOpticsGroup"] if "rlnOpticsGroup" in optics else pd.Series(map(str, range(1, len(optics) + 1)))
    place = {value: k for k, value in enumerate(number)}
    groups = table["rlnOpticsGroup"] if "rlnOpticsGroup" in table else pd.Series([number.iloc[0]] * len(table))
    for row, value in enumerate(groups, 1):
        if value not in place:
            raise BadInput(f"{path}: row {row}: optics group {value} is not in data_optics; add it there")
    made = tuple(_optics(row, k, path) for k, row in enumerate(optics.to_dict("records"), 1))
    return MovieTable(path, names, made, torch.tensor([place[g] for g in groups]), optics, table)


def _optics(row: dict, number: int, path: Path) -> Optics:
    def value(label: str, default: float | None = None) -> float:
        text = row.get(label)
        if text is None and default is not None:
            return default
        try:
            return float(text)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            raise BadInput(f"{path}: data_optics row {number}: _{label} is {text!r}; expected a number") from None

    pixel = value("rlnMicrographOriginalPixelSize", value("rlnMicrographPixelSize", 0.0))
    if pixel <= 0:
        raise BadInput(f"{path}: data_optics row {number}: no pixel size (_rlnMicrographOriginalPixelSize); add it")
    return Optics(pixel, 0, value("rlnVoltage"), value("rlnSphericalAberration", 2.7), value("rlnAmplitudeContrast", 0.1),
                  name=str(row.get("rlnOpticsGroupName", f"opticsGroup{number}")))  # fmt: skip


def drawn(table: MovieTable, upsampling: int, note: Callable[[str], None]) -> MovieTable:
    """The table with the pixel sizes of EER frames drawn at an upsampling; `note` gets a line for the user where there is one.

    rlnEERUpsampling in data_optics (`frazil import` writes 1: the camera's pixels) says at which upsampling its pixel size holds. Without
    it, as in RELION's own movies.star, the pixel size is that of the frames as they are drawn: RELION takes it so. Raises BadInput where
    EER movies and others are listed together and would get different pixels.
    """
    eer = [Path(name).suffix.lower() == ".eer" for name in table.names]
    if not any(eer) or upsampling not in UPSAMPLINGS:  # opening a movie refuses the latter
        return table
    if upsampling != 1 and not all(eer):
        raise BadInput(f"{table.path}: lists EER movies and others: --eer-upsampling {upsampling} would give them different pixels; "
                       "import them apart")  # fmt: skip
    if UPSAMPLING not in table.optics_table:
        size = ", ".join(f"{o.pixel_size:g}" for o in table.optics)
        if upsampling != 1:
            note(f"{table.path}: has no _{UPSAMPLING}, so {size} Å is taken for the pixel of the frames as drawn "
                 f"(upsampling {upsampling}), as RELION does, not for the camera's")  # fmt: skip
        return table
    try:
        factors = [UPSAMPLINGS[int(value)] / UPSAMPLINGS[upsampling] for value in table.optics_table[UPSAMPLING]]
    except (ValueError, KeyError):
        raise BadInput(f"{table.path}: data_optics: _{UPSAMPLING} is not one of {', '.join(map(str, UPSAMPLINGS))}") from None
    optics = tuple(replace(o, pixel_size=o.pixel_size * factor) for o, factor in zip(table.optics, factors, strict=True))
    changed = table.optics_table.assign(**{ORIGINAL: [repr(o.pixel_size) for o in optics], UPSAMPLING: str(upsampling)})
    sizes = [f"{a.pixel_size:g} Å becomes {b.pixel_size:g} Å" for a, b in zip(table.optics, optics, strict=True) if a != b]
    if sizes:
        note(f"EER drawn at upsampling {upsampling}: a pixel of {', '.join(dict.fromkeys(sizes))}")
    return replace(table, optics=optics, optics_table=changed)


@dataclass(frozen=True)
class MotionRecord:
    """What is written about the motion of one movie. Shifts in px of the frames as read; frames are counted from `first_frame`."""

    general: dict[str, str | int | float]  # data_general, labels without underscore
    track: Tensor  # (n, 2)
    observed: Tensor  # (n,) bool
    coefficients: Tensor | None  # (2, 18)
    hot: Tensor  # (m, 2) int64 xy
    patch_shifts: Tensor  # (n, p, 2)
    patch_centres: Tensor  # (p, 2) px

    @property
    def first_frame(self) -> int:
        """Number of the first frame used, from 1."""
        return int(self.general.get("rlnMicrographStartFrame", 1))


def write_motion(path: str | os.PathLike[str], record: MotionRecord, comment: str = "") -> None:
    """The STAR file of a movie as RELION's motion correction writes it, atomically."""
    n, first = len(record.track), record.first_frame
    track = torch.where(record.observed[:, None], record.track, torch.full_like(record.track, NOT_OBSERVED)).numpy()
    general = {**record.general, "rlnMotionModelVersion": int(record.coefficients is not None)}
    shifts = pd.DataFrame({"rlnMicrographFrameNumber": np.arange(first, first + n), "rlnMicrographShiftX": track[:, 0],
                           "rlnMicrographShiftY": track[:, 1]})  # fmt: skip
    blocks = {"general": general, "global_shift": shifts}
    if record.coefficients is not None:
        values = record.coefficients.reshape(-1).numpy()
        blocks["local_motion_model"] = pd.DataFrame({"rlnMotionModelCoeffsIdx": np.arange(len(values)), "rlnMotionModelCoeff": values})
    if len(record.hot):
        hot = record.hot.numpy()
        blocks["hot_pixels"] = pd.DataFrame({"rlnCoordinateX": hot[:, 0].astype(float), "rlnCoordinateY": hot[:, 1].astype(float)})
    if record.coefficients is not None:
        patches = record.patch_shifts.shape[1]
        centre = record.patch_centres.numpy()
        blocks["local_shift"] = pd.DataFrame({
            "rlnMicrographFrameNumber": np.repeat(np.arange(first, first + n), patches),
            "rlnCoordinateX": np.tile(centre[:, 0], n), "rlnCoordinateY": np.tile(centre[:, 1], n),
            "rlnMicrographShiftX": record.patch_shifts[..., 0].reshape(-1).numpy(),
            "rlnMicrographShiftY": record.patch_shifts[..., 1].reshape(-1).numpy(),
        })  # fmt: skip
    write_star(path, blocks, f"{comment}; {len(record.hot)} hot pixels")


def read_motion(path: str | os.PathLike[str], whole: bool = False) -> MotionRecord:
    """The motion of a movie, from frazil's or RELION's file. Raises BadInput naming the file where blocks or labels are missing.

    whole: of a file of frazil's; BadInput also where any part of it, needed here or not, has been cut off.
    """
    star = read_whole_star(path) if whole else read_star(path)
    general = star.get("general")
    if not isinstance(general, dict):
        raise BadInput(f"{path}: has no data_general; expected the STAR file of a movie's motion")
    track = _columns(star, "global_shift", ("rlnMicrographShiftX", "rlnMicrographShiftY"), path)
    assert track is not None
    observed = (track > NOT_OBSERVED / 2).all(-1)
    coefficients = None
    if int(general.get("rlnMotionModelVersion", 0)) == 1:
        found = _columns(star, "local_motion_model", ("rlnMotionModelCoeff",), path)
        if found is None or found.numel() != 36:
            raise BadInput(f"{path}: data_local_motion_model does not hold 36 coefficients; correct the movie's motion again")
        coefficients = found.reshape(2, 18)
    hot = _columns(star, "hot_pixels", ("rlnCoordinateX", "rlnCoordinateY"), path, needed=False)
    if whole:
        found, said = star.get("local_shift"), re.search(r"([0-9]+) hot pixels", star.comment)
        patches = len(found) / len(track) if isinstance(found, pd.DataFrame) else 0
        if (len(track) != general.get("rlnImageSizeZ", len(track)) or (coefficients is not None and (patches < 1 or patches % 1))
                or (said and int(said[1]) != (0 if hot is None else len(hot)))):  # fmt: skip
            raise BadInput(f"{path}: is not whole; correct the movie's motion again")
    return MotionRecord(general, track, observed, coefficients, torch.zeros(0, 2, dtype=torch.int64) if hot is None else hot.long(),
                        torch.zeros(len(track), 0, 2, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.float64))  # fmt: skip


def _columns(star: Star, block: str, labels: tuple[str, ...], path: str | os.PathLike[str], needed: bool = True) -> Tensor | None:
    """(rows, labels) float64 of a block; None where an optional one is missing."""
    table = star.get(block)
    if not isinstance(table, pd.DataFrame) or not all(label in table for label in labels):
        if needed:
            raise BadInput(f"{path}: data_{block} with {', '.join('_' + label for label in labels)} is missing; correct the movie's "
                f"motion again")
        return None
    try:
        return torch.from_numpy(np.array(table[list(labels)].to_numpy(dtype=float)))
    except ValueError:
        raise BadInput(f"{path}: data_{block} holds values that are no numbers; correct the movie's motion again") from None
