"""frazil refine3d: particles and a rough reference in, a gold-standard map out. Files around steps/refine3d.py."""
from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from frazil.data import BadInput, Particles, Volume
from frazil.io.images import StackImages
from frazil.io.mrc import write_mrc
from frazil.io.particles import ANGLES, ParticleSet, write_particles
from frazil.io.star import write_star
from frazil.jobs.inputs import check_symmetry, read_mask_for
from frazil.jobs.particles_input import (
    check_diameter,
    check_search,
    load_reference,
    memory_budget,
    open_checked,
    option,
    peak_memory,
    read_table,
    tick,
    usable_particles,
    warn_of_oddities,
)
from frazil.jobs.refine_files import model_blocks, optimiser_blocks, sampling_blocks
from frazil.jobs.refine_report import refine3d_report
from frazil.jobs.run import Run
from frazil.maths.fsc import resolution_at
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.residence import resident, share
from frazil.refine.sampling import Sampling
from frazil.steps.refine3d import Job, Refine3dParams, State, initial_state, make_engine, refine3d

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True


class Params(Refine3dParams):
    """Gold-standard auto-refinement of one map from particles and a rough reference."""

    particles: Path = option(..., "particle STAR file (RELION 3.0 to 5)", "basic")
    reference: Path = option(..., "rough map to start from, same box and pixel size as the particles", "basic")
    mask: Path | None = option(None, "solvent mask, values 0 to 1", "basic")
    mask2: Path | None = option(None, "second mask: its region is set to its own mean")
    write_iterations: bool = option(False, "also write run_itNNN files after every iteration", may_change=True)
    iterations: int = option(999, Refine3dParams.model_fields["iterations"].description or "", ge=1, may_change=True)

    _diameter = field_validator("diameter")(check_diameter)


def run(params: Params, run: Run) -> None:
    """Refine, writing a checkpoint an iteration, RELION's files and a report at the end."""
    table, images, reference, masks = load_input(params, run)
    used = usable_particles(run, table, images, lambda good: check_halves(params, table.particles, good))
    particles = table.particles[used]
    warn_of_oddities(run, params.diameter, table, images, used)
    check_search(params.offset_range, params.offset_step, table.particles)
    saved = run.load_checkpoint()
    budget = memory_budget(run, (saved or {}).get("budget", 0))
    settings = make_engine(params, device=str(run.device), budget=budget, seed=run.seed)
    at_hand, settings = resident(share(images, used), particles, settings)
    job = Job(at_hand, params, settings, *masks, tick=lambda done: tick(run, len(particles), done))
    if saved is None:
        state = initial_state(job, particles, reference)
        size = f"box {reference.data.shape[-1]} px of {reference.pixel_size:g} Å"
        run.note(f"{len(particles)} particles in {len(particles.micrographs)} micrographs, {size}")
    else:
        state = unpack_state(saved, particles)
        run.note(f"resuming after iteration {state.progress.iteration}")
    if params.write_iterations and state.progress.iteration == 0:
        write_iteration(run, params, state, table, used, "run_it000")
    run.check_stop()
    for state in refine3d(job, state):  # noqa: B020 (the last state is what is left)
        record(run, params, state)
        if params.write_iterations and not state.progress.converged:
            write_iteration(run, params, state, table, used, f"run_it{state.progress.iteration:03d}")
        run.save_checkpoint({**pack_state(state), "budget": budget})
        run.check_stop()
    write_results(run, params, state, table, used)


def load_input(params: Params, run: Run) -> tuple[ParticleSet, StackImages, Volume, list[Tensor | None]]:
    """The table, its images (headers checked), the reference and the two masks: all that can be wrong without reading pixels."""
    check_symmetry(params.symmetry)
    if params.solvent_correct_fsc and params.mask is None:
        raise BadInput("--solvent-correct-fsc needs --mask: without a mask there is nothing to correct for")
    if params.max_order is not None and params.max_order < params.healpix_order:
        raise BadInput(f"--max-order {params.max_order} is below --healpix-order {params.healpix_order}, where the search starts; raise it")
    table = read_table(params.particles)
    if params.healpix_order >= params.local_from_order and not set(ANGLES) <= set(table.table):
        raise BadInput(
            f"{params.particles}: has no orientations (_rlnAngleRot, …) for the search to be local from the start; "
            f"raise --local-from-order above --healpix-order {params.healpix_order}"
        )
    images = open_checked(table, run.threads)
    reference = load_reference(params.reference, table.particles, params.initial_lowpass)
    masks = [None if path is None else read_mask_for(path, reference, params.reference) for path in (params.mask, params.mask2)]
    return table, images, reference, masks


