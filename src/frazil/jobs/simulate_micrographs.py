"""`frazil simulate-micrographs`: micrographs with known positions, to test picking and extraction."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from frazil.data import BadInput, Optics, Volume
from frazil.io.mrc import write_mrc
from frazil.io.star import write_star
from frazil.jobs.inputs import read_cube
from frazil.jobs.run import Run
from frazil.maths.fourier import image_from_ft
from frazil.simulate.micrographs import MicrographSettings, grey_scale, simulate_micrograph, slices, view_rotations
from frazil.simulate.phantom import Phantom, density, phantom

POSITIONAL: tuple[str, ...] = ()
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}


class Params(BaseModel):
    """Simulate micrographs of a phantom or a map: particles, CTF, noise, ice, junk and a carbon edge, and the true positions."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    micrographs: int = Field(4, ge=1, description="number of micrographs")
    size: tuple[int, int] = Field((1024, 1024), description="width and height", json_schema_extra={"unit": "px"})
    pixel_size: float = Field(1.77, gt=0, description="pixel size", json_schema_extra={"unit": "Å"})
    particles: int = Field(60, ge=0, description="particles a micrograph; fewer where there is no room")
    box: int = Field(
        128, ge=16, le=1024, multiple_of=2, description="box of a particle; the phantom is 0.65 of it", json_schema_extra={"unit": "px"}
    )
    symmetry: str = Field("C1", description="point group of the phantom")
    map: Path | None = Field(None, description="simulate from this map instead of a phantom")
    snr: float = Field(0.1, gt=0, description="variance of the signal under a particle over that of the noise in a pixel")
    views: int = Field(8, ge=0, description="orientations, written as templates.mrcs and turned in the plane; 0: every particle its own")
    in_plane: bool = Field(True, description="turn the views in the plane", json_schema_extra=EXPERT)
    junk: int = Field(8, ge=0, description="blobs half or twice as large as a particle", json_schema_extra=EXPERT)
    ice: int = Field(2, ge=0, description="ice crystals", json_schema_extra=EXPERT)
    carbon: bool = Field(True, description="a carbon edge", json_schema_extra=EXPERT)
    coloured: float = Field(0.2, ge=0, le=1, description="share of the noise that falls off with frequency", json_schema_extra=EXPERT)
    defocus: bool = Field(True, description="write the CTF into micrographs.star", json_schema_extra=EXPERT)
    voltage: float = Field(300.0, gt=0, description="acceleration voltage", json_schema_extra={"unit": "kV", **EXPERT})
    cs: float = Field(2.7, ge=0, description="spherical aberration", json_schema_extra={"unit": "mm", **EXPERT})


def run(params: Params, run: Run) -> None:
    """Write micrographs/*.mrc, micrographs.star, truth/*.star, truth.star, templates.mrcs and reference.mrc."""
    optics = Optics(params.pixel_size, params.box, params.voltage, params.cs, 0.1)
    source = source_of(params, run.seed)
    side = params.box * params.pixel_size
    diameter = source.diameter() if isinstance(source, Phantom) else 0.65 * side
    if min(params.size) * params.pixel_size < 3 * diameter:
        raise BadInput(f"--size: {params.size[0]} x {params.size[1]} px is too small for particles of {diameter:.0f} Å")
    settings = MicrographSettings((params.size[1], params.size[0]), diameter, params.particles, params.snr, params.views, params.in_plane,
                                  0.6, params.coloured, params.junk, params.ice, params.carbon, run.seed + 1)  # fmt: skip
    inside = run.path.resolve().is_relative_to(Path.cwd())
    named = run.path.resolve().relative_to(Path.cwd()) if inside else run.path.resolve()
    for folder in ("micrographs", "truth"):
        (run.path / folder).mkdir(exist_ok=True)
    rows, lists, total = [], [], 0
    for i in range(params.micrographs):
        made = simulate_micrograph(source, optics, settings, i)
        name = f"micrographs/mic{i + 1:04d}.mrc"
        write_mrc(run.path / name, made.image, params.pixel_size)
        truth = {"rlnCoordinateX": made.xy[:, 0].numpy(), "rlnCoordinateY": made.xy[:, 1].numpy(), "rlnClassNumber": made.view.numpy() + 1,
                 "rlnAnglePsi": made.psi.numpy()}  # fmt: skip
        write_star(run.path / f"truth/mic{i + 1:04d}.star", {"": pd.DataFrame(truth)})
        rows.append((str(named / name), 1, *made.defocus.tolist()))
        lists.append((str(named / name), str(named / f"truth/mic{i + 1:04d}.star")))
        total += len(made.xy)
        run.progress(i + 1, params.micrographs, "simulating")
        run.check_stop()
    write_tables(params, rows, lists, run)
    write_references(source, optics, settings, run)
    run.summary(f"{params.micrographs} micrographs with {total} particles of {diameter:.0f} Å: {run.path / 'micrographs.star'}",
                f"positions {run.path / 'truth.star'}, templates {run.path / 'templates.mrcs'}")  # fmt: skip


def source_of(params: Params, seed: int) -> Phantom | Volume:
    """The phantom of a seed, or the map given."""
    if params.map is None:
        return phantom(params.box, params.pixel_size, params.symmetry, seed + 1)
    volume = read_cube(params.map)
    if abs(volume.pixel_size / params.pixel_size - 1) > 1e-3:
        raise BadInput(
            f"{params.map}: pixel size {volume.pixel_size:g} Å, but --pixel-size is {params.pixel_size:g}; `frazil map resample` it"
        )
    return volume


def write_tables(params: Params, rows: list[tuple], lists: list[tuple[str, str]], run: Run) -> None:
    """micrographs.star and truth.star."""
    size = params.pixel_size
    row = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnMicrographOriginalPixelSize": size, "rlnVoltage": params.voltage,
           "rlnSphericalAberration": params.cs, "rlnAmplitudeContrast": 0.1, "rlnMicrographPixelSize": size}  # fmt: skip
    optics = pd.DataFrame([row])
    labels = ["rlnMicrographName", "rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]
    table = pd.DataFrame(rows, columns=labels)
    if not params.defocus:
        table = table.drop(columns=labels[2:])
    write_star(run.path / "micrographs.star", {"optics": optics, "micrographs": table})
    listed = pd.DataFrame(lists, columns=["rlnMicrographName", "rlnMicrographCoordinates"])
    write_star(run.path / "truth.star", {"coordinate_files": listed})


def write_references(source: Phantom | Volume, optics: Optics, settings: MicrographSettings, run: Run) -> None:
    """templates.mrcs, the views white on black in standard deviations of the noise, and reference.mrc."""
    rotation = view_rotations(settings)
    images = grey_scale(source, optics, settings) * image_from_ft(slices(source, rotation, optics), optics.box)
    write_mrc(run.path / "templates.mrcs", images, optics.pixel_size, stack=True)
    volume = density(source, optics.box, optics.pixel_size) if isinstance(source, Phantom) else source
    write_mrc(run.path / "reference.mrc", volume.data, volume.pixel_size)
