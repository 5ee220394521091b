"""frazil refine3d: particles and a rough reference in, a gold-standard map out. Files around steps/refine3d.py."""
from __future__ import annotations

import resource
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field, field_validator
from torch import Tensor

from frazil.data import BadInput, Particles, Volume
from frazil.io.files import write_text
from frazil.io.images import StackImages, find_bad, split_image_name
from frazil.io.mrc import write_mrc
from frazil.io.particles import ANGLES, ParticleSet, open_images, read_particles, write_particles
from frazil.io.star import write_star
from frazil.jobs.inputs import PIXEL_TOLERANCE, check_symmetry, read_cube, read_mask_for
from frazil.jobs.refine_files import model_blocks, optimiser_blocks, sampling_blocks
from frazil.jobs.refine_report import refine3d_report
from frazil.jobs.run import Run
from frazil.maths.fourier import resolution_shell
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.sampling import Sampling
from frazil.steps.refine3d import Job, Refine3dParams, State, initial_state, make_engine, refine3d

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True
CPU_BUDGET = 0.5  # share of the free main memory a CPU run works in


def _field(default: Any, text: str, level: str = "expert", *, may_change: bool = False, **limits: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"unit": "", "level": level, "may_change": may_change}, **limits)


class Params(Refine3dParams):
    """Gold-standard auto-refinement of one map from particles and a rough reference."""

    particles: Path = _field(..., "particle STAR file (RELION 3.0 to 5)", "basic")
    reference: Path = _field(..., "rough map to start from, same box and pixel size as the particles", "basic")
    mask: Path | None = _field(None, "solvent mask, values 0 to 1", "basic")
    mask2: Path | None = _field(None, "second mask: its region is set to its own mean")
    write_iterations: bool = _field(False, "also write run_itNNN files after every iteration", may_change=True)
    iterations: int = _field(999, Refine3dParams.model_fields["iterations"].description or "", ge=1, may_change=True)

    @field_validator("diameter")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0 and value != -1:
            raise ValueError("should be above 0, or -1 for the whole box")
        return value


def run(params: Params, run: Run) -> None:
    """Refine, writing a checkpoint an iteration, RELION's files and a report at the end."""
    table, images, reference, masks = load_input(params, run)
    used = usable_particles(params, run, table, images)
    particles = table.particles[used]
    warn_of_oddities(params, run, table, images, used)
    saved = run.load_checkpoint()
    budget = memory_budget(run, (saved or {}).get("budget", 0))
    settings = make_engine(params, device=str(run.device), budget=budget, seed=run.seed)
    job = Job(_Subset(images, used), params, settings, *masks, tick=lambda done: tick(run, len(particles), done))
    if saved is None:
        state = initial_state(job, particles, reference)
        size = f"box {reference.data.shape[-1]} px of {reference.pixel_size:g} Å"
        run.note(f"{len(particles)} particles in {len(particles.micrographs)} micrographs, {size}")
    else:
        state = unpack_state(saved, particles)
        run.note(f"resuming after iteration {state.progress.iteration}")
    run.check_stop()
    for state in refine3d(job, state):  # noqa: B020 (the last state is what is left)
        record(run, params, state)
        if params.write_iterations and not state.progress.converged:
            write_iteration(run, params, state, table, used, f"run_it{state.progress.iteration:03d}")
        run.save_checkpoint({**pack_state(state), "budget": budget})
        run.check_stop()
    write_results(run, params, state, table, used)


def tick(run: Run, total: int, done: int) -> None:
    """Progress of an iteration; stops between batches when asked to."""
    run.progress(done, total, "particles")
    run.check_stop()


class _Subset:
    """The images of the particles in use, by their number among them."""

    def __init__(self, images: StackImages, used: Tensor) -> None:
        self._images, self._used = images, used

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._images[self._used[index]]


