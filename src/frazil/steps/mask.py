"""Solvent masks: low-pass, threshold, components, growth, soft edge (spec/processing 7.1).

    binary    low-passed map ≥ t, combined with a second one, small components left out
    grown     voxels nearer than `extend` px to the binary mask (negative: only voxels at least that far from the solvent)
    soft      ½ + ½ cos(π D/w) for 0 < D < w,   D = exact distance in px to the grown mask

Thresholds are proposed from the molecular mass (volume 1.21 Å³/Da) and from the knee of ln(volume) against the threshold.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from scipy import ndimage
from torch import Tensor

from frazil.maths.distance import bounding_box, squared_distance
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import resolution_shell

VOLUME_PER_DALTON = 1.21  # Å³/Da, from a partial specific volume of 0.73 cm³/g
BLUR_FACTOR = 1.5  # a low-passed particle takes more room than its atoms
EXPERT: JsonDict = {"level": "expert"}
PX: JsonDict = {"unit": "px"}
CONNECTED = np.ones((3, 3, 3), dtype=bool)  # voxels that touch by a corner belong together
Operation = Literal["and", "or", "and-not", "or-not"]


class MaskParams(BaseModel):
    """A soft mask from a map, an atomic model or a sphere."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    lowpass: float = Field(15.0, ge=0, description="low-pass the map first; 0: not at all", json_schema_extra={"unit": "Å"})
    threshold: float | None = Field(None, description="density from which on a voxel is inside; proposed from mass or knee if not given")
    mass: float | None = Field(None, gt=0, description="molecular mass of all that is in the map", json_schema_extra={"unit": "kDa"})
    largest: int = Field(0, ge=0, description="keep so many connected components, the largest; 0: all that are not small")
    smallest: float = Field(0.01, ge=0, le=1, description="leave out components smaller than this share of the largest",
                            json_schema_extra={"unit": "fraction", **EXPERT})  # fmt: skip
    extend: float = Field(3.0, description="grow by this much; negative: shrink", json_schema_extra=PX)
    edge: float = Field(3.0, ge=0, description="width of the soft cosine edge", json_schema_extra=PX)
    invert: bool = Field(False, description="solvent instead of particle", json_schema_extra=EXPERT)
    resolution: float | None = Field(None, gt=0, description="resolution the mask is meant for: warns where its edge is too hard for it",
                                     json_schema_extra={"unit": "Å"})  # fmt: skip


@dataclass(frozen=True)
class ThresholdCurve:
    """Volume that a threshold leaves, and the thresholds proposed."""

    threshold: Tensor  # (n,) float64, rising
    volume: Tensor  # (n,) float64 Å³ of voxels with at least that density
    proposals: dict[str, float] = field(default_factory=dict)  # by name: "knee", "mass"


@dataclass(frozen=True)
class Mask:
    """A mask and what is known of it."""

    data: Tensor  # (N, N, N) float32, 0 to 1
    threshold: float | None = None
    components: tuple[int, ...] = ()  # voxels of the components kept, largest first
    dropped: int = 0  # components left out
    volume: float = 0.0  # Å³ of the grown mask before its edge
    seed_volume: float = 0.0  # Å³ of the binary mask before growth
    warnings: tuple[str, ...] = ()

    @property
    def mass(self) -> float:
        """kDa of protein that would fill the binary mask before growth."""
        return self.seed_volume / VOLUME_PER_DALTON / 1e3


