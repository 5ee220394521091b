"""`frazil extract`: particles cut out of micrographs, at picked or at refined positions, normalised, as stacks and particles.star."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from frazil.data import BadInput
from frazil.io.micrographs import Micrographs, read_micrographs
from frazil.jobs.extract_files import (
    Wanted,
    make_items,
    optics_rows,
    pick_positions,
    refined_positions,
    write_lists,
)
from frazil.jobs.extract_report import write_report
from frazil.jobs.extract_work import Job, Made, Tally, kept_before, work
from frazil.jobs.run import Run
from frazil.maths.tiling import good_size, is_good
from frazil.steps.extract import BACKGROUND, ExtractSettings, box_for

POSITIONAL = ("micrographs",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}
FINE: JsonDict = {"unit": "Å", "level": "expert"}
PX: JsonDict = {"unit": "px"}
NEARBY = 30.0  # Å, distance of two refined particles that are one


class Params(BaseModel):
    """Cut particles out of micrographs: give --coordinates (picks) or --particles (refined, to extract anew)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    micrographs: Path = Field(description="STAR file of micrographs, best with their CTF; or one image (.mrc, .tif)")
    coordinates: str | None = Field(None, description="picks: autopick.star, a folder, or a file (.star, .box, .cs, .cbox, .csv)")
    particles: Path | None = Field(None, description="particles to extract again, at their refined positions (STAR)")
    box: int | None = Field(None, ge=8, description="side of the box in the micrograph; from --diameter if not given", json_schema_extra=PX)
    diameter: float | None = Field(None, gt=0, description="diameter of the particle, to choose --box by", json_schema_extra=ANGSTROM)
    rescale: int | None = Field(None, ge=8, description="side of the images written; as --box if not given", json_schema_extra=PX)
    precision: Literal["float16", "float32"] = Field("float16", description="of the stacks; RELION reads float16 from version 4 on")
    min_score: float | None = Field(None, description="least rlnAutopickFigureOfMerit of a pick")
    background_diameter: float | None = Field(None, gt=0, description="of the circle outside which is background; 0.75 of the box if "
                                              "not given", json_schema_extra=ANGSTROM)  # fmt: skip
    normalise: bool = Field(True, description="background to mean 0, standard deviation 1", json_schema_extra=EXPERT)
    ramp: bool = Field(True, description="subtract a plane through the background", json_schema_extra=EXPERT)
    invert: bool = Field(True, description="particles are dark in the micrographs", json_schema_extra=EXPERT)
    white_dust: float = Field(-1.0, description="standard deviations above the background from which a pixel becomes noise; -1: none",
                              json_schema_extra=EXPERT)  # fmt: skip
    black_dust: float = Field(-1.0, description="the same below the background", json_schema_extra=EXPERT)
    premultiply: bool = Field(False, description="multiply the images by their CTF", json_schema_extra=EXPERT)
    recentre: tuple[float, float, float] | None = Field(None, description="with --particles: point of the map (x y z from the centre of "
                                                        "its box) to be the centre of the boxes", json_schema_extra=ANGSTROM)  # fmt: skip
    reset_offsets: bool = Field(False, description="with --particles: leave refined offsets out", json_schema_extra=EXPERT)
    min_distance: float | None = Field(None, ge=0, description=f"of particles nearer than this only the best stays; {NEARBY:g} with "
                                       "--particles, else 0", json_schema_extra=ANGSTROM)  # fmt: skip
    max_outside: float = Field(0.5, ge=0, lt=1, description="largest share of a box outside the micrograph", json_schema_extra=EXPERT)
    stack_size: int = Field(0, ge=0, description="particles of a joined stack; 0: one stack for each micrograph", json_schema_extra=EXPERT)
    by_file_name: bool = Field(False, description="match micrographs by file name where the folders differ (another motion correction)",
                               json_schema_extra=EXPERT)  # fmt: skip
    scale_positions: bool = Field(True, description="multiply coordinates that count pixels of another size than the micrographs'",
                                  json_schema_extra=EXPERT)  # fmt: skip
    pixel_size: float | None = Field(None, gt=0, description="of the micrographs, instead of what files say", json_schema_extra=FINE)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        """One source of positions, a box, and nothing that contradicts it."""
        if (self.coordinates is None) == (self.particles is None):
            raise ValueError("give one of --coordinates and --particles")
        if self.box is None and self.diameter is None:
            raise ValueError("give --box, or --diameter to choose one by")
        if self.particles is None and (self.recentre is not None or self.reset_offsets):
            raise ValueError("--recentre and --reset-offsets need --particles")
        if not self.normalise and self.background_diameter:
            raise ValueError("--background-diameter means nothing with --no-normalise")
        return self


