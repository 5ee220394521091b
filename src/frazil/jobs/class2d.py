"""frazil class2d: particles in, class averages out, with no reference. Files around steps/class2d.py."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from frazil.data import BadInput
from frazil.io.mrc import read_mrc
from frazil.io.particles import ParticleSet
from frazil.io.star import read_star
from frazil.jobs.class_report import class_report
from frazil.jobs.classify_files import Output, pack_state, part_of, resolutions, seeded_anew, unpack_state
from frazil.jobs.classify_run import begin, check_poses, continued, device_errors, run_iterations
from frazil.jobs.inputs import PIXEL_TOLERANCE
from frazil.jobs.moments import read_moments
from frazil.jobs.particles_input import (
    check_diameter,
    open_checked,
    option,
    read_table,
)
from frazil.jobs.refine_files import beside
from frazil.jobs.run import Run
from frazil.refine.gradient import Moments, no_moments
from frazil.refine.parallel import world_of_environment
from frazil.refine.planes import reference_planes
from frazil.refine.windows import Engine
from frazil.steps.class2d import FORM, Class2dParams, GradientState, class2d, initial_state, resolved
from frazil.steps.classify import ClassifyState

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True


class Params(Class2dParams):
    """Class averages of particles, without a reference."""

    particles: Path | None = option(None, "particle STAR file (RELION 3.0 to 5); with --continue those of its data.star", "basic")
    reference: Path | None = option(None, "stack of averages to start from, one a class (or one for all); none: from the particles alone")
    mask: Path | None = option(None, "solvent mask for the averages, an image with values 0 to 1; none: a circle of the diameter")
    continue_: Path | None = option(None, "go on from this run_itNNN_optimiser.star, with its settings but those given here", "basic")
    write_every: int = option(10, "write run_itNNN files every so many iterations; 0: of the last only", ge=0, may_change=True)
    iterations: int = option(0, Class2dParams.model_fields["iterations"].description or "", "basic", ge=0, may_change=True)

    _diameter = field_validator("diameter")(check_diameter)


def run(params: Params, run: Run) -> None:
    """Classify, writing RELION's files, a checkpoint to resume from, and a report with the sheet of averages at the end."""
    world = world_of_environment()
    state, params, table = first_look(run, params)
    optics = table.particles.optics[int(table.particles.group.min())]
    if params.reference is not None and "explore" not in params.model_fields_set:
        params = params.model_copy(update={"explore": 0.0})  # who gives the averages wants these classes, not new ones in their place
    params = resolved(params, optics.pixel_size)
    run.settle(params)
    images = open_checked(table, run.threads)
    references = None if params.reference is None else read_averages(params.reference, params.classes, optics.box, optics.pixel_size)
    mask = None if params.mask is None else read_image_mask(params.mask, optics.box)
    job, used, saved, budget = begin(run, params, table, images, FORM, [mask], world)
    particles, engine = table.particles[used], job.engine
    count = len(particles)
    with device_errors(run):
        if saved is not None:
            state = unpack_gradient(saved, unpack_state(saved, particles, engine.device), engine.device)
            run.note(f"resuming after iteration {state.progress.iteration}")
        elif state is not None:
            state = seeded_anew(part_of(state, used), params, engine.seed)
            maps = state.model.maps.to(device=engine.device, dtype=engine.dtype)
            state = replace(state, model=replace(state.model, maps=maps))
            run.note(f"{count} particles, {params.classes} classes, going on after iteration {state.progress.iteration}")
            if params.method == "vdam":
                state = with_moments(run, params, state, engine)
        else:
            size = f"box {optics.box} px of {optics.pixel_size:g} Å"
            run.note(f"{count} particles in {len(particles.micrographs)} micrographs, {params.classes} classes, {size}")
            state = initial_state(job, particles, optics.pixel_size, references)
    out = Output(run.path, table[used], params, run.seed, (str(params.mask or "None"), "None"), extra=settings(params))
    state = run_iterations(run, job, state, out, params.write_every, budget, loop=class2d, pack=pack_gradient)
    if world.rank == 0:
        class_report(run.path)
        summarise(run, state)


def settings(params: Params) -> tuple[tuple[str, Any], ...]:
    """Entries of optimiser.star that only a 2D classification has."""
    vdam = params.method == "vdam"
    found: dict[str, Any] = {"rlnDoCenterClasses": int(params.center_classes), "rlnDoGradientRefine": int(vdam)}
    found["frazilExplore"] = params.explore
    return tuple((found | ({"rlnSgdClassInactivityThreshold": params.inactivity_threshold} if vdam else {})).items())


