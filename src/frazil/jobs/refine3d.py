"""frazil refine3d: particles and a rough reference in, a gold-standard map out. Files around steps/refine3d.py."""
from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from frazil.data import BadInput, Particles, Volume
from frazil.io.images import StackImages, find_bad
from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import ParticleSet, read_particles, write_particles
from frazil.io.star import write_star
from frazil.jobs.refine_files import model_blocks, optimiser_blocks, sampling_blocks
from frazil.jobs.report import refine3d_report
from frazil.jobs.run import Run
from frazil.maths.symmetry import operators
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.sampling import Sampling
from frazil.steps.refine3d import Job, Refine3dParams, State, initial_state, make_engine, refine3d

POSITIONAL = ("particles",)
HAS_RUN_DIRECTORY = True
CPU_BUDGET = 0.5  # share of the free main memory a CPU run works in


class Params(Refine3dParams):
    """Gold-standard auto-refinement of one map from particles and a rough reference."""

    particles: Path = Field(description="particle STAR file (RELION 3.0 to 5)", json_schema_extra={"unit": "", "level": "basic"})
    reference: Path = Field(description="rough map to start from, same box and pixel size as the particles", json_schema_extra={"unit": "", "level": "basic"})
    mask: Path | None = Field(None, description="solvent mask, values 0 to 1", json_schema_extra={"unit": "", "level": "basic"})
    mask2: Path | None = Field(None, description="second mask: its region is set to its own mean", json_schema_extra={"unit": "", "level": "expert"})
    write_iterations: bool = Field(
        False, description="also write run_itNNN files after every iteration", json_schema_extra={"unit": "", "level": "expert"}
    )


def run(params: Params, run: Run) -> None:
    """Refine, writing a checkpoint an iteration, RELION's files and a report at the end."""
    table, images, used = load_particles(params, run)
    particles = table.particles[used]
    reference = load_reference(params, particles)
    masks = [load_mask(path, reference) for path in (params.mask, params.mask2)]
    if params.solvent_correct_fsc and masks[0] is None:
        raise BadInput("--solvent-correct-fsc needs --mask: without a mask there is nothing to correct for")
    job = Job(_Subset(images, used), params, engine(params, run), *masks, tick=lambda done: tick(run, len(particles), done))
    saved = run.load_checkpoint()
    if saved is None:
        state = initial_state(job, particles, reference)
        run.note(f"{len(particles)} particles in {len(particles.micrographs)} micrographs, box {reference.data.shape[-1]} px of {reference.pixel_size:g} Å")
    else:
        state = unpack_state(saved, particles)
        run.note(f"resuming after iteration {state.progress.iteration}")
    run.check_stop()
    for state in refine3d(job, state):
        record(run, params, state)
        run.save_checkpoint(pack_state(state))
        if params.write_iterations and not state.progress.converged:
            write_iteration(run, params, state, table, used, f"run_it{state.progress.iteration:03d}")
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