def load_input(params: Params, run: Run) -> tuple[ParticleSet, StackImages, Volume, list[Tensor | None]]:
    """The table, its images (headers checked), the reference and the two masks: all that can be wrong without reading pixels."""
    check_symmetry(params.symmetry)
    if params.solvent_correct_fsc and params.mask is None:
        raise BadInput("--solvent-correct-fsc needs --mask: without a mask there is nothing to correct for")
    if params.max_order is not None and params.max_order < params.healpix_order:
        raise BadInput(f"--max-order {params.max_order} is below --healpix-order {params.healpix_order}, where the search starts; raise it")
    table = read_particles(params.particles)
    if not table.has_ctf:
        raise BadInput(f"{params.particles}: label _rlnDefocusU is missing: refinement needs the CTF of every particle; estimate it first")
    if params.healpix_order >= params.local_from_order and not set(ANGLES) <= set(table.table):
        raise BadInput(
            f"{params.particles}: has no orientations (_rlnAngleRot, …) for the search to be local from the start; "
            f"raise --local-from-order above --healpix-order {params.healpix_order}"
        )
    for g in table.particles.group.unique().tolist():
        if (box := table.particles.optics[g].box) % 2:
            raise BadInput(f"{params.particles}: optics group {g + 1} has an odd box of {box} px; re-extract with an even box")
    room = int(CPU_BUDGET * psutil.virtual_memory().available) // 2  # they are kept in main memory, whatever computes
    images = open_images(table, memory_budget=room, threads=run.threads)
    images.check()
    reference = load_reference(params, table.particles)
    masks = [None if path is None else read_mask_for(path, reference, params.reference) for path in (params.mask, params.mask2)]
    return table, images, reference, masks


def load_reference(params: Params, particles: Particles) -> Volume:
    """The reference, of the box and pixel size of the first optics group that has particles."""
    volume, group = read_cube(params.reference), int(particles.group.min())
    box, first = volume.data.shape[-1], particles.optics[group]
    whose = "the particles'" if len(particles.optics) == 1 else f"that of the particles in optics group {group + 1}"
    remedy = "`frazil map resample` changes box and pixel size, `frazil map crop` the box alone"
    if box != first.box:
        raise BadInput(f"{params.reference}: box {box} px, but {whose} is {first.box} px; {remedy}")
    if abs(volume.pixel_size - first.pixel_size) > PIXEL_TOLERANCE * first.pixel_size:
        raise BadInput(f"{params.reference}: pixel size {volume.pixel_size:g} Å, but {whose} is {first.pixel_size:g} Å; {remedy}")
    if float(volume.data.max()) == float(volume.data.min()):
        raise BadInput(f"{params.reference}: every voxel is {float(volume.data.max()):g}; expected a map of the particle")
    if resolution_shell(box, first.pixel_size, params.initial_lowpass) < 1:
        side = f"{box * first.pixel_size:g} Å"
        raise BadInput(f"--initial-lowpass {params.initial_lowpass:g} leaves nothing of {params.reference}, {side} a side; give fewer Å")
    return Volume(volume.data.float(), first.pixel_size)


def usable_particles(params: Params, run: Run, table: ParticleSet, images: StackImages) -> Tensor:
    """Indices of the particles whose images can be used; the others are counted and listed in dropped_particles.txt."""
    particles, names = table.particles, table.image_names
    keep = torch.ones(len(particles), dtype=torch.bool)
    reasons = {}
    for index, reason in zip(find_bad(images, torch.arange(len(particles)), particles.group), ("not finite", "constant"), strict=True):
        keep[index] = False
        reasons |= dict.fromkeys(index.tolist(), reason)
    used = torch.nonzero(keep)[:, 0]
    if len(used) < 4:
        raise BadInput(f"{params.particles}: {len(used)} usable particles of {len(particles)}; two half sets need at least 4")
    counts = [int((particles.half[used] == h).sum()) for h in (1, 2)]
    if sum(counts) and min(counts) < 2:
        raise BadInput(
            f"{params.particles}: _rlnRandomSubset puts {counts[0]} usable particles in half 1 and {counts[1]} in half 2; "
            f"remove the column to have them split at random"
        )
    if reasons:
        first = min(reasons)
        write_text(run.file("dropped_particles.txt"), "".join(f"{names[i]}\t{reasons[i]}\n" for i in sorted(reasons)))
        run.warn(
            f"{len(reasons)} of {len(particles)} particles are constant or hold NaN and are left out "
            f"(first: row {first + 1}, {names[first]}); dropped_particles.txt lists them"
        )
    return used


def warn_of_oddities(params: Params, run: Run, table: ParticleSet, images: StackImages, used: Tensor) -> None:
    """Warn of what can be refined but is probably a mistake."""
    particles, names = table.particles, table.image_names
    optics = [particles.optics[g] for g in particles.group[used].unique().tolist()]
    smallest = min(o.box * o.pixel_size for o in optics)
    if params.diameter > smallest:
        run.warn(f"--diameter {params.diameter:g} is larger than the box ({smallest:g} Å), nothing is masked; give the particle's own in Å")
    if 0 < params.diameter < 4 * max(o.pixel_size for o in optics):
        run.warn(f"--diameter {params.diameter:g} is only a few pixels; it is in Å, not in nm or pixels")
    copies = len(names) - len({split_image_name(name) for name in names})
    if copies:
        run.warn(f"{copies} of {len(names)} rows repeat the image of an earlier row; copies in both half sets inflate the resolution")
    warn_unnormalised(run, params, particles, images, used)


