"""Positions of particles in micrographs: RELION STAR, EMAN .box, cryoSPARC .cs, crYOLO .cbox, CSV and plain columns.

A table has RELION's labels: rlnCoordinateX, rlnCoordinateY (px, centre of the particle, first pixel = 0) and what else is known
(rlnAutopickFigureOfMerit, rlnClassNumber, rlnAnglePsi, …). Files of EMAN and crYOLO give the corner of a box: centre = corner + side/2.
cryoSPARC gives fractions of the micrograph's sides.
"""
from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from frazil.data import BadInput
from frazil.io.files import atomic_path, write_text
from frazil.io.images import find_stack
from frazil.io.star import first_table, read_star, write_star

X, Y, SCORE, CLASS, PSI = "rlnCoordinateX", "rlnCoordinateY", "rlnAutopickFigureOfMerit", "rlnClassNumber", "rlnAnglePsi"
NAME, FILE, PIXEL = "rlnMicrographName", "rlnMicrographCoordinates", "rlnMicrographPixelSize"
LISTS = ("autopick.star", "manualpick.star")  # of frazil's and RELION's picking runs, whose folders hold logs too
FORMATS = (".star", ".box", ".cs", ".cbox", ".csv")
TEXT_FORMATS = (".csv", ".txt", ".coords", ".tsv")
_HEADS = {
    X: ("x", "x_coord", "coordinatex", "rlncoordinatex", "x_px", "xcoord"),
    Y: ("y", "y_coord", "coordinatey", "rlncoordinatey", "y_px", "ycoord"),
    SCORE: ("score", "fom", "confidence", "rlnautopickfigureofmerit", "ncc"),
    CLASS: ("class", "template", "rlnclassnumber"),
    PSI: ("psi", "angle", "rlnanglepsi"),
    NAME: ("micrograph", "image_name", "rlnmicrographname", "image", "name"),
}
_SUFFIX = re.compile(r"(_autopick|_manualpick|_pick|_picks|_particles|_coords|_topaz)$")


def root(name: str) -> str:
    """What two files of one micrograph have in common: the file name without folder, endings and a picker's suffix."""
    stem = re.sub(r"\.(mrcs?|map|tiff?|eer|star|box|cbox|csv|txt|coords|tsv|cs|gz)$", "", Path(name).name, flags=re.IGNORECASE)
    return _SUFFIX.sub("", stem)


def read_coordinates(path: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Tables by micrograph: of a file for one micrograph or for many (a list of coordinate files, a table with names, .cs), or of a folder.

    The key is rlnMicrographName where the file gives one, else the file's own root. Raises BadInput naming file and row.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected coordinates ({', '.join(FORMATS)}), or a folder of them")
    suffix = path.suffix.lower()
    if suffix == ".cs":
        return _read_cs(path)
    if suffix == ".box":
        return {root(path.name): _from_corners(_columns(path, 4), path)}
    if suffix == ".cbox":
        return {root(path.name): _read_cbox(path)}
    if suffix in TEXT_FORMATS:
        return _split(_read_text(path), path)
    return _read_star(path)


def write_coordinates(path: str | os.PathLike[str], table: pd.DataFrame, box: int = 0) -> None:
    """Write the table of one micrograph as .star, .box, .cbox or .csv, by the ending. .box and .cbox need a box in px.

    Raises BadInput for another ending, or a missing box.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".star":
        write_star(path, {"": table})
    elif suffix == ".csv":
        names = {X: "x", Y: "y", SCORE: "score", CLASS: "class", PSI: "psi", NAME: "micrograph"}
        with atomic_path(path) as tmp:
            table.rename(columns=names).to_csv(tmp, index=False)
    elif suffix in (".box", ".cbox"):
        if box <= 0:
            raise BadInput(f"{path}: {suffix} files hold boxes; give their side in px (--box)")
        corner = table[[X, Y]].to_numpy(float) - box / 2
        score = table[SCORE].to_numpy(float) if SCORE in table else np.ones(len(table))
        if suffix == ".box":
            write_text(path, "".join(f"{x:.2f}\t{y:.2f}\t{box}\t{box}\t{s:.6g}\n" for (x, y), s in zip(corner, score, strict=True)))
        else:
            _write_cbox(path, corner, score, box)
    else:
        raise BadInput(f"{path}: coordinates are written as {', '.join(FORMATS)}; give a name that ends in one of them")


def write_cs(path: str | os.PathLike[str], tables: Mapping[str, pd.DataFrame], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write the tables of all micrographs as one cryoSPARC .cs file of particle locations; shapes: (y, x) px by micrograph."""
    kinds = [("uid", "<u8"), ("location/micrograph_uid", "<u8"), ("location/exp_group_id", "<u4"), ("location/micrograph_path", "S512"),
             ("location/micrograph_shape", "<u4", (2,)), ("location/center_x_frac", "<f4"), ("location/center_y_frac", "<f4"),
             ("pick_stats/ncc_score", "<f4"), ("pick_stats/power", "<f4"), ("pick_stats/template_idx", "<u4"),
             ("pick_stats/angle_rad", "<f4")]  # fmt: skip
    rows = np.zeros(sum(map(len, tables.values())), dtype=kinds)
    at = 0
    for number, (name, table) in enumerate(tables.items(), 1):
        h, w = shapes[name]
        part = rows[at : at + len(table)]
        part["uid"] = np.arange(at + 1, at + len(table) + 1)
        part["location/micrograph_uid"], part["location/micrograph_path"] = number, name.encode()
        part["location/micrograph_shape"] = (h, w)
        part["location/center_x_frac"], part["location/center_y_frac"] = table[X].to_numpy(float) / w, table[Y].to_numpy(float) / h
        part["pick_stats/ncc_score"] = table[SCORE].to_numpy(float) if SCORE in table else 0
        part["pick_stats/template_idx"] = table[CLASS].to_numpy(float).clip(1) - 1 if CLASS in table else 0
        part["pick_stats/angle_rad"] = np.radians(table[PSI].to_numpy(float)) if PSI in table else 0
        at += len(table)
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        np.save(file, rows)


# ---- readers


def _read_folder(folder: Path) -> dict[str, pd.DataFrame]:
    """Every coordinate file of a folder; where a picking run made it, what its list names."""
    for name in LISTS:
        if (folder / name).is_file():
            return read_coordinates(folder / name)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in (*FORMATS, ".txt", ".coords", ".tsv") and p.is_file())
    out: dict[str, pd.DataFrame] = {}
    for file in files:
        try:
            found = read_coordinates(file)
        except BadInput:
            if file.suffix == ".star":  # other STAR files may lie there too
                continue
            raise
        out.update(found)
    if not out:
        raise BadInput(f"{folder}: holds no coordinate files ({', '.join(FORMATS)})")
    return out