def threshold_curve(data: Tensor, pixel_size: float, mass: float | None = None, points: int = 400) -> ThresholdCurve:
    """Volume against threshold of a (low-passed) map (N, N, N), from its median to its maximum, with the proposals."""
    low, high = float(data.ravel()[:: max(1, data.numel() >> 20)].median()), float(data.max())  # a median of a million voxels is enough
    if not high > low:
        return ThresholdCurve(torch.tensor([low], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    counts = torch.histc(data, bins=points, min=low, max=high).double().cpu()
    volume = counts.flip(0).cumsum(0).flip(0) * pixel_size**3
    threshold = low + (high - low) * torch.arange(points, dtype=torch.float64) / points
    proposals = {"knee": knee(threshold, volume)}
    if mass is not None:
        wanted = mass * 1e3 * VOLUME_PER_DALTON * BLUR_FACTOR
        proposals["mass"] = float(np.interp(-wanted, -volume.numpy(), threshold.numpy()))
    return ThresholdCurve(threshold, volume, proposals)


def knee(threshold: Tensor, volume: Tensor) -> float:
    """Threshold half as far again above the first one as the point where ln(volume) lies farthest under the chord of its curve.

    That point is where the steep fall of the noise ends; a little above it blobs of noise no longer touch the particle. The curve ends
    where a thousandth of its first volume is left, so that a few bright voxels do not stretch it.
    """
    kept = volume >= volume[0] / 1000
    t, v = threshold[kept], volume[kept].log()
    if len(t) < 3:
        return float(threshold[0])
    x, y = (t - t[0]) / (t[-1] - t[0]), (v - v[-1]) / (v[0] - v[-1])
    return float(t[0] + 1.5 * (t[(1 - x - y).argmax()] - t[0]))


def keep_components(inside: Tensor, largest: int = 0, smallest: float = 0.01) -> tuple[Tensor, tuple[int, ...], int]:
    """(mask, voxels of each component kept, number left out) of a binary mask (N, N, N): the `largest` of those not too small."""
    if not bool(inside.any()):
        return inside, (), 0
    box = bounding_box(inside)
    cut = np.array(inside[box].cpu().numpy(), order="C")  # a copy: it is written to
    labels = np.zeros(cut.shape, np.int32)
    count = int(ndimage.label(cut, CONNECTED, output=labels))  # pyright: ignore[reportArgumentType]
    place = np.flatnonzero(cut)  # counting all voxels would take longer than labelling them
    label = labels.ravel()[place]
    del labels
    sizes = np.bincount(label, minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    kept = [int(i) for i in order if sizes[i] >= smallest * sizes.max()]
    kept = kept[:largest] if largest else kept
    if len(kept) == count:
        return inside, tuple(int(sizes[i]) for i in kept), 0
    chosen = np.zeros(count + 1, dtype=bool)
    chosen[[i + 1 for i in kept]] = True
    cut.ravel()[place[~chosen[label]]] = False
    out = torch.zeros_like(inside)
    out[box] = torch.from_numpy(cut).to(inside.device)
    return out, tuple(int(sizes[i]) for i in kept), count - len(kept)


def combine(first: Tensor, second: Tensor, operation: Operation) -> Tensor:
    """Two binary masks as sets: and, or, and-not (without the second), or-not (with all outside the second)."""
    other = second if operation in ("and", "or") else ~second
    return first & other if operation.startswith("and") else first | other


def grow(inside: Tensor, extend: float) -> Tensor:
    """Binary mask (N, N, N) grown by voxels nearer than `extend` px, or shrunk by those nearer than −extend px to the outside."""
    reach = math.ceil(abs(extend))
    if not reach or not bool(inside.any()):
        return inside.clone()
    if extend < 0:
        solvent = ~inside
        return inside & (squared_distance(solvent, reach) >= extend**2) if bool(solvent.any()) else inside.clone()
    box = bounding_box(inside, reach)
    out = torch.zeros_like(inside)
    out[box] = squared_distance(inside[box], reach) < extend**2
    return out


def soften(inside: Tensor, edge: float) -> Tensor:
    """(N, N, N) float32 mask: 1 inside, ½ + ½ cos(π D/w) at distance D < w = edge px, 0 beyond."""
    out = inside.float()
    reach = math.ceil(edge)
    if not reach or not bool(inside.any()):
        return out
    box = bounding_box(inside, reach)
    table = torch.arange((reach + 1) ** 2 + 1, dtype=torch.float64).sqrt().div(edge).clamp(max=1)
    table = (0.5 + 0.5 * torch.cos(math.pi * table)).float().to(inside.device)
    squared = squared_distance(inside[box], reach)
    weights = out[box]
    for weight, distance in zip(weights, squared, strict=True):  # a plane at a time: an index is eight bytes
        weight.copy_(table[distance.long()])
    return out


def spread(points: Tensor, box: int, radius_px: float) -> Tensor:
    """(N, N, N) bool: voxels nearer than radius_px to any of the points (n, 3), xyz in px of the first voxel, inside."""
    place = points.round().long()
    place = place[((place >= 0) & (place < box)).all(1)]
    seeds = torch.zeros(box, box, box, dtype=torch.bool, device=points.device)
    seeds[place[:, 2], place[:, 1], place[:, 0]] = True
    return seeds | grow(seeds, radius_px)


def make_mask(inside: Tensor, pixel_size: float, params: MaskParams, threshold: float | None = None) -> Mask:
    """The soft mask of a binary one (N, N, N): components, growth, edge, warnings. `threshold` is kept for the record."""
    kept, components, dropped = keep_components(inside, params.largest, params.smallest)
    grown = grow(kept, params.extend)
    data = soften(grown, params.edge)
    voxel = pixel_size**3
    mask = Mask(data, threshold, components, dropped, int(grown.count_nonzero()) * voxel, int(kept.count_nonzero()) * voxel)
    told = warnings_of(mask, pixel_size, params)
    return Mask(1 - data if params.invert else data, threshold, components, dropped, mask.volume, mask.seed_volume, told)


def warnings_of(mask: Mask, pixel_size: float, params: MaskParams) -> tuple[str, ...]:
    """What a user should know of a mask before using it, in plain words."""
    out, data = [], mask.data
    box = data.shape[-1]
    faces = [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, 0], data[:, :, -1]]
    if max(float(face.max()) for face in faces) > 0.01:
        out.append("the mask touches the edge of the box: raise the threshold, or pad the map to a larger box")
    share = mask.volume / (box * pixel_size) ** 3
    if share > 0.5:
        out.append(f"the mask fills {100 * share:.0f} % of the box: the threshold is so low that it takes in solvent")
    if params.mass and not 0.7 < mask.mass / params.mass < 2.5:
        word = "more" if mask.mass > params.mass else "less"
        out.append(f"the density inside has room for {mask.mass:.0f} kDa of protein, {word} than fits the {params.mass:g} kDa given: "
                   "look at the threshold")  # fmt: skip
    if params.resolution and params.edge * pixel_size < params.resolution:
        needed = math.ceil(params.resolution / pixel_size)
        out.append(f"the edge of {params.edge * pixel_size:.1f} Å is narrower than the resolution of {params.resolution:g} Å: the mask is "
                   f"too tight and will raise the FSC by itself; use --edge {needed}")  # fmt: skip
    if len(mask.components) > 1:
        sizes = ", ".join(f"{v * pixel_size**3:.0f}" for v in mask.components[:5])
        out.append(f"the mask has {len(mask.components)} separate parts ({sizes} Å³): --largest 1 keeps the largest alone")
    return tuple(out)


def filtered(data: Tensor, pixel_size: float, lowpass: float) -> Tensor:
    """The map (N, N, N) low-passed at the shell nearest to `lowpass` Å, as RELION does; itself where that is 0 or beyond Nyquist."""
    shell = resolution_shell(data.shape[-1], pixel_size, lowpass) if lowpass > 0 else data.shape[-1]
    return lowpass_map(data, pixel_size, data.shape[-1] * pixel_size / shell) if 0 < shell < data.shape[-1] // 2 else data
