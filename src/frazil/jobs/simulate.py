"""`frazil simulate`: particle stacks and STAR files with known truth."""
from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from frazil.data import BadInput, Optics, Volume
from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import make_particle_set, write_particles
from frazil.io.star import write_star
from frazil.jobs.run import Run
from frazil.maths.filters import lowpass_map
from frazil.simulate import Phantom, Settings, Simulated, phantom, simulate_particles

POSITIONAL: tuple[str, ...] = ()
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}


def _expert(unit: str) -> JsonDict:
    """Marks of an expert parameter with a unit."""
    return {"level": "expert", "unit": unit}


class Params(BaseModel):
    """Simulate particles of a phantom or a map: images with CTF, shifts and noise, and the truth about them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    particles: int = Field(1500, ge=1, description="number of particles")
    box: int = Field(64, ge=16, le=1024, description="side of the particle images, even", json_schema_extra={"unit": "px"})
    pixel_size: float = Field(3.5, gt=0, description="pixel size", json_schema_extra={"unit": "Å"})
    symmetry: str = Field("C1", description="point group of the phantom: C1, C4, D2, D7, T, O, I …")
    map: Path | None = Field(None, description="simulate from this map (its grey scale, its frame) instead of a phantom")
    snr: float = Field(0.1, gt=0, allow_inf_nan=True, description="variance of the signal over that of the noise, whole box; inf: no noise")
    shift_sd: float = Field(5.0, ge=0, description="standard deviation of the shifts, each way", json_schema_extra={"unit": "Å"})
    lowpass: float = Field(40.0, gt=0, description="resolution of reference_lowpass.mrc", json_schema_extra={"unit": "Å"})
    voltage: float = Field(300.0, gt=0, description="acceleration voltage", json_schema_extra=_expert("kV"))
    cs: float = Field(2.7, ge=0, description="spherical aberration", json_schema_extra=_expert("mm"))
    amplitude_contrast: float = Field(0.1, ge=0, le=1, description="fraction of amplitude contrast", json_schema_extra=EXPERT)
    defocus_min: float = Field(8000.0, description="lowest mean defocus of a micrograph", json_schema_extra=_expert("Å"))
    defocus_max: float = Field(20000.0, description="highest mean defocus of a micrograph", json_schema_extra=_expert("Å"))
    astigmatism: float = Field(300.0, ge=0, description="largest difference of the two defoci", json_schema_extra=_expert("Å"))
    per_micrograph: int = Field(100, ge=1, description="particles a micrograph, which is a stack", json_schema_extra=EXPERT)
    scale_sd: float = Field(0.0, ge=0, lt=1, description="relative spread of the micrographs' contrast", json_schema_extra=EXPERT)
    coloured_noise: bool = Field(False, description="noise that falls with frequency, instead of white", json_schema_extra=EXPERT)
    preferred: float = Field(0.0, ge=0, le=1, description="fraction of particles seen from near one direction", json_schema_extra=EXPERT)
    optics_groups: int = Field(1, ge=1, le=9, description="number of optics groups; each further one has a box 1/8 larger and "
                               "pixels 1/12 smaller than the one before", json_schema_extra=EXPERT)  # fmt: skip
    with_truth: bool = Field(False, description="put the true poses in particles.star too, not only in truth.star")


def run(params: Params, run: Run) -> None:
    """Write particles.star, truth.star, stacks/*.mrcs, reference.mrc (the truth) and reference_lowpass.mrc into the run directory."""
    made = make(params, run.seed)
    write(made, run.path, params)
    noise = "no noise" if math.isinf(params.snr) else f"SNR {params.snr:g}"
    run.event("simulated", particles=len(made.particles), box=params.box, pixel_size=params.pixel_size, snr=params.snr)
    run.summary(
        f"{len(made.particles)} particles of {params.box} px, {params.pixel_size:g} Å a pixel, {noise}: {run.path / 'particles.star'}",
        f"true map {run.path / 'reference.mrc'}, low-passed to {params.lowpass:g} Å {run.path / 'reference_lowpass.mrc'}",
    )


def make(params: Params, seed: int) -> Simulated:
    """Images and truth in memory; the same parameters and seed give the same. Raises BadInput for parameters that do not fit."""
    if params.box % 2:
        raise BadInput(f"--box: must be even, got {params.box}")
    if params.defocus_max < params.defocus_min:
        raise BadInput(f"--defocus-max: {params.defocus_max:g} is below --defocus-min {params.defocus_min:g}")
    source = source_density(params, seed)
    optics = [
        Optics(
            round(params.pixel_size * (11 / 12) ** g, 4), 2 * round(params.box * (9 / 8) ** g / 2), params.voltage, params.cs,
            params.amplitude_contrast, name=f"opticsGroup{g + 1}",
        )
        for g in range(params.optics_groups)
    ]  # fmt: skip
    settings = Settings(
        params.snr, params.shift_sd, (params.defocus_min, params.defocus_max), 200.0 if params.defocus_max > 0 else 0.0,
        params.astigmatism, params.per_micrograph, params.scale_sd, params.coloured_noise, params.preferred, seed,
    )  # fmt: skip
    return simulate_particles(source, params.particles, optics, settings)


def source_density(params: Params, seed: int) -> Phantom | Volume:
    """The phantom of a seed, or the map given, checked against box and pixel size."""
    if params.map is None:
        return phantom(params.box, params.pixel_size, params.symmetry, seed)
    volume = read_map(params.map)
    if volume.data.shape[-1] != params.box or abs(volume.pixel_size - params.pixel_size) > 1e-3 * params.pixel_size:
        raise BadInput(
            f"{params.map}: box {volume.data.shape[-1]} px of {volume.pixel_size:g} Å, but --box is {params.box} and --pixel-size "
            f"{params.pixel_size:g}; give the map's own, or resample it with `frazil map resample`"
        )
    return volume


def write(made: Simulated, folder: Path, params: Params) -> None:
    """The files of simulated particles, in a folder that exists.

    Stacks are named as RELION does, relative to the project: the current folder where the run's is inside it, else in full.
    """
    (folder / "stacks").mkdir(exist_ok=True)
    inside = folder.resolve().is_relative_to(Path.cwd())
    named = folder.resolve().relative_to(Path.cwd()) if inside else folder.resolve()
    particles = made.particles
    name = [""] * len(particles)
    for m, micrograph in enumerate(particles.micrographs):
        members = torch.nonzero(particles.micrograph == m)[:, 0]
        stack = f"stacks/{Path(micrograph).stem}.mrcs"
        write_mrc(folder / stack, made.images[members], particles.optics[int(particles.group[members[0]])].pixel_size, stack=True)
        for place, i in enumerate(members.tolist()):
            name[i] = f"{place + 1:06d}@{named / stack}"
    table = make_particle_set(particles, name)
    write_particles(folder / "truth.star", table)
    if params.with_truth:
        write_particles(folder / "particles.star", table)
    else:
        write_star(folder / "particles.star", {"optics": table.optics_table, "particles": table.table})
    write_mrc(folder / "reference.mrc", made.truth.data, made.truth.pixel_size)
    low = lowpass_map(made.truth.data, made.truth.pixel_size, params.lowpass)
    write_mrc(folder / "reference_lowpass.mrc", low, made.truth.pixel_size)