def check_halves(params: Params, particles: Particles, used: Tensor) -> None:
    """Raise BadInput unless both half sets have particles to work with."""
    if len(used) < 4:
        raise BadInput(f"{params.particles}: {len(used)} usable particles of {len(particles)}; two half sets need at least 4")
    counts = [int((particles.half[used] == h).sum()) for h in (1, 2)]
    if sum(counts) and min(counts) < 2:
        raise BadInput(
            f"{params.particles}: _rlnRandomSubset puts {counts[0]} usable particles in half 1 and {counts[1]} in half 2; "
            f"remove the column to have them split at random"
        )


def resolution(state: State) -> float:
    """Å. At the end where the halves' FSC first falls below 0.143; before that what decides the window: it may jump a dip (spec 3.9)."""
    model = state.joined or state.models[0]
    if state.joined is None:
        return model.box * model.pixel_size / max(state.progress.shell, 1)
    return float(resolution_at(model.fsc, 0.143, model.box, model.pixel_size))


def record(run: Run, params: Params, state: State) -> None:
    """One line for people, one event for the page and the report."""
    p, model = state.progress, state.joined or state.models[0]
    run.event(
        "iteration", iteration=p.iteration, box=model.box, pixel_size=model.pixel_size, resolution=resolution(state),
        current_size=p.size, peak_gb=peak_memory(run) / 1e9, coarse_size=p.coarse_size,
        healpix_order=state.sampling.order, local=state.sampling.sigma is not None, offset_range=state.sampling.offset_range,
        offset_step=state.sampling.offset_step, accuracy_rotation=p.accuracy_rotation, accuracy_shift=p.accuracy_shift,
        pmax=model.ave_pmax, changes_rotation=p.change_rotation, changes_shift=p.change_shift, sigma_offset=model.sigma_offset,
        log_likelihood=model.log_likelihood, significant=float(state.poses.significant.double().mean()),
        seconds=sum(state.seconds.values()), phases=state.seconds, fsc=model.fsc.tolist(),
        sigma2_noise=[s.tolist() for s in model.sigma2], converged=p.converged,
    )  # fmt: skip
    where = "local" if state.sampling.sigma is not None else "global"
    accuracy = f"{p.accuracy_rotation:.2f}° {p.accuracy_shift:.2f} Å" if p.accuracy_rotation < 999 else "not known yet"
    run.note(
        f"iteration {p.iteration}{' (last)' if p.converged else ''}: resolution {resolution(state):.2f} Å, "
        f"{where} search {state.sampling.step:.3g}°, window {p.size} px, accuracy {accuracy}, "
        f"moved {p.change_rotation:.2f}° {p.change_shift:.2f} Å"
    )
    if p.accuracy_rotation > 10 and p.iteration > 2 and p.accuracy_rotation < 999:
        run.warn(f"expected angular accuracy is {p.accuracy_rotation:.1f}°: the orientations are hardly determined by the data")


def write_iteration(run: Run, params: Params, state: State, table: ParticleSet, used: Tensor, root: str) -> None:
    """RELION's files of an iteration: two half maps with their models, data, sampling and optimiser."""
    a = state.models[0].pixel_size
    for h, model in enumerate(state.models, 1):
        file = run.file(f"{root}_half{h}_class001.mrc")
        write_mrc(file, model.maps[0], a)
        write_star(run.file(f"{root}_half{h}_model.star"), half_model_blocks(state, params, model, h, file))
    write_data_and_settings(run, params, state, table, used, root, tuple(str(run.file(f"{root}_half{h}_model.star")) for h in (1, 2)))


def half_model_blocks(state: State, params: Params, model: Model, half: int, file: Path):
    """model.star of a half, or with half 0 of all particles."""
    q = state.particles
    mine = q.micrograph if half == 0 else q.micrograph[q.half == half]
    return model_blocks(model, state, params, list(q.micrographs), [str(file)], torch.bincount(mine, minlength=len(q.micrographs)))


