"""What a run directory, frazil's or RELION's, tells for the report of a project: figures, curves, directions, maps, its inputs."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from frazil.data import BadInput
from frazil.io.mrc import read_map
from frazil.io.star import Star, first_table, read_star
from frazil.jobs.record import read_events, read_json

Array = NDArray[Any]
FSC_LABELS = {
    "corrected": "rlnFourierShellCorrelationCorrected",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "phases randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
}
MODEL_LABELS = {"map": "frazilFscModelMap", "FSC-work": "frazilFscWork", "FSC-free": "frazilFscFree"}
NOT_KNOWN = 900.0  # Å: 999 stands for "no resolution" in RELION's files


@dataclass
class Facts:
    """One run directory."""

    path: Path
    kind: str = ""  # refine3d, postprocess, model-fsc, localres, … or "" if it cannot be told
    job: dict[str, Any] = field(default_factory=dict)  # job.json
    values: dict[str, Any] = field(default_factory=dict)  # figures for the table, by key
    inputs: list[Path] = field(default_factory=list)  # files it was made from
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    fsc: pd.DataFrame | None = None  # table of postprocess.star
    model_fsc: pd.DataFrame | None = None  # table of model_fsc.star
    angles: Array | None = None  # (n, 2) rot, tilt in degrees
    local_resolution: Array | None = None  # (m,) Å of the voxels that count
    map: Path | None = None
    residues: pd.DataFrame | None = None


def read_run(path: Path) -> Facts:
    """Everything the report needs of a run; BadInput if the directory is missing or holds nothing it knows."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder; expected the directory of a run, as refine3d, postprocess or model-fsc made it")
    facts = Facts(path, job=read_json(path / "job.json") or {})
    facts.kind = str(facts.job.get("job", ""))
    events = read_events(path)
    facts.warnings = list(dict.fromkeys(str(e.get("message", "")) for e in events if e.get("event") == "warning"))
    facts.seconds = sum(float(e.get("seconds") or 0.0) for e in events if e.get("event") in ("done", "stopped", "failed"))
    facts.inputs = [Path(entry["path"]) for entry in facts.job.get("inputs", {}).values()]
    for reader in (_motion, _particles, _refinement, _postprocess, _model, _local_resolution):
        reader(facts, events)
    if not facts.kind and not facts.values:
        raise BadInput(f"{path}: holds neither job.json nor files of RELION's that are known here; give directories of finished runs")
    return facts


def _first(folder: Path, *patterns: str) -> Path | None:
    """The last file by name that fits the first pattern that fits any."""
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[-1]
    return None


def listed(star: Star, name: str) -> Mapping[str, Any]:
    """A list block of a STAR file, empty if it is not there."""
    block = star.get(name)
    return block if isinstance(block, dict) else {}


def _motion(facts: Facts, events: list[dict[str, Any]]) -> None:
    """Exposure from the first movie's STAR file; number of micrographs."""
    path = facts.path / "corrected_micrographs.star"
    if not path.exists():
        return
    facts.kind = facts.kind or "motion"
    if table := first_table(read_star(path), "rlnMicrographName"):
        facts.values["micrographs"] = len(table[1])
    for movie in sorted(facts.path.glob("**/*.star")):
        general = listed(read_star(movie), "general")
        if "rlnMicrographDoseRate" in general and "rlnImageSizeZ" in general:
            facts.values["exposure"] = float(general["rlnMicrographDoseRate"]) * float(general["rlnImageSizeZ"])
            break


def _particles(facts: Facts, events: list[dict[str, Any]]) -> None:
    """Optics, number of particles and micrographs, defocus, directions, from the particle STAR file the run ended with."""
    given = [p for p in facts.inputs if p.suffix == ".star" and p.exists()]
    counts = [count for count in (count_particles(p) for p in given) if count]
    if counts:
        facts.values["particles_in"] = max(counts)
    path = _first(facts.path, "run_data.star", "run_it*_data.star", "particles*.star", "shiny.star")
    if path is None:
        return
    star = read_star(path)
    table = first_table(star, "rlnImageName")
    if table is None:
        return
    rows = table[1]
    facts.values["particles"] = len(rows)
    if "rlnMicrographName" in rows:
        facts.values["micrographs"] = len(set(rows["rlnMicrographName"]))
    if "rlnDefocusU" in rows:
        defocus = 0.5 * (rows["rlnDefocusU"].to_numpy(dtype=float) + rows["rlnDefocusV"].to_numpy(dtype=float))
        facts.values["defocus"] = (float(np.min(defocus)) / 1e4, float(np.max(defocus)) / 1e4)
    optics = first_table(star, "rlnOpticsGroupName")
    for key, label in (("voltage", "rlnVoltage"), ("cs", "rlnSphericalAberration"), ("detector_pixel", "rlnMicrographOriginalPixelSize"),
                       ("pixel_size", "rlnImagePixelSize")):  # fmt: skip
        source = optics[1] if optics and label in optics[1] else rows if label in rows else None
        if source is not None:
            facts.values[key] = sorted({float(x) for x in source[label]})
    if "rlnAngleRot" in rows and "rlnAngleTilt" in rows:
        facts.angles = np.stack([rows[f"rlnAngle{a}"].to_numpy(dtype=float) for a in ("Rot", "Tilt")], -1)


