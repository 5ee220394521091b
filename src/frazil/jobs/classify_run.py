"""What the jobs class2d and class3d do alike: run the iterations, record and write them, go on after a stop or from files."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frazil.data import BadInput, Particles
from frazil.io.images import StackImages
from frazil.io.particles import ANGLES, ParticleSet, match_by_image_name
from frazil.jobs.classify_files import Output, host_copy, pack_state, read_classification, resolutions, write_iteration
from frazil.jobs.classify_settings import VERSION, kept_settings
from frazil.jobs.entries import Entries
from frazil.jobs.particles_input import (
    check_search,
    memory_budget,
    peak_memory,
    read_table,
    tick,
    usable_particles,
    warn_of_oddities,
)
from frazil.jobs.run import Run
from frazil.jobs.writer import Writer
from frazil.refine.parallel import World, world_of_environment
from frazil.refine.planner import keep_on_device
from frazil.refine.residence import Resident, resident, share
from frazil.refine.windows import Engine
from frazil.steps.classify import UNKNOWN, ClassifyJob, ClassifyParams, ClassifyState, Form, classify, make_engine

REST = 10.0  # times as long as the last checkpoint took to write that lie before the next: a tenth of the time at most goes to them
# How the libraries under torch say that a device failed (Triton, cuFFT, cuBLAS, the driver), and that its memory is used up.
FAILED = re.compile(r"Triton Error \[CUDA\]|cuFFT error|CUBLAS_STATUS|CUDA error|CUSOLVER_STATUS|cusolver error")
MEMORY = re.compile(r"out of memory|out_of_memory|ALLOC_FAILED|OUT_OF_RESOURCES", re.IGNORECASE)


class DeviceLost(RuntimeError):
    """The GPU stopped working in the middle of a run; what was written stands."""


@contextmanager
def device_errors(run: Run) -> Iterator[None]:
    """Say clearly what happened when a GPU has no memory left, or is gone, and from which iteration the run can go on."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError and AcceleratorError are of this kind
        what = next(iter(str(error).splitlines()), "")
        if isinstance(error, torch.OutOfMemoryError) or (MEMORY.search(what) and FAILED.search(what)):
            remedy = "free some, or use fewer classes or --pad 1"
            raise DeviceLost(f"{run.device} has too little memory even for the smallest batches; {remedy}; {again(run)}") from error
        if not isinstance(error, torch.AcceleratorError) and not FAILED.search(what):
            raise
        stays = "with --device cpu if it stays away"
        raise DeviceLost(f"{run.device} does not answer any more ({what}); {again(run)}, {stays}") from error


def again(run: Run) -> str:
    """How a run that ended early is continued, and where it then begins: at the checkpoint on disk."""
    if world_of_environment().rank:
        return "--resume goes on after the last iteration that was kept"
    if run.kept is None:
        return f"no iteration was kept: --resume with --output {run.path} begins anew"
    return f"iteration {run.kept} was kept: --resume with --output {run.path} goes on from there"


def placed(state: ClassifyState, engine: Engine) -> ClassifyState:
    """The state with its maps in the engine's precision, on its device if there is room for them."""
    maps = state.model.maps
    where = engine.device if keep_on_device(len(maps), maps.shape[-1], maps.ndim == 3, engine.budget) else "cpu"
    return replace(state, model=replace(state.model, maps=maps.to(device=where, dtype=engine.dtype)))


def with_images_at_hand(job: ClassifyJob, particles: Particles) -> ClassifyJob:
    """The job with the images of this process's particles on its GPU, if there is room for them."""
    mine = job.world.share(len(particles))
    some, engine = resident(share(job.images, mine), particles[mine], job.engine)
    images = some.among(mine, particles.group) if isinstance(some, Resident) else job.images
    return replace(job, images=images, engine=engine)