def _read_star(path: Path) -> dict[str, pd.DataFrame]:
    """A list of coordinate files, a table with micrograph names, or the coordinates of one micrograph."""
    star = read_star(path)
    listed = first_table(star, FILE)
    if listed is not None and NAME in listed[1]:
        out: dict[str, pd.DataFrame] = {}
        for row, (name, file) in enumerate(zip(listed[1][NAME], listed[1][FILE], strict=True), 1):
            found = Path(file) if Path(file).is_file() else find_stack(str(file), path)
            if found is None:
                raise BadInput(f"{path}: row {row}: {file}: no such file; run in the project folder")
            out[str(name)] = next(iter(read_coordinates(found).values()))
        return out
    found = first_table(star, X)
    if found is None or Y not in found[1]:
        empty = first_table(star, Y)
        raise BadInput(f"{path}: has no columns _{X} and _{Y}; expected coordinates" if empty is None else f"{path}: label _{X} is missing")
    return _split(_checked(found[1], path), path)


def _split(table: pd.DataFrame, path: Path) -> dict[str, pd.DataFrame]:
    """By micrograph name, where there is such a column."""
    if NAME not in table:
        return {root(path.name): table}
    return {str(name): part.drop(columns=NAME).reset_index(drop=True) for name, part in table.groupby(NAME, sort=False)}