def run(params: Params, run: Run) -> None:
    """Extract from every micrograph that has positions and write the lists."""
    micrographs = read_micrographs(params.micrographs, params.pixel_size)
    if missing := [o.name for o in micrographs.optics if o.pixel_size <= 0]:
        raise BadInput(f"{params.micrographs}: no pixel size for {missing[0]}, in neither table nor image; give --pixel-size")
    by_name, scaled = params.by_file_name, params.scale_positions
    if params.particles is not None:
        wanted = refined_positions(params.particles, micrographs, by_name, params.recentre, params.reset_offsets, scaled)
    else:
        wanted = pick_positions(str(params.coordinates), micrographs, by_name, params.min_score, scaled)
    for line in wanted.notes:
        run.warn(line)
    without_ctf(micrographs, wanted, run)
    settings = settings_of(params, micrographs, wanted, run)
    optics = optics_rows(micrographs, wanted, settings, params.premultiply, run)
    distance = params.min_distance if params.min_distance is not None else NEARBY if params.particles else 0.0
    job = Job(micrographs, wanted, settings, optics, params.precision, distance, params.max_outside, params.premultiply, run.seed)
    items = make_items(run.path, micrographs, wanted, params.stack_size)
    tally, made = Tally(), Made()
    if run.resumed:
        kept_before(job, items, tally, made)
        run.note(f"{len(made.parts)} of {len(items)} stacks are there and whole")
    work(job, [item for item in items if item.base not in made.parts], run, tally, made)
    conclude(params, run, job, {item.base: made.parts[item.base] for item in items if item.base in made.parts}, made, tally)


def without_ctf(micrographs: Micrographs, wanted: Wanted, run: Run) -> None:
    """Leave out micrographs without a CTF where others have one (particles that bring their own stay); say where none has."""
    if wanted.has_ctf:
        return
    lacking = [i for i in wanted.places if not bool(micrographs.has_ctf[i])]
    if len(lacking) == len(wanted.places):
        run.note("no CTF: the micrographs give none, so particles get none; classification and refinement will ask for it")
        return
    for i in lacking:
        del wanted.places[i]
    if lacking:
        run.warn(f"{len(lacking)} micrographs have no CTF values while others have, and are left out "
                 f"(first: {micrographs.names[lacking[0]]}); estimate their CTF, or remove the columns to extract without")  # fmt: skip


def settings_of(params: Params, micrographs: Micrographs, wanted: Wanted, run: Run) -> ExtractSettings:
    """Sizes in px; odd ones become even, said so; sizes that make no sense are BadInput."""
    sizes = sorted({micrographs.optics_of(i).pixel_size for i in wanted.places}) or [1.0]
    if len(sizes) > 1:
        shown = ", ".join(f"{s:g}" for s in sizes)
        run.warn(f"micrographs of {len(sizes)} pixel sizes ({shown} Å): boxes are of the same number of px, so of different widths; each "
                 "optics group keeps its own pixel size")  # fmt: skip
    box = params.box or box_for(params.diameter or 0.0, sizes[0])
    if params.box is None:
        run.note(f"box of {box} px ({box * sizes[0]:.0f} Å) for a diameter of {params.diameter:g} Å")
    size = params.rescale or box
    box, size = even(box, "--box", run), even(size, "--rescale", run)
    if size > box:
        raise BadInput(f"--rescale {size} is larger than the box of {box} px; images can only be made smaller")
    if params.box and not is_good(size):
        fitting = f"{good_size(size)} px" if size == box else f"--rescale {good_size(size)}"
        run.note(f"images of {size} px transform slowly (a prime factor above 7): {fitting} would be faster")
    if params.diameter and box * sizes[0] < params.diameter:
        raise BadInput(f"--box {box} is {box * sizes[0]:.0f} Å, less than the --diameter of {params.diameter:g} Å; give 1.5 times as much")
    width = params.background_diameter / sizes[0] if params.background_diameter else BACKGROUND * box
    if params.normalise and 0.5 * width * size / box >= size / 2**0.5 - 2:  # the corners lie N/√2 from the middle
        raise BadInput(f"--background-diameter {params.background_diameter or 0:g} leaves no background in a box of {box * sizes[0]:.0f} Å")
    return ExtractSettings(box, size, width, params.normalise, params.ramp, params.invert, params.white_dust, params.black_dust)


def even(side: int, option: str, run: Run) -> int:
    """The side, one more if odd."""
    if side % 2:
        run.warn(f"{option} {side} is odd: {side + 1} px are used; boxes are even")
    return side + side % 2


def conclude(params: Params, run: Run, job: Job, parts: dict[str, pd.DataFrame], made: Made, tally: Tally) -> None:
    """particles.star, report, and what a person wants to know."""
    total = sum(map(len, parts.values()))
    if not total:
        faults = [*made.bad[:1], *tally.lines(params.max_outside, job.distance)]
        raise BadInput(f"no particle could be extracted from {len(job.wanted.places)} micrographs: {'; '.join(faults) or 'no positions'}")
    lines = [*made.bad, *tally.lines(params.max_outside, job.distance)]
    for line in lines[len(made.bad) :]:
        run.warn(line)
    write_lists(run.path, job.optics, list(parts.values()), job.wanted.blocks)
    sizes = sorted({float(size) for size in job.optics["rlnImagePixelSize"]})
    counts = np.concatenate([np.unique(p["rlnMicrographName"].to_numpy(str), return_counts=True)[1] for p in parts.values() if len(p)])
    write_report(run, made.shown, counts, sizes[0], job.settings.size, lines)
    run.event("extracted", particles=total, micrographs=len(counts), left_out=len(made.bad), **vars(tally))
    bad = [f"{len(made.bad)} micrographs left out, see log.txt"] if made.bad else []
    shown = ", ".join(f"{size:.4g}" for size in sizes)
    images = f"{total} particles of {job.settings.size} px ({shown} Å)"
    run.summary(f"{images} from {len(counts)} micrographs: {run.path / 'particles.star'}", *bad)