def begin(
    run: Run, params: Any, table: ParticleSet, images: StackImages, form: Form, masks: list[Tensor | None], world: World
) -> tuple[ClassifyJob, Tensor, dict[str, Any] | None, int]:  # fmt: skip
    """(job on the usable particles, which they are, checkpoint of a stopped run, memory budget); what is left out or odd is said."""
    used = usable_particles(run, table, images, lambda good: check_counts(params, good, len(table), params.particles or params.continue_))
    warn_of_oddities(run, params.diameter, table, images, used)
    check_search(params.offset_range, params.offset_step, table.particles, params.strict_highres)
    saved = world.tell(run.load_checkpoint() if world.rank == 0 else None)
    run.kept = (saved or {}).get("progress", {}).get("iteration")
    budget, count = memory_budget(run, (saved or {}).get("budget", 0)), len(used)
    engine = make_engine(params, device=str(run.device), budget=budget, seed=run.seed)
    job = ClassifyJob(share(images, used), params, engine, form, *masks, tick=lambda done: tick(run, count, min(done, count)), world=world)
    return job, used, saved, budget


def check_counts(params: ClassifyParams, used: Tensor, total: int, path: Path | None) -> None:
    """Raise BadInput unless there are at least as many particles as classes, and two of them."""
    if len(used) < max(2, params.classes):
        raise BadInput(
            f"{path}: {len(used)} usable particles of {total} for --classes {params.classes}; each class needs at least one (and all two)"
        )


def check_poses(params: ClassifyParams, table: ParticleSet, local: bool = False) -> None:
    """Raise BadInput where orientations are to be kept that the table does not have, or options exclude each other."""
    kept = "--skip-align" if params.skip_align else "--skip-rotate" if params.skip_rotate else "--sigma-ang" if local else ""
    if params.skip_align and params.skip_rotate:
        raise BadInput("--skip-align and --skip-rotate: give one; --skip-align keeps shifts as well as orientations")
    if local and kept != "--sigma-ang":
        raise BadInput(f"--sigma-ang searches orientations, {kept} keeps them; give one of the two")
    if kept and not set(ANGLES) <= set(table.table):
        raise BadInput(f"{table.path}: has no orientations (_rlnAngleRot, …), which {kept} starts from; refine the particles first")


def run_iterations(
    run: Run, job: ClassifyJob, state: ClassifyState, out: Output, write_every: int, budget: int,
    loop: Callable[[ClassifyJob, ClassifyState], Iterator[ClassifyState]] = classify,
    pack: Callable[[ClassifyState], dict[str, Any]] = pack_state,
) -> ClassifyState:  # fmt: skip
    """The rest of a classification: every iteration recorded, checkpointed, and every so many written, also 0. Returns the last state.

    loop: yields the states; pack: what of one goes to the checkpoint. Files are written while the next iteration is computed. Of several
    processes only the first writes.
    """
    params, first = job.params, job.world.rank == 0
    run.check_stop()
    with device_errors(run), Writer() as writer:
        job = with_images_at_hand(job, state.particles)
        if first and write_every and state.progress.iteration == 0:  # RELION's scripts look for what a run began with
            begin = host_copy(state)
            writer.do(lambda: write_iteration(out, begin()))
        for state in loop(job, state):  # noqa: B020 (the last state is what is left)
            number = state.progress.iteration
            record(run, state, params)
            if first:
                copy, last = host_copy(state), number == params.iterations
                if last or (write_every and number % write_every == 0):
                    writer.do(lambda copy=copy, last=last: write_iteration(out, copy(), last=last))
                keep = lambda copy=copy: run.save_checkpoint({**pack(copy()), "budget": budget})  # noqa: E731
                writer.newest("checkpoint", lambda keep=keep, number=number: (keep(), setattr(run, "kept", number)), REST)
            run.check_stop()
    return state


