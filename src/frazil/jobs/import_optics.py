"""Optics of imported images: pixel size, voltage and beam shift of each file, the groups they make, and joining an earlier import."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from frazil.data import BadInput
from frazil.io.movie_table import ORIGINAL, UPSAMPLING
from frazil.io.movies import EER
from frazil.io.sessions import Acquisition, epu_beside, read_epu, read_mdoc
from frazil.io.star import first_table, read_star
from frazil.jobs.import_files import MISMATCH
from frazil.jobs.import_params import Params
from frazil.jobs.run import Run
from frazil.maths.clusters import cluster_shifts

FEW = 20  # movies of a beam-shift group below which one is told
SAME = 1e-3  # relative difference of pixel sizes that is rounding
# What RELION takes where a label is absent. It has no word for "no MTF": whatever stands there is a file to be read.
ABSENT = {"rlnBeamTiltX": "0", "rlnBeamTiltY": "0", UPSAMPLING: "1"}


@dataclass
class Found:
    """What was gathered about the files."""

    names: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    pixels: list[float] = field(default_factory=list)
    notes: dict[Path, Acquisition] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)

    def keep(self, places: Sequence[int]) -> None:
        """Only the files at these places."""
        for listing in (self.names, self.paths, self.shapes, self.pixels):
            listing[:] = [listing[i] for i in places]  # pyright: ignore[reportArgumentType, reportCallIssue]


@dataclass(frozen=True, order=True)
class Kind:
    """What files of one optics group have in common."""

    cluster: int  # of beam shifts
    pixel: float  # Å
    voltage: float  # kV


def kinds_of(params: Params, run: Run, found: Found) -> list[Kind]:
    """The kind of each file; files of which something is not known are problems."""
    notes = [_note(path, found) for path in found.paths]
    pixels, voltages = _pixels(params, run, found, notes), _voltages(params, run, found, notes)
    different = sorted(set(zip(pixels, voltages, strict=True)))
    if len(different) > 1:
        shown = ", ".join(f"{pixel:g} Å at {voltage:g} kV" for pixel, voltage in different)
        run.note(f"files of {len(different)} kinds ({shown}): an optics group each")
    doses = [n.dose for n in notes if n is not None and n.dose > 0]
    if doses:
        run.note(f"recorded dose {np.median(doses):.1f} e/Å² an exposure")
    clusters = _clusters(params, run, found, notes)
    return [Kind(*values) for values in zip(clusters, pixels, voltages, strict=True)]


def _pixels(params: Params, run: Run, found: Found, notes: Sequence[Acquisition | None]) -> list[float]:
    """Å, of each file: as asked for, by its .mdoc, by the headers."""
    told = [n.pixel_size if n is not None and n.source.suffix.lower() == ".mdoc" else 0.0 for n in notes]
    values: list[float] = []
    for value in sorted({v for v in told if v > 0}):
        if not values or value > (1 + SAME) * values[-1]:
            values.append(value)
    headers = [p for p in found.pixels if p > 0 and abs(p - 1) > 1e-6]  # 1 Å is what writers put who do not know
    if params.pixel_size:
        out = [params.pixel_size] * len(notes)
    elif values:
        out = [max((v for v in values if v <= t), default=values[0]) for t in told]
        _missing(found, told, values, "pixel size", "Å", "--pixel-size")
    else:
        out = [float(np.median(headers)) if headers else 1.0] * len(notes)
        if not headers and found.names:
            found.problems.append("--pixel-size: neither header nor .mdoc gives one; give it in Å")
    wrong = [(name, size) for name, p, size in zip(found.names, found.pixels, out, strict=True)
             if p > 0 and abs(p - 1) > 1e-6 and abs(p / size - 1) > MISMATCH]  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        run.warn(f"{wrong[0][0]}{more}: header pixel size differs from {wrong[0][1]:g} Å by over 5 %")
    _contradicted(run, notes, told, [t > 0 and abs(t / size - 1) > MISMATCH for t, size in zip(told, out, strict=True)],
                  "pixels of {:g} Å", f"{params.pixel_size or 0:g}")  # fmt: skip
    return out


def _voltages(params: Params, run: Run, found: Found, notes: Sequence[Acquisition | None]) -> list[float]:
    """kV, of each file: as asked for, by .mdoc or EPU, else 300."""
    told = [float(round(n.voltage)) if n is not None and n.voltage > 0 else 0.0 for n in notes]
    values = sorted({v for v in told if v > 0})
    if params.voltage:
        _contradicted(run, notes, told, [t > 0 and t != round(params.voltage or 0) for t in told], "{:g} kV", f"{params.voltage:g}")
        return [params.voltage] * len(notes)
    _missing(found, told, values, "voltage", "kV", "--voltage")
    return [t or (values[0] if values else 300.0) for t in told]


def _missing(found: Found, told: Sequence[float], values: Sequence[float], what: str, unit: str, option: str) -> None:
    """Files that say nothing are like the others; where these differ among themselves, it is a problem."""
    if len(values) < 2:
        return
    shown = ", ".join(f"{v:g}" for v in values)
    found.problems += [f"{name}: nothing tells its {what}, and others have {shown} {unit}: import it apart, with {option}"
                       for name, t in zip(found.names, told, strict=True) if not t]  # fmt: skip


def _contradicted(run: Run, notes: Sequence[Acquisition | None], told: Sequence[float], wrong: list[bool], what: str, used: str) -> None:
    """Say which files the microscope's software describes otherwise than an option does."""
    places = [i for i, is_wrong in enumerate(wrong) if is_wrong]
    if places and (note := notes[places[0]]) is not None:
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        run.warn(f"{note.source}{more}: says {what.format(told[places[0]])}, not {used}")


