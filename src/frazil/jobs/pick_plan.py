"""What a run of `frazil pick` picks with: templates, sizes, grey scale, threshold; found once from some of the micrographs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.micrographs import Micrographs, read_micrograph
from frazil.jobs.pick_templates import (
    Templates,
    automatic_threshold,
    calibrated_scale,
    measured_diameter,
    read_templates,
    view_templates,
)
from frazil.jobs.run import Run
from frazil.steps.blobs import BlobSettings, learn_profile
from frazil.steps.pick import Bank, PickSettings, Prepared, ScoreMap, make_bank, match, prepare, rescaled

if TYPE_CHECKING:
    from frazil.jobs.pick import Params

SAMPLED = 5  # micrographs from which grey scale and thresholds are found
MOST_KEPT = 1 << 25  # values of score maps that are kept from finding the threshold
SAMPLED_Z = 3  # of z, which micrographs have alike
CHECKED = 2  # micrographs on which a grey scale that is given is checked
TAUGHT = 8  # micrographs from which a round profile is learned
NEARBY = 0.65  # least distance of picks, of the diameter
INSIDE = 0.1  # least distance of a centre from the edge, of the diameter
FAR_OFF = 2.0  # factor by which a grey scale may miss before it is worth a warning
FOM_THRESHOLD = 0.05
Z_LEAST = 3.0  # of thresholds found for z: noise alone has peaks in two groups too
FOM_SCALE = 2.0  # a threshold below it is one of the figure of merit: z has no use for it
PIXEL_TOLERANCE = 0.01  # relative difference of pixel sizes that counts as none
CPU_CACHE, GPU_SHARE = 3 << 29, 0.4  # memory for turned templates: bytes on a CPU, share of what is free on a GPU


@dataclass
class Plan:
    """What a run picks with; found once, the same after --resume."""

    diameter: float  # Å
    min_distance: float  # Å
    edge: float  # Å
    score: str
    threshold: float | None
    scale: float | None = None  # of the grey scale; None: not found yet
    templates: Templates | None = None
    blobs: BlobSettings | None = None
    banks: dict[tuple[int, int, float], Bank] = field(default_factory=dict)
    matched: dict[int, tuple[ScoreMap, Tensor | None]] = field(default_factory=dict)  # by number: those the threshold was found from


def make_plan(params: Params, micrographs: Micrographs, run: Run) -> Plan:
    """Templates, sizes and thresholds; what has to be found from the micrographs is kept in the checkpoint."""
    kept = run.load_checkpoint() if run.resumed else None
    if params.read_fom:
        return replanned(params)
    if params.log_diameter:
        plan, kept = blob_plan(params, micrographs, kept, run)
    else:
        plan = template_plan(params, micrographs, run)
    plan.min_distance = params.min_distance if params.min_distance is not None else plan.min_distance or NEARBY * plan.diameter
    plan.edge = params.edge if params.edge is not None else INSIDE * plan.diameter
    plan.threshold = params.threshold if params.threshold is not None else plan.threshold
    if kept is not None:
        plan.scale, plan.threshold = kept["scale"], kept["threshold"] if params.threshold is None else params.threshold
    settle(params, plan, micrographs, run)
    learned = {"learned": plan.templates.images, "pixel": plan.templates.pixel_size} if params.log_diameter and plan.templates else {}
    run.save_checkpoint({"scale": plan.scale, "threshold": plan.threshold, "diameter": plan.diameter, **learned})
    run.event("plan", diameter=plan.diameter, min_distance=plan.min_distance, edge=plan.edge, threshold=plan.threshold, scale=plan.scale,
              score=plan.score)  # fmt: skip
    return plan


def template_plan(params: Params, micrographs: Micrographs, run: Run) -> Plan:
    """Templates, which score suits them, and whether their grey scale is known."""
    if params.templates is not None:
        templates = read_templates(params.templates, params.template_pixel_size)
    else:
        assert params.reference is not None
        templates = view_templates(params.reference, params.symmetry, params.view_step, params.template_pixel_size)
    diameter = params.diameter or measured_diameter(templates)
    side = templates.images.shape[-1] * templates.pixel_size
    if diameter > side:
        raise BadInput(f"--diameter: {diameter:g} Å is more than the templates' box of {side:g} Å; use a larger box or a smaller diameter")
    measured = "" if params.diameter else " (measured)"
    run.note(f"{len(templates.images)} templates from {templates.source}, diameter {diameter:.0f} Å{measured}")
    other = [o.pixel_size for o in micrographs.optics if abs(o.pixel_size / templates.pixel_size - 1) > PIXEL_TOLERANCE]
    if other:
        run.note(f"templates have pixels of {templates.pixel_size:g} Å, micrographs of {other[0]:g} Å: templates are resampled")
    score = chosen_score(params, templates, bool(micrographs.has_ctf.any()), run)
    filed = params.greyscale == "file" or (params.greyscale == "auto" and not templates.of_map and not other)
    scale = 1.0 if filed or score != "fom" else None
    return Plan(diameter, 0.0, 0.0, score, FOM_THRESHOLD if score == "fom" else None, scale, templates)


def chosen_score(params: Params, templates: Templates, has_ctf: bool, run: Run) -> str:
    """The score asked for, or the one that suits: see Params.score."""
    if params.score != "auto":
        return params.score
    if templates.of_map and not (params.ctf and has_ctf):
        return "ncc"
    if params.greyscale != "auto" or (params.threshold is not None and params.threshold < FOM_SCALE):
        run.note("the score is fom, whose " + ("grey scale" if params.greyscale != "auto" else "thresholds are below 1") + " is given")
        return "fom"
    return "z"


def replanned(params: Params) -> Plan:
    """The plan of the run whose score maps are read, with what is asked for now."""
    assert params.read_fom is not None
    names = ("diameter", "min_distance", "edge", "threshold")
    try:
        kept: dict[str, Any] = torch.load(Path(params.read_fom) / "plan.pt", weights_only=True)
        chosen = {name: kept[name] if getattr(params, name) is None else getattr(params, name) for name in names}
        return Plan(score=kept["score"], scale=1.0, **chosen)
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError):
        raise BadInput(f"{params.read_fom}: holds no finished run of `frazil pick --write-fom` (plan.pt is missing or not whole)") from None


def blob_plan(params: Params, micrographs: Micrographs, kept: dict[str, Any] | None, run: Run) -> tuple[Plan, dict[str, Any] | None]:
    """Plain LoG, or a round template learned from it."""
    assert params.log_diameter is not None
    low, high = params.log_diameter
    blobs = BlobSettings(low, high, params.lowpass, params.invert)
    plan = Plan(0.5 * (low + high), 0.8 * low, 0.0, "log", 0.0, 1.0, None, blobs)
    if not params.log_rounds:
        return plan, kept
    if kept is not None and "learned" in kept:
        learned, size, diameter = kept["learned"], kept["pixel"], kept["diameter"]
    else:
        loaded = sample(micrographs, TAUGHT, run.device)
        first = loaded[0]
        alike = [x for _, x, p in loaded if x.shape == first[1].shape and p == first[2]]
        run.progress(0, 1, "learning the profile")
        found = learn_profile(alike, first[2], blobs, params.log_rounds)
        run.note(f"round profile learned from {len(alike)} micrographs, mean correlation of its picks {found.agreement:.2f}")
        learned, size, diameter = found.template.cpu(), found.pixel_size, found.diameter
    return replace(
        plan, diameter=diameter, score="ncc", threshold=None, templates=Templates(learned, size, "blobs", True), blobs=None
    ), kept


def sample(micrographs: Micrographs, number: int, device: torch.device) -> list[tuple[int, Tensor, float]]:
    """(index, pixels, pixel size) of some readable micrographs, spread over the set. Raises BadInput if none can be read."""
    order = np.unique(np.linspace(0, len(micrographs) - 1, number).round().astype(int)).tolist()
    out, fault = [], None
    for index in [*order, *(i for i in range(len(micrographs)) if i not in order)]:
        try:
            out.append((index, read_micrograph(micrographs.file(index)).to(device), micrographs.optics_of(index).pixel_size))
        except BadInput as error:
            fault = error
        if len(out) >= min(number, len(order)):
            break
    if not out:
        raise BadInput(f"none of {len(micrographs)} micrographs can be read; the first fault: {fault}")
    return out


def settle(params: Params, plan: Plan, micrographs: Micrographs, run: Run) -> None:
    """Find grey scale and threshold from some micrographs, where they are not given."""
    filed = plan.score == "fom" and plan.scale == 1.0 and not run.resumed
    if plan.templates is None or (plan.scale is not None and plan.threshold is not None and not filed):
        return
    run.progress(0, 1, "looking at some micrographs")
    prepared: list[tuple[int, Prepared, Bank]] = []
    number = CHECKED if filed and plan.threshold is not None else SAMPLED_Z if plan.score == "z" else SAMPLED
    for index, pixels, _ in sample(micrographs, number, run.device):
        bank = bank_for(params, plan, pixels, micrographs.optics_of(index).pixel_size, run)
        prepared.append((index, prepared_of(params, micrographs, index, pixels, bank), bank))
    bank = prepared[0][2]
    alike = [p for _, p, b in prepared if b is bank]
    if filed:
        factor = calibrated_scale(alike[:CHECKED], bank, plan.min_distance)
        if not 1 / FAR_OFF < factor < FAR_OFF:
            times, kind = max(factor, 1 / factor), "weak" if factor > 1 else "strong"
            run.warn(f"the templates are about {times:.1f} times too {kind} for these micrographs (in units of the background's sd), "
                     "so fom is not 1 for a good match; --greyscale calibrate corrects that")  # fmt: skip
    if plan.scale is None:
        plan.scale = calibrated_scale(alike, bank, plan.min_distance)
        plan.banks = {key: rescaled(b, plan.scale) for key, b in plan.banks.items()}
        run.note(f"grey scale of the templates multiplied by {plan.scale:.4g}: a typical particle has fom 1")
    if plan.threshold is None:
        matched = [match(p, bank) for p in alike]
        plan.threshold = max(automatic_threshold(matched, plan.min_distance), Z_LEAST if plan.score == "z" else -np.inf)
        if plan.score != "fom" and len(matched) * matched[0].value.numel() < MOST_KEPT:  # the grey scale is in fom, and may have changed
            numbers = [i for i, _, b in prepared if b is bank]
            plan.matched = {i: (scores, p.preview) for i, p, scores in zip(numbers, alike, matched, strict=True)}
        run.note(f"threshold {plan.threshold:.3f}, between the two groups of peaks of {len(alike)} micrographs")


def bank_for(params: Params, plan: Plan, pixels: Tensor, pixel_size: float, run: Run) -> Bank:
    """The bank for micrographs of this shape and pixel size."""
    assert plan.templates is not None
    key = (pixels.shape[0], pixels.shape[1], pixel_size)
    if key not in plan.banks:
        budget = CPU_CACHE
        if run.device.type == "cuda":
            budget = int(GPU_SHARE * min(run.gpu_memory or 1 << 62, torch.cuda.mem_get_info(run.device)[0]))
        if min(key[:2]) * pixel_size < 2 * plan.diameter:
            raise BadInput(f"a micrograph is {key[1]} x {key[0]} px of {pixel_size:g} Å, too small for particles of {plan.diameter:g} Å")
        settings = PickSettings(
            plan.diameter, params.lowpass, params.angular_step, plan.score, params.invert, params.intact_first_peak, budget
        )
        plan.banks.clear()  # one set of turned templates in memory: micrographs of a kind mostly follow each other
        bank = make_bank(plan.templates.images.to(run.device), plan.templates.pixel_size, (key[0], key[1]), pixel_size, settings)
        plan.banks[key] = rescaled(bank, plan.scale) if plan.scale not in (None, 1.0) else bank
    return plan.banks[key]


def prepared_of(params: Params, micrographs: Micrographs, index: int, pixels: Tensor, bank: Bank) -> Prepared:
    """A micrograph on its work grid, with its CTF where there is one."""
    if params.ctf and bool(micrographs.has_ctf[index]):
        defocus, phase = micrographs.defocus[index].to(pixels.device), float(micrographs.phase_shift[index])
        return prepare(pixels, bank, micrographs.optics_of(index), defocus, phase)
    return prepare(pixels, bank)