def record(run: Run, state: ClassifyState, params: ClassifyParams) -> None:
    """One line for people, one event for the page and the report."""
    p, model, each = state.progress, state.model, resolutions(state)
    side = model.box * model.pixel_size
    counts = torch.bincount(state.poses.klass, minlength=model.classes)
    run.event(
        "iteration", iteration=p.iteration, box=model.box, pixel_size=model.pixel_size, resolution=side / max(p.shell, 1),
        current_size=p.size, coarse_size=p.coarse_size, peak_gb=peak_memory(run) / 1e9, healpix_order=state.sampling.order,
        local=state.sampling.sigma is not None, psi_step=state.sampling.coarse_step, offset_range=state.sampling.offset_range,
        offset_step=state.sampling.offset_step, accuracy_rotation=p.accuracy_rotation, accuracy_shift=p.accuracy_shift,
        pmax=model.ave_pmax, changes_rotation=p.change_rotation, changes_shift=p.change_shift, changes_class=p.change_class,
        sigma_offset=model.sigma_offset, log_likelihood=model.log_likelihood,
        significant=float(state.poses.significant.double().mean()), seconds=sum(state.seconds.values()), phases=state.seconds,
        occupancy=model.pdf_class.tolist(), class_counts=counts.tolist(), class_resolution=each.tolist(),
        class_accuracy=state.accuracy.tolist(), sigma2_noise=[s.tolist() for s in model.sigma2],
    )  # fmt: skip
    shares = "occupancy " + " ".join(f"{100 * share:.1f}" for share in model.pdf_class.tolist()) + " %"
    if model.classes > 12:
        shares = f"largest class {100 * float(model.pdf_class.max()):.1f} %, {int((counts > 0).sum())} of {model.classes} hold particles"
    accuracy = f", accuracy {p.accuracy_rotation:.1f}° {p.accuracy_shift:.1f} Å" if p.accuracy_rotation < UNKNOWN else ""
    run.note(
        f"iteration {p.iteration}: resolution {side / max(p.shell, 1):.2f} Å, window {p.size} px, {shares}, "
        f"{100 * p.change_class:.1f} % changed class{accuracy}, {sum(state.seconds.values()):.1f} s"
    )
    for k in state.emptied:
        if float(model.pdf_class[k]) > 0:
            run.warn(f"class {k + 1} was almost empty after iteration {p.iteration} and starts anew from half of the largest class")
        else:
            remedy = "" if params.reseed_below else ", or --reseed-below 0.05 starts such classes anew"
            run.warn(f"class {k + 1} is empty after iteration {p.iteration}: its map is zero from now on; fewer --classes may do{remedy}")


def continued(run: Run, params: Any, dims: int) -> tuple[ClassifyState, ParticleSet, Any, Entries]:
    """(state, particles, completed parameters, entries of the optimiser.star) of --continue; dims: 2 or 3, of the references.

    The run takes the seed of a run of ours as well, unless one is given.
    """
    path: Path = params.continue_
    if params.reference is not None:
        raise BadInput(f"--continue goes on with the references of {path}; leave --reference out")
    state, table, general = read_classification(path, Path.cwd())
    if state.model.maps.ndim != dims + 1:
        raise BadInput(f"{path}: is of a {5 - dims}D classification; `frazil class{5 - dims}d` continues it")
    if params.particles is not None:
        given = read_table(params.particles)
        i, _ = match_by_image_name(names_in_full(given), names_in_full(table))
        if len(i) != len(given) or len(given) != len(table):
            held = f"{len(i)} of its {len(given)} particles are among the {len(table)}"
            raise BadInput(f"{params.particles}: {held} of {path}; leave it out to go on with those")
    if "classes" in params.model_fields_set and params.classes != state.model.classes:
        raise BadInput(f"{path}: has {state.model.classes} classes, --classes is {params.classes}; leave that out")
    first = state.progress.iteration == 0
    if "seed" not in run.options.model_fields_set and VERSION in general:
        run.seed = general.whole("rlnRandomSeed", run.seed)
    elif first and run.seed != general.whole("rlnRandomSeed", run.seed):
        state = replace(state, assigned=None)  # whoever gives another seed wants other classes to begin with
    kept = kept_settings(params, general, Path.cwd(), state.model.pixel_size)
    if first and "initial_lowpass" not in kept and "initial_lowpass" not in params.model_fields_set:  # which RELION's files do not name
        kept["initial_lowpass"] = state.model.box * state.model.pixel_size / max(state.progress.shell, 1)
    params = params.model_copy(update={**kept, "classes": state.model.classes})
    if state.progress.iteration >= (params.iterations or 25):
        raise BadInput(f"{path}: iteration {state.progress.iteration} is done, --iterations is {params.iterations}; raise it")
    return state, table, params, general


def names_in_full(table: ParticleSet) -> list[str]:
    """Image names with the full path of the stack, by which sets written from other folders can be compared."""
    split = (name.rpartition("@") for name in table.image_names)
    return [f"{number or 1}@{Path(stack).absolute()}" for number, _, stack in split]
