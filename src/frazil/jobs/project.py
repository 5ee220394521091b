"""`frazil project`: projections of a map as a particle stack with its STAR file."""
from __future__ import annotations

import os
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from frazil.data import BadInput, Optics, Particles, Volume
from frazil.io.mrc import write_mrc
from frazil.io.particles import ParticleSet, make_particle_set, read_particles, write_particles
from frazil.jobs.inputs import read_cube
from frazil.jobs.run import Run
from frazil.maths.rotation import euler_to_matrix, random_rotations
from frazil.steps.project import prepare_map, project_particles

POSITIONAL = ("map",)
HAS_RUN_DIRECTORY = False
BATCH = 1 << 23  # pixels projected at a time
EXPERT: JsonDict = {"level": "expert"}


class Params(BaseModel):
    """Project a map along the poses of a STAR file, along given angles, or along random directions."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    map: Path = Field(description="the map")
    output: Path = Field(description="stack to write (.mrcs); a STAR file with the poses goes beside it")
    star: Path | None = Field(None, description="project at the poses, and with the box and pixel size, of these particles")
    angles: tuple[float, ...] = Field((), description="project at these angles: rot tilt psi, or several such triples",
                                      json_schema_extra={"unit": "degrees"})  # fmt: skip
    number: int = Field(0, ge=0, description="project along so many random directions")
    ctf: bool = Field(False, description="multiply by the CTF of the particles of --star")
    shifts: bool = Field(True, description="displace the pictures by the offsets of --star", json_schema_extra=EXPERT)
    seed: int = Field(0, ge=0, description="seed of the random directions", json_schema_extra=EXPERT)

    @model_validator(mode="after")
    def _one_source(self) -> Params:
        """Exactly one of the three ways to give poses, and a CTF only with a STAR file."""
        if sum(map(bool, (self.star, self.angles, self.number))) != 1:
            raise ValueError("give one of --star, --angles and --number")
        if len(self.angles) % 3:
            raise ValueError(f"--angles: {len(self.angles)} values; expected triples of rot, tilt, psi")
        if self.ctf and not self.star:
            raise ValueError("--ctf needs --star, which says with what CTF")
        return self


def run(params: Params, run: Run | None) -> None:
    """Write the stack and its STAR file."""
    volume = read_cube(params.map)
    origin = read_particles(params.star) if params.star else invented(params, volume)
    particles = origin.particles
    if params.ctf and not origin.has_ctf:
        raise BadInput(f"{params.star}: label _rlnDefocusU is missing, so there is no CTF to apply; leave out --ctf")
    boxes = {optics.box for optics in particles.optics}
    if len(boxes) != 1 or 0 in boxes:
        raise BadInput(f"{params.star}: optics groups have boxes {sorted(boxes)} px; a stack holds one box: split the file by optics group")
    images = project_all(volume, particles, params)
    star = params.output.with_suffix(".star")
    write_mrc(params.output, images, particles.optics[0].pixel_size, stack=True)
    stack = os.path.relpath(params.output, star.parent)
    names = {"rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(len(particles))]}
    write_particles(star, origin, extra=names)
    print(f"{len(images)} projections of {images.shape[-1]} px in {params.output}, poses in {star}")


def invented(params: Params, volume: Volume) -> ParticleSet:
    """Particles without CTF at the angles given or along random directions, on the grid of the map."""
    if params.angles:
        rotation = euler_to_matrix(torch.tensor(params.angles, dtype=torch.float64).reshape(-1, 3))
    else:
        rotation = random_rotations(params.number, torch.Generator().manual_seed(params.seed))
    n, optics = len(rotation), Optics(volume.pixel_size, volume.data.shape[-1])
    zero = torch.zeros(n, dtype=torch.int64)
    shift, defocus = torch.zeros(n, 2, dtype=torch.float64), torch.zeros(n, 3, dtype=torch.float64)
    particles = Particles((optics,), zero, rotation, shift, defocus, zero.clone(), zero.clone(), (params.map.name,))
    return make_particle_set(particles, [""] * n)


def project_all(volume: Volume, particles: Particles, params: Params) -> torch.Tensor:
    """(n, N, N) float32 on the CPU, in the order of the particles."""
    box = particles.optics[0].box
    half = prepare_map(volume, "cuda" if torch.cuda.is_available() else "cpu")
    out = torch.empty(len(particles), box, box)
    for group in range(len(particles.optics)):
        for index in torch.nonzero(particles.group == group)[:, 0].split(max(1, BATCH // box**2)):
            if len(index):
                out[index] = project_particles(half, volume.pixel_size, particles, index, ctf=params.ctf, shifts=params.shifts).cpu()
    return out
