"""A classification's state as RELION's files and as checkpoint, and back (spec/refinement 8). Shared by class2d and class3d."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Particles
from frazil.io.mrc import write_mrc
from frazil.io.particles import ParticleSet, read_particles, write_particles
from frazil.io.star import Block, read_star, write_star
from frazil.jobs.classify_settings import own_settings
from frazil.jobs.entries import Entries, column, entries, rows
from frazil.jobs.moments import write_moments
from frazil.jobs.refine_files import (
    A_MODEL,
    FIXED_SETTINGS,
    beside,
    class_spectra,
    direction_priors,
    general_block,
    groups_and_noise,
    read_model,
    rows_of_micrographs,
    settings_and_counters,
)
from frazil.maths.fourier import resolution_shell
from frazil.refine.classes import class_shells
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.sampling import Sampling, make_grid
from frazil.steps.class2d import GradientState
from frazil.steps.classify import UNKNOWN, ClassifyParams, ClassifyState, keeps_orientations

ASSIGNED = "frazilAssignedClass"  # column of data.star: the class that a particle has to take in the next iteration; 0: any
ASSIGNED_AFTER = "frazilAssignedAfterIteration"  # of optimiser.star: for which iteration's files that column was written


@dataclass(frozen=True)
class Output:
    """Where an iteration is written and what its files mention besides the state."""

    folder: Path
    table: ParticleSet  # rows of the particles in use
    params: ClassifyParams
    seed: int
    masks: tuple[str, str] = ("None", "None")  # solvent mask, second mask
    extra: tuple[tuple[str, Any], ...] = ()  # further entries of optimiser.star


def resolutions(state: ClassifyState) -> Tensor:
    """(K,) resolution of each class in Å; infinite for an empty one, as in RELION's files: its map is zero."""
    model = state.model
    found = model.box * model.pixel_size / class_shells(model.data_vs_prior).double()
    for k in torch.nonzero(model.pdf_class == 0)[:, 0].tolist():
        if not bool(model.maps[k].any()):
            found[k] = torch.inf
    return found


def resolution_text(angstroms: float) -> str:
    """How the resolution of a class is written for people."""
    return f"{angstroms:.1f} Å" if isfinite(angstroms) else "empty"


def write_iteration(out: Output, state: ClassifyState, *, last: bool = False) -> None:
    """RELION's files of an iteration: maps, model, sampling, data, optimiser; of the last also run_data.star."""
    root = f"run_it{state.progress.iteration:03d}"
    names = write_maps(out.folder, root, state)
    moments = state.moments if isinstance(state, GradientState) else None
    gradients = {} if moments is None else write_moments(out.folder, root, moments, state.model.pixel_size)
    paths = {kind: out.folder / f"{root}_{kind}.star" for kind in ("model", "sampling", "data", "optimiser")}
    write_star(paths["model"], model_blocks(state, out.params, names, gradients))
    write_star(paths["sampling"], sampling_blocks(state, out.params))
    extra = {
        "rlnLogLikeliContribution": state.poses.log_likelihood.numpy(), "rlnMaxValueProbDistribution": state.poses.pmax.numpy(),
        "rlnNrOfSignificantSamples": state.poses.significant.numpy(), "rlnGroupNumber": state.particles.micrograph.numpy() + 1,
    }  # fmt: skip
    if state.assigned is not None or ASSIGNED in out.table.table:  # which a table that was continued may still have
        extra[ASSIGNED] = (torch.full((len(state.particles),), -1) if state.assigned is None else state.assigned).numpy() + 1
    for path in [paths["data"], *([out.folder / "run_data.star"] if last else [])]:
        write_particles(path, out.table, state.particles, extra)
    write_star(paths["optimiser"], optimiser_blocks(state, out, paths))


def write_maps(folder: Path, root: str, state: ClassifyState) -> list[str]:
    """Write the maps, one a class, or the stack of class averages; returns the names model.star gives them."""
    maps, a = state.model.maps.float(), state.model.pixel_size
    if maps.ndim == 3:
        stack = folder / f"{root}_classes.mrcs"
        write_mrc(stack, maps, a, stack=True)
        if state.unmasked is not None:
            write_mrc(folder / "run_unmasked_classes.mrcs", state.unmasked.float(), a, stack=True)
        return [f"{k + 1:06d}@{stack}" for k in range(len(maps))]
    files = [folder / f"{root}_class{k + 1:03d}.mrc" for k in range(len(maps))]
    with ThreadPoolExecutor(8) as pool:  # gigabytes an iteration where boxes are large
        list(pool.map(lambda file, density: write_mrc(file, density, a), files, maps))
    return [str(file) for file in files]


