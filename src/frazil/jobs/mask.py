"""`frazil mask`: a soft solvent mask from a map, an atomic model or a sphere, with a plot of the threshold and of the mask on the map."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.models import check_inside, read_atoms
from frazil.io.mrc import write_mrc
from frazil.jobs.half_maps import read_map_at
from frazil.jobs.inputs import check_same_grid
from frazil.jobs.map_plots import plot_mask, plot_threshold
from frazil.jobs.pages import Picture, write_page
from frazil.jobs.run import Run
from frazil.maths.masks import radii
from frazil.steps.mask import EXPERT, PX, Mask, MaskParams, Operation, ThresholdCurve, combine, filtered, make_mask, spread, threshold_curve

POSITIONAL = ("map",)
HAS_RUN_DIRECTORY = True
CAPTIONS = {
    "threshold": "The curve falls steeply while the threshold takes in noise; the knee is where that ends. The mass line is where the "
                 "volume is one and a half times that of the protein. The right threshold keeps the particle whole and no dust.",
    "mask": "Central slices with the mask at 0.01 and 0.99 (orange) and 0.5 (red). The inner line should follow the particle at some "
            "distance; nothing of it may be cut off.",
}  # fmt: skip


class Params(MaskParams):
    """Make a soft mask: threshold, growth, cosine edge; from a map, an atomic model (--model) or a sphere (--radius)."""

    map: Path | None = Field(None, description="the map to make it from, or, with --model or --radius, whose grid to take")
    model: Path | None = Field(None, description="atomic model (PDB or mmCIF): the mask holds its atoms")
    atom_radius: float = Field(3.0, gt=0, description="distance from an atom that is inside", json_schema_extra={"unit": "Å", **EXPERT})
    radius: float | None = Field(None, gt=0, description="a sphere of this radius", json_schema_extra=PX)
    inner_radius: float = Field(0.0, ge=0, description="radius of a hole in the sphere", json_schema_extra={**PX, **EXPERT})
    centre: tuple[float, float, float] = Field((0.0, 0.0, 0.0), description="centre xyz of the sphere from the middle of the box",
                                               json_schema_extra={**PX, **EXPERT})  # fmt: skip
    box: int | None = Field(None, ge=8, le=2048, multiple_of=2, description="side of the mask, where there is no map", json_schema_extra=PX)
    pixel_size: float | None = Field(None, gt=0, description="pixel size, instead of that in the map's header",
                                     json_schema_extra={"unit": "Å"})  # fmt: skip
    combine: Path | None = Field(None, description="a second map, thresholded alike, to combine with")
    operation: Operation = Field("and", description="how: and, or, and-not (leave its voxels out), or-not")

    @model_validator(mode="after")
    def _one_source(self) -> Params:
        """There is something to make a mask of."""
        if self.model is not None and self.radius is not None:
            raise ValueError("--model and --radius cannot be given together; make two masks and --combine them")
        if self.map is None and self.model is None and self.radius is None:
            raise ValueError("give a map, or --model or --radius")
        if self.map is None and (self.box is None or self.pixel_size is None):
            raise ValueError("without a map --box and --pixel-size are needed")
        if self.map is not None and self.box is not None:
            raise ValueError("--box: the map has its own box; `frazil map crop` changes it")
        if self.radius is not None and self.inner_radius >= self.radius:
            raise ValueError(f"--inner-radius: {self.inner_radius:g} px is not smaller than --radius {self.radius:g}")
        return self


def run(params: Params, run: Run) -> None:
    """Write mask.mrc, plots and report.html."""
    if run.resumed:
        run.note("a mask takes less time to make than what is half made to keep: it is made anew")
    grid = read_grid(params)
    data = grid.data.to(run.device)
    curve: ThresholdCurve | None = None
    threshold: float | None = None
    run.progress(0, 3, "threshold")
    if params.model is not None:
        inside = around_atoms(params, params.model, grid, run.device)
    elif params.radius is not None:
        inside = ball(params, data.shape[-1], run.device)
    else:
        smooth = filtered(data, grid.pixel_size, params.lowpass)
        curve = threshold_curve(smooth, grid.pixel_size, params.mass)
        threshold = choose_threshold(params, curve, float(smooth.max()))
        inside = smooth >= threshold
        del smooth
    if params.combine is not None:
        inside = combine(inside, second(params, grid, threshold, run.device), params.operation)
    if not bool(inside.any()):
        raise BadInput("--combine: nothing is left inside the mask; look at --operation and at both maps")
    run.progress(1, 3, "components, growth and edge")
    mask = make_mask(inside, grid.pixel_size, params, threshold)
    run.progress(2, 3, "writing")
    write_mrc(run.file("mask.mrc"), mask.data, grid.pixel_size, origin=grid.origin)
    report(run, params, grid, mask, curve)


def read_grid(params: Params) -> Volume:
    """The map, or an empty one of the box and pixel size asked for, with its centre as origin of coordinates."""
    if params.map is not None:
        return read_map_at(params.map, params.pixel_size)
    assert params.box is not None and params.pixel_size is not None
    first = -(params.box // 2) * params.pixel_size
    return Volume(torch.zeros(params.box, params.box, params.box), params.pixel_size, (first, first, first))


def choose_threshold(params: Params, curve: ThresholdCurve, highest: float) -> float:
    """The threshold given, or proposed from the mass, or from the knee; raises BadInput where nothing would be inside."""
    if params.threshold is None:
        if not curve.proposals:
            raise BadInput(f"{params.map}: every voxel has the same value; expected a map of a particle")
        return curve.proposals["mass" if params.mass else "knee"]
    if params.threshold > highest:
        raise BadInput(f"--threshold: {params.threshold:g} is above the highest density of the low-passed map, {highest:.4g}; the mask "
                       f"would be empty: try {curve.proposals.get('knee', highest / 5):.3g}")  # fmt: skip
    return params.threshold


def around_atoms(params: Params, model: Path, grid: Volume, device: torch.device) -> Tensor:
    """(N, N, N) bool: voxels near an atom, in the frame of the map's header, or around the centre of the box without a map."""
    position = read_atoms(model).position
    box = grid.data.shape[-1]
    if params.map is None:
        position = position - position.mean(0) - torch.tensor(grid.origin, dtype=torch.float64)
    else:
        position = position - torch.tensor(grid.origin, dtype=torch.float64)
    check_inside(model, position.numpy(), box, grid.pixel_size)
    return spread((position / grid.pixel_size).to(device), box, params.atom_radius / grid.pixel_size)


