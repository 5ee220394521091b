"""`frazil reconstruct`: a map from the poses in a particle STAR file. Files around steps/reconstruct.py."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from frazil.data import BadInput, Particles
from frazil.io.images import find_bad
from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import open_images, read_particles
from frazil.jobs.inputs import check_symmetry
from frazil.jobs.run import Run
from frazil.maths.fsc import fsc, resolution_at
from frazil.steps.reconstruct import ReconstructParams, add_batch_, batches, empty_sums, finish, make_target

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True
NAMES = {0: "reconstruction.mrc", 1: "reconstruction_half1.mrc", 2: "reconstruction_half2.mrc"}
WANTED = {"all": (0,), "1": (1,), "2": (2,), "halves": (1, 2)}


class Params(ReconstructParams):
    """Reconstruct a map from particles with known poses, CTF-corrected and without a prior."""

    particles: Path = Field(description="particle STAR file with angles and offsets")
    half: Literal["all", "1", "2", "halves"] = Field("all", description="which particles: all, one random half, or both halves, a map each")
    box: int = Field(0, ge=0, multiple_of=2, description="side of the map; 0: that of optics group 1",
                     json_schema_extra={"unit": "px", "level": "expert"})  # fmt: skip
    pixel_size: float = Field(0.0, ge=0, description="pixel size of the map; 0: that of optics group 1",
                              json_schema_extra={"unit": "Å", "level": "expert"})  # fmt: skip


def run(params: Params, run: Run) -> None:
    """Write a map for each half asked for; with both halves say how far they agree. A map that is there already is not made again."""
    check_symmetry(params.symmetry)
    table = read_particles(params.particles)
    check(params, table.particles, table.has_ctf)
    images = open_images(table, memory_budget=0, threads=run.threads)
    images.check()
    bad = torch.cat(find_bad(images, torch.arange(len(table)), table.particles.group))
    if len(bad):
        run.warn(f"{len(bad)} of {len(table)} particles are constant or hold NaN and are left out; the first is row {int(bad.min()) + 1}")
    first = table.particles.optics[0]
    target = make_target(params.box or first.box, params.pixel_size or first.pixel_size, params, str(run.device))
    maps = {}
    for half in WANTED[params.half]:
        path = run.file(NAMES[half])
        maps[half] = path
        if path.exists():
            run.note(f"{path} is there already")
            continue
        chosen = select(table.particles, half, bad, params.particles)
        sums = empty_sums(target)
        done = 0
        for index in batches(table.particles, chosen):
            add_batch_(sums, images, table.particles, index, target)
            done += len(index)
            run.progress(done, len(chosen), f"half {half}" if half else "particles")
            run.check_stop()
        maps[half] = write_map(run, path, finish(sums, target), target.pixel_size, len(chosen))
    report(run, maps, target.pixel_size)


def check(params: Params, particles: Particles, has_ctf: bool) -> None:
    """Raise BadInput for what cannot be reconstructed."""
    if params.ctf and not has_ctf:
        raise BadInput(f"{params.particles}: label _rlnDefocusU is missing, so there is no CTF; add it or give --no-ctf")
    for number, optics in enumerate(particles.optics, 1):
        if optics.box % 2:
            raise BadInput(f"{params.particles}: optics group {number} has an odd box of {optics.box} px; extract with an even box")
    if len(particles) > 1 and float((particles.rotation - particles.rotation[:1]).abs().amax()) < 1e-6:
        raise BadInput(f"{params.particles}: all particles have the same orientation; give refined ones (_rlnAngleRot, Tilt, Psi)")


def select(particles: Particles, half: int, bad: Tensor, path: Path) -> Tensor:
    """Indices of the good particles of a half set (0: all); raises BadInput where there are none."""
    keep = torch.ones(len(particles), dtype=torch.bool) if half == 0 else particles.half == half
    keep = keep.clone()
    keep[bad] = False
    if not bool(keep.any()):
        what = f"with _rlnRandomSubset {half}; give --half all" if half else "in it; look at the images"
        raise BadInput(f"{path}: no usable particle {what}")
    return torch.nonzero(keep)[:, 0]


def write_map(run: Run, path: Path, data: Tensor, pixel_size: float, particles: int) -> Path:
    """Write a map of the run and note it."""
    write_mrc(path, data, pixel_size)
    run.event("map", file=path.name, particles=particles)
    run.summary(f"{path}: {data.shape[-1]} px of {pixel_size:.5g} Å from {particles} particles")
    return path


def report(run: Run, maps: dict[int, Path], pixel_size: float) -> None:
    """Say how far two halves agree."""
    if set(maps) != {1, 2}:
        return
    a, b = (read_map(maps[half]).data for half in (1, 2))
    curve = fsc(a, b)
    resolution = resolution_at(curve, 0.143, a.shape[-1], pixel_size)
    run.event("fsc", fsc=curve, resolution=resolution)
    run.summary(f"halves agree to {resolution:.2f} Å (FSC 0.143, unmasked)")