def model_blocks(state: ClassifyState, params: ClassifyParams, map_names: list[str], gradients: dict[str, list[str]]) -> dict[str, Block]:
    """model.star of K classes; gradients: columns that name the momenta of a gradient run."""
    model, names = state.model, list(state.particles.micrographs)
    counts = torch.bincount(state.particles.micrograph, minlength=len(names))
    classes: dict[str, Any] = {
        "rlnReferenceImage": map_names, **gradients, "rlnClassDistribution": model.pdf_class.numpy(),
        "rlnAccuracyRotations": state.accuracy[:, 0].numpy(), "rlnAccuracyTranslationsAngst": state.accuracy[:, 1].numpy(),
        "rlnEstimatedResolution": resolutions(state).numpy(), "rlnOverallFourierCompleteness": completeness(model).numpy(),
    }  # fmt: skip
    if model.prior_offset is not None:
        classes |= {f"rlnClassPriorOffset{x}": model.prior_offset[:, i].numpy() for i, x in enumerate("XY")}
    general = general_block(model, state.progress, state.sampling, len(names), (params.pad, params.tau_fudge))
    blocks: dict[str, Block] = {"model_general": general, "model_classes": pd.DataFrame(classes)}
    return blocks | class_spectra(model) | groups_and_noise(model, state.particles, names, counts) | direction_priors(model)


def completeness(model: Model) -> Tensor:
    """(K,) mean over the shells within each class's resolution of the fraction of voxels with data above prior."""
    shells = class_shells(model.data_vs_prior)
    return torch.stack([c[: int(r) + 1].mean() for c, r in zip(model.coverage, shells, strict=True)])


def sampling_blocks(state: ClassifyState, params: ClassifyParams) -> dict[str, Block]:
    """sampling.star."""
    s, first = state.sampling, params.sampling(state.model.pixel_size)
    general: dict[str, Any] = {"rlnIs3DSampling": int(not s.flat), "rlnIs3DTranslationalSampling": 0}
    if not s.flat:
        general |= {"rlnHealpixOrder": s.order, "rlnSymmetryGroup": s.group, "rlnTiltAngleLimit": -91.0}
    general |= {
        "rlnPsiStep": s.coarse_step, "rlnOffsetRange": s.offset_range, "rlnOffsetStep": s.offset_step, "rlnHelicalOffsetStep": -1.0,
        "rlnSamplingPerturbInstance": s.instance, "rlnSamplingPerturbFactor": s.factor, "rlnHealpixOrderOriginal": first.order,
        "rlnPsiStepOriginal": first.coarse_step, "rlnOffsetRangeOriginal": first.offset_range, "rlnOffsetStepOriginal": first.offset_step,
    }  # fmt: skip
    blocks: dict[str, Block] = {"sampling_general": general}
    if not s.flat:
        grid = make_grid(s)
        kept = grid.table[grid.pixels].numpy()
        blocks["sampling_directions"] = pd.DataFrame({"rlnAngleRot": kept[:, 0], "rlnAngleTilt": kept[:, 1]})
    return blocks


def optimiser_blocks(state: ClassifyState, out: Output, paths: dict[str, Path]) -> dict[str, Block]:
    """optimiser.star with the entries a RELION ≥ 3.1 asks for (spec 8.5)."""
    p, params, model = state.progress, out.params, state.model
    return {"optimiser_general": {
        "rlnOutputRootName": str(out.folder / "run"), "rlnModelStarFile": str(paths["model"]),
        "rlnExperimentalDataStarFile": str(paths["data"]), "rlnOrientSamplingStarFile": str(paths["sampling"]),
        "rlnSolventMaskName": out.masks[0], "rlnSolventMask2Name": out.masks[1],
        "rlnBestResolutionThusFar": p.shell / (model.box * model.pixel_size), "rlnJoinHalvesUntilThisResolution": -1.0,
        "rlnDoSplitRandomHalves": 0, "rlnDoAutoRefine": 0, "rlnAutoLocalSearchesHealpixOrder": 4, "rlnDoSolventFscCorrection": 0,
        "rlnDoSkipAlign": int(params.skip_align), "rlnDoSkipRotate": int(params.skip_rotate), "rlnDoCenterClasses": 0,
        "rlnHighresLimitExpectation": params.strict_highres or -1.0,
        **settings_and_counters(p, params, out.seed), **FIXED_SETTINGS, **dict(out.extra), **own_settings(params),
        **({} if state.assigned is None else {ASSIGNED_AFTER: p.iteration}),
    }}  # fmt: skip


