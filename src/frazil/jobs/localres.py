"""`frazil localres`: local resolution, locally filtered map, directional FSC, and how evenly the particles' views sample Fourier space."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field

from frazil.data import BadInput
from frazil.io.mrc import write_mrc
from frazil.io.particles import read_particles
from frazil.io.star import write_star
from frazil.jobs.fsc import spoken
from frazil.jobs.half_maps import Halves, read_halves, read_mtf
from frazil.jobs.inputs import check_symmetry
from frazil.jobs.map_plots import plot_directional, plot_local_resolution, plot_resolution_histogram, plot_sphere
from frazil.jobs.pages import Picture, write_page
from frazil.jobs.run import Run
from frazil.jobs.watching import watched
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import fourier_resample
from frazil.maths.fsc import fsc, resolution_at
from frazil.steps.directional import Directional, DirectionalParams, PoseEfficiency, directional_fsc, fsc_volume, pose_efficiency
from frazil.steps.localres import EXPERT, GOLD, LocalResolution, LocalresParams, local_resolution
from frazil.steps.mask import filtered, threshold_curve

POSITIONAL = ("half1", "half2")
HAS_RUN_DIRECTORY = True
SURFACE_LEVEL = 0.3  # of the density that a two-hundredth of the region exceeds: the surface drawn
PICTURE_SIDE = 128  # smaller boxes are drawn on a grid so much finer
ANISOTROPIC = 0.9  # sphericity below which a warning is given
UNEVEN = 0.5  # efficiency of the views below which a warning is given
CAPTIONS = {
    "locres": "The locally filtered map seen along its axes and cut through the middle, coloured by local resolution. The inside of a "
              "rigid particle is finer than its surface and flexible parts.",
    "histogram": "Local resolutions of the voxels inside the mask.",
    "directional": "FSC in cones about all directions. Curves that fan out, and a wide histogram, mean that the map is better resolved in "
                   "some directions than in others: preferred orientations.",
    "sphere": "Left to right, where given: resolution by direction in Fourier space; how densely the views sample it; the viewing "
              "directions themselves. Views cover the great circle at right angles to them.",
}  # fmt: skip


class Params(LocalresParams, DirectionalParams):
    """Local and directional resolution of two half maps."""

    half1: Path = Field(description="first unfiltered half map, as run_half1_class001_unfil.mrc")
    half2: Path | None = Field(None, description="second one; if not given, the first's name with half2 for half1")
    mask: Path | None = Field(None, description="solvent mask: where to look, and whose voxels are in histogram and statistics; the maps "
                                                "themselves are not masked")  # fmt: skip
    particles: Path | None = Field(None, description="data STAR file of the particles, for the efficiency of their views")
    symmetry: str = Field("C1", description="point group of the particle, for that")
    pixel_size: float | None = Field(None, gt=0, description="pixel size, instead of that in the headers", json_schema_extra={"unit": "Å"})
    mtf: Path | None = Field(None, description="STAR file of the detector's MTF, to divide the filtered map by")
    mtf_pixel_size: float | None = Field(None, gt=0, description="pixel size of the detector's images; that of the maps if not given",
                                         json_schema_extra={"unit": "Å"})  # fmt: skip
    directional: bool = Field(True, description="measure the directional FSC too", json_schema_extra=EXPERT)


def run(params: Params, run: Run) -> None:
    """Write relion_locres.mrc, relion_locres_filtered.mrc, locres_points.star, directional.star, fsc3d.mrc, plots and report.html."""
    operators = check_symmetry(params.symmetry)
    rotations = read_rotations(params.particles) if params.particles else None
    halves = read_halves(params.half1, params.half2, params.mask, params.pixel_size, run.device)
    mtf = read_mtf(params.mtf, params.mtf_pixel_size, halves.pixel_size) if params.mtf else None
    if params.sampling < halves.pixel_size:
        raise BadInput(f"--sampling: {params.sampling:g} Å is less than a pixel of {halves.pixel_size:g} Å")
    if 2 * (params.radius + params.edge) > halves.box * halves.pixel_size:
        raise BadInput(f"--radius and --edge: the window of {2 * (params.radius + params.edge):g} Å is larger than the box of "
                       f"{halves.box * halves.pixel_size:.4g} Å")  # fmt: skip

    watch = watched(run, halves.paths[1])
    found = local_resolution(halves.first, halves.second, halves.mask, halves.pixel_size, params, mtf, run.seed, watch)
    write_mrc(run.file("relion_locres.mrc"), found.resolution, halves.pixel_size)
    write_mrc(run.file("relion_locres_filtered.mrc"), found.filtered, halves.pixel_size)
    write_points(run, halves, found)
    directional = None
    if params.directional:
        watch.progress("directional FSC", 0, 1)
        directional = directional_fsc(halves.first, halves.second, halves.mask, halves.pixel_size, params)
        write_directional(run, halves, directional)
    views = pose_efficiency(rotations, operators) if rotations is not None else None
    report(run, halves, found, directional, views)


def read_rotations(path: Path) -> torch.Tensor:
    """(n, 3, 3) orientations of a data STAR file; raises BadInput where it holds none."""
    particles = read_particles(path).particles
    if len(particles) == 0:
        raise BadInput(f"{path}: holds no particles")
    if len(particles) > 1 and float((particles.rotation - particles.rotation[:1]).abs().amax()) < 1e-6:
        raise BadInput(f"{path}: all particles have the same orientation; give the data STAR of a refinement (_rlnAngleRot, Tilt, Psi)")
    return particles.rotation


def write_points(run: Run, halves: Halves, found: LocalResolution) -> None:
    """Resolution at every window: coordinates in px of the map (0 = first voxel)."""
    z, y, x = found.points.T.numpy()
    write_star(run.file("locres_points.star"), {"locres_points": pd.DataFrame({
        "rlnCoordinateX": x, "rlnCoordinateY": y, "rlnCoordinateZ": z, "rlnAngstromResolution": found.at_points.numpy(),
    })})  # fmt: skip


def write_directional(run: Run, halves: Halves, found: Directional) -> None:
    """directional.star: resolution by direction; fsc3d.mrc: FSC at every element of the centred transform."""
    rot, tilt = found.angles.T.numpy()
    write_star(run.file("directional.star"), {
        "directional_general": {"rlnAngstromResolution": found.mean, "frazilSphericity": found.sphericity, "frazilSpread": found.spread},
        "directional": pd.DataFrame({"rlnAngleRot": rot, "rlnAngleTilt": tilt, "rlnAngstromResolution": found.resolution.numpy()}),
    })  # fmt: skip
    write_mrc(run.file("fsc3d.mrc"), fsc_volume(found, halves.box), 1 / (halves.box * halves.pixel_size))


def region(halves: Halves) -> torch.Tensor:
    """(N, N, N) bool on the CPU: voxels that count in statistics, those of the mask or, without, of the map above its knee."""
    if halves.mask is not None:
        return (halves.mask > 0.5).cpu()
    smooth = filtered((halves.first + halves.second) / 2, halves.pixel_size, 15.0)
    return (smooth >= threshold_curve(smooth, halves.pixel_size).proposals["knee"]).cpu()


def tell_local(run: Run, halves: Halves, found: LocalResolution) -> tuple[list[tuple[str, str]], list[Picture], list[str]]:
    """(key figures, pictures, warnings) of the local resolution."""
    inside = region(halves)
    values = found.resolution.cpu()[inside].numpy()
    overall = resolution_at(fsc(halves.first, halves.second), GOLD, halves.box, halves.pixel_size)
    low, middle, high = np.percentile(values, [5, 50, 95])
    run.event("localres", median=middle, best=low, worst=high, windows=len(found.points), window=found.side, box=halves.box,
              pixel_size=halves.pixel_size)  # fmt: skip
    run.summary(f"local resolution {middle:.2f} Å (median), 90 % of the voxels {'in the mask ' if halves.mask is not None else ''}between "
                f"{low:.2f} and {high:.2f} Å, from {len(found.points)} windows")  # fmt: skip
    if halves.mask is None:
        run.note("no mask: every window in the box's sphere was measured, with the solvent's noise in it; voxels of the particle were "
                 "chosen by density for the statistics")  # fmt: skip
    else:
        run.note("the mask chose windows and the voxels of histogram and statistics; relion_locres.mrc and the filtered map are not masked")
    told = []
    if middle < 2.05 * halves.pixel_size:
        told.append(f"most of the map is resolved to Nyquist ({2 * halves.pixel_size:.2f} Å): the pixels limit the local resolution")
    picture = coloured(found, inside, halves.pixel_size, middle)
    pictures = [Picture("locres", "Local resolution", CAPTIONS["locres"], picture),
                Picture("histogram", "Histogram", CAPTIONS["histogram"], plot_resolution_histogram(values, overall))]  # fmt: skip
    return [(f"{middle:.2f} Å", "median local resolution"), (f"{low:.2f} – {high:.2f} Å", "of 90 % of the voxels")], pictures, told


def coloured(found: LocalResolution, inside: torch.Tensor, pixel_size: float, resolution: float) -> Figure:
    """The filtered map inside the region, low-passed a little, coloured by local resolution; small boxes are drawn on a finer grid."""
    data = lowpass_map(found.filtered.cpu(), pixel_size, 1.3 * resolution, 4.0)
    local, region = found.resolution.cpu(), inside
    finer = max(1, PICTURE_SIDE // data.shape[-1])
    if finer > 1:
        data = fourier_resample(data, finer * data.shape[-1])
        local, region = (x.repeat_interleave(finer, 0).repeat_interleave(finer, 1).repeat_interleave(finer, 2) for x in (local, inside))
    data = torch.where(region, data, data.new_zeros(()))
    level = SURFACE_LEVEL * float(np.percentile(data[region].numpy(), 99.5))
    return plot_local_resolution(data.numpy(), local.numpy(), region.numpy(), pixel_size / finer, level)


def tell_directional(run: Run, halves: Halves, found: Directional) -> tuple[list[tuple[str, str]], list[Picture], list[str]]:
    """(key figures, pictures, warnings) of the directional FSC."""
    best, worst = float(found.resolution.min()), float(found.resolution.max())
    run.event("directional", sphericity=found.sphericity, mean=found.mean, spread=found.spread, best=best, worst=worst)
    run.summary(f"directional resolution {spoken(best)} to {spoken(worst)} (mean {found.mean:.2f} Å), sphericity {found.sphericity:.3f}")
    told = []
    if found.sphericity < ANISOTROPIC:
        told.append(f"the resolution depends on the direction: {spoken(best)} to {spoken(worst)}, sphericity {found.sphericity:.2f}; the "
                    "particles prefer some orientations, so that the map is blurred along others")  # fmt: skip
    share = np.full(len(found.resolution), 1 / len(found.resolution))
    figure = plot_directional(found.curves.numpy(), halves.box, halves.pixel_size, found.resolution.numpy(), share)
    numbers = [(f"{found.sphericity:.3f}", "sphericity"), (f"{spoken(best)} – {spoken(worst)}", "resolution by direction")]
    return numbers, [Picture("directional", "Directional FSC", CAPTIONS["directional"], figure)], told


def tell_views(run: Run, found: PoseEfficiency) -> tuple[list[tuple[str, str]], list[str]]:
    """(key figures, warnings) of the distribution of views."""
    run.event("views", efficiency=found.efficiency, empty=found.empty)
    run.summary(f"efficiency of the views {found.efficiency:.2f} (1: even), {100 * found.empty:.1f} % of Fourier space is not sampled")
    told = []
    if found.efficiency < UNEVEN:
        told.append(f"the views are uneven: the particles are worth {100 * found.efficiency:.0f} % of as many evenly spread ones, and "
                    f"{100 * found.empty:.0f} % of Fourier space is empty; tilted images or another grid would help")  # fmt: skip
    return [(f"{found.efficiency:.2f}", "efficiency of the views"), (f"{100 * found.empty:.1f} %", "of Fourier space not sampled")], told


def report(run: Run, halves: Halves, found: LocalResolution, directional: Directional | None, views: PoseEfficiency | None) -> None:
    """Events, warnings, the lines a person wants, and the page."""
    numbers, pictures, told = tell_local(run, halves, found)
    panels = {}
    if directional is not None:
        more, drawn, warned = tell_directional(run, halves, directional)
        numbers, pictures, told = numbers + more, pictures + drawn, told + warned
        rot, tilt = directional.angles.T.numpy()
        panels["resolution by direction"] = (directional.resolution.numpy(), "Å")
        pictures.append(Picture("sphere_resolution", "Directions", CAPTIONS["sphere"], plot_sphere(rot, tilt, panels)))
    if views is not None:
        more, warned = tell_views(run, views)
        numbers, told = numbers + more, told + warned
        rot, tilt = views.angles.T.numpy()
        both = {"sampling of Fourier space": (views.sampling.numpy(), "mean = 1"), "views": (views.views.numpy(), "mean = 1")}
        pictures.append(Picture("sphere_views", "Views", CAPTIONS["sphere"], plot_sphere(rot, tilt, both)))
    for line in told:
        run.warn(line)
    write_page(run, numbers, told, pictures)
