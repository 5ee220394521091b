"""How accurately poses can be known: the error at which a particle's likelihood falls to 1 % (spec/refinement 4.4)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.rotation import euler_to_matrix, matrix_to_euler
from frazil.ops.project import project
from frazil.refine.model import Model
from frazil.refine.search import reference_volumes
from frazil.refine.windows import Engine, Frame, make_frame, particle_ctf

LIMIT = math.log(100)  # likelihood ratio 0.01
ANGLES = ((0.05, 0.2), (0.1, 1.0), (0.2, 2.0), (0.5, 5.0), (1.0, 10.0), (2.0, 20.0), (5.0, 30.0))
SHIFTS = ((0.1, 0.2), (0.2, 1.0), (0.2, 2.0), (0.5, 5.0), (1.0, 10.0))


def ladder(steps: tuple[tuple[float, float], ...]) -> Tensor:
    """Growing errors 0, …: each (step, until)."""
    values = [0.0]
    for step, until in steps:
        while values[-1] < until - 1e-9:
            values.append(round(values[-1] + step, 6))
    return torch.tensor(values, dtype=torch.float64)


def crossing(errors: Tensor, distance: Tensor) -> Tensor:
    """(n,) error at which a row of (n, steps) distances first exceeds LIMIT, by linear interpolation; the last error if never."""
    over = distance > LIMIT
    first = torch.where(over.any(1), over.double().argmax(1), distance.shape[1] - 1).clamp(min=1)
    rows = torch.arange(len(distance))
    d0, d1 = distance[rows, first - 1], distance[rows, first]
    part = ((LIMIT - d0) / (d1 - d0).clamp(min=1e-12)).clamp(0, 1)
    return errors[first - 1] + part * (errors[first] - errors[first - 1])


def expected_accuracy(
    particles: Particles, model: Model, klass: int, engine: Engine, size: int, generator: torch.Generator
) -> tuple[float, float]:
    """(degrees, Å) expected error of rotation and shift of one class, see `expected_accuracies`."""
    rotation, shift = expected_accuracies(particles, model, torch.tensor([klass]), engine, size, generator)[0].tolist()
    return rotation, shift


def expected_accuracies(
    particles: Particles, model: Model, classes: Tensor, engine: Engine, size: int, generator: torch.Generator,
    made: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(k, 2) float64 expected error of rotation (degrees) and shift (Å) of classes (k,), mean over `particles` at their present poses.

    For each particle one of rot, tilt, psi (2D classes: psi) and one of x, y is drawn; the squared difference of CTF-modulated slices
    over 2σ² is followed up a ladder of errors to ln 100. All classes are compared at once, with the same draws. made:
    `reference_volumes` for this window or a larger one and (k,) the place of `classes` in them, where there are any already.
    """
    if made is None:
        volumes = reference_volumes(replace(model, maps=model.maps[classes.to(model.maps.device)]), size, engine)
        made = volumes, torch.arange(len(classes))
    errors = []
    for g, optics in enumerate(particles.optics):
        index = torch.nonzero(particles.group == g)[:, 0]
        if len(index) == 0:
            continue
        frame = make_frame(optics, size, model.box, model.pixel_size, engine)
        bytes_each = len(ladder(ANGLES)) * frame.inside * len(classes) * (24 if engine.dtype == torch.float32 else 40)
        for some in index.split(max(1, engine.budget // 8 // bytes_each)):
            inverse = 0.5 / model.sigma2[g].to(engine.device)[frame.pixels.shell[: frame.inside]]
            inverse[0].fill_(0)
            errors.append(_errors(particles, some, made, frame, inverse, engine, generator))
    return torch.cat(errors, 1).mean(1)


def _errors(
    particles: Particles, some: Tensor, made: tuple[Tensor, Tensor], frame: Frame, inverse: Tensor, engine: Engine,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """(k, n, 2) float64 errors of rotation and shift of the particles `some` of one optics group against each class."""
    volumes, place = made
    angles, shifts, n, k, optics = ladder(ANGLES), ladder(SHIFTS), len(some), len(place), frame.optics
    c = particle_ctf(particles, some, frame.k, optics, engine).double() * frame.amplitude
    weight = c.square() * (c.square() if optics.ctf_premultiplied else 1) * inverse
    euler = matrix_to_euler(particles.rotation[some])[:, None].repeat(1, len(angles), 1)
    turned = torch.randint(3, (n,), generator=generator)
    euler[torch.arange(n), :, torch.full_like(turned, 2) if volumes.ndim == 3 else turned] += angles
    rotations = euler_to_matrix(euler.reshape(-1, 3)).to(device=engine.device, dtype=engine.dtype)
    which = place.to(engine.device).repeat_interleave(len(rotations))
    slices = project(
        volumes, rotations.repeat(k, 1, 1), frame.coords, engine.pad, which=which, implementation=engine.implementation
    ).view(k, n, len(angles), -1)  # fmt: skip
    difference = torch.einsum("knep,np->kne", (slices - slices[:, :, :1]).abs().square(), weight.to(slices.real)).double().cpu()
    along = frame.k[:, torch.randint(2, (n,), generator=generator).to(frame.k.device)].T  # (n, p)
    phase = 2 * math.pi * optics.pixel_size * along[:, None] * shifts[:, None].to(along)
    moved = torch.einsum("knp,nep->kne", slices[:, :, 0].abs().square().double() * weight, 2 - 2 * torch.cos(phase)).cpu()
    pair = (crossing(angles, difference.flatten(0, 1)), crossing(shifts, moved.flatten(0, 1)) * optics.pixel_size)
    return torch.stack(pair, -1).view(k, n, 2)