# ---- going on from an iteration's files


A_CLASSIFICATION = "the optimiser.star of a Class2D or Class3D iteration"


def read_classification(optimiser: Path, folder: Path) -> tuple[ClassifyState, ParticleSet, Entries]:
    """State of a classification after an iteration, from its optimiser.star and the files that names (RELION's or ours).

    Also its particles and the entries of optimiser.star as text. Raises BadInput, naming the file, for an auto-refinement, another
    kind of file, and where something is missing.
    """
    general = entries(read_star(optimiser, text=True), optimiser, "optimiser_general", A_CLASSIFICATION)
    if general.whole("rlnDoAutoRefine", 0) or "rlnModelStarFile" not in general:
        raise BadInput(f"{optimiser}: is not of a classification; give {A_CLASSIFICATION}")
    find = lambda label: beside(optimiser, folder, general[label], label)  # noqa: E731
    files = {label: find(label) for label in ("rlnModelStarFile", "rlnExperimentalDataStarFile", "rlnOrientSamplingStarFile")}
    table = read_particles(files["rlnExperimentalDataStarFile"]).from_here()
    q, path = table.particles, files["rlnModelStarFile"]
    model, blocks = read_model(path, folder, q), read_star(path)
    star = entries(blocks, path, "model_general", A_MODEL)
    sampling = read_sampling(files["rlnOrientSamplingStarFile"], general.whole("rlnAdaptiveOversampleOrder"))
    if star.whole("rlnOrientationalPriorMode"):
        sampling = replace(sampling, sigma=star.number("rlnSigmaPriorRotAngle"))
    number = general.number
    progress = Progress(
        iteration=general.whole("rlnCurrentIteration"),
        shell=resolution_shell(model.box, model.pixel_size, star.number("rlnCurrentResolution")),
        no_gain=general.whole("rlnNumberOfIterWithoutResolutionGain", 0),
        no_change=general.whole("rlnNumberOfIterWithoutChangingAssignments", 0),
        change_rotation=number("rlnChangesOptimalOrientations", 999), change_shift=number("rlnChangesOptimalOffsets", 999),
        smallest_rotation=number("rlnSmallestChangesOrientations", 999), smallest_shift=number("rlnSmallestChangesOffsets", 999),
        change_class=number("rlnChangesOptimalClasses", 0), smallest_class=number("rlnSmallestChangesClasses", 999),
        accuracy_rotation=number("rlnOverallAccuracyRotations", UNKNOWN),
        accuracy_shift=number("rlnOverallAccuracyTranslationsAngst", UNKNOWN), ave_pmax=model.ave_pmax,
    )  # fmt: skip
    model = replace(model, scales=model.scales[rows_of_micrographs(rows(blocks, path, "model_groups", A_MODEL), q, optimiser)])
    poses = replace(Poses.empty(len(q)), rotation=q.rotation, shift=q.shift, norm=q.norm, klass=(q.klass - 1).clamp(min=0))
    accuracy = torch.full((model.classes, 2), UNKNOWN, dtype=torch.float64)
    assigned = None
    if ASSIGNED in table.table and general.whole(ASSIGNED_AFTER, -1) == progress.iteration:
        assigned = column(table.table, files["rlnExperimentalDataStarFile"], "particles", ASSIGNED).long() - 1
    return ClassifyState(progress, sampling, model, q, poses, accuracy, assigned), table, general


def read_sampling(path: Path, oversampling: int) -> Sampling:
    """The search grid of a sampling.star."""
    s = entries(read_star(path), path, "sampling_general", "a sampling.star")
    flat = not s.whole("rlnIs3DSampling")
    return Sampling(
        order=s.whole("rlnHealpixOrder", 0), offset_range=s.number("rlnOffsetRange"), offset_step=s.number("rlnOffsetStep"),
        oversampling=oversampling, group=str(s.get("rlnSymmetryGroup", "C1")), instance=s.number("rlnSamplingPerturbInstance"),
        factor=s.number("rlnSamplingPerturbFactor"), flat=flat, psi_step=s.number("rlnPsiStep") if flat else None,
    )  # fmt: skip