def warn_unnormalised(run: Run, params: Params, particles: Particles, images: StackImages, used: Tensor) -> None:
    """Warn if the background of the first particles is not mean 0, sd 1 (spec 1.6)."""
    some = used[particles.group[used] == particles.group[used[0]]][:100]
    optics = particles.optics[int(particles.group[used[0]])]
    n = optics.box
    y, x = torch.meshgrid(*(2 * [torch.arange(n) - n // 2]), indexing="ij")
    radius = (params.diameter if params.diameter > 0 else n * optics.pixel_size) / (2 * optics.pixel_size)
    outside = images[some][:, torch.hypot(y.float(), x.float()) > min(radius, n / 2 - 1)]
    sd, mean = outside.std(1), outside.mean(1)
    off = (mean.abs() > 0.5 * sd) | (sd < 0.5) | (sd > 2)
    if float(off.float().mean()) > 0.5:
        found = f"background mean {float(mean.mean()):.2f}, sd {float(sd.mean()):.2f}"
        run.warn(f"particles look un-normalised: {found}, expected 0 and 1; re-extract them")


def memory_budget(run: Run, before: int = 0) -> int:
    """Bytes the engine may work in: what --gpu-memory says, else 90 % of a GPU's free memory or about half of the main memory.

    The budget decides the batches, these the rounding of sums, and rounding which of two like samples counts: a resumed run keeps
    what it had `before` if there is room, and main memory goes by powers of two, so that a repeated run gives the same map.
    """
    if run.gpu_memory:
        if run.device.type == "cuda":  # makes torch give cached blocks back rather than pass the limit
            torch.cuda.set_per_process_memory_fraction(min(1.0, run.gpu_memory / torch.cuda.mem_get_info(run.device)[1]), run.device)
        return run.gpu_memory
    free = torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else psutil.virtual_memory().available
    if 0 < before < free:
        return before
    return int(0.9 * free) if run.device.type == "cuda" else 1 << (int(CPU_BUDGET * free).bit_length() - 1)


def peak_memory(run: Run) -> int:
    """Most bytes held so far: reserved on the GPU, or resident in main memory."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_reserved(run.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def record(run: Run, params: Params, state: State) -> None:
    """One line for people, one event for the page and the report."""
    p, model = state.progress, state.joined or state.models[0]
    scale = model.box * model.pixel_size
    run.event(
        "iteration", iteration=p.iteration, box=model.box, pixel_size=model.pixel_size, resolution=scale / max(p.shell, 1),
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
        f"iteration {p.iteration}{' (last)' if p.converged else ''}: resolution {scale / max(p.shell, 1):.2f} Å, "
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
    a = state.joined.pixel_size
    for h in (1, 2):
        write_mrc(run.file(f"run_half{h}_class001_unfil.mrc"), state.unfiltered[h - 1], a)
    final = run.file("run_class001.mrc")
    write_mrc(final, state.joined.maps[0], a)
    model = run.file("run_model.star")
    write_star(model, half_model_blocks(state, params, state.joined, 0, final))
    write_data_and_settings(run, params, state, table, used, "run", (str(model), str(model)))
    refine3d_report(run.path)
    p, scale = state.progress, state.joined.box * a
    kind = "mask-corrected" if params.solvent_correct_fsc else "unmasked"
    run.summary(
        f"resolution {scale / max(p.shell, 1):.2f} Å (FSC 0.143 of independent halves, {kind}), "
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
    if (held := len(saved["particles"]["half"])) != len(particles):
        raise BadInput(f"checkpoint.pt has {held} particles, the input {len(particles)}: were images changed? choose another --output")
    model = lambda m: Model(**{**m, "sigma2": tuple(m["sigma2"])})  # noqa: E731
    joined, unfiltered = saved["joined"], saved["unfiltered"]
    try:
        return State(
            Progress(**saved["progress"]), Sampling(**saved["sampling"]), (model(saved["models"][0]), model(saved["models"][1])),
            replace(particles, prior_rotation=None, **saved["particles"]), Poses(**saved["poses"]), saved["seconds"],
            None if joined is None else model(joined), None if unfiltered is None else (unfiltered[0], unfiltered[1]),
        )  # fmt: skip
    except TypeError as error:
        raise BadInput(f"checkpoint.pt was written by another version of frazil ({error}); choose another --output") from error
