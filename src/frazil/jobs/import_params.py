"""What `frazil import` asks for."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

EXPERT: JsonDict = {"level": "expert"}
FileKind = Literal["auto", "movies", "micrographs", "particles", "map", "coordinates"]


class Params(BaseModel):
    """Register movies, micrographs, particles, maps or coordinates with their optics. Every file's header is checked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    files: tuple[str, ...] = Field(description="files, globs in quotes, a STAR file, or SerialEM .mdoc files of movies", min_length=1)
    kind: FileKind = Field("auto", description="what they are: movies, micrographs, particles, map, coordinates; auto: by their headers")
    pixel_size: float | None = Field(None, gt=0, description="pixel size of the files (EER: of the camera's pixels); from .mdoc or header "
                                     "if not given", json_schema_extra={"unit": "Å"})  # fmt: skip
    voltage: float | None = Field(None, gt=0, description="acceleration voltage; from .mdoc or EPU, else "
        "300", json_schema_extra={"unit": "kV"})
    cs: float = Field(2.7, ge=0, description="spherical aberration", json_schema_extra={"unit": "mm"})
    amplitude_contrast: float = Field(0.1, ge=0, le=1, description="fraction of amplitude contrast")
    optics_group: str = Field("opticsGroup1", description="name of the optics group: letters, digits, _ and -")
    mtf: Path | None = Field(None, description="STAR file of the detector's MTF")
    beam_tilt: tuple[float, float] | None = Field(None, description="beam tilt x and y", json_schema_extra={"unit": "mrad", **EXPERT})
    beam_shift_groups: bool = Field(False, description="an optics group for each cluster of beam shifts (.mdoc, or EPU's .xml beside "
        "the movies)")
    clusters: int = Field(0, ge=0, description="number of these clusters; 0: found", json_schema_extra=EXPERT)
    gain: Path | None = Field(None, description="gain reference: its orientation and whether it holds factors or counts are found from "
                              "the movies, gain.mrc written")  # fmt: skip
    defects: Path | None = Field(None, description="defects of the detector, to be checked")
    micrographs: Path | None = Field(None, description="micrographs that coordinates belong to (STAR)")
    append: Path | None = Field(None, description="movies.star or micrographs.star of an earlier import: keep its rows, add what is new")
    settle: float = Field(30.0, ge=0, description="leave out files changed within this time: they may still be growing",
                          json_schema_extra={"unit": "s", **EXPERT})  # fmt: skip
    link: bool = Field(False, description="reach files outside this folder by links in the run directory", json_schema_extra=EXPERT)
    skip_bad: bool = Field(False, description="leave faulty files out instead of stopping", json_schema_extra=EXPERT)
    eer_grouping: int = Field(32, ge=1, description="EER: camera frames a frame, for the gain's test", json_schema_extra=EXPERT)