def ball(params: Params, box: int, device: torch.device) -> Tensor:
    """(N, N, N) bool: the sphere, or the shell between two."""
    assert params.radius is not None
    if any(params.centre):
        lines = [torch.arange(box, device=device, dtype=torch.float32) - box // 2 - c for c in params.centre]
        r = (lines[2][:, None, None] ** 2 + lines[1][:, None] ** 2 + lines[0] ** 2).sqrt()
    else:
        r = radii(box, 3, device)
    return (r <= params.radius) & (r >= params.inner_radius)


def second(params: Params, grid: Volume, threshold: float | None, device: torch.device) -> Tensor:
    """The second map as a set; a mask (values 0 to 1) beside a sphere or a model is taken at ½."""
    assert params.combine is not None
    other = read_map_at(params.combine, params.pixel_size)
    check_same_grid(grid, params.map or Path("the mask asked for"), other, params.combine)
    if threshold is None:
        return other.data.to(device) >= (params.threshold if params.threshold is not None else 0.5)
    return filtered(other.data.to(device), grid.pixel_size, params.lowpass) >= threshold


def report(run: Run, params: Params, grid: Volume, mask: Mask, curve: ThresholdCurve | None) -> None:
    """Say what came out, with plots."""
    for line in mask.warnings:
        run.warn(line)
    inside = int((mask.data > 0.5).count_nonzero()) / mask.data.numel()
    run.event("mask", threshold=mask.threshold, volume=mask.volume, seed_volume=mask.seed_volume, mass=mask.mass, share=inside,
              components=list(mask.components[:20]), dropped=mask.dropped, proposals=curve.proposals if curve else {})  # fmt: skip
    numbers = [(f"{mask.volume:.0f} Å³", "volume of the mask"), (f"{100 * inside:.1f} %", "of the box"),
               (f"{mask.mass:.0f} kDa", "protein that would fill it before growth"), (str(len(mask.components)), "components")]  # fmt: skip
    pictures = []
    if curve is not None and mask.threshold is not None:
        numbers.insert(0, (f"{mask.threshold:.4g}", "threshold"))
        proposals = ", ".join(f"{name} {value:.4g}" for name, value in curve.proposals.items())
        run.summary(f"threshold {mask.threshold:.4g} (proposed: {proposals})")
        figure = plot_threshold(curve.threshold.numpy(), curve.volume.numpy(), curve.proposals, mask.threshold)
        pictures.append(Picture("threshold", "Threshold", CAPTIONS["threshold"], figure))
    data = mask.data.cpu().numpy()
    shown = grid.data.numpy() if params.map is not None else data
    pictures.append(Picture("mask", "Mask", CAPTIONS["mask"], plot_mask(np.asarray(shown), data, grid.pixel_size)))
    write_page(run, numbers, mask.warnings, pictures)
    run.summary(f"{run.file('mask.mrc')}: {mask.volume:.0f} Å³, {100 * inside:.1f} % of the box; "
                f"room for {mask.mass:.0f} kDa of protein before growth")  # fmt: skip
