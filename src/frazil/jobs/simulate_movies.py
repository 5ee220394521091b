"""`frazil simulate-movies`: movies with known motion, gain and bad pixels, to test motion correction and what follows."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from frazil.data import BadInput, Optics, Volume
from frazil.io.coordinates import FILE, X, Y
from frazil.io.coordinates import NAME as MICROGRAPH
from frazil.io.eer import events_of, write_eer
from frazil.io.files import below_here
from frazil.io.gain import write_gain
from frazil.io.movie_table import NAME, ORIGINAL, UPSAMPLING
from frazil.io.movies import write_mrc_movie, write_tiff
from frazil.io.mrc import write_mrc
from frazil.io.star import write_star
from frazil.jobs.run import Run
from frazil.simulate.movies import MovieSettings, SimulatedMovie, protein_density, simulate_movie

POSITIONAL: tuple[str, ...] = ()
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
PX: JsonDict = {"unit": "px"}
GRID = 7  # places a side at which the true local motion is written
MOST = {"tif": 255, "mrc": 32767}  # counts of a pixel in a frame
COMMENT = "true motion: translations in px that bring a frame onto the first one"


class Params(BaseModel):
    """Simulate movies of a phantom or an atomic model: drift, local motion, radiation damage, counts of a detector, and the truth."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    movies: int = Field(2, ge=1, description="number of movies")
    size: tuple[int, int] = Field((1024, 1024), description="width and height", json_schema_extra=PX)
    frames: int = Field(24, ge=2, description="frames a movie")
    pixel_size: float = Field(1.0, gt=0, description="pixel size", json_schema_extra={"unit": "Å"})
    dose: float = Field(1.2, gt=0, description="dose of a frame", json_schema_extra={"unit": "e/Å²"})
    drift: float = Field(8.0, ge=0, description="length of the stage's drift", json_schema_extra=PX)
    local: float = Field(1.5, ge=0, description="largest local motion in the field", json_schema_extra=PX)
    damage: bool = Field(True, description="radiation damage")
    container: Literal["tif", "mrc", "eer"] = Field("tif", description="file format: LZW TIFF, MRC stack, EER")
    particles: int = Field(40, ge=0, description="particles a movie")
    box: int = Field(192, ge=16, le=1024, multiple_of=2, description="box of a particle; the phantom is 0.65 of it", json_schema_extra=PX)
    model: Path | None = Field(None, description="atomic model (PDB, mmCIF) instead of a phantom")
    defocus_min: float = Field(10000.0, gt=0, description="smallest defocus", json_schema_extra={"unit": "Å"})
    defocus_max: float = Field(20000.0, gt=0, description="largest defocus", json_schema_extra={"unit": "Å"})
    astigmatism: float = Field(300.0, ge=0, description="difference of the two defoci", json_schema_extra={"unit": "Å", **EXPERT})
    gain_sd: float = Field(0.03, ge=0, lt=1, description="relative spread of the pixels' sensitivity; 0: none")
    hot_pixels: int = Field(20, ge=0, description="pixels that count too much")
    dead_pixels: int = Field(5, ge=0, description="pixels that count nothing; the gain is 0 there")
    ice: float = Field(0.0, ge=0, description="sd of the ice's projected contrast", json_schema_extra=EXPERT)
    contrast: float = Field(1.0, gt=0, description="factor on the scattering of the particles", json_schema_extra=EXPERT)
    eer_frames: int = Field(32, ge=1, le=255, description="EER: camera frames a frame", json_schema_extra=EXPERT)
    voltage: float = Field(300.0, gt=0, description="acceleration voltage", json_schema_extra={"unit": "kV", **EXPERT})
    cs: float = Field(2.7, ge=0, description="spherical aberration", json_schema_extra={"unit": "mm", **EXPERT})


def run(params: Params, run: Run) -> None:
    """Write movies/*, movies.star, gain.mrc, reference.mrc, truth/*.star and truth.star."""
    if params.defocus_max < params.defocus_min:
        raise BadInput(f"--defocus-max {params.defocus_max:g} is below --defocus-min {params.defocus_min:g}")
    optics = Optics(params.pixel_size, params.box, params.voltage, params.cs, 0.1)
    source, named = source_of(params, run.seed), below_here(run.path)
    for folder in ("movies", "truth"):
        (run.path / folder).mkdir(exist_ok=True)
    rows, lists, total = [], [], 0
    for i in range(params.movies):
        made = simulate_movie(source, optics, settings_of(params, run.seed, i))
        name = f"movies/mov{i + 1:04d}.{params.container}"
        truth = f"truth/mov{i + 1:04d}_particles.star"  # comes last: where it is, the movie is whole
        capped = 0 if run.resumed and (run.path / truth).exists() else write_movie(run.path / name, made, params)
        if i == 0:
            write_gain(run.path / "gain.mrc", made.gain, params.container == "eer")
        write_truth(run, made, i)
        rows.append((str(named / name), 1))
        lists.append((str(named / name), str(named / truth)))
        total += len(made.place)
        if capped:
            run.note(f"{name}: {capped} pixels count more than the format holds and are cut off")
        run.progress(i + 1, params.movies, "simulating")
        run.check_stop()
    write_mrc(run.path / "reference.mrc", source.data, source.pixel_size)
    row = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, ORIGINAL: params.pixel_size, "rlnVoltage": params.voltage,
           "rlnSphericalAberration": params.cs, "rlnAmplitudeContrast": 0.1}  # fmt: skip
    row |= {UPSAMPLING: 1} if params.container == "eer" else {}
    listed = pd.DataFrame(rows, columns=[NAME, "rlnOpticsGroup"])
    write_star(run.path / "movies.star", {"optics": pd.DataFrame([row]), "movies": listed})
    write_star(run.path / "truth.star", {"coordinate_files": pd.DataFrame(lists, columns=[MICROGRAPH, FILE])})
    eer = params.container == "eer"
    dose = f"--dose {params.dose / params.eer_frames:g} --eer-grouping {params.eer_frames}" if eer else f"--dose {params.dose:g}"
    run.summary(f"{params.movies} movies with {total} particles, true motion in {run.path / 'truth'}: {run.path / 'movies.star'}",
                f"frazil motion {named / 'movies.star'} --gain {named / 'gain.mrc'} {dose} --output …")  # fmt: skip