def write_data_and_settings(
    run: Run, params: Params, state: State, table: ParticleSet, used: Tensor, root: str, models: tuple[str, ...]
) -> None:
    """data.star, sampling.star and optimiser.star."""
    data, sampling = run.file(f"{root}_data.star"), run.file(f"{root}_sampling.star")
    extra = {
        "rlnLogLikeliContribution": state.poses.log_likelihood.numpy(), "rlnMaxValueProbDistribution": state.poses.pmax.numpy(),
        "rlnNrOfSignificantSamples": state.poses.significant.numpy(), "rlnGroupNumber": state.particles.micrograph.numpy() + 1,
    }  # fmt: skip
    write_particles(data, table[used], state.particles, extra)
    write_star(sampling, sampling_blocks(state, params))
    files = {
        "root": str(run.file("run")), "model1": models[0], "model2": models[1], "data": str(data), "sampling": str(sampling),
        "mask": str(params.mask or "None"), "mask2": str(params.mask2 or "None"),
    }  # fmt: skip
    write_star(run.file(f"{root}_optimiser.star"), optimiser_blocks(state, params, run.seed, files))


def write_results(run: Run, params: Params, state: State, table: ParticleSet, used: Tensor) -> None:
    """Final maps and STAR files, the report, and the lines a person wants."""
    if state.joined is None or state.unfiltered is None:
        write_iteration(run, params, state, table, used, f"run_it{state.progress.iteration:03d}")
        run.warn(f"not converged after {state.progress.iteration} iterations: the halves were not joined; raise --iterations to go on")
        refine3d_report(run.path)
        return
    a, joined, unfiltered, found = state.joined.pixel_size, state.joined, state.unfiltered, resolution(state)
    furthest = joined.box * a / max(state.progress.shell, 1)
    # What the files call the resolution is the same as what is printed.
    state = replace(state, progress=replace(state.progress, shell=max(1, round(joined.box * a / found))))
    for h in (1, 2):
        write_mrc(run.file(f"run_half{h}_class001_unfil.mrc"), unfiltered[h - 1], a)
    final = run.file("run_class001.mrc")
    write_mrc(final, joined.maps[0], a)
    model = run.file("run_model.star")
    write_star(model, half_model_blocks(state, params, joined, 0, final))
    write_data_and_settings(run, params, state, table, used, "run", (str(model), str(model)))
    refine3d_report(run.path)
    p = state.progress
    if furthest < 0.97 * found:
        run.warn(
            f"the FSC of the halves falls below 0.143 at {found:.2f} Å and rises again, to {furthest:.2f} Å: the first is the resolution; "
            f"look at the curve, a dip may come from preferred views, a wrong CTF, or a structure that is not resolved"
        )
    kind = "mask-corrected" if params.solvent_correct_fsc else "unmasked"
    run.summary(
        f"resolution {found:.2f} Å (FSC 0.143 of independent halves, {kind}), "
        f"{p.iteration} iterations, {len(used)} particles",
        f"expected accuracy {p.accuracy_rotation:.2f}° and {p.accuracy_shift:.2f} Å",
        f"map {final}, report {run.file('report.html')}",
    )


# ---- checkpoints: plain dicts of tensors and numbers, loadable without running code

_KEPT = ("rotation", "shift", "norm", "half", "klass")  # what a refinement changes in Particles


def pack_state(state: State) -> dict[str, Any]:
    """The state as a dict that torch.load(weights_only=True) can read."""
    return {
        "progress": asdict(state.progress), "sampling": asdict(state.sampling), "models": [_packed(m) for m in state.models],
        "particles": {name: getattr(state.particles, name) for name in _KEPT}, "poses": dict(vars(state.poses)),
        "joined": None if state.joined is None else _packed(state.joined),
        "unfiltered": None if state.unfiltered is None else list(state.unfiltered), "seconds": dict(state.seconds),
    }  # fmt: skip


def _packed(model: Model) -> dict[str, Any]:
    values = {f.name: getattr(model, f.name) for f in fields(model)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def unpack_state(saved: dict[str, Any], particles: Particles) -> State:
    """The state of a checkpoint; `particles` are those of the same job's input."""
    model = lambda m: Model(**{**m, "sigma2": tuple(m["sigma2"])})  # noqa: E731
    try:
        if (held := len(saved["particles"]["half"])) != len(particles):
            raise BadInput(f"checkpoint.pt has {held} particles, the input {len(particles)}: were images changed? choose another --output")
        joined, unfiltered = saved["joined"], saved["unfiltered"]
        return State(
            Progress(**saved["progress"]), Sampling(**saved["sampling"]), (model(saved["models"][0]), model(saved["models"][1])),
            replace(particles, prior_rotation=None, **saved["particles"]), Poses(**saved["poses"]), saved["seconds"],
            None if joined is None else model(joined), None if unfiltered is None else (unfiltered[0], unfiltered[1]),
        )  # fmt: skip
    except (TypeError, KeyError) as error:
        raise BadInput(f"checkpoint.pt was written by another version of frazil ({error}); choose another --output") from error