def part_of(state: ClassifyState, used: Tensor) -> ClassifyState:
    """The state of some of its particles."""
    poses = Poses(**{name: value[used] for name, value in vars(state.poses).items()})
    assigned = None if state.assigned is None else state.assigned[used]
    return replace(state, particles=state.particles[used], poses=poses, assigned=assigned)


def seeded_anew(state: ClassifyState, params: ClassifyParams, seed: int) -> ClassifyState:
    """The state with the particles of classes whose maps are the same drawn at random among these for the next iteration.

    All of them are in a run that was not seeded yet; two after a class started anew. Equal maps would stay equal, and the files do not
    hold which particle was to go where, unless frazil wrote them.
    """
    maps, live = state.model.maps, state.model.pdf_class > 0
    if state.assigned is not None or keeps_orientations(params):
        return state
    first = [next(j for j in range(k + 1) if torch.equal(maps[j], maps[k])) if live[k] else k for k in range(len(maps))]
    groups = [torch.tensor([k for k, j in enumerate(first) if j == i]) for i in sorted({j for j in first if first.count(j) > 1})]
    if not groups:
        return state
    generator, assigned = torch.Generator().manual_seed(seed), torch.full((len(state.particles),), -1, dtype=torch.int64)
    for group in groups:
        mine = torch.isin(state.poses.klass, group) | (len(group) == len(maps))
        assigned[mine] = group[torch.randint(len(group), (int(mine.sum()),), generator=generator)]
    return replace(state, assigned=assigned)


# ---- checkpoints: plain dicts of tensors and numbers, loadable without running code

_KEPT = ("rotation", "shift", "norm", "klass")  # what a classification changes in Particles


def host_copy(state: ClassifyState) -> Callable[[], ClassifyState]:
    """A function that gives the state with its maps in main memory, copied when it is first called, on a stream of its own.

    To be made by the thread that computes; called by another it disturbs no computation.
    """
    if not state.model.maps.is_cuda:
        return lambda: state
    ready = torch.cuda.Event()
    ready.record()

    @cache
    def copy() -> ClassifyState:
        stream = torch.cuda.Stream(state.model.maps.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            unmasked = None if state.unmasked is None else state.unmasked.cpu()
            here = replace(state, model=replace(state.model, maps=state.model.maps.cpu()), unmasked=unmasked)
            if isinstance(here, GradientState) and here.moments is not None:
                here = replace(here, moments=replace(here.moments, first=here.moments.first.cpu(), second=here.moments.second.cpu()))
            return here

    return copy


def pack_state(state: ClassifyState) -> dict[str, Any]:
    """The state (of a `host_copy`) as a dict that torch.load(weights_only=True) can read."""
    model = {f.name: getattr(state.model, f.name) for f in fields(state.model)}
    model = {name: list(value) if isinstance(value, tuple) else value for name, value in model.items()}
    return {
        "progress": asdict(state.progress), "sampling": asdict(state.sampling), "model": model,
        "particles": {name: getattr(state.particles, name) for name in _KEPT}, "poses": dict(vars(state.poses)),
        "accuracy": state.accuracy, "assigned": state.assigned, "unmasked": state.unmasked, "seconds": dict(state.seconds),
    }  # fmt: skip


def unpack_state(saved: dict[str, Any], particles: Particles, device: str = "cpu") -> ClassifyState:
    """The state of a checkpoint, its maps on a device; `particles` are those of the same job's input."""
    try:
        if (held := len(saved["particles"]["klass"])) != len(particles):
            raise BadInput(f"checkpoint.pt has {held} particles, the input {len(particles)}: were images changed? choose another --output")
        model = Model(**{**saved["model"], "sigma2": tuple(saved["model"]["sigma2"]), "maps": saved["model"]["maps"].to(device)})
        return ClassifyState(
            Progress(**saved["progress"]), Sampling(**saved["sampling"]), model, replace(particles, **saved["particles"]),
            Poses(**saved["poses"]), saved["accuracy"], saved["assigned"], unmasked=saved["unmasked"], seconds=saved["seconds"],
        )  # fmt: skip
    except (TypeError, KeyError) as error:
        raise BadInput(f"checkpoint.pt was written by another version of frazil ({error}); choose another --output") from error
