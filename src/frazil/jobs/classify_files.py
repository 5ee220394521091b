"""A classification's state as RELION's files and as checkpoint, and back (spec/refinement 8). Shared by class2d and class3d."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Particles
from frazil.io.mrc import write_mrc
from frazil.io.particles import ParticleSet, read_particles, write_particles
from frazil.io.star import Block, read_star, write_star
from frazil.jobs.moments import write_moments
from frazil.jobs.refine_files import (
    FIXED_SETTINGS,
    beside,
    class_spectra,
    direction_priors,
    general_block,
    groups_and_noise,
    read_model,
    settings_and_counters,
)
from frazil.maths.fourier import resolution_shell
from frazil.refine.classes import class_shells
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.sampling import Sampling, make_grid
from frazil.steps.class2d import GradientState
from frazil.steps.classify import UNKNOWN, ClassifyParams, ClassifyState, keeps_orientations


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
    """(K,) resolution of each class in Å."""
    return state.model.box * state.model.pixel_size / class_shells(state.model.data_vs_prior).double()


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
        **settings_and_counters(p, params, out.seed), **FIXED_SETTINGS, **dict(out.extra),
    }}  # fmt: skip


# ---- going on from an iteration's files


def read_classification(optimiser: Path, folder: Path) -> tuple[ClassifyState, ParticleSet, dict[str, str]]:
    """State of a classification after an iteration, from its optimiser.star and the files that names (RELION's or ours).

    Also its particles and the entries of optimiser.star as text. Raises BadInput for an auto-refinement.
    """
    general = {name: str(value) for name, value in dict(read_star(optimiser)["optimiser_general"]).items()}
    if int(float(general.get("rlnDoAutoRefine", "0"))) or "rlnModelStarFile" not in general:
        raise BadInput(f"{optimiser}: is not of a classification; give the optimiser.star of a Class2D or Class3D iteration")
    find = lambda label: beside(optimiser, folder, general[label])  # noqa: E731
    model = read_model(find("rlnModelStarFile"), folder)
    star = dict(read_star(find("rlnModelStarFile"))["model_general"])
    table = read_particles(find("rlnExperimentalDataStarFile")).from_here()
    sampling = read_sampling(find("rlnOrientSamplingStarFile"), int(general["rlnAdaptiveOversampleOrder"]))
    if int(star["rlnOrientationalPriorMode"]):
        sampling = replace(sampling, sigma=float(star["rlnSigmaPriorRotAngle"]))
    number = lambda label, default: float(general.get(label) or default)  # noqa: E731
    progress = Progress(
        iteration=int(general["rlnCurrentIteration"]),
        shell=resolution_shell(model.box, model.pixel_size, float(star["rlnCurrentResolution"])),
        no_gain=int(number("rlnNumberOfIterWithoutResolutionGain", 0)),
        no_change=int(number("rlnNumberOfIterWithoutChangingAssignments", 0)),
        change_rotation=number("rlnChangesOptimalOrientations", 999), change_shift=number("rlnChangesOptimalOffsets", 999),
        smallest_rotation=number("rlnSmallestChangesOrientations", 999), smallest_shift=number("rlnSmallestChangesOffsets", 999),
        change_class=number("rlnChangesOptimalClasses", 0), smallest_class=number("rlnSmallestChangesClasses", 999),
        accuracy_rotation=number("rlnOverallAccuracyRotations", UNKNOWN),
        accuracy_shift=number("rlnOverallAccuracyTranslationsAngst", UNKNOWN), ave_pmax=model.ave_pmax,
    )  # fmt: skip
    q = table.particles
    model = replace(model, scales=scales_in_order(model.scales, read_star(find("rlnModelStarFile"))["model_groups"], q, optimiser))
    poses = replace(Poses.empty(len(q)), rotation=q.rotation, shift=q.shift, norm=q.norm, klass=(q.klass - 1).clamp(min=0))
    accuracy = torch.full((model.classes, 2), UNKNOWN, dtype=torch.float64)
    return ClassifyState(progress, sampling, model, q, poses, accuracy), table, general


def scales_in_order(scales: Tensor, groups: Any, particles: Particles, optimiser: Path) -> Tensor:
    """Scales in the order of the particles' micrographs, which model.star names or, where its names are others, numbers."""
    names = [str(name) for name in groups["rlnGroupName"]]
    if set(names) >= set(particles.micrographs):
        return scales[torch.tensor([names.index(name) for name in particles.micrographs])]
    if len(scales) != len(particles.micrographs):
        held = f"its model has {len(scales)} groups, its particles {len(particles.micrographs)}"
        raise BadInput(f"{optimiser}: {held}; the model and the data files are not of one run")
    return scales


def read_sampling(path: Path, oversampling: int) -> Sampling:
    """The search grid of a sampling.star."""
    s = dict(read_star(path)["sampling_general"])
    flat = not int(s["rlnIs3DSampling"])
    return Sampling(
        order=int(s.get("rlnHealpixOrder", 0)), offset_range=float(s["rlnOffsetRange"]), offset_step=float(s["rlnOffsetStep"]),
        oversampling=oversampling, group=str(s.get("rlnSymmetryGroup", "C1")), instance=float(s["rlnSamplingPerturbInstance"]),
        factor=float(s["rlnSamplingPerturbFactor"]), flat=flat, psi_step=float(s["rlnPsiStep"]) if flat else None,
    )  # fmt: skip


def part_of(state: ClassifyState, used: Tensor) -> ClassifyState:
    """The state of some of its particles."""
    poses = Poses(**{name: value[used] for name, value in vars(state.poses).items()})
    return replace(state, particles=state.particles[used], poses=poses)


def seeded_anew(state: ClassifyState, params: ClassifyParams, seed: int) -> ClassifyState:
    """The state with the particles of classes whose maps are the same drawn at random among these for the next iteration.

    All of them are in a run that was not seeded yet; two after a class started anew. Equal maps would stay equal, and the files do not
    hold which particle was to go where.
    """
    maps, live = state.model.maps, state.model.pdf_class > 0
    if keeps_orientations(params):
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
    if (held := len(saved["particles"]["klass"])) != len(particles):
        raise BadInput(f"checkpoint.pt has {held} particles, the input {len(particles)}: were images changed? choose another --output")
    try:
        model = Model(**{**saved["model"], "sigma2": tuple(saved["model"]["sigma2"]), "maps": saved["model"]["maps"].to(device)})
        return ClassifyState(
            Progress(**saved["progress"]), Sampling(**saved["sampling"]), model, replace(particles, **saved["particles"]),
            Poses(**saved["poses"]), saved["accuracy"], saved["assigned"], unmasked=saved["unmasked"], seconds=saved["seconds"],
        )  # fmt: skip
    except TypeError as error:
        raise BadInput(f"checkpoint.pt was written by another version of frazil ({error}); choose another --output") from error
