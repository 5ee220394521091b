"""What is looked for: templates from a stack or class averages, or views of a map; their diameter and their grey scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles, Volume
from frazil.io.images import find_stack, split_image_name
from frazil.io.mrc import read_header, read_stack
from frazil.io.star import first_table, read_star
from frazil.jobs.inputs import check_symmetry, read_cube
from frazil.maths.masks import radii
from frazil.maths.peaks import highest_apart, local_maxima, split_level, thinned
from frazil.maths.rotation import euler_to_matrix
from frazil.steps.pick import Bank, Prepared, ScoreMap, amplitudes
from frazil.steps.project import prepare_map, project_particles

RIM = 0.1  # of its highest value, down to which the radial profile of a template counts as particle
ROOM = 1.1  # mask over what was measured
MOST_VIEWS = 1000


@dataclass(frozen=True)
class Templates:
    """Pictures of the particle, white on black."""

    images: Tensor  # (t, N, N)
    pixel_size: float  # Å
    source: str  # for messages
    of_map: bool  # grey scale unknown


def read_templates(path: Path, pixel_size: float | None) -> Templates:
    """Templates of a stack (.mrcs) or of a STAR file that lists images (class averages); empty ones are left out.

    Raises BadInput: no such file, not square, not finite, all empty, no pixel size.
    """
    images, found = _listed(path) if path.suffix == ".star" else (read_stack(path), read_header(path).pixel_size[0])
    if images.shape[-1] != images.shape[-2]:
        raise BadInput(f"{path}: templates are {images.shape[-1]} x {images.shape[-2]} px; expected square ones")
    if images.shape[-1] % 2:
        images = images[:, :-1, :-1]  # the centre stays at N // 2
    if not bool(torch.isfinite(images).all()):
        raise BadInput(f"{path}: holds values that are not finite (NaN or infinite)")
    full = images.flatten(1).std(-1) > 1e-12
    if not bool(full.any()):
        raise BadInput(f"{path}: all {len(images)} templates are empty; select class averages first")
    size = pixel_size or found
    if not size > 0:
        raise BadInput(f"{path}: has no pixel size in its header; give --template-pixel-size")
    return Templates(images[full], size, str(path), False)


def view_templates(path: Path, symmetry: str, step: float, pixel_size: float | None) -> Templates:
    """Projections of a map on the HEALPix grid with at most `step` degrees between views, those that its symmetry leaves different."""
    from frazil.maths.sphere import angular_step, directions
    from frazil.maths.symmetry import kept_directions

    check_symmetry(symmetry)
    volume = read_cube(path)
    volume = Volume(volume.data, pixel_size or volume.pixel_size)
    order = max(0, math.ceil(math.log2(angular_step(0) / step) - 1e-9))
    kept = kept_directions(symmetry, order)
    if len(kept) > MOST_VIEWS:
        raise BadInput(f"--view-step: {step:g} degrees make {len(kept)} views; expected {MOST_VIEWS} at most, 30 degrees are enough")
    angles = torch.cat([directions(order)[kept], torch.zeros(len(kept), 1, dtype=torch.float64)], -1)
    n = len(angles)
    zero = torch.zeros(n, dtype=torch.int64)
    optics = (Optics(volume.pixel_size, volume.data.shape[-1]),)
    place = torch.zeros(n, 2, dtype=torch.float64), torch.zeros(n, 3, dtype=torch.float64)
    particles = Particles(optics, zero, euler_to_matrix(angles), *place, zero.clone(), zero.clone())
    images = project_particles(prepare_map(volume), volume.pixel_size, particles, torch.arange(n), shifts=False)
    return Templates(different(images), volume.pixel_size, str(path), True)


def different(images: Tensor, tolerance: float = 0.02) -> Tensor:
    """Images (t, N, N) without those that equal an earlier one to `tolerance` of its norm (a round particle has one view)."""
    kept: list[int] = []
    for i, image in enumerate(images):
        if all(float((image - images[k]).norm()) > tolerance * float(images[k].norm()) for k in kept):
            kept.append(i)
    return images[kept]


def measured_diameter(templates: Templates) -> float:
    """Å: diameter of what the templates show, with some room, from their mean radial profile."""
    n = templates.images.shape[-1]
    r = radii(n, 2)
    inside = r <= n / 2
    level = templates.images[:, r > n / 2 - 2].mean(-1)[:, None, None]
    strength = (templates.images - level).square().mean(0).sqrt()
    shell = r.round().long()
    profile = torch.bincount(shell[inside], strength[inside].double()) / torch.bincount(shell[inside])
    rim = int((profile > RIM * profile.max()).nonzero().max())
    return min(2 * rim * ROOM, n) * templates.pixel_size


def calibrated_scale(prepared: Sequence[Prepared], bank: Bank, distance: float, edge_px: int = 2) -> float:
    """Factor for the templates' grey scale so that FOM = 1 for the typical particle: median amplitude of the stronger half of the peaks.

    Peaks are parted into particles and the rest by Otsu's level. Raises BadInput where nothing resembles the templates.
    """
    found = [peak_values(amplitudes(p, bank), distance / bank.grid.work_pixel, edge_px) for p in prepared]
    values = np.concatenate(found) if found else np.zeros(0)
    values = values[values > 0]
    if not len(values):
        raise BadInput("the micrographs hold nothing that resembles the templates: are particles dark in them (--no-invert if not)?")
    return float(np.median(values[values >= split_level(values)]))


def automatic_threshold(matched: Sequence[ScoreMap], distance: float) -> float:
    """Otsu's level of the peaks of some micrographs."""
    values = [peak_values(scores.value, distance / scores.grid.work_pixel) for scores in matched]
    return split_level(np.concatenate(values)) if values else 0.0


def peak_values(score: Tensor, distance: float, edge: int = 2) -> np.ndarray:
    """Values of the maxima > 0 of a score map, at least `distance` work pixels apart."""
    allowed = torch.zeros_like(score, dtype=torch.bool)
    allowed[edge:-edge, edge:-edge] = True
    peaks = local_maxima(score, allowed, 0.0)
    values, order = score[peaks[:, 0], peaks[:, 1]].double().sort(descending=True, stable=True)
    peaks = peaks[order].double()
    kept = thinned(peaks, distance)
    values = values[kept].cpu().numpy()
    return values[highest_apart(peaks[kept].cpu().numpy(), values, distance)]


def _listed(path: Path) -> tuple[Tensor, float]:
    """Images named in a STAR file, and their pixel size."""
    star = read_star(path)
    for label in ("rlnReferenceImage", "rlnImageName"):
        found = first_table(star, label)
        if found is not None:
            break
    else:
        raise BadInput(f"{path}: has no column _rlnReferenceImage or _rlnImageName; expected class averages, or give a stack (.mrcs)")
    out, sizes = [], []
    for name in found[1][label]:
        number, stack = split_image_name(str(name)) if "@" in str(name) else (1, str(name))
        file = find_stack(stack, path)
        if file is None:
            raise BadInput(f"{path}: {stack}: no such file; run in the project folder")
        images = read_stack(file)
        if not 1 <= number <= len(images):
            raise BadInput(f"{path}: {name}: {file} holds {len(images)} images")
        out.append(images[number - 1])
        sizes.append(read_header(file).pixel_size[0])
    if len({tuple(image.shape) for image in out}) > 1:
        raise BadInput(f"{path}: the images have different sizes; expected equal ones")
    return torch.stack(out), sizes[0]