def _clusters(params: Params, run: Run, found: Found, notes: Sequence[Acquisition | None]) -> list[int]:
    """The beam-shift cluster of each file, 0 where they are not asked for."""
    if not params.beam_shift_groups or not found.names:
        return [0] * len(notes)
    shifts = [n.image_shift if n is not None else None for n in notes]
    missing = [name for name, s in zip(found.names, shifts, strict=True) if s is None]
    if missing:
        raise BadInput(f"--beam-shift-groups: {len(missing)} files have no .mdoc or EPU .xml with a shift, first {missing[0]}")
    cluster = cluster_shifts(np.array(shifts, dtype=float), params.clusters)
    counts = np.bincount(cluster)
    run.note(f"{len(counts)} groups of beam shifts with {counts.min()} to {counts.max()} files")
    if counts.min() < FEW:
        run.warn(f"the smallest beam-shift group has {counts.min()} files, fewer than {FEW}: too few to refine its aberrations")
    return [int(c) for c in cluster]


def _note(path: Path, found: Found) -> Acquisition | None:
    """What the microscope's software says of a file; an unreadable description is a problem."""
    if path in found.notes:
        return found.notes[path]
    try:
        mdoc, epu = path.with_name(path.name + ".mdoc"), epu_beside(path)
        if mdoc.is_file():
            return next((n for n in read_mdoc(mdoc) if n.movie == path.name), None)
        return read_epu(epu) if epu is not None else None
    except BadInput as error:
        found.problems.append(str(error))
        return None


def optics_table(params: Params, movies: bool, found: Found, kinds: Sequence[Kind]) -> tuple[pd.DataFrame, list[int]]:
    """data_optics, a row a kind that there is, and the group of each file, from 1."""
    different = sorted(set(kinds))
    rows = []
    for number, kind in enumerate(different, 1):
        name = params.optics_group if len(different) == 1 else f"{params.optics_group}_{number}"
        row: dict[str, object] = {"rlnOpticsGroupName": name, "rlnOpticsGroup": number}
        row |= {} if params.mtf is None else {"rlnMtfFileName": str(params.mtf)}
        row |= {ORIGINAL: kind.pixel} if movies else {ORIGINAL: kind.pixel, "rlnMicrographPixelSize": kind.pixel}
        row |= {"rlnVoltage": float(kind.voltage), "rlnSphericalAberration": params.cs, "rlnAmplitudeContrast": params.amplitude_contrast}
        if params.beam_tilt is not None:
            row |= {"rlnBeamTiltX": params.beam_tilt[0], "rlnBeamTiltY": params.beam_tilt[1]}
        if any(path.suffix.lower() in EER for path, k in zip(found.paths, kinds, strict=True) if k == kind):
            row |= {UPSAMPLING: 1}  # the pixel size is that of the camera's pixels, however they are drawn later
        rows.append(row)
    optics = pd.DataFrame(rows)
    if UPSAMPLING in optics:
        optics[UPSAMPLING] = optics[UPSAMPLING].fillna(1).astype(int)
    return optics, [different.index(kind) + 1 for kind in kinds]


def joined(path: Path, label: str, optics: pd.DataFrame, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of an earlier import with new rows; an optics group of the same name is the same group, and must have the same values.

    Where one side lacks a label, RELION's meaning of its absence is written; BadInput for a label that has none.
    """
    star = read_star(path, text=True)
    old_optics, old = star["optics"], first_table(star, label)
    assert isinstance(old_optics, pd.DataFrame) and old is not None
    if not len(table):
        return old_optics, old[1]
    known = dict(zip(old_optics["rlnOpticsGroupName"], old_optics["rlnOpticsGroup"].astype(int), strict=True))
    number, fresh = {}, []
    for record in optics.to_dict("records"):
        name = str(record["rlnOpticsGroupName"])
        if name in known:
            _check_same(path, name, old_optics[old_optics["rlnOpticsGroupName"] == name].iloc[0], record)
        else:
            known[name] = max(known.values(), default=0) + 1
            fresh.append({**record, "rlnOpticsGroup": known[name]})
        number[record["rlnOpticsGroup"]] = known[name]
    table = table.assign(rlnOpticsGroup=[number[g] for g in table["rlnOpticsGroup"]])
    both = _appended(path, old_optics, pd.DataFrame(fresh)) if fresh else old_optics
    return both, _appended(path, old[1], table)


def _check_same(path: Path, name: str, was: pd.Series, record: dict) -> None:
    """Raise BadInput where an optics group of an earlier import has other values than are asked for now."""
    for key, value in record.items():
        if key in ("rlnOpticsGroupName", "rlnOpticsGroup"):
            continue
        before = str(was[key]) if key in was else ABSENT.get(str(key), "none")
        try:
            same = abs(float(before) - float(value)) <= 1e-4 * abs(float(value))
        except ValueError:
            same = str(before) == str(value)
        if not same:
            shown = value if isinstance(value, str) else f"{value:g}"
            raise BadInput(f"{path}: optics group {name} has _{key} {before}, not {shown}; give another --optics-group")


def _appended(path: Path, old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Both tables, every value text."""
    for label in dict.fromkeys((*old.columns, *new.columns)):
        if label in old and label in new:
            continue
        if label not in ABSENT:
            which = f"has no _{label}, which the new rows have" if label in new else f"has _{label}, which the new rows do not have"
            way = "give --mtf for all files or for none" if label == "rlnMtfFileName" else "append to the result of an import alone"
            raise BadInput(f"{path}: {which}, and nothing can be written in its place; {way}")
    return pd.concat([old, new.astype(str)]).fillna(ABSENT).astype(str)
