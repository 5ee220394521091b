"""`frazil import`: raw data registered with its optics: movies, micrographs, particles, maps, coordinates; nothing is copied but maps."""
from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from frazil.data import BadInput
from frazil.io.images import find_stack
from frazil.io.micrographs import micrograph_header, read_micrographs
from frazil.io.movie_table import NAME, read_movies
from frazil.io.movies import EER, MRC, TIFF, open_movie
from frazil.io.mrc import read_header
from frazil.io.sessions import read_mdoc
from frazil.io.star import first_table, read_star, write_star
from frazil.jobs.import_files import SHOWN, import_coordinates, import_maps, import_particles
from frazil.jobs.import_gain import check_defects, import_gain
from frazil.jobs.import_optics import Found, Kind, joined, kinds_of, optics_table
from frazil.jobs.import_params import FileKind, Params
from frazil.jobs.run import Run

POSITIONAL = ("files",)
HAS_RUN_DIRECTORY = True
GROUP_NAME = re.compile(r"^[A-Za-z0-9_-]+$")


def run(params: Params, run: Run) -> None:
    """Write movies.star, micrographs.star, particles.star, coordinates.star or a copy of a map into the run directory."""
    if not GROUP_NAME.match(params.optics_group):
        raise BadInput(f"--optics-group: {params.optics_group!r} holds other characters than letters, digits, _ and -")
    found = Found()
    paths = list(gather(params.files, found))
    kind = params.kind if params.kind != "auto" else guess_kind(paths)
    for option, value in (("--gain", params.gain), ("--defects", params.defects)):
        if value is not None and kind != "movies":
            raise BadInput(f"{option}: goes with movies, and {params.files[0]} … are {kind}")
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


def gather(patterns: tuple[str, ...], found: Found) -> Iterator[Path]:
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


def _from_mdoc(path: Path, found: Found) -> list[Path]:
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


def guess_kind(paths: list[Path]) -> FileKind:
    """What the first file is. Raises BadInput where that cannot be told."""
    if not paths:
        return "movies"  # nothing but problems, which are reported there
    first = paths[0]
    ending = first.suffix.lower()
    if ending in EER:
        return "movies"
    if ending == ".star":
        star = read_star(first, text=True)
        kinds: dict[str, FileKind] = {NAME: "movies", "rlnImageName": "particles", "rlnMicrographName": "micrographs"}
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


def _import_images(params: Params, run: Run, kind: str, paths: list[Path], found: Found) -> None:
    listed = _expand_star(kind, paths)
    before = _earlier(params, kind)
    for number, path in enumerate(listed):
        run.progress(number, len(listed), "headers")
        run.check_stop()
        try:
            name = project_name(path, run, params.link)
            if name in before:
                if not (params.beam_shift_groups or re.fullmatch(re.escape(params.optics_group) + r"(_\d+)?", before[name])):
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
    kinds = kinds_of(params, run, found)
    kinds = [kinds[i] for i in _report_problems(params, run, found, bool(before))]
    check_defects(params, found)
    if params.gain is not None and found.paths:
        bad = set(import_gain(params, run, found))
        keep = [i for i in range(len(kinds)) if i not in bad]
        kinds = [kinds[i] for i in keep]
        found.keep(keep)
    _write_images(params, run, kind, found, kinds)


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


def _compare_shapes(found: Found) -> None:
    """Images whose size is not that of most are a problem; numbers of frames may differ."""
    sizes = [shape[-2:] for shape in found.shapes]
    if len(set(sizes)) > 1:
        common = max(set(sizes), key=sizes.count)
        for name, size in zip(found.names, sizes, strict=True):
            if size != common:
                found.problems.append(f"{name}: {size[1]} x {size[0]} px, most are {common[1]} x {common[0]}; import it apart, as "
                    f"another group")


def _report_problems(params: Params, run: Run, found: Found, appending: bool) -> list[int]:
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
    found.keep(keep)
    if not found.names and not appending:
        later = f" ({len(found.deferred)} are too new: --settle 0 takes them)" if found.deferred else ""
        raise BadInput(f"nothing left to import{later}")
    return keep


def _write_images(params: Params, run: Run, kind: str, found: Found, kinds: list[Kind]) -> None:
    """movies.star or micrographs.star."""
    label = NAME if kind == "movies" else "rlnMicrographName"
    optics, group = optics_table(params, kind == "movies", found, kinds)
    table = pd.DataFrame({label: np.array(found.names, dtype=object), "rlnOpticsGroup": np.array(group, dtype=np.int64)})
    added = len(table)
    if params.append is not None:
        clash = set(optics["rlnOpticsGroupName"] if len(optics) else ()) & set(_earlier(params, kind).values())
        if clash and params.beam_shift_groups:
            raise BadInput(f"{params.append}: has {sorted(clash)[0]}, which need not be the beam shift that is found now under this name; "
                           "give another --optics-group")  # fmt: skip
        optics, table = joined(params.append, label, optics, table)
    output = run.path / f"{kind}.star"
    write_star(output, {"optics": optics, kind: table})
    frames = f", {min(s[0] for s in found.shapes)} to {max(s[0] for s in found.shapes)} frames" if kind == "movies" and found.shapes else ""
    size = f" of {found.shapes[0][-1]} x {found.shapes[0][-2]} px" if found.shapes else ""
    run.event("imported", what=kind, files=added, problems=len(found.problems), deferred=len(found.deferred))
    run.summary(f"{added} {kind}{size}{frames}, {len(optics)} optics group{'s' * (len(optics) > 1)}: {output}")
