"""Jobs: files around steps. `jobs/<name>.py` is the command `frazil <name>`; this table is what `frazil --help` lists.

A job module has

    Params              a pydantic model, extra="forbid": Field(description=…, json_schema_extra={"unit": …, "level": "basic" | "expert"});
                        a field of type Path is an input file
    POSITIONAL          the fields given without a name on the command line, in order
    HAS_RUN_DIRECTORY   True: the command has the options of run.Options and `run` gets a Run; False: `run` gets None
    run(params, run)    the work

or, for a command with several actions, ACTIONS: dict[str, Action] instead. Nothing is imported before a command is used.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

JOBS = {
    "import": "register movies, micrographs, particles, maps",
    "motion": "align movie frames: dose-weighted micrographs",
    "ctf": "defocus and astigmatism of micrographs",
    "pick": "find particles: templates, views of a map, or blobs",
    "pick-evaluate": "recall and false discovery of picks against truth",
    "coordinates": "convert positions: STAR, .box, .cs, .cbox, CSV",
    "extract": "cut particles out of micrographs, normalised",
    "class2d": "sort particles into class averages, no reference",
    "select": "choose particles: by class, score, values; split, join",
    "class3d": "sort particles into several maps",
    "refine3d": "refine a map from particles: gold standard",
    "mask": "soft solvent mask from a map, a model or a sphere",
    "postprocess": "corrected FSC, resolution, sharpened map",
    "localres": "local and directional resolution of two half maps",
    "model-fsc": "map and half maps against an atomic model",
    "report": "validation of a whole project on one page",
    "fsc": "Fourier shell correlation of two maps",
    "map": "make, change, align, compare, convert or show maps",
    "reconstruct": "a map from the poses in a particle STAR file",
    "project": "project a map along given or random directions",
    "simulate": "particles with known truth, of a phantom or a map",
    "simulate-micrographs": "micrographs with particles at known positions",
    "simulate-movies": "movies with known motion, as TIFF, MRC or EER",
    "demo": "simulate, refine, compare with the truth",
    "bench": "time standard tasks on this machine",
    "doctor": "devices, memory, versions, what is missing here",
}
MAP_ACTIONS = {
    "info": "size, pixel size, range, origin and centre of mass of maps",
    "picture": "central slices and projections as a PNG picture",
    "convert": "another file format, MRC mode, or a mended header",
    "from-model": "density of an atomic model (PDB, mmCIF)",
    "sphere": "a soft sphere, as a mask or a first reference",
    "add": "add a map or a number",
    "subtract": "subtract a map or a number",
    "multiply": "multiply by a map or a number",
    "divide": "divide by a map or a number",
    "difference": "difference of two maps brought to one scale",
    "normalise": "set mean and standard deviation",
    "threshold": "cut off low or high values, or make them 0 and 1",
    "lowpass": "remove what is finer than a resolution",
    "highpass": "remove what is coarser than a resolution",
    "bandpass": "keep what lies between two resolutions",
    "b-factor": "sharpen or damp by a B-factor",
    "crop": "cut or pad a map to another box, same pixel size",
    "resample": "resample a map to another pixel size or box",
    "mirror": "the other hand of a map",
    "shift": "move the density, or centre it",
    "rotate": "turn (and mirror, and move) a map by given angles",
    "symmetrise": "average a map over a point group",
    "find-symmetry": "symmetry axes and point group of a map",
    "align": "bring a map onto another: all orientations, shifts and both hands",
}
BENCH_ACTIONS = {"class3d": "3D classification of simulated ribosome-like particles"}
ACTIONS = {"map": MAP_ACTIONS, "bench": BENCH_ACTIONS}


@dataclass(frozen=True)
class Action:
    """What a command needs to be offered: its parameters, which of them have no name, whether it has a run directory, the work."""

    params: type[BaseModel]
    positional: tuple[str, ...]
    run: Callable[[Any, Any], None]
    has_run_directory: bool = False


def load(job: str, action: str | None = None) -> Action:
    """Import the module of a command and return what it offers."""
    module = import_module(f"frazil.jobs.{job.replace('-', '_')}")
    if action is not None:
        return module.ACTIONS[action]
    return Action(module.Params, module.POSITIONAL, module.run, module.HAS_RUN_DIRECTORY)