def source_of(params: Params, seed: int) -> Volume:
    """The scattering density of the particles, Å⁻²."""
    if params.model is None:
        volume = protein_density(params.box, params.pixel_size, seed + 1)
    else:
        from frazil.io.models import density_from_model

        volume = density_from_model(params.model, params.box, params.pixel_size, b_factor=30.0)
    return replace(volume, data=volume.data * params.contrast)


def settings_of(params: Params, seed: int, number: int) -> MovieSettings:
    """Of movie `number`: its own motion, places and defocus, the same detector."""
    rng = np.random.default_rng([seed, number])
    mean = rng.uniform(params.defocus_min, params.defocus_max)
    defocus = (mean + params.astigmatism / 2, mean - params.astigmatism / 2, rng.uniform(0, 180))
    width, height = params.size
    return MovieSettings(height, width, params.frames, params.dose, params.drift, params.local, params.particles, defocus, ice=params.ice,
                         gain_sd=params.gain_sd, hot_pixels=params.hot_pixels, dead_pixels=params.dead_pixels,
                         seed=1 + number + 10_000 * seed, detector_seed=1 + seed, damage=params.damage)  # fmt: skip


def write_movie(path: Path, made: SimulatedMovie, params: Params) -> int:
    """The counts in the container asked for; how many did not fit."""
    most, capped = MOST.get(params.container, params.eer_frames), 0

    def counts() -> Iterator[np.ndarray]:
        nonlocal capped
        for frame in range(params.frames):
            found = made.counts(frame)
            capped += int((found > most).sum())
            yield found.clamp(max=most).numpy()

    if params.container == "tif":
        write_tiff(path, (frame.astype(np.uint8) for frame in counts()))
    elif params.container == "mrc":
        write_mrc_movie(path, np.stack([frame.astype(np.int16) for frame in counts()]), params.pixel_size)
    else:
        rng = np.random.default_rng(made.settings.seed)
        events = [event for frame in counts() for event in events_of(frame, params.eer_frames, rng)]
        write_eer(path, events, (params.size[1], params.size[0]))
    return capped


def write_truth(run: Run, made: SimulatedMovie, number: int) -> None:
    """truth/movNNNN.star: what alignment should find, and the bad pixels; truth/movNNNN_particles.star: places in the first frame."""
    s, base = made.settings, run.path / f"truth/mov{number + 1:04d}"
    line = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    place = torch.cartesian_prod(line, line)
    shift = -made.motion(place)  # (frames, places, 2)
    mean, at = shift.mean(1), place * torch.tensor([s.width, s.height])
    frame = np.arange(1, s.frames + 1)
    general = {"rlnImageSizeX": s.width, "rlnImageSizeY": s.height, "rlnImageSizeZ": s.frames, ORIGINAL: made.optics.pixel_size,
               "rlnMicrographDoseRate": s.dose, "rlnVoltage": made.optics.voltage, "rlnDefocusU": s.defocus[0],
               "rlnDefocusV": s.defocus[1], "rlnDefocusAngle": s.defocus[2]}  # fmt: skip
    track = pd.DataFrame({"rlnMicrographFrameNumber": frame, "rlnMicrographShiftX": mean[:, 0], "rlnMicrographShiftY": mean[:, 1]})
    local = pd.DataFrame({"rlnMicrographFrameNumber": np.repeat(frame, len(place)), X: np.tile(at[:, 0], s.frames),
                          Y: np.tile(at[:, 1], s.frames), "rlnMicrographShiftX": shift[..., 0].reshape(-1),
                          "rlnMicrographShiftY": shift[..., 1].reshape(-1)})  # fmt: skip
    dead = torch.nonzero(made.gain == 0).flip(-1)
    blocks = {"general": general, "global_shift": track, "local_shift": local}
    blocks |= {name: pd.DataFrame({X: xy[:, 0].double(), Y: xy[:, 1].double()})
               for name, xy in (("hot_pixels", made.hot), ("dead_pixels", dead)) if len(xy)}  # fmt: skip
    write_star(base.with_suffix(".star"), blocks, COMMENT)
    write_star(base.with_name(base.name + "_particles.star"), {"": pd.DataFrame({X: made.place[:, 0], Y: made.place[:, 1]})})