def first_look(run: Run, params: Params) -> tuple[ClassifyState | None, Params, ParticleSet]:
    """(state to continue, parameters completed from it, particles): what can be told without images."""
    state = None
    if params.continue_ is not None:
        state, table, params, general = continued(run, params, 2)
        found = {
            "center_classes": bool(general.whole("rlnDoCenterClasses", int(params.center_classes))),
            "method": "vdam" if general.whole("rlnDoGradientRefine", 0) else "em",
            "explore": general.number("frazilExplore", 0),  # RELION's runs do not
            "inactivity_threshold": general.number("rlnSgdClassInactivityThreshold", params.inactivity_threshold),
        }
        params = params.model_copy(update={name: value for name, value in found.items() if name not in params.model_fields_set})
    elif params.particles is None:
        raise BadInput("PARTICLES is missing; give a particle STAR file, or --continue with the optimiser.star of an iteration")
    else:
        table = read_table(params.particles)
    check_poses(params, table)
    return state, params, table


def read_averages(path: Path, classes: int, box: int, pixel_size: float) -> Tensor:
    """(1 or K, N, N) averages to start from, of the particles' box and pixel size."""
    file = read_mrc(path)
    stack = file.data[None] if file.data.ndim == 2 else file.data
    if stack.shape[-2:] != (box, box):
        raise BadInput(f"{path}: images of {stack.shape[-1]} x {stack.shape[-2]} px, but the particles' box is {box} px; resample them")
    if file.pixel_size and abs(file.pixel_size - pixel_size) > PIXEL_TOLERANCE * pixel_size:
        raise BadInput(f"{path}: pixel size {file.pixel_size:g} Å, but the particles' is {pixel_size:g} Å; resample them")
    if len(stack) not in (1, classes):
        raise BadInput(f"{path}: holds {len(stack)} averages, --classes is {classes}; give --classes {len(stack)}")
    if not bool(torch.isfinite(stack).all()):
        raise BadInput(f"{path}: holds NaN or infinite pixels; make the averages again")
    return stack


def read_image_mask(path: Path, box: int) -> Tensor:
    """(N, N) mask of the averages, values 0 to 1."""
    data = read_mrc(path).data
    mask = data[0] if data.ndim == 3 and len(data) == 1 else data
    if tuple(mask.shape) != (box, box):
        size = " x ".join(map(str, mask.shape))
        raise BadInput(f"{path}: is {size} px; a mask for the averages is one image of the particles' box, {box} x {box} px")
    low, high = float(mask.min()), float(mask.max())
    if not (low >= -1e-5 and high <= 1 + 1e-5 and high > 0):  # false for NaN too
        raise BadInput(f"{path}: values run from {low:.4g} to {high:.4g}, expected 0 to 1 and not all 0; make the mask again")
    return mask


def with_moments(run: Run, params: Params, state: ClassifyState, engine: Engine) -> GradientState:
    """The state of --continue with the momenta and accuracies of its files, or without where the iteration was not one of gradients."""
    assert params.continue_ is not None
    folder, number = Path.cwd(), state.progress.iteration
    general = dict(read_star(params.continue_)["optimiser_general"])
    model = beside(params.continue_, folder, str(general["rlnModelStarFile"]))
    planes = reference_planes(state.model.maps[:1], state.model.box, engine)
    m = planes.shape[-1] - 1
    moments = read_moments(model, folder, m, begun=number > 0) if int(general.get("rlnDoGradientRefine", 0)) else None
    if moments is None:
        run.note(f"{params.continue_}: has no momenta; the gradients begin anew")
        moments = no_moments(params.classes, m, planes)
    else:
        moments = replace(moments, first=moments.first.to(planes), second=moments.second.to(planes.real))
    classes = read_star(model)["model_classes"]
    labels = ("rlnAccuracyRotations", "rlnAccuracyTranslationsAngst")
    accuracy = torch.stack([torch.tensor([float(x) for x in classes[label]], dtype=torch.float64) for label in labels], 1)
    return GradientState(**{**vars(state), "accuracy": accuracy}, moments=moments)


def pack_gradient(state: ClassifyState) -> dict[str, Any]:
    """pack_state, with the momenta of a gradient run."""
    moments = state.moments if isinstance(state, GradientState) else None
    kept = None if moments is None else {"first": moments.first.cpu(), "second": moments.second.cpu(), "begun": moments.begun}
    return {**pack_state(state), "moments": kept}


def unpack_gradient(saved: dict[str, Any], state: ClassifyState, device: str) -> ClassifyState:
    """The state with the momenta of its checkpoint."""
    kept = saved.get("moments")
    if kept is None:
        return state
    moments = Moments(kept["first"].to(device), kept["second"].to(device), kept["begun"])
    return GradientState(**vars(state), moments=moments)


def summarise(run: Run, state: ClassifyState) -> None:
    """The lines a person wants."""
    counts = torch.bincount(state.poses.klass, minlength=state.model.classes)
    best, used = resolutions(state).amin(), int((counts > 0).sum())
    largest = 100 * float(counts.max()) / max(1, len(state.particles))
    root = run.file(f"run_it{state.progress.iteration:03d}")
    run.summary(
        f"{used} classes hold particles, the largest {largest:.1f} %; best resolution {float(best):.1f} Å",
        f"averages {root}_classes.mrcs, sheet {run.file('classes.png')}",
        f"{state.progress.iteration} iterations, {len(state.particles)} particles, report {run.file('report.html')}",
    )
