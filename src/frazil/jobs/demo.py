"""`frazil demo`: simulate particles, refine them as a user would, compare with the truth."""
from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import match_by_image_name, read_particles
from frazil.jobs import refine3d, simulate
from frazil.jobs.record import read_events
from frazil.jobs.run import Options, Run, execute, spoken_time
from frazil.maths.fsc import fsc, resolution_at
from frazil.maths.masks import soft_sphere
from frazil.maths.symmetry import operators
from frazil.simulate import PoseDifference, compare_poses, density, phantom

POSITIONAL: tuple[str, ...] = ()
HAS_RUN_DIRECTORY = True


class Params(BaseModel):
    """Refine simulated particles of an asymmetric phantom from a 40 Å reference, and compare map and poses with the truth."""

    model_config = ConfigDict(extra="forbid")
    particles: int = Field(1500, ge=20, description="number of particles")
    box: int = Field(64, ge=16, le=512, description="side of the particle images, even", json_schema_extra={"unit": "px"})
    pixel_size: float = Field(3.5, gt=0, description="pixel size", json_schema_extra={"unit": "Å"})
    snr: float = Field(0.1, gt=0, description="variance of the signal over that of the noise, whole box")
    symmetry: str = Field("C1", description="point group of the phantom")


def run(params: Params, run: Run) -> None:
    """Run `simulate` and `refine3d` in directories of their own inside the demo's, then say how near the truth they came."""
    data, found = run.file("particles"), run.file("refine3d")
    wishes = simulate.Params(**params.model_dump())
    run.note(f"simulating {params.particles} particles of {params.box} px, SNR {params.snr:g}")
    common = {"device": run.options.device, "threads": run.threads, "seed": run.seed, "resume": True, "gpu_memory": run.options.gpu_memory}
    execute("simulate", simulate.run, wishes, Options(output=data, quiet=True, **common))
    run.check_stop()
    settings = refine3d.Params(
        particles=data / "particles.star", reference=data / "reference_lowpass.mrc", initial_lowpass=wishes.lowpass,
        symmetry=params.symmetry, diameter=round(0.75 * params.box * params.pixel_size),
    )  # fmt: skip
    execute("refine3d", refine3d.run, settings, Options(output=found, quiet=run.options.quiet, **common))
    seconds = sum(e["seconds"] for e in read_events(found) if e["event"] in ("done", "stopped"))
    figures, difference = compare(params, run)
    run.event("compared", **figures)
    run.summary(
        f"resolution by half maps (FSC 0.143) {figures['resolution']:.2f} Å; Nyquist is {2 * params.pixel_size:g} Å",
        f"against the truth: FSC 0.5 at {figures['truth_05']:.2f} Å, FSC 0.143 at {figures['truth_0143']:.2f} Å",
        f"poses: median error {figures['angle']:.2f}° and {figures['shift']:.2f} Å (the map as a whole is turned by "
        f"{figures['frame_angle']:.2f}° and moved by {float(difference.translation.norm()):.2f} Å, which the comparison takes out)",
        f"refined in {spoken_time(seconds)}; look at {found / 'report.html'}",
    )


def compare(params: Params, run: Run) -> tuple[dict[str, float], PoseDifference]:
    """Resolutions in Å and median pose errors; the truth, where the refinement has put it, is written as truth_moved.mrc."""
    found, data = run.file("refine3d"), run.file("particles")
    true, posed = read_particles(data / "truth.star"), read_particles(found / "run_data.star")
    i, j = match_by_image_name(true, posed)
    difference = compare_poses(true.particles[i], posed.particles[j], operators(params.symmetry))
    shape = phantom(params.box, params.pixel_size, params.symmetry, run.seed)
    truth = density(shape.moved(difference.rotation, difference.translation), params.box, params.pixel_size)
    scale = read_map(data / "reference.mrc").data.norm() / truth.data.norm()
    write_mrc(run.file("truth_moved.mrc"), truth.data * scale, params.pixel_size)
    mask = soft_sphere(params.box, 0.42 * params.box, 0.06 * params.box)
    halves = [read_map(found / f"run_half{h}_class001_unfil.mrc").data for h in (1, 2)]
    final = read_map(found / "run_class001.mrc").data
    to_truth = fsc(final * mask, truth.data * mask)

    def at(curve: torch.Tensor, threshold: float) -> float:
        return resolution_at(curve, threshold, params.box, params.pixel_size)

    turned = torch.rad2deg(torch.acos(((torch.trace(difference.rotation) - 1) / 2).clamp(-1, 1)))
    figures = {
        "resolution": at(fsc(*halves), 0.143), "truth_05": at(to_truth, 0.5), "truth_0143": at(to_truth, 0.143),
        "angle": float(difference.angle.median()), "shift": float(difference.shift.median()), "frame_angle": float(turned),
        "fsc_to_truth": to_truth.tolist(),
    }  # fmt: skip
    return figures, difference
