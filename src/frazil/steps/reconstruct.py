"""Direct reconstruction: a map from particles whose poses are known, weighted by their CTF (spec/refinement 3.1-3.4).

    B(p) = Σ_i c_i(k) X_i(k) exp(−2πi k·o_i),    W(p) = Σ_i c_i(k)²,    V = B / max(W, W̄(|p|)/1000)

with p = P·R_iᵀ(kx, ky, 0). There is no prior: noise stays in the map at every resolution, which is what half maps are for.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from frazil.data import Images, Particles
from frazil.maths.ctf import odd_phase
from frazil.maths.fourier import half_volume_radius, image_ft
from frazil.ops.insert import insert_
from frazil.refine.maximization import prepare_sums_, reconstruct
from frazil.refine.windows import Engine, make_frame, particle_ctf

BATCH_PIXELS = 1 << 23  # pixels of images worked on at a time


class ReconstructParams(BaseModel):
    """Reconstruct a map from particles with known poses."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    symmetry: str = Field("C1", description="point group of the particle: Cn, Dn, T, O, I, I1 to I4")
    max_resolution: float = Field(0.0, ge=0, description="leave out what is finer; 0: go to Nyquist", json_schema_extra={"unit": "Å"})
    ctf: bool = Field(True, description="weight and correct by the CTF")
    pad: float = Field(2.0, ge=1, le=4, description="padding of the Fourier volume", json_schema_extra={"level": "expert"})
    ctf_intact_first_peak: bool = Field(False, description="leave the CTF 1 before its first peak", json_schema_extra={"level": "expert"})


@dataclass(frozen=True)
class Target:
    """The volume to fill: box in px of pixel_size Å, up to a Fourier window of side `size`."""

    box: int
    pixel_size: float
    size: int
    params: ReconstructParams
    device: str = "cpu"
    dtype: torch.dtype = torch.float32  # of the images; sums are of the same type

    def engine(self) -> Engine:
        """The settings the shared pieces of the likelihood engine ask for."""
        mode = "intact_first_peak" if self.params.ctf_intact_first_peak else "normal"
        return Engine(diameter=0.0, pad=self.params.pad, ctf_mode=mode, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Sums:
    """B and W of a reconstruction: half volumes (see maths.fourier), filled in place."""

    data: Tensor  # complex
    weight: Tensor  # real


def make_target(box: int, pixel_size: float, params: ReconstructParams, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Target:
    """A target whose window reaches the resolution asked for, at most Nyquist."""
    wanted = math.ceil(box * pixel_size / params.max_resolution - 1e-9) if params.max_resolution > 0 else box // 2
    return Target(box, pixel_size, min(box, 2 * wanted), params, device, dtype)


def empty_sums(target: Target) -> Sums:
    """Zeros, in double precision where that takes less than 2 GB."""
    m = half_volume_radius(target.params.pad, target.size // 2)
    shape = (2 * m + 1, 2 * m + 1, m + 1)
    double = target.dtype == torch.float64 or math.prod(shape) * 24 < 2 << 30
    weight = torch.zeros(shape, dtype=torch.float64 if double else torch.float32, device=target.device)
    return Sums(torch.zeros_like(weight, dtype=torch.complex128 if double else torch.complex64), weight)


def batches(particles: Particles, chosen: Tensor) -> Iterator[Tensor]:
    """Indices (b,) of `chosen` particles, one optics group a batch, as many as are worked on at a time."""
    for group, optics in enumerate(particles.optics):
        members = chosen[particles.group[chosen] == group]
        yield from members.split(max(1, BATCH_PIXELS // optics.box**2)) if len(members) else ()


def add_batch_(sums: Sums, images: Images, particles: Particles, index: Tensor, target: Target) -> None:
    """Add the particles at `index` (b,), all of one optics group, to the sums in place."""
    optics = particles.optics[int(particles.group[index[0]])]
    engine = target.engine()
    frame = make_frame(optics, target.size, target.box, target.pixel_size, engine)
    k = frame.k
    x = image_ft(images[index].to(device=target.device, dtype=target.dtype))
    x = x.reshape(len(index), -1)[:, frame.pixels.index[: frame.inside]]
    turn = -2 * math.pi * (particles.shift[index].to(k) @ k.T) - odd_phase(k, optics)
    x = x * torch.polar(torch.ones_like(turn), turn).to(x.dtype)
    c = particle_ctf(particles, index, k, optics, engine) if target.params.ctf else torch.ones(x.shape, dtype=target.dtype, device=x.device)
    numerator = x if optics.ctf_premultiplied and target.params.ctf else x * c
    gain = frame.amplitude
    rotations = particles.rotation[index].to(device=target.device, dtype=target.dtype)
    insert_(sums.data, sums.weight, numerator * gain, (c * gain) ** 2, rotations, frame.coords, target.params.pad)


def finish(sums: Sums, target: Target) -> Tensor:
    """(N, N, N) float32 map of the sums: symmetry, division, back to real space. `sums` may be used further."""
    data, weight = prepare_sums_(sums.data, sums.weight, target.params.symmetry)
    return reconstruct(data, weight, None, target.params.pad, target.box)[0].cpu()


def reconstruct_poses(images: Images, particles: Particles, target: Target, chosen: Tensor | None = None) -> Tensor:
    """(N, N, N) float32 map of the `chosen` particles (indices; None: all) at the poses they have."""
    sums = empty_sums(target)
    for index in batches(particles, torch.arange(len(particles)) if chosen is None else chosen):
        add_batch_(sums, images, particles, index, target)
    return finish(sums, target)
