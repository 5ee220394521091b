"""Importing what is no image of the camera: particles, maps, positions."""
from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from frazil.data import BadInput
from frazil.io.coordinates import read_coordinates, root, write_coordinates
from frazil.io.files import atomic_path
from frazil.io.images import find_stack, split_image_name
from frazil.io.micrographs import read_micrographs
from frazil.io.mrc import read_header
from frazil.io.particles import read_particles, write_particles
from frazil.io.star import write_star
from frazil.jobs.run import Run

MISMATCH = 0.05  # of pixel sizes in header and option from which one is told
SHOWN = 20  # problems named on one line


def import_particles(run: Run, paths: list[Path]) -> None:
    """particles.star: a checked STAR file of particles, converted to RELION 3.1 where it is older."""
    if len(paths) != 1:
        raise BadInput(f"particles come from one STAR file, got {len(paths)} files; join them first")
    table = read_particles(paths[0])
    stacks = sorted({split_image_name(name)[1] for name in table.image_names})
    lost = [stack for stack in stacks if find_stack(stack, paths[0]) is None]
    if lost:
        raise BadInput(f"{paths[0]}: {len(lost)} of {len(stacks)} stacks are not found, first {lost[0]}; run in the project folder")
    for stack in stacks:
        found = find_stack(stack, paths[0])
        assert found is not None
        read_header(found)
    write_particles(run.path / "particles.star", table)
    run.summary(f"{len(table)} particles in {len(stacks)} stacks, {len(table.particles.optics)} optics groups: "
        f"{run.path / 'particles.star'}")


def import_maps(pixel_size: float | None, run: Run, paths: list[Path]) -> None:
    """Copies of maps and masks, headers checked."""
    problems = []
    for path in paths:
        try:
            header = read_header(path)
            if header.shape[0] < 2:
                problems.append(f"{path}: is a single image; expected a map")
            elif pixel_size and header.pixel_size[0] > 0 and abs(header.pixel_size[0] / pixel_size - 1) > MISMATCH:
                run.warn(f"{path}: header pixel size {header.pixel_size[0]:g} Å, not {pixel_size:g}; `frazil map convert` mends it")
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput("; ".join(problems))
    for path in paths:
        with atomic_path(run.path / path.name) as temporary:
            shutil.copyfile(path, temporary)
    run.summary(f"{len(paths)} maps: {', '.join(str(run.path / path.name) for path in paths[:5])}")


def import_coordinates(micrographs: Path | None, skip_bad: bool, run: Run, paths: list[Path]) -> None:
    """coordinates.star: which file of positions belongs to which micrograph."""
    known = {} if micrographs is None else {root(name): name for name in read_micrographs(micrographs).names}
    rows, problems, total = [], [], 0
    for path in paths:
        try:
            tables = read_coordinates(path)
        except BadInput as error:
            problems.append(str(error))
            continue
        for named, table in tables.items():
            key = root(named or path.name)
            if known and key not in known:
                problems.append(f"{path}: no micrograph of {micrographs} is called {key}")
                continue
            output = run.path / f"{key}_coords.star"
            write_coordinates(output, table)
            inside = output.absolute().is_relative_to(Path.cwd())
            rows.append((known.get(key, named or key), str(output.absolute().relative_to(Path.cwd()) if inside else output.absolute())))
            total += len(table)
    if problems and not (skip_bad and rows):
        raise BadInput(f"{len(problems)} problems (--skip-bad leaves these files out): {'; '.join(problems[:SHOWN])}")
    for problem in problems:
        run.warn(problem)
    table = pd.DataFrame(rows, columns=["rlnMicrographName", "rlnMicrographCoordinates"])
    write_star(run.path / "coordinates.star", {"coordinate_files": table})
    run.summary(f"{total} positions of {len(rows)} micrographs: {run.path / 'coordinates.star'}")
