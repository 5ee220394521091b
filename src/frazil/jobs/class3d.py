"""frazil class3d: particles and one or several rough references in, K maps out. Files around steps/class3d.py."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import field_validator
from torch import Tensor

from frazil.data import BadInput, Particles, Volume
from frazil.io.particles import ParticleSet
from frazil.io.star import read_star
from frazil.jobs.class_report import class_report
from frazil.jobs.classify_files import Output, part_of, resolution_text, resolutions, seeded_anew, unpack_state
from frazil.jobs.classify_run import begin, check_poses, continued, device_errors, placed, run_iterations
from frazil.jobs.inputs import check_same_grid, check_symmetry, read_cube, read_mask_for
from frazil.jobs.particles_input import (
    check_diameter,
    load_reference,
    open_checked,
    option,
    read_table,
)
from frazil.jobs.refine_files import beside
from frazil.jobs.run import Run
from frazil.refine.parallel import world_of_environment
from frazil.steps.class3d import FORM, Class3dParams
from frazil.steps.classify import ClassifyJob, ClassifyState, initial_state

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True


class Params(Class3dParams):
    """Several maps from particles and one or several rough references."""

    particles: Path | None = option(None, "particle STAR file (RELION 3.0 to 5); with --continue those of its data.star", "basic")
    reference: Path | None = option(
        None, "rough map for all classes, or a STAR file with a column _rlnReferenceImage: one map a class", "basic"
    )
    mask: Path | None = option(None, "solvent mask, values 0 to 1", "basic")
    mask2: Path | None = option(None, "second mask: its region is set to its own mean")
    mask_lowpass: Path | None = option(None, "third mask: its region is kept, low-passed to --mask-lowpass-resolution")
    continue_: Path | None = option(None, "go on from this run_itNNN_optimiser.star, with its settings but those given here", "basic")
    write_every: int = option(1, "write run_itNNN files every so many iterations; 0: of the last only", ge=0, may_change=True)
    iterations: int = option(25, Class3dParams.model_fields["iterations"].description or "", "basic", ge=1, may_change=True)

    _diameter = field_validator("diameter")(check_diameter)


def run(params: Params, run: Run) -> None:
    """Classify, writing RELION's files, a checkpoint to resume from, and a report at the end."""
    world = world_of_environment()
    state, params, table = first_look(run, params)
    paths, params = reference_files(params)
    run.settle(params)
    images = open_checked(table, run.threads)
    references = load_references(paths, table.particles, params.initial_lowpass)
    like = Volume(state.model.maps[0], state.model.pixel_size) if state is not None else references[0]
    masks = load_masks(params, like, paths[0] if paths else params.continue_ or Path())
    job, used, saved, budget = begin(run, params, table, images, FORM, masks, world)
    with device_errors(run):
        state = first_state(run, job, table.particles[used], used, (saved, state, references))
    names = tuple(str(path or "None") for path in (params.mask, params.mask2))
    out = Output(run.path, table[used], params, run.seed, (names[0], names[1]))
    state = run_iterations(run, job, state, out, params.write_every, budget)
    if world.rank == 0:
        class_report(run.path)
        summarise(run, state)


def first_look(run: Run, params: Params) -> tuple[ClassifyState | None, Params, ParticleSet]:
    """(state to continue, parameters completed from it, particles): what can be told without images and maps to begin with."""
    state = None
    if params.continue_ is None:
        if params.particles is None or params.reference is None:
            missing = "PARTICLES" if params.particles is None else "--reference"
            raise BadInput(f"{missing} is missing; give both, or --continue with the optimiser.star of an iteration")
        table = read_table(params.particles)
    else:
        state, table, params, _ = continued(run, params, 3)
    check_symmetry(params.symmetry)
    check_poses(params, table, params.sigma_ang is not None)
    return state, params, table


def reference_files(params: Params) -> tuple[list[Path], Params]:
    """The maps to start from, and the parameters with as many classes as a STAR file lists."""
    path = params.reference
    if path is None or path.suffix != ".star":
        return [path] if path else [], params
    tables = [block for block in read_star(path).values() if "rlnReferenceImage" in block]
    if not tables:
        raise BadInput(f"{path}: has no column _rlnReferenceImage; list one map a class there")
    names = [str(name) for name in pd.Series(tables[0]["rlnReferenceImage"])]
    if not names:
        raise BadInput(f"{path}: lists no map, its column _rlnReferenceImage has no rows; list one map a class there")
    if "classes" in params.model_fields_set and params.classes != len(names):
        raise BadInput(f"{path}: lists {len(names)} references, --classes is {params.classes}; leave --classes out")
    return [beside(path, Path.cwd(), name) for name in names], params.model_copy(update={"classes": len(names)})


def load_references(paths: list[Path], particles: Particles, initial_lowpass: float) -> list[Volume]:
    """Maps that fit each other and the particles."""
    if len(paths) > 1:
        first = read_cube(paths[0])
        for path in paths[1:]:
            check_same_grid(first, paths[0], read_cube(path), path)
    return [load_reference(path, particles, initial_lowpass) for path in paths]


def load_masks(params: Params, like: Volume, name: Path) -> list[Tensor | None]:
    """The three masks, on the grid of the references."""
    return [None if path is None else read_mask_for(path, like, name) for path in (params.mask, params.mask2, params.mask_lowpass)]


def first_state(
    run: Run, job: ClassifyJob, particles: Particles, used: Tensor, before: tuple[dict[str, Any] | None, ClassifyState | None, list[Volume]]
) -> ClassifyState:
    """Where to begin: the checkpoint of a stopped run, the files of --continue, or the references."""
    saved, continued_from, references = before
    if saved is not None:
        state = unpack_state(saved, particles)
        run.note(f"resuming after iteration {state.progress.iteration}")
        return placed(state, job.engine)
    k = job.params.classes
    if continued_from is not None:
        state = part_of(continued_from, used)
        run.note(f"{len(particles)} particles, {k} classes, going on after iteration {state.progress.iteration}")
        return seeded_anew(placed(state, job.engine), job.params, run.seed)
    maps = torch.stack([v.data for v in references])
    size = f"box {references[0].data.shape[-1]} px of {references[0].pixel_size:g} Å"
    run.note(f"{len(particles)} particles in {len(particles.micrographs)} micrographs, {k} classes, {size}")
    return initial_state(job, particles, maps, references[0].pixel_size)


def summarise(run: Run, state: ClassifyState) -> None:
    """The lines a person wants."""
    share, each = state.model.pdf_class, resolutions(state)
    root = run.file(f"run_it{state.progress.iteration:03d}")
    for k in torch.argsort(share, descending=True).tolist()[:12]:
        count, part = int((state.poses.klass == k).sum()), 100 * float(share[k])
        run.summary(f"class {k + 1}: {count} particles ({part:.1f} %), {resolution_text(float(each[k]))}, {root}_class{k + 1:03d}.mrc")
    run.summary(f"{state.progress.iteration} iterations, {len(state.particles)} particles, report {run.file('report.html')}")