def _checked(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table, its coordinates finite numbers."""
    table = table.copy()
    for label in (X, Y):
        table[label] = numbers = _floats(table[label])
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            raise BadInput(f"{path}: row {wrong[0] + 1}: {label} is not a finite number")
    return table


def _floats(column: Any) -> np.ndarray:
    """Numbers of a column, NaN where there is none."""
    return np.asarray(pd.to_numeric(column, errors="coerce"), dtype=float)


def _columns(path: Path, least: int) -> np.ndarray:
    """(n, ≥ least) numbers of a text file of columns; comments and blank lines are passed over."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = re.split(r"[\s,;]+", line.split("#")[0].strip())
        if words == [""]:
            continue
        try:
            values = [float(w) for w in words]
        except ValueError:
            raise BadInput(f"{path}: line {number}: {line.strip()[:40]!r}; expected {least} or more numbers") from None
        if len(values) < least:
            raise BadInput(f"{path}: line {number}: {len(values)} values; expected {least} or more")
        rows.append(values)
    width = min((len(r) for r in rows), default=least)
    return np.array([r[:width] for r in rows], dtype=float).reshape(-1, width)


def _from_corners(columns: np.ndarray, path: Path) -> pd.DataFrame:
    """Centres of boxes x, y, width, height[, score]."""
    table = {X: columns[:, 0] + columns[:, 2] / 2, Y: columns[:, 1] + columns[:, 3] / 2}
    if columns.shape[1] > 4 and not np.isin(columns[:, 4], (-1, -2, -3)).any():  # EMAN 1 has marks of its own there
        table[SCORE] = columns[:, 4]
    return _checked(pd.DataFrame(table), path)


def _read_cbox(path: Path) -> pd.DataFrame:
    """crYOLO's boxes: a STAR file with CoordinateX, Width, …, or columns in its older form."""
    if not re.search(rb"^\s*data_", path.read_bytes(), re.MULTILINE):
        return _from_corners(_columns(path, 4), path)
    found = first_table(read_star(path), "CoordinateX")
    labels = ("CoordinateX", "CoordinateY", "Width", "Height")
    if found is None or not set(labels) <= set(found[1].columns):
        raise BadInput(f"{path}: has no columns {', '.join('_' + label for label in labels)}; is this a crYOLO file?")
    columns = np.stack([_floats(found[1][label]) for label in labels], -1)
    out = _from_corners(columns, path)
    if "Confidence" in found[1]:
        out[SCORE] = _floats(found[1]["Confidence"])
    return out


def _write_cbox(path: Path, corner: np.ndarray, score: np.ndarray, box: int) -> None:
    missing = ["<NA>"] * len(corner)
    table = pd.DataFrame({
        "CoordinateX": corner[:, 0], "CoordinateY": corner[:, 1], "CoordinateZ": missing, "Width": float(box), "Height": float(box),
        "Depth": missing, "EstWidth": missing, "EstHeight": missing, "Confidence": score, "NumBoxes": missing, "Angle": missing,
    })  # fmt: skip
    write_star(path, {"global": {"cbox_format_version": "1.0"}, "cryolo": table})


def _read_text(path: Path) -> pd.DataFrame:
    """Columns with a heading (CSV, or tab-separated as topaz writes), or two or more columns of numbers: x, y, score."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        return pd.DataFrame({X: np.zeros(0), Y: np.zeros(0)})
    if re.match(r"^[\s,;\d.eE+-]+$", lines[0]):
        columns = _columns(path, 2)
        table = pd.DataFrame(columns[:, :3], columns=[X, Y, SCORE][: min(3, columns.shape[1])])
        return _checked(table, path)
    separator = "," if "," in lines[0] else r"\s+"
    try:
        table = pd.read_csv(path, sep=separator, comment="#", engine="python")
    except (ValueError, pd.errors.ParserError) as error:
        raise BadInput(f"{path}: cannot be read as a table: {error}") from None
    heads = {alias: label for label, aliases in _HEADS.items() for alias in aliases}
    table = table.rename(columns={c: heads.get(str(c).strip().lower(), str(c)) for c in table.columns})
    if X not in table or Y not in table:
        raise BadInput(f"{path}: has columns {', '.join(map(str, table.columns))}; expected a heading with x and y")
    return _checked(table, path)


def _read_cs(path: Path) -> dict[str, pd.DataFrame]:
    """Particle locations of cryoSPARC (a NumPy file)."""
    try:
        with open(path, "rb") as file:
            rows = np.load(file)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        said = error if path.stat().st_size else "it is empty"
        raise BadInput(f"{path}: cannot be read as a cryoSPARC file: {said}") from error
    if not isinstance(rows, np.ndarray):
        raise BadInput(f"{path}: is a NumPy archive of several arrays (.npz); expected the one table of a cryoSPARC .cs file")
    fields = rows.dtype.names or ()
    needed = ("location/micrograph_path", "location/micrograph_shape", "location/center_x_frac", "location/center_y_frac")
    missing = [name for name in needed if name not in fields]
    if missing:
        raise BadInput(f"{path}: has no field {missing[0]}; expected particles with locations (export the picks or extracted particles)")
    shape = rows["location/micrograph_shape"].astype(float)
    table = pd.DataFrame({NAME: [n.decode() if isinstance(n, bytes) else str(n) for n in rows["location/micrograph_path"]],
                          X: rows["location/center_x_frac"] * shape[:, 1], Y: rows["location/center_y_frac"] * shape[:, 0]})  # fmt: skip
    if "location/micrograph_psize_A" in fields:
        table[PIXEL] = rows["location/micrograph_psize_A"].astype(float)
    if "pick_stats/ncc_score" in fields:
        table[SCORE] = rows["pick_stats/ncc_score"].astype(float)
    if "pick_stats/angle_rad" in fields:
        table[PSI] = np.degrees(rows["pick_stats/angle_rad"].astype(float))
    return _split(_checked(table, path), path)
