"""A refinement's state as RELION's files, and back (spec/refinement 8.1–8.5)."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Particles
from frazil.io.images import split_image_name
from frazil.io.mrc import read_map, read_stack
from frazil.io.particles import ParticleSet, read_particles
from frazil.io.star import Block, Star, read_star
from frazil.jobs.entries import column, entries, rows
from frazil.maths.fourier import resolution_shell
from frazil.maths.sphere import angular_step
from frazil.refine.convergence import Progress
from frazil.refine.model import Model, Poses
from frazil.refine.sampling import Sampling, make_grid
from frazil.steps.classify import ClassifyParams
from frazil.steps.refine3d import Refine3dParams, State


def resolution_columns(shells: int, box: int, pixel_size: float) -> dict[str, np.ndarray]:
    """rlnSpectralIndex, rlnResolution (1/Å) and rlnAngstromResolution of shells 0 … (999 at 0)."""
    r = np.arange(shells)
    frequency = r / (box * pixel_size)
    return {
        "rlnSpectralIndex": r,
        "rlnResolution": frequency,
        "rlnAngstromResolution": np.where(r > 0, 1 / np.maximum(frequency, 1e-12), 999.0),
    }


def general_block(model: Model, progress: Progress, sampling: Sampling, groups: int, settings: tuple[float, float]) -> dict[str, Any]:
    """model_general; settings: padding and tau_fudge."""
    sigma, box, a = sampling.sigma or 0.0, model.box, model.pixel_size
    return {
        "rlnReferenceDimensionality": model.maps.ndim - 1, "rlnDataDimensionality": 2, "rlnOriginalImageSize": box,
        "rlnCurrentResolution": box * a / max(progress.shell, 1), "rlnCurrentImageSize": progress.size, "rlnPaddingFactor": settings[0],
        "rlnIsHelix": 0, "rlnFourierSpaceInterpolator": 1, "rlnMinRadiusNnInterpolation": 10, "rlnPixelSize": a,
        "rlnNrClasses": model.classes, "rlnNrBodies": 1, "rlnNrGroups": groups, "rlnNrOpticsGroups": len(model.sigma2),
        "rlnTau2FudgeFactor": settings[1], "rlnNormCorrectionAverage": model.norm_average,
        "rlnSigmaOffsetsAngst": model.sigma_offset, "rlnOrientationalPriorMode": int(sampling.sigma is not None),
        "rlnSigmaPriorRotAngle": sigma, "rlnSigmaPriorTiltAngle": sigma, "rlnSigmaPriorPsiAngle": sigma,
        "rlnLogLikelihood": model.log_likelihood, "rlnAveragePmax": model.ave_pmax,
    }  # fmt: skip


def model_blocks(
    model: Model, state: State, params: Refine3dParams, names: list[str], map_files: list[str], counts: Tensor
) -> dict[str, Block]:
    """model.star of one half, or of the joined map.

    names: micrographs; counts: particles of each in this half; map_files: a map a class.
    """
    p, box, a = state.progress, model.box, model.pixel_size
    resolution = box * a / max(p.shell, 1)
    blocks: dict[str, Block] = {
        "model_general": general_block(model, p, state.sampling, len(names), (params.pad, params.tau_fudge)),
        "model_classes": pd.DataFrame({
            "rlnReferenceImage": map_files, "rlnClassDistribution": model.pdf_class.numpy(),
            "rlnAccuracyRotations": p.accuracy_rotation, "rlnAccuracyTranslationsAngst": p.accuracy_shift,
            "rlnEstimatedResolution": resolution, "rlnOverallFourierCompleteness": model.coverage.mean(1).numpy(),
        }),
    }  # fmt: skip
    fsc = model.fsc.numpy()
    return blocks | class_spectra(model, fsc) | groups_and_noise(model, state.particles, names, counts) | direction_priors(model)


def class_spectra(model: Model, fsc: np.ndarray | None = None) -> dict[str, Block]:
    """A table of spectra a class; fsc: between half maps, zeros without them."""
    shells, blocks = model.box // 2 + 1, {}
    for k in range(model.classes):
        blocks[f"model_class_{k + 1}"] = pd.DataFrame({
            **resolution_columns(shells, model.box, model.pixel_size),
            "rlnSsnrMap": model.data_vs_prior[k].numpy(), "rlnGoldStandardFsc": np.zeros(shells) if fsc is None else fsc,
            "rlnFourierCompleteness": model.coverage[k].numpy(), "rlnReferenceSigma2": model.sigma2_map[k].numpy(),
            "rlnReferenceTau2": model.tau2[k].numpy(),
        })  # fmt: skip
    return blocks


def groups_and_noise(model: Model, particles: Particles, names: list[str], counts: Tensor) -> dict[str, Block]:
    """Scales of the micrographs (`names`, with so many particles each), noise of the optics groups."""
    blocks: dict[str, Block] = {"model_groups": pd.DataFrame({
        "rlnGroupNumber": np.arange(1, len(names) + 1), "rlnGroupName": names, "rlnGroupNrParticles": counts.numpy(),
        "rlnGroupScaleCorrection": model.scales.numpy(),
    })}  # fmt: skip
    noise: list[pd.DataFrame] = []
    for g, (sigma2, optics) in enumerate(zip(model.sigma2, particles.optics, strict=True), 1):
        columns = resolution_columns(len(sigma2), optics.box, optics.pixel_size)
        del columns["rlnAngstromResolution"]
        blocks[f"model_optics_group_{g}"] = pd.DataFrame({**columns, "rlnSigma2Noise": sigma2.numpy()})
        scale = optics.box * optics.pixel_size / (model.box * model.pixel_size)
        noise.append(noise_of_model_shells(sigma2, scale, resolution_columns(model.box // 2 + 1, model.box, model.pixel_size)))
    for m, g in enumerate(optics_of_micrographs(particles), 1):  # where RELION 3.1 looks for the noise
        blocks[f"model_group_{m}"] = noise[g]
    return blocks


def direction_priors(model: Model) -> dict[str, Block]:
    """The prior of the directions of every class."""
    return {
        f"model_pdf_orient_class_{k + 1}": pd.DataFrame({"rlnOrientationDistribution": model.pdf_direction[k].numpy()})
        for k in range(model.classes)
    }


def noise_of_model_shells(sigma2: Tensor, scale: float, columns: dict[str, np.ndarray]) -> pd.DataFrame:
    """A noise spectrum on the shells of the model, as RELION 3.1 keeps it; scale: side of the images' box over the model's, in Å."""
    nearest = np.minimum(np.round(columns["rlnSpectralIndex"] * scale).astype(int), len(sigma2) - 1)
    shells = {name: columns[name] for name in ("rlnSpectralIndex", "rlnResolution")}
    return pd.DataFrame({**shells, "rlnSigma2Noise": sigma2.numpy()[nearest]})


def optics_of_micrographs(particles: Particles) -> list[int]:
    """Optics group (from 0) of every micrograph: that of its last particle, 0 where it has none."""
    group = torch.zeros(len(particles.micrographs), dtype=torch.int64)
    group[particles.micrograph] = particles.group
    return group.tolist()


def sampling_blocks(state: State, params: Refine3dParams) -> dict[str, Block]:
    """sampling.star."""
    s, a = state.sampling, state.models[0].pixel_size
    grid = make_grid(s)
    kept = grid.table[grid.pixels].numpy()
    return {
        "sampling_general": {
            "rlnIs3DSampling": 1, "rlnIs3DTranslationalSampling": 0, "rlnHealpixOrder": s.order, "rlnSymmetryGroup": s.group,
            "rlnTiltAngleLimit": -91.0, "rlnPsiStep": s.coarse_step, "rlnOffsetRange": s.offset_range, "rlnOffsetStep": s.offset_step,
            "rlnHelicalOffsetStep": -1.0, "rlnSamplingPerturbInstance": s.instance, "rlnSamplingPerturbFactor": s.factor,
            "rlnHealpixOrderOriginal": params.healpix_order, "rlnPsiStepOriginal": angular_step(params.healpix_order),
            "rlnOffsetRangeOriginal": params.offset_range * a, "rlnOffsetStepOriginal": params.offset_step * a,
        },
        "sampling_directions": pd.DataFrame({"rlnAngleRot": kept[:, 0], "rlnAngleTilt": kept[:, 1]}),
    }  # fmt: skip


# What RELION asks for but frazil has no choice about: no gradient descent, no helices, no bodies, CTF always.
FIXED_SETTINGS = {
    "rlnDoAutoSampling": 0,
    "rlnDoMapEstimation": 1, "rlnDoFastSubsetOptimisation": 0, "rlnDoExternalReconstruct": 0, "rlnDoBlush": 0,
    "rlnBodyStarFile": "None", "rlnTauSpectrumName": "None", "rlnFourierMask": "None", "rlnLocalSymmetryFile": "None",
    "rlnMaximumCoarseImageSize": -1, "rlnLowresLimitExpectation": -1.0,
    "rlnDoStochasticGradientDescent": 0, "rlnDoStochasticEM": 0, "rlnDoGradientRefine": 0,
    "rlnSgdInitialIterations": 0, "rlnSgdFinalIterations": 0, "rlnSgdInBetweenIterations": 0, "rlnSgdInitialResolution": -1.0,
    "rlnSgdFinalResolution": -1.0, "rlnSgdInitialSubsetSize": -1, "rlnSgdFinalSubsetSize": -1, "rlnSgdMuFactor": 0.0,
    "rlnSgdSigma2FudgeInitial": 1.0, "rlnSgdSigma2FudgeHalflife": -1, "rlnSgdSkipAnneal": 0, "rlnSgdSubsetSize": -1,
    "rlnSgdWriteEverySubset": -1, "rlnSgdMaxSubsets": -1, "rlnSgdStepsize": 0.5,
    "rlnDoHelicalRefine": 0, "rlnIgnoreHelicalSymmetry": 0, "rlnNrHelicalNStart": 1, "rlnHelicalTwistInitial": 0.0,
    "rlnHelicalRiseInitial": 0.0, "rlnHelicalCentralProportion": 0.3, "rlnHelicalMaskTubeInnerDiameter": -1.0,
    "rlnHelicalMaskTubeOuterDiameter": -1.0, "rlnHelicalSymmetryLocalRefinement": 0, "rlnHelicalSigmaDistance": -1.0,
    "rlnHelicalKeepTiltPriorFixed": 0, "rlnDoCorrectCtf": 1, "rlnCtfDataArePhaseFlipped": 0, "rlnDoOnlyFlipCtfPhases": 0,
    "rlnRefsAreCtfCorrected": 1, "rlnFixSigmaNoiseEstimates": 0, "rlnFixSigmaOffsetEstimates": 0, "rlnMaxNumberOfPooledParticles": 1,
    "rlnHasLargeSizeIncreaseIterationsAgo": 0,
}  # fmt: skip


def settings_and_counters(progress: Progress, params: Refine3dParams | ClassifyParams, seed: int) -> dict[str, Any]:
    """What optimiser.star says of any job that aligns particles: its settings, and how far it is."""
    p = progress
    return {
        "rlnCurrentIteration": p.iteration, "rlnNumberOfIterations": params.iterations, "rlnRandomSeed": seed,
        "rlnTau2FudgeArg": params.tau_fudge, "rlnAdaptiveOversampleOrder": params.oversampling,
        "rlnAdaptiveOversampleFraction": params.adaptive_fraction, "rlnMaximumSignificantPoses": params.max_significant,
        "rlnParticleDiameter": params.diameter, "rlnWidthMaskEdge": round(params.mask_edge), "rlnDoZeroMask": int(params.zero_mask),
        "rlnDoSolventFlattening": int(params.flatten_solvent), "rlnDoCorrectNorm": int(params.norm), "rlnDoCorrectScale": int(params.scale),
        "rlnDoIgnoreCtfUntilFirstPeak": int(params.ctf_intact_first_peak),
        "rlnIncrementImageSize": p.increment, "rlnHasConverged": int(p.converged), "rlnHasHighFscAtResolLimit": int(p.high_fsc),
        "rlnNumberOfIterWithoutResolutionGain": p.no_gain, "rlnNumberOfIterWithoutChangingAssignments": p.no_change,
        "rlnOverallAccuracyRotations": p.accuracy_rotation, "rlnOverallAccuracyTranslationsAngst": p.accuracy_shift,
        "rlnChangesOptimalOrientations": p.change_rotation, "rlnChangesOptimalOffsets": p.change_shift,
        "rlnChangesOptimalClasses": p.change_class, "rlnSmallestChangesClasses": int(p.smallest_class),
        "rlnSmallestChangesOrientations": p.smallest_rotation, "rlnSmallestChangesOffsets": p.smallest_shift,
    }  # fmt: skip


def optimiser_blocks(state: State, params: Refine3dParams, seed: int, files: dict[str, str]) -> dict[str, Block]:
    """optimiser.star with the entries a RELION ≥ 3.1 asks for (spec 8.5).

    files: names of root, model1, model2, data, sampling, mask, mask2.
    """
    p, model = state.progress, state.models[0]
    return {"optimiser_general": {
        "rlnOutputRootName": files["root"], "rlnModelStarFile": files["model1"], "rlnModelStarFile2": files["model2"],
        "rlnExperimentalDataStarFile": files["data"], "rlnOrientSamplingStarFile": files["sampling"],
        "rlnSolventMaskName": files["mask"], "rlnSolventMask2Name": files["mask2"],
        "rlnJoinHalvesUntilThisResolution": params.low_resolution_join, "rlnAutoLocalSearchesHealpixOrder": params.local_from_order,
        "rlnDoSolventFscCorrection": int(params.solvent_correct_fsc),
        "rlnBestResolutionThusFar": p.shell / (model.box * model.pixel_size),
        "rlnDoSplitRandomHalves": 1, "rlnDoAutoRefine": 1, "rlnDoSkipAlign": 0, "rlnDoSkipRotate": 0, "rlnDoCenterClasses": 0,
        "rlnHighresLimitExpectation": -1.0, **settings_and_counters(p, params, seed), **FIXED_SETTINGS,
    }}  # fmt: skip


A_MODEL = "a model.star of RELION 3.1 or later, or of frazil"


def read_model(path: Path, folder: Path, particles: Particles | None = None) -> Model:
    """Model of a RELION model.star, its maps looked for beside it and in `folder`; particles: those of its data.star.

    RELION 3.1 keeps noise by micrograph, not by optics group: that needs the particles, where there are several optics groups.
    Raises BadInput naming the file where something is missing.
    """
    star = read_star(path)
    general, classes = entries(star, path, "model_general", A_MODEL), rows(star, path, "model_classes", A_MODEL)

    def values(block: str, label: str) -> Tensor:
        return column(rows(star, path, block, A_MODEL), path, block, label)

    if "rlnReferenceImage" not in classes or len(classes) == 0:
        raise BadInput(f"{path}: data_model_classes names no map (_rlnReferenceImage); expected {A_MODEL}")
    k = len(classes["rlnReferenceImage"])
    maps = read_references(path, folder, [str(name) for name in classes["rlnReferenceImage"]])
    each = lambda label: torch.stack([values(f"model_class_{i + 1}", label) for i in range(k)])  # noqa: E731
    has_fsc = "rlnGoldStandardFsc" in star["model_class_1"] if "model_class_1" in star else False
    offsets = [values("model_classes", f"rlnClassPriorOffset{x}") for x in "XY" if f"rlnClassPriorOffset{x}" in classes]
    # RELION writes none for 2D classes, which have one direction.
    directions = [values(b, "rlnOrientationDistribution") for i in range(k) if (b := f"model_pdf_orient_class_{i + 1}") in star]
    pixel_size = general.number("rlnPixelSize")
    if "rlnNrOpticsGroups" in general:
        noise = tuple(values(f"model_optics_group_{g + 1}", "rlnSigma2Noise") for g in range(general.whole("rlnNrOpticsGroups")))
    else:
        noise = noise_of_optics_groups(star, path, maps[0].shape[-1] * pixel_size, particles)
    return Model(
        maps=torch.stack(maps), pixel_size=pixel_size, sigma2=noise,
        scales=values("model_groups", "rlnGroupScaleCorrection"), norm_average=general.number("rlnNormCorrectionAverage"),
        sigma_offset=general.number("rlnSigmaOffsetsAngst"), pdf_class=values("model_classes", "rlnClassDistribution"),
        pdf_direction=torch.stack(directions) if directions else values("model_classes", "rlnClassDistribution")[:, None],
        tau2=each("rlnReferenceTau2"), data_vs_prior=each("rlnSsnrMap"),
        fsc=values("model_class_1", "rlnGoldStandardFsc") if has_fsc else torch.zeros(maps[0].shape[-1] // 2 + 1, dtype=torch.float64),
        sigma2_map=each("rlnReferenceSigma2"), coverage=each("rlnFourierCompleteness"), ave_pmax=general.number("rlnAveragePmax"),
        log_likelihood=general.number("rlnLogLikelihood"), prior_offset=torch.stack(offsets, 1) if offsets else None,
    )  # fmt: skip


def noise_of_optics_groups(star: Star, path: Path, side: float, particles: Particles | None) -> tuple[Tensor, ...]:
    """Noise spectra of the optics groups from those of the micrographs (model_group_N), as RELION 3.1 keeps them (spec 8.3).

    Our model has one spectrum an optics group: the mean over its particles of their micrographs' spectra. Theirs are on the shells of
    the model, whose box has this side in Å, those of an optics group on its own images' (`noise_of_model_shells` is the way there).
    """
    groups = rows(star, path, "model_groups", A_MODEL)
    of = lambda m: f"model_group_{m + 1}"  # noqa: E731
    spectra = torch.stack([column(rows(star, path, of(m), A_MODEL), path, of(m), "rlnSigma2Noise") for m in range(len(groups))])
    everyone = column(groups, path, "model_groups", "rlnGroupNrParticles") if "rlnGroupNrParticles" in groups else torch.ones(len(groups))
    if particles is None:
        return (weighted_mean(spectra, everyone),)
    place, found = rows_of_micrographs(groups, particles, path), []
    for g, optics in enumerate(particles.optics):
        mine = place[particles.micrograph[particles.group == g]]
        mean = weighted_mean(spectra, torch.bincount(mine, minlength=len(groups)) if len(mine) else everyone)
        shell = torch.arange(optics.box // 2 + 1, dtype=torch.float64) * side / (optics.box * optics.pixel_size)
        found.append(mean[shell.round().long().clamp(max=len(mean) - 1)])
    return tuple(found)


def weighted_mean(spectra: Tensor, weights: Tensor) -> Tensor:
    """(shells,) mean of spectra (n, shells) with weights (n,); the plain one where all of these are 0."""
    weights = weights.double() if float(weights.sum()) > 0 else torch.ones(len(spectra), dtype=torch.float64)
    return (weights[:, None] * spectra).sum(0) / weights.sum()


def rows_of_micrographs(groups: pd.DataFrame, particles: Particles, path: Path) -> Tensor:
    """(micrographs,) int64 row of model_groups of each, which names them or, where its names are others, numbers them."""
    names = [str(name) for name in groups["rlnGroupName"]] if "rlnGroupName" in groups else []
    place = {name: row for row, name in reversed(list(enumerate(names)))}
    if set(place) >= set(particles.micrographs):
        return torch.tensor([place[name] for name in particles.micrographs])
    if len(groups) != len(particles.micrographs):
        held = f"its model has {len(groups)} groups, its particles {len(particles.micrographs)}"
        raise BadInput(f"{path}: {held}; the model and the data files are not of one run")
    return torch.arange(len(groups))


def read_references(path: Path, folder: Path, names: list[str]) -> list[Tensor]:
    """(N, N, N) maps, or (N, N) class averages "number@stack", that a model.star names."""
    if not any("@" in name for name in names):
        return [read_map(beside(path, folder, name)).data for name in names]
    placed = [split_image_name(name) for name in names]
    stacks = {stack: read_stack(beside(path, folder, stack)) for stack in {stack for _, stack in placed}}
    return [stacks[stack][number - 1] for number, stack in placed]


def beside(path: Path, folder: Path, name: str, label: str = "") -> Path:
    """The file a STAR file names, below `folder`, beside the STAR file or below a folder that holds it; BadInput where it is nowhere.

    Names are relative to the folder a program was started in, mostly one of those above its output. label: under which the file is
    named, for the message.
    """
    above = (parent / name for parent in path.absolute().parents[1:])
    for candidate in (folder / name, path.parent / name, path.parent / Path(name).name, *above):
        if candidate.is_file():
            return candidate
    raise BadInput(f"{path}: the file {name} it names{f' (_{label})' if label else ''} is neither in {folder} nor beside it")


def read_refinement(optimiser: Path, folder: Path) -> tuple[State, ParticleSet]:
    """State of an auto-refinement after an iteration, from its optimiser.star and the files that names (RELION's or ours)."""
    wanted = "the optimiser.star of an iteration of an auto-refinement"
    general = entries(read_star(optimiser), optimiser, "optimiser_general", wanted)
    find = lambda label: beside(optimiser, folder, str(general[label]), label)  # noqa: E731
    particles = read_particles(find("rlnExperimentalDataStarFile"))
    q = particles.particles
    models = (read_model(find("rlnModelStarFile"), folder, q), read_model(find("rlnModelStarFile2"), folder, q))
    settings, first = find("rlnOrientSamplingStarFile"), find("rlnModelStarFile")
    s = entries(read_star(settings), settings, "sampling_general", "a sampling.star")
    first_model = entries(read_star(first), first, "model_general", A_MODEL)
    sampling = Sampling(
        order=s.whole("rlnHealpixOrder"), offset_range=s.number("rlnOffsetRange"), offset_step=s.number("rlnOffsetStep"),
        oversampling=general.whole("rlnAdaptiveOversampleOrder"), group=str(s["rlnSymmetryGroup"]),
        instance=s.number("rlnSamplingPerturbInstance"), factor=s.number("rlnSamplingPerturbFactor"),
    )  # fmt: skip
    if first_model.whole("rlnOrientationalPriorMode"):
        sampling = replace(sampling, sigma=2 * sampling.step)
    box, a = models[0].box, models[0].pixel_size
    progress = Progress(
        iteration=general.whole("rlnCurrentIteration"),
        shell=resolution_shell(box, a, first_model.number("rlnCurrentResolution")),
        increment=general.whole("rlnIncrementImageSize"), high_fsc=bool(general.whole("rlnHasHighFscAtResolLimit")),
        no_gain=general.whole("rlnNumberOfIterWithoutResolutionGain"),
        no_change=general.whole("rlnNumberOfIterWithoutChangingAssignments"),
        change_rotation=general.number("rlnChangesOptimalOrientations"), change_shift=general.number("rlnChangesOptimalOffsets"),
        smallest_rotation=general.number("rlnSmallestChangesOrientations"), smallest_shift=general.number("rlnSmallestChangesOffsets"),
        accuracy_rotation=general.number("rlnOverallAccuracyRotations"),
        accuracy_shift=general.number("rlnOverallAccuracyTranslationsAngst"),
        converged=bool(general.whole("rlnHasConverged")), ave_pmax=models[0].ave_pmax,
    )  # fmt: skip
    poses = replace(Poses.empty(len(q)), rotation=q.rotation, shift=q.shift, norm=q.norm)
    return State(progress, sampling, models, q, poses), particles
