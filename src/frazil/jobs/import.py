"""`frazil import`: raw data registered with its optics: movies, micrographs, particles, maps, coordinates; nothing is copied but maps."""
from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from frazil.data import BadInput
from frazil.io.gain import fit_gain, oriented, read_defects, read_gain
from frazil.io.images import find_stack
from frazil.io.micrographs import micrograph_header, read_micrographs
from frazil.io.movie_table import NAME, read_movies
from frazil.io.movies import EER, MRC, TIFF, open_movie
from frazil.io.mrc import read_header, write_mrc
from frazil.io.sessions import Acquisition, epu_beside, read_epu, read_mdoc
from frazil.io.star import first_table, read_star, write_star
from frazil.jobs.import_files import MISMATCH, SHOWN, import_coordinates, import_maps, import_particles
from frazil.jobs.run import Run
from frazil.maths.bad_pixels import ORIENTATIONS, gain_match
from frazil.maths.clusters import cluster_shifts

POSITIONAL = ("files",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
Kind = Literal["auto", "movies", "micrographs", "particles", "map", "coordinates"]
GROUP_NAME = re.compile(r"^[A-Za-z0-9_-]+$")
GAIN_MOVIES = 20
FEW = 20  # movies of a beam-shift group below which one is told


class Params(BaseModel):
    """Register movies, micrographs, particles, maps or coordinates with their optics. Every file's header is checked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    files: tuple[str, ...] = Field(description="files, globs in quotes, a STAR file, or SerialEM .mdoc files of movies", min_length=1)
    kind: Kind = Field("auto", description="what they are: movies, micrographs, particles, map, coordinates; auto: by their headers")
    pixel_size: float | None = Field(None, gt=0, description="pixel size of the files; from .mdoc or header if not "
        "given", json_schema_extra={"unit": "Å"})
    voltage: float | None = Field(None, gt=0, description="acceleration voltage; from .mdoc or EPU, else "
        "300", json_schema_extra={"unit": "kV"})
    cs: float = Field(2.7, ge=0, description="spherical aberration", json_schema_extra={"unit": "mm"})
    amplitude_contrast: float = Field(0.1, ge=0, le=1, description="fraction of amplitude contrast")
    optics_group: str = Field("opticsGroup1", description="name of the optics group: letters, digits, _ and -")
    mtf: Path | None = Field(None, description="STAR file of the detector's MTF")
    beam_tilt: tuple[float, float] | None = Field(None, description="beam tilt x and y", json_schema_extra={"unit": "mrad", **EXPERT})
    beam_shift_groups: bool = Field(False, description="an optics group for each cluster of beam shifts (.mdoc, or EPU's .xml beside "
        "the movies)")
    clusters: int = Field(0, ge=0, description="number of these clusters; 0: found", json_schema_extra=EXPERT)
    gain: Path | None = Field(None, description="gain reference: its orientation is found from the movies, gain.mrc written")
    defects: Path | None = Field(None, description="defects of the detector, to be checked")
    micrographs: Path | None = Field(None, description="micrographs that coordinates belong to (STAR)")
    append: Path | None = Field(None, description="movies.star or micrographs.star of an earlier import: keep its rows, add what is new")
    settle: float = Field(30.0, ge=0, description="leave out files changed within this time: they may still be growing",
                          json_schema_extra={"unit": "s", **EXPERT})  # fmt: skip
    link: bool = Field(False, description="reach files outside this folder by links in the run directory", json_schema_extra=EXPERT)
    skip_bad: bool = Field(False, description="leave faulty files out instead of stopping", json_schema_extra=EXPERT)
    eer_grouping: int = Field(32, ge=1, description="EER: camera frames a frame, for the gain's test", json_schema_extra=EXPERT)


@dataclass
class _Found:
    """What was gathered about the files."""

    names: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    pixels: list[float] = field(default_factory=list)
    notes: dict[Path, Acquisition] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)


def run(params: Params, run: Run) -> None:
    """Write movies.star, micrographs.star, particles.star, coordinates.star or a copy of a map into the run directory."""
    if not GROUP_NAME.match(params.optics_group):
        raise BadInput(f"--optics-group: {params.optics_group!r} holds other characters than letters, digits, _ and -")
    found = _Found()
    paths = list(gather(params.files, found))
    kind = params.kind if params.kind != "auto" else guess_kind(paths)
    if kind in ("movies", "micrographs"):
        _import_images(params, run, kind, paths, found)
    elif kind == "particles":
        import_particles(run, paths)
    elif kind == "map":
        import_maps(params.pixel_size, run, paths)
    else:
        import_coordinates(params.micrographs, params.skip_bad, run, paths)


def natural(path: Path) -> list[object]:
    """Key that sorts frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", str(path))]


def gather(patterns: tuple[str, ...], found: _Found) -> Iterator[Path]:
    """Files of names, globs and .mdoc files, naturally sorted, each once. Raises BadInput where a pattern finds nothing."""
    seen: set[Path] = set()
    for pattern in patterns:
        if any(sign in pattern for sign in "*?["):
            base = Path(pattern).anchor or "."
            listed = sorted(Path(base).glob(str(Path(pattern).relative_to(base)) if base != "." else pattern), key=natural)
        else:
            listed = [Path(pattern)] if Path(pattern).exists() else []
        if not listed:
            raise BadInput(f"{pattern}: no such file; give names or a glob in quotes, such as 'Movies/*.tiff'")
        for path in listed:
            for one in _from_mdoc(path, found) if path.suffix.lower() == ".mdoc" else [path]:
                if one not in seen:
                    seen.add(one)
                    yield one


def _from_mdoc(path: Path, found: _Found) -> list[Path]:
    """Movies that an .mdoc names, beside it; what it says of them goes to found.notes, an unreadable one to the problems."""
    try:
        listed = read_mdoc(path)
    except BadInput as error:
        found.problems.append(str(error))
        return []
    out = []
    for one in listed:
        movie = path.parent / one.movie
        found.notes[movie] = one
        out.append(movie)
    return out


def guess_kind(paths: list[Path]) -> Kind:
    """What the first file is. Raises BadInput where that cannot be told."""
    if not paths:
        return "movies"  # nothing but problems, which are reported there
    first = paths[0]
    ending = first.suffix.lower()
    if ending in EER:
        return "movies"
    if ending == ".star":
        star = read_star(first, text=True)
        kinds: dict[str, Kind] = {NAME: "movies", "rlnImageName": "particles", "rlnMicrographName": "micrographs"}
        kinds["rlnCoordinateX"] = "coordinates"
        for label, kind in kinds.items():
            if first_table(star, label) is not None:
                return kind
    if ending in (".box", ".cbox", ".txt", ".coords", ".csv"):
        return "coordinates"
    for path in paths:
        if path.suffix.lower() not in (*TIFF, *MRC, ".map"):
            continue
        try:
            n, height, width = read_header(path).shape if path.suffix.lower() == ".map" else open_movie(path).shape
        except BadInput:
            continue  # named when its header is read
        return "map" if n == height == width else "movies" if n > 1 else "micrographs"
    if ending in (*TIFF, *MRC):
        return "movies"
    raise BadInput(f"{first}: cannot be told what it is; give --kind movies, micrographs, particles, map or coordinates")


# ---- movies and micrographs


def _import_images(params: Params, run: Run, kind: str, paths: list[Path], found: _Found) -> None:
    listed = _expand_star(kind, paths)
    before = _earlier(params, kind)
    for number, path in enumerate(listed):
        run.progress(number, len(listed), "headers")
        run.check_stop()
        try:
            name = project_name(path, run, params.link)
            if name in before:
                if before[name] != params.optics_group and not params.beam_shift_groups:
                    raise BadInput(f"{name}: is in {params.append} already, as {before[name]}; it cannot be in {params.optics_group} too")
                continue
            if time.time() - path.stat().st_mtime < params.settle if path.exists() else False:
                found.deferred.append(name)
                continue
            shape, pixel = _header(path, kind)
        except BadInput as error:
            found.problems.append(str(error))
            continue
        found.names.append(name)
        found.paths.append(path)
        found.shapes.append(shape)
        found.pixels.append(pixel)
    outside = [name for name in found.names if Path(name).is_absolute()]
    if outside and not params.link:
        run.warn(
            f"{len(outside)} of {len(found.names)} files lie outside this folder ({outside[0]}, …) and are named by their whole paths: "
            f"a project moved to another machine loses them; --link makes links in {run.path}"
        )
    _compare_shapes(found)
    optics, group = _optics(params, run, kind, found)
    group = group[_report_problems(params, run, found, bool(before))]
    if params.gain is not None:
        _gain(params, run, found)
    _write_images(params, run, kind, found, optics, group)


def _expand_star(kind: str, paths: list[Path]) -> list[Path]:
    """Images named by STAR files in place of these."""
    out: list[Path] = []
    for path in paths:
        if path.suffix.lower() != ".star":
            out.append(path)
        elif kind == "movies":
            table = read_movies(path)
            out += [find_stack(name, path) or Path(name) for name in table.names]
        else:
            table = read_micrographs(path)
            out += [find_stack(name, path) or Path(name) for name in table.names]
    return out


def _earlier(params: Params, kind: str) -> dict[str, str]:
    """Name → optics group name of the rows of --append."""
    if params.append is None:
        return {}
    star = read_star(params.append, text=True)
    label = NAME if kind == "movies" else "rlnMicrographName"
    found, optics = first_table(star, label), star.get("optics")
    if found is None or not isinstance(optics, pd.DataFrame):
        raise BadInput(f"{params.append}: has no data_optics and table with _{label}; --append takes the result of an earlier import")
    names = dict(zip(optics["rlnOpticsGroup"], optics["rlnOpticsGroupName"], strict=True))
    return dict(zip(found[1][label], (names.get(g, "") for g in found[1]["rlnOpticsGroup"]), strict=True))


def project_name(path: Path, run: Run, link: bool) -> str:
    """How a file is named in STAR files: relative to this folder; outside of it by its whole path, or by a link in the run directory."""
    full, here = path.absolute(), Path.cwd()
    if full.is_relative_to(here) and ".." not in full.relative_to(here).parts:
        return str(full.relative_to(here))
    if not link:
        return str(full)
    folder = run.path / "links"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / path.name
    if place.is_symlink() and place.resolve() != full.resolve():
        raise BadInput(f"{path}: another file of that name is linked already; import the folders one by one")
    if not place.is_symlink():
        place.symlink_to(full)
    return str(place.absolute().relative_to(here)) if place.absolute().is_relative_to(here) else str(place.absolute())


def _header(path: Path, kind: str) -> tuple[tuple[int, ...], float]:
    """(frames, rows, columns) or (rows, columns), pixel size or 0. Raises BadInput naming the file."""
    if kind == "micrographs":
        shape, pixel = micrograph_header(path)
        return shape, pixel
    movie = open_movie(path, grouping=1)
    if movie.shape[0] < 2:
        raise BadInput(f"{path}: holds one image; expected a movie (--kind micrographs imports single images)")
    return movie.shape, movie.pixel_size


def _compare_shapes(found: _Found) -> None:
    """Images whose size is not that of most are a problem; numbers of frames may differ."""
    sizes = [shape[-2:] for shape in found.shapes]
    if len(set(sizes)) > 1:
        common = max(set(sizes), key=sizes.count)
        for name, size in zip(found.names, sizes, strict=True):
            if size != common:
                found.problems.append(f"{name}: {size[1]} x {size[0]} px, most are {common[1]} x {common[0]}; import it apart, as "
                    f"another group")


def _report_problems(params: Params, run: Run, found: _Found, appending: bool) -> list[int]:
    """Raise BadInput with all problems, or leave the faulty files out with --skip-bad; returns the places of those that stay."""
    for problem in found.problems:
        run.warn(problem)
    if found.deferred:
        run.note(f"{len(found.deferred)} files changed in the last {params.settle:g} s are left for later, first {found.deferred[0]}")
    if any(p.startswith("--") for p in found.problems) or (found.problems and not params.skip_bad):
        more = f"; and {len(found.problems) - SHOWN} more in log.txt" if len(found.problems) > SHOWN else ""
        raise BadInput(f"{len(found.problems)} problems (--skip-bad leaves these files out): {'; '.join(found.problems[:SHOWN])}{more}")
    faulty = {name for name in found.names if any(p.startswith(f"{name}:") for p in found.problems)}
    keep = [i for i, name in enumerate(found.names) if name not in faulty]
    for listing in (found.names, found.paths, found.shapes, found.pixels):
        listing[:] = [listing[i] for i in keep]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if not found.names and not appending:
        later = f" ({len(found.deferred)} are too new: --settle 0 takes them)" if found.deferred else ""
        raise BadInput(f"nothing left to import{later}")
    return keep


def _optics(params: Params, run: Run, kind: str, found: _Found) -> tuple[dict[str, object], np.ndarray]:
    """Values of the optics row and the beam-shift cluster of each file."""
    notes = [_note(path, found) for path in found.paths]
    known = [n for n in notes if n is not None]
    told = sorted({round(n.pixel_size, 5) for n in known if n.pixel_size > 0 and n.source.suffix.lower() == ".mdoc"})
    headers = [p for p in found.pixels if p > 0 and abs(p - 1) > 1e-6]  # 1 Å is what writers put who do not know
    pixel = params.pixel_size or (told[0] if told else float(np.median(headers)) if headers else 0.0)
    if pixel <= 0 and found.names:
        found.problems.append("--pixel-size: neither header nor .mdoc gives one; give it in Å")
        pixel = 1.0
    known_pixels = [(name, p) for name, p in zip(found.names, found.pixels, strict=True) if p > 0 and abs(p - 1) > 1e-6]
    wrong = [name for name, p in known_pixels if abs(p / pixel - 1) > MISMATCH]
    if wrong:
        run.warn(f"{wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}: header pixel size differs from {pixel:g} Å by "
            f"over 5 %")
    if told and abs(told[0] / pixel - 1) > MISMATCH:
        run.warn(f"{known[0].source}: says pixels of {told[0]:g} Å, not {pixel:g}")
    voltages = sorted({round(n.voltage) for n in known if n.voltage > 0})
    voltage = params.voltage or (float(voltages[0]) if voltages else 300.0)
    if voltages and round(voltage) not in voltages:
        run.warn(f"{known[0].source}: says {voltages[0]} kV, not {voltage:g}")
    cluster = np.zeros(len(found.names), np.int64)
    if params.beam_shift_groups and found.names:
        shifts = [n.image_shift if n is not None else None for n in notes]
        missing = [name for name, s in zip(found.names, shifts, strict=True) if s is None]
        if missing:
            raise BadInput(f"--beam-shift-groups: {len(missing)} files have no .mdoc or EPU .xml with a shift, first {missing[0]}")
        cluster = cluster_shifts(np.array(shifts, dtype=float), params.clusters)
        counts = np.bincount(cluster)
        run.note(f"{len(counts)} groups of beam shifts with {counts.min()} to {counts.max()} files")
        if counts.min() < FEW:
            run.warn(f"the smallest beam-shift group has {counts.min()} files, fewer than {FEW}: too few to refine its aberrations")
    label = "rlnMicrographOriginalPixelSize"
    row: dict[str, object] = {} if params.mtf is None else {"rlnMtfFileName": str(params.mtf)}
    row |= {label: pixel} if kind == "movies" else {label: pixel, "rlnMicrographPixelSize": pixel}
    row |= {"rlnVoltage": float(voltage), "rlnSphericalAberration": params.cs, "rlnAmplitudeContrast": params.amplitude_contrast}
    if params.beam_tilt is not None:
        row |= {"rlnBeamTiltX": params.beam_tilt[0], "rlnBeamTiltY": params.beam_tilt[1]}
    doses = [n.dose for n in known if n.dose > 0]
    if doses:
        run.note(f"recorded dose {np.median(doses):.1f} e/Å² an exposure")
    return row, cluster


def _note(path: Path, found: _Found) -> Acquisition | None:
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


def _write_images(params: Params, run: Run, kind: str, found: _Found, row: dict[str, object], cluster: np.ndarray) -> None:
    """movies.star or micrographs.star."""
    label = NAME if kind == "movies" else "rlnMicrographName"
    count = int(cluster.max()) + 1 if len(cluster) else 1
    names = [params.optics_group] if count == 1 else [f"{params.optics_group}_{k + 1}" for k in range(count)]
    optics = pd.DataFrame([{"rlnOpticsGroupName": name, "rlnOpticsGroup": k + 1, **row} for k, name in enumerate(names)])
    table = pd.DataFrame({label: np.array(found.names, dtype=object), "rlnOpticsGroup": cluster + 1})
    added = len(table)
    if params.append is not None:
        optics, table = _joined(params.append, label, optics, table)
    output = run.path / f"{kind}.star"
    write_star(output, {"optics": optics, kind: table})
    frames = f", {min(s[0] for s in found.shapes)} to {max(s[0] for s in found.shapes)} frames" if kind == "movies" and found.shapes else ""
    size = f" of {found.shapes[0][-1]} x {found.shapes[0][-2]} px" if found.shapes else ""
    run.event("imported", what=kind, files=added, problems=len(found.problems), deferred=len(found.deferred))
    run.summary(f"{added} {kind}{size}{frames}, {len(optics)} optics group{'s' * (len(optics) > 1)}: {output}")


def _joined(path: Path, label: str, optics: pd.DataFrame, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of an earlier import with new rows; an optics group of the same name is the same group, and must have the same values."""
    star = read_star(path, text=True)
    old_optics, old = star["optics"], first_table(star, label)
    assert isinstance(old_optics, pd.DataFrame) and old is not None
    known = dict(zip(old_optics["rlnOpticsGroupName"], old_optics["rlnOpticsGroup"].astype(int), strict=True))
    number, fresh = {}, []
    for record in optics.to_dict("records"):
        name = record["rlnOpticsGroupName"]
        if name in known:
            was = old_optics[old_optics["rlnOpticsGroupName"] == name].iloc[0]
            for key in ("rlnMicrographOriginalPixelSize", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"):
                if abs(float(was[key]) - float(record[key])) > 1e-4 * abs(float(record[key])) and len(table):
                    raise BadInput(f"{path}: optics group {name} has _{key} {was[key]}, not {record[key]:g}; give another --optics-group")
        else:
            known[name] = max(known.values(), default=0) + 1
            fresh.append({**record, "rlnOpticsGroup": known[name]})
        number[record["rlnOpticsGroup"]] = known[name]
    table = table.assign(rlnOpticsGroup=[number[g] for g in table["rlnOpticsGroup"]])
    both = pd.concat([old_optics, pd.DataFrame(fresh)]) if fresh else old_optics
    return both.fillna("0").astype(str), pd.concat([old[1], table]).fillna("0").astype(str)


# ---- gain


def _gain(params: Params, run: Run, found: _Found) -> None:
    """gain.mrc: multiplicative, in the orientation that fits the movies."""
    assert params.gain is not None
    eer = found.paths[0].suffix.lower() in EER
    plain = read_gain(params.gain, eer)
    total: torch.Tensor | None = None
    for path in found.paths[:GAIN_MOVIES]:
        movie = open_movie(path, threads=run.threads, grouping=params.eer_grouping)
        mean = sum((movie.load(f, f + 1)[0].float() for f in range(movie.shape[0])), torch.zeros(movie.shape[1:]))
        total = mean if total is None or total.shape != mean.shape else total + mean
    assert total is not None
    shape = (total.shape[0], total.shape[1])
    if params.defects is not None:
        read_defects(params.defects, shape, found.paths[0].suffix.lower() in TIFF)
    scores = {}
    for turn, flip in ORIENTATIONS:
        try:
            scores[turn, flip] = gain_match(total, fit_gain(oriented(plain, turn, flip), shape, params.gain, eer))
        except BadInput:
            continue
    if not scores:
        fit_gain(plain, shape, params.gain, eer)  # says what does not fit
    (turn, flip), best = max(scores.items(), key=lambda item: item[1])
    second = max((v for k, v in scores.items() if k != (turn, flip)), default=0.0)
    if best < second + 5 or best < 5:
        turn, flip = 0, 0
        run.warn(f"{params.gain}: resembles the movies in no orientation (best {best:.1f} standard deviations); gain.mrc is as it was "
            f"given")
    write_mrc(run.path / "gain.mrc", oriented(plain, turn, flip), 1.0)
    run.event("gain", rotation=turn, flip=flip, scores={f"{t} {f}": v for (t, f), v in scores.items()})
    run.summary(f"gain fits with rotation {turn}, flip {flip} ({best:.0f} standard deviations; next best {second:.0f}): "
        f"{run.path / 'gain.mrc'}")