def count_particles(path: Path) -> int:
    """Rows of a particle STAR file, 0 if it is something else."""
    table = first_table(read_star(path), "rlnImageName")
    return len(table[1]) if table else 0


def _refinement(facts: Facts, events: list[dict[str, Any]]) -> None:
    """Symmetry, resolution by the unmasked half maps, final accuracy, map."""
    sampling = _first(facts.path, "run_sampling.star", "run_it*_sampling.star")
    parameters = facts.job.get("parameters", {})
    if sampling is not None:
        facts.values["symmetry"] = str(listed(read_star(sampling), "sampling_general").get("rlnSymmetryGroup", "C1")).upper()
    elif parameters.get("symmetry"):
        facts.values["symmetry"] = str(parameters["symmetry"]).upper()
    model = _first(facts.path, "run_model.star")
    if model is None:
        return
    facts.kind = facts.kind or "refine3d"
    star = read_star(model)
    general = listed(star, "model_general")
    facts.values["box"] = int(general.get("rlnOriginalImageSize", 0))
    if float(general.get("rlnCurrentResolution", NOT_KNOWN)) < NOT_KNOWN:
        facts.values["unmasked_resolution"] = float(general["rlnCurrentResolution"])
    classes = first_table(star, "rlnAccuracyRotations")
    if classes:
        facts.values["accuracy"] = float(classes[1]["rlnAccuracyRotations"].iloc[0])
    facts.map = facts.path / "run_class001.mrc" if (facts.path / "run_class001.mrc").exists() else None
    if parameters.get("reference"):
        facts.values["initial_model"] = Path(parameters["reference"]).name


def _postprocess(facts: Facts, events: list[dict[str, Any]]) -> None:
    """Resolution, B-factor, mask and curves of postprocess.star."""
    path = facts.path / "postprocess.star"
    if not path.exists():
        return
    facts.kind = facts.kind or "postprocess"
    star = read_star(path)
    general = listed(star, "general")
    for key, label in (("resolution", "rlnFinalResolution"), ("b_factor", "rlnBfactorUsedForSharpening")):
        if label in general and not (key == "resolution" and float(general[label]) >= NOT_KNOWN):
            facts.values[key] = float(general[label])
    if general.get("rlnMaskName"):
        facts.values["mask"] = Path(str(general["rlnMaskName"])).name
    facts.inputs += [Path(str(general[f"rlnUnfilteredMapHalf{i}"])) for i in (1, 2) if f"rlnUnfilteredMapHalf{i}" in general]
    table = first_table(star, FSC_LABELS["corrected"]) or first_table(star, FSC_LABELS["unmasked"])
    facts.fsc = table[1] if table else None
    if (facts.path / "postprocess.mrc").exists():
        facts.map = facts.path / "postprocess.mrc"


def _model(facts: Facts, events: list[dict[str, Any]]) -> None:
    """What model-fsc found."""
    path = facts.path / "model_fsc.star"
    if not path.exists():
        return
    facts.kind = facts.kind or "model-fsc"
    table = first_table(read_star(path), MODEL_LABELS["map"])
    facts.model_fsc = table[1] if table else None
    result = next((e for e in reversed(events) if e.get("event") == "result"), {})
    names = {"crossing": "model_resolution", "crossing_half1": "work_resolution", "crossing_half2": "free_resolution", "q_score": "q_score",
             "correlation": "model_correlation"}  # fmt: skip
    facts.values |= {key: result[name] for name, key in names.items() if result.get(name) is not None}
    facts.values |= {f"model_{key}": value for key, value in result.get("composition", {}).items()}
    if facts.job.get("parameters", {}).get("model"):
        facts.values["model"] = Path(facts.job["parameters"]["model"]).name
    if (facts.path / "qscore.star").exists() and (residues := first_table(read_star(facts.path / "qscore.star"), "frazilResidueName")):
        facts.residues = residues[1]


def _local_resolution(facts: Facts, events: list[dict[str, Any]]) -> None:
    """Range of the local resolution inside the mask the run was given, else where the map has a value."""
    found = [p for p in sorted(facts.path.glob("*locres*.mrc")) if "filtered" not in p.name]
    if not found:
        return
    facts.kind = facts.kind or "localres"
    data = read_map(found[0]).data.numpy()
    inside = (data > 0) & (data < NOT_KNOWN)
    mask = facts.job.get("inputs", {}).get("mask")
    if mask and Path(mask["path"]).exists():
        weight = read_map(mask["path"]).data.numpy()
        inside &= weight > 0.5 if weight.shape == data.shape else inside
    if inside.any():
        facts.local_resolution = data[inside]
        facts.values["local_range"] = tuple(float(x) for x in np.percentile(facts.local_resolution, (1, 99)))


def inputs_of(facts: Facts) -> Iterator[Path]:
    """Absolute paths of a run's inputs, however they are written: as they are, from the folder it was started in, from above its own."""
    own = facts.path.resolve()
    folders = [Path(facts.job["directory"])] if facts.job.get("directory") else []
    for path in facts.inputs:
        for folder in (Path(), *folders, *own.parents):
            yield (folder / path).resolve()