def load_particles(params: Params, run: Run) -> tuple[ParticleSet, StackImages, Tensor]:
    """The table, its images (checked), and the indices of the particles that can be used."""
    try:
        operators(params.symmetry)
    except ValueError as error:
        raise BadInput(f"--symmetry: {error}") from error
    table = read_particles(params.particles)
    particles = table.particles
    for g, optics in enumerate(particles.optics):
        if optics.box % 2:
            raise BadInput(f"{params.particles}: optics group {g + 1} has an odd box of {optics.box} px; re-extract with an even box")
    boxes = torch.tensor([o.box for o in particles.optics])[particles.group]
    names = table.table["rlnImageName"].tolist()
    images = StackImages(names, params.particles, boxes=boxes, memory_budget=memory_budget(run) // 2, threads=run.threads)
    images.check()
    bad = torch.cat(find_bad(images, torch.arange(len(particles)), particles.group))
    if len(bad):
        with open(run.file("dropped_particles.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{names[i]}\n" for i in bad.tolist())
        run.warn(f"{len(bad)} of {len(particles)} particles are constant or hold NaN and are left out (first: {names[int(bad[0])]}); dropped_particles.txt lists them")
    keep = torch.ones(len(particles), dtype=torch.bool)
    keep[bad] = False
    used = torch.nonzero(keep)[:, 0]
    if len(used) < 4:
        raise BadInput(f"{params.particles}: {len(used)} usable particles; two half sets need at least 4")
    warn_unnormalised(run, params, particles, images, used)
    return table, images, used


def warn_unnormalised(run: Run, params: Params, particles: Particles, images: StackImages, used: Tensor) -> None:
    """Warn if the background of the first particles is not mean 0, sd 1 (spec 1.6)."""
    some = used[particles.group[used] == particles.group[used[0]]][:100]
    optics = particles.optics[int(particles.group[used[0]])]
    n = optics.box
    y, x = torch.meshgrid(*(2 * [torch.arange(n) - n // 2]), indexing="ij")
    radius = (params.diameter if params.diameter > 0 else n * optics.pixel_size) / (2 * optics.pixel_size)
    outside = images[some][:, torch.hypot(y.float(), x.float()) > min(radius, n / 2 - 1)]
    sd, mean = outside.std(1), outside.mean(1)
    off = ((mean / sd).abs() > 0.5) | (sd < 0.5) | (sd > 2)
    if float(off.float().mean()) > 0.5:
        run.warn(f"particles look un-normalised: background mean {float(mean.mean()):.2f}, sd {float(sd.mean()):.2f}, expected 0 and 1; re-extract them")


def load_reference(params: Params, particles: Particles) -> Volume:
    """The reference, of the box and pixel size of optics group 1."""
    volume, first = read_map(params.reference), particles.optics[0]
    shape = tuple(volume.data.shape)
    if len(set(shape)) != 1:
        raise BadInput(f"{params.reference}: {shape[2]} × {shape[1]} × {shape[0]} voxels, expected a cube of {first.box}")
    if shape[0] != first.box:
        raise BadInput(
            f"{params.reference}: box {shape[0]} px, but the particles' is {first.box} px; `frazil map crop` or `frazil map resample` makes them equal"
        )
    if abs(volume.pixel_size - first.pixel_size) > 0.01 * first.pixel_size:
        raise BadInput(
            f"{params.reference}: pixel size {volume.pixel_size:g} Å, but the particles' is {first.pixel_size:g} Å; resample it with `frazil map resample`"
        )
    if not bool(torch.isfinite(volume.data).all()):
        raise BadInput(f"{params.reference}: holds NaN or infinite values; expected a finite map")
    return Volume(volume.data.float(), first.pixel_size)


def load_mask(path: Path | None, reference: Volume) -> Tensor | None:
    """A mask of the reference's shape with values in [0, 1]."""
    if path is None:
        return None
    mask = read_map(path).data.float()
    if mask.shape != reference.data.shape:
        raise BadInput(f"{path}: mask of {tuple(mask.shape)} voxels, expected {tuple(reference.data.shape)} like the reference")
    low, high = float(mask.min()), float(mask.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4 and high > 0):
        raise BadInput(f"{path}: mask values from {low:g} to {high:g}, expected 0 to 1 and not all 0")
    return mask.clamp(0, 1)


def memory_budget(run: Run) -> int:
    """Bytes the engine may work in: of the GPU's free memory 90 %, of the main memory half, or what --gpu-memory says."""
    if run.gpu_memory:
        return run.gpu_memory
    if run.device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(run.device)[0])
    import psutil

    return int(CPU_BUDGET * psutil.virtual_memory().available)


def engine(params: Params, run: Run):
    """Engine settings of this run."""
    return make_engine(params, device=str(run.device), budget=memory_budget(run), seed=run.seed)


def record(run: Run, params: Params, state: State) -> None:
    """One line for people, one event for the page and the report."""
    p, model = state.progress, state.joined or state.models[0]
    scale = model.box * model.pixel_size
    run.event(
        "iteration", iteration=p.iteration, resolution=scale / max(p.shell, 1), current_size=p.size, coarse_size=p.coarse_size,
        healpix_order=state.sampling.order, local=state.sampling.sigma is not None, offset_range=state.sampling.offset_range,
        offset_step=state.sampling.offset_step, accuracy_rotation=p.accuracy_rotation, accuracy_shift=p.accuracy_shift, pmax=model.ave_pmax,
        changes_rotation=p.change_rotation, changes_shift=p.change_shift, sigma_offset=model.sigma_offset, log_likelihood=model.log_likelihood,
        significant=float(state.poses.significant.double().mean()), seconds=sum(state.seconds.values()), phases=state.seconds,
        fsc=model.fsc.tolist(), sigma2_noise=[s.tolist() for s in model.sigma2], converged=p.converged,
    )  # fmt: skip
    where = "local" if state.sampling.sigma is not None else "global"
    run.note(
        f"iteration {p.iteration}{' (last)' if p.converged else ''}: resolution {scale / max(p.shell, 1):.2f} Å, {where} search {state.sampling.step:.3g}°, "
        f"window {p.size} px, accuracy {p.accuracy_rotation:.2f}° {p.accuracy_shift:.2f} Å, moved {p.change_rotation:.2f}° {p.change_shift:.2f} Å"
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


def write_data_and_settings(run: Run, params: Params, state: State, table: ParticleSet, used: Tensor, root: str, models: tuple[str, ...]) -> None:
    """data.star, sampling.star and optimiser.star."""
    data, sampling = run.file(f"{root}_data.star"), run.file(f"{root}_sampling.star")
    extra = {
        "rlnLogLikeliContribution": state.poses.log_likelihood.numpy(), "rlnMaxValueProbDistribution": state.poses.pmax.numpy(),
        "rlnNrOfSignificantSamples": state.poses.significant.numpy(), "rlnGroupNumber": state.particles.micrograph.numpy() + 1,
    }  # fmt: skip
    write_particles(data, subset_of(table, used), state.particles, extra)
    write_star(sampling, sampling_blocks(state, params))
    files = {
        "root": str(run.file("run")), "model1": models[0], "model2": models[1], "data": str(data), "sampling": str(sampling),
        "mask": str(params.mask or "None"),
    }  # fmt: skip
    write_star(run.file(f"{root}_optimiser.star"), optimiser_blocks(state, params, run.seed, files))


def subset_of(table: ParticleSet, used: Tensor) -> ParticleSet:
    """The set with only the particles in use."""
    if len(used) == len(table.table):
        return table
    return replace(table, table=table.table.iloc[used.numpy()].reset_index(drop=True), particles=table.particles[used])


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
    run.summary(
        f"resolution {scale / max(p.shell, 1):.2f} Å (FSC 0.143 of independent halves, {'mask-corrected' if params.solvent_correct_fsc else 'unmasked'}), "
        f"{p.iteration} iterations, {len(used)} particles",
        f"expected accuracy {p.accuracy_rotation:.2f}° and {p.accuracy_shift:.2f} Å",
        f"map {final}, report {run.file('report.html')}",
    )


# ---- checkpoints: plain dicts of tensors and numbers, loadable without running code

_KEPT = ("rotation", "shift", "norm", "half", "klass")  # what a refinement changes in Particles


def pack_state(state: State) -> dict[str, Any]:
    """The state as a dict that torch.load(weights_only=True) can read."""
    model = lambda m: None if m is None else {f.name: list(v) if isinstance(v := getattr(m, f.name), tuple) else v for f in fields(m)}  # noqa: E731
    return {
        "progress": asdict(state.progress), "sampling": asdict(state.sampling), "models": [model(m) for m in state.models],
        "particles": {name: getattr(state.particles, name) for name in _KEPT}, "poses": dict(vars(state.poses)), "joined": model(state.joined),
        "unfiltered": None if state.unfiltered is None else list(state.unfiltered), "seconds": dict(state.seconds),
    }  # fmt: skip


def unpack_state(saved: dict[str, Any], particles: Particles) -> State:
    """The state of a checkpoint; `particles` are those of the same job's input."""
    if len(saved["particles"]["half"]) != len(particles):
        raise BadInput(f"the checkpoint has {len(saved['particles']['half'])} particles, the input {len(particles)}: was the STAR file changed? start anew")
    model = lambda m: None if m is None else Model(**{**m, "sigma2": tuple(m["sigma2"])})  # noqa: E731
    joined, unfiltered = saved["joined"], saved["unfiltered"]
    return State(
        Progress(**saved["progress"]), Sampling(**saved["sampling"]), (model(saved["models"][0]), model(saved["models"][1])),
        replace(particles, prior_rotation=None, **saved["particles"]), Poses(**saved["poses"]), saved["seconds"], model(joined),
        None if unfiltered is None else (unfiltered[0], unfiltered[1]),
    )  # fmt: skip
