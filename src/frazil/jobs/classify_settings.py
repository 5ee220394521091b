"""The settings of a classification in its optimiser.star, written and read back, so that --continue repeats what the run did next.

RELION has labels for most of them. The others get labels of ours, frazil + the name (equal_filter: frazilEqualFilter), which RELION
passes over and does not write again: what RELION continued goes on with our defaults for these.
"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

import frazil
from frazil.data import BadInput
from frazil.io.star import read_star
from frazil.jobs.entries import Entries, entries
from frazil.jobs.refine_files import A_MODEL, beside

VERSION = "frazilVersion"  # of optimiser.star: that frazil wrote it, and which
# What RELION's labels hold, exactly, or what is no setting of the method. All other fields get labels of ours.
ELSEWHERE = {
    "particles", "reference", "continue_", "write_every", "classes", "iterations", "tau_fudge", "pad", "diameter", "zero_mask",
    "flatten_solvent", "norm", "scale", "ctf_intact_first_peak", "skip_align", "skip_rotate", "oversampling", "adaptive_fraction",
    "max_significant", "strict_highres", "perturb", "offset_range", "offset_step", "healpix_order", "symmetry", "psi_step", "mask",
    "mask2", "center_classes", "method", "inactivity_threshold",
}  # fmt: skip


def label_of(name: str) -> str:
    """The label of a setting that RELION has none for."""
    return "frazil" + "".join(part.capitalize() for part in name.split("_"))


def own_settings(params: BaseModel) -> dict[str, Any]:
    """Labels of ours for optimiser.star: the settings that RELION's do not hold, and who wrote them."""
    found: dict[str, Any] = {VERSION: frazil.__version__}
    for name in type(params).model_fields:
        if name not in ELSEWHERE:
            value = getattr(params, name)
            found[label_of(name)] = int(value) if isinstance(value, bool) else str(value)
    return found


def read_own_settings(params: BaseModel, general: Entries, folder: Path) -> dict[str, Any]:
    """What `own_settings` wrote, but the fields that the user gave; raises BadInput for values that cannot be."""
    found = {}
    for name, field in type(params).model_fields.items():
        text, label = general.get(label_of(name)), label_of(name)
        if name in ELSEWHERE or name in params.model_fields_set or text is None:
            continue
        kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        try:
            value = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(None if text == "None" else text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].replace("Input should", "should")
            raise BadInput(f"{general.path}: _{label} is {text!r}, but {reason}; mend it, or give the option") from error
        found[name] = beside(general.path, folder, str(value), label) if isinstance(value, Path) else value
    return found


def kept_settings(params: BaseModel, general: Entries, folder: Path, pixel_size: float) -> dict[str, Any]:
    """Parameters as the files of an iteration have them, for those the user did not give (spec 8.6).

    Files are looked for in `folder`, and beside the optimiser.star; raises BadInput where they are nowhere.
    """
    path = general.path
    model, sampling = (beside(path, folder, general[label], label) for label in ("rlnModelStarFile", "rlnOrientSamplingStarFile"))
    m = entries(read_star(model), model, "model_general", A_MODEL)
    s = entries(read_star(sampling), sampling, "sampling_general", "a sampling.star")
    number, flag = general.number, lambda label, default: bool(general.whole(label, default))
    first = lambda label, default: s.number(f"{label}Original", s.number(label, default))  # noqa: E731
    strict = number("rlnHighresLimitExpectation", -1)
    # Local searches at a finer order than the run began with are the doing of --auto-sampling, which then goes on by itself.
    local = m.whole("rlnOrientationalPriorMode") and s.whole("rlnHealpixOrder", 0) <= int(first("rlnHealpixOrder", 2))
    found: dict[str, Any] = {
        "iterations": general.whole("rlnNumberOfIterations", 25), "tau_fudge": m.number("rlnTau2FudgeFactor"),
        "pad": m.number("rlnPaddingFactor"), "diameter": number("rlnParticleDiameter", -1), "mask_edge": number("rlnWidthMaskEdge", 5),
        "zero_mask": flag("rlnDoZeroMask", 1), "flatten_solvent": flag("rlnDoSolventFlattening", 1),
        "norm": flag("rlnDoCorrectNorm", 1), "scale": flag("rlnDoCorrectScale", 1),
        "ctf_intact_first_peak": flag("rlnDoIgnoreCtfUntilFirstPeak", 0), "skip_align": flag("rlnDoSkipAlign", 0),
        "skip_rotate": flag("rlnDoSkipRotate", 0), "oversampling": general.whole("rlnAdaptiveOversampleOrder", 1),
        "adaptive_fraction": number("rlnAdaptiveOversampleFraction", 0.999),
        "max_significant": general.whole("rlnMaximumSignificantPoses", -1),
        "strict_highres": strict if strict > 0 else None, "perturb": s.number("rlnSamplingPerturbFactor"),
        "offset_range": first("rlnOffsetRange", 0) / pixel_size, "offset_step": first("rlnOffsetStep", 0) / pixel_size,
        "healpix_order": int(first("rlnHealpixOrder", 2)), "symmetry": str(s.get("rlnSymmetryGroup", "C1")),
        "sigma_ang": m.number("rlnSigmaPriorRotAngle") if local else None,
        "psi_step": first("rlnPsiStep", 12), **read_own_settings(params, general, folder),
    }  # fmt: skip
    for name, label in (("mask", "rlnSolventMaskName"), ("mask2", "rlnSolventMask2Name")):
        if name not in params.model_fields_set and (file := general.get(label)) not in (None, "", "None", "none"):
            found[name] = beside(path, folder, str(file), label)
    return {name: value for name, value in found.items() if name in type(params).model_fields and name not in params.model_fields_set}
