"""`frazil demo`: simulate particles, refine them as a user would, compare with the truth."""
from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from frazil.io.mrc import read_map, write_mrc
from frazil.io.particles import match_by_image_name, read_particles
from frazil.jobs import refine3d, simulate
from frazil.jobs.record import read_events, write_json
from frazil.jobs.run import Options, execute, spoken_time
from frazil.maths.fsc import fsc, resolution_at
from frazil.maths.masks import soft_sphere
from frazil.maths.symmetry import operators
from frazil.simulate import PoseDifference, compare_poses, density, phantom

POSITIONAL: tuple[str, ...] = ()
HAS_RUN_DIRECTORY = False  # its two jobs have one each, and their progress bars


class Params(BaseModel):
    """Refine simulated particles of an asymmetric phantom from a 40 Å reference, and compare map and poses with the truth."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    output: Path = Field(description="directory for the results")
    particles: int = Field(1500, ge=20, description="number of particles")
    box: int = Field(64, ge=16, le=512, description="side of the particle images, even", json_schema_extra={"unit": "px"})
    pixel_size: float = Field(3.5, gt=0, description="pixel size", json_schema_extra={"unit": "Å"})
    snr: float = Field(0.1, gt=0, description="variance of the signal over that of the noise, whole box")
    symmetry: str = Field("C1", description="point group of the phantom")
    device: str = Field("auto", description="where to compute: auto, cpu, cuda or cuda:0, cuda:1, …")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = as many as this process may use")
    seed: int = Field(1, ge=0, description="seed of everything random")
    resume: bool = Field(False, description="continue the demo in --output from where it stopped")


def run(params: Params, run: None = None) -> None:
    """Run `simulate` and `refine3d` in directories of their own inside --output, then say how near the truth they came."""
    data, found = params.output / "particles", params.output / "refine3d"
    wishes = simulate.Params(**{name: getattr(params, name) for name in ("particles", "box", "pixel_size", "snr", "symmetry")})
    common = {"device": params.device, "threads": params.threads, "seed": params.seed, "resume": params.resume}
    execute("simulate", simulate.run, wishes, Options(output=data, **common))
    settings = refine3d.Params(
        particles=data / "particles.star", reference=data / "reference_lowpass.mrc", initial_lowpass=wishes.lowpass,
        symmetry=params.symmetry, diameter=round(0.75 * params.box * params.pixel_size),
    )  # fmt: skip
    execute("refine3d", refine3d.run, settings, Options(output=found, **common))
    seconds = sum(e["seconds"] for e in read_events(found) if e["event"] in ("done", "stopped"))
    figures, difference = compare(params)
    write_json(params.output / "demo.json", {"parameters": params.model_dump(mode="json"), "seconds": seconds, **figures})
    print(
        f"resolution by half maps (FSC 0.143) {figures['resolution']:.2f} Å; Nyquist is {2 * params.pixel_size:g} Å",
        f"against the truth: FSC 0.5 at {figures['truth_05']:.2f} Å, FSC 0.143 at {figures['truth_0143']:.2f} Å",
        f"poses: median error {figures['angle']:.2f}° and {figures['shift']:.2f} Å (the map as a whole is turned by "
        f"{figures['frame_angle']:.2f}° and moved by {float(difference.translation.norm()):.2f} Å, which the comparison takes out)",
        f"refined in {spoken_time(seconds)}; look at {found / 'report.html'}",
        sep="\n",
    )


def compare(params: Params) -> tuple[dict[str, float], PoseDifference]:
    """Resolutions in Å and median pose errors; the truth, where the refinement has put it, is written as truth_moved.mrc."""
    found, data = params.output / "refine3d", params.output / "particles"
    true, posed = read_particles(data / "truth.star"), read_particles(found / "run_data.star")
    i, j = match_by_image_name(true, posed)
    difference = compare_poses(true.particles[i], posed.particles[j], operators(params.symmetry))
    shape = phantom(params.box, params.pixel_size, params.symmetry, params.seed)
    truth = density(shape.moved(difference.rotation, difference.translation), params.box, params.pixel_size)
    scale = read_map(data / "reference.mrc").data.norm() / truth.data.norm()
    write_mrc(params.output / "truth_moved.mrc", truth.data * scale, params.pixel_size)
    mask = soft_sphere(params.box, 0.42 * params.box, 0.06 * params.box)
    final = read_map(found / "run_class001.mrc").data
    to_truth = fsc(final * mask, truth.data * mask)

    def at(curve: torch.Tensor, threshold: float) -> float:
        return resolution_at(curve, threshold, params.box, params.pixel_size)

    turned = torch.rad2deg(torch.acos(((torch.trace(difference.rotation) - 1) / 2).clamp(-1, 1)))
    figures = {
        "resolution": [e["resolution"] for e in read_events(found) if e["event"] == "iteration"][-1],
        "truth_05": at(to_truth, 0.5), "truth_0143": at(to_truth, 0.143),
        "angle": float(difference.angle.median()), "shift": float(difference.shift.median()), "frame_angle": float(turned),
        "fsc_to_truth": to_truth.tolist(),
    }  # fmt: skip
    return figures, difference
