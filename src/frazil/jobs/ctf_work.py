"""What `frazil ctf` does for one micrograph, in whichever process: spectrum, fit, files. Read by jobs/ctf."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.io.micrographs import micrograph_header, read_micrograph
from frazil.io.mrc import write_mrc
from frazil.io.star import read_whole_star, write_star
from frazil.jobs.ctf_picture import write_picture
from frazil.jobs.resuming import are_whole
from frazil.maths.thon import PolarBins
from frazil.steps.ctf import (
    LEAST_SIDE,
    CtfResult,
    CtfSettings,
    Spectrum,
    estimate_ctf,
    micrograph_spectrum,
    saved_bins,
    saved_spectrum,
    tile_bins,
    tile_layout,
)

COMMENT = "frazil…: standard deviations in Å and degrees; curves by frequency"
Source = Path | Spectrum  # of a micrograph: its file, or its spectrum


@dataclass(frozen=True)
class Task:
    """A micrograph."""

    name: str  # in the table
    files: tuple[Path, Path, Path]  # diagnostic image (.ctf, MRC), its picture, and the STAR file that is written last
    source: Source
    optics: Optics
    settings: CtfSettings
    saved: bool  # the source is a power spectrum that motion correction saved


@dataclass(frozen=True)
class Done:
    """What a micrograph gave."""

    values: dict[str, Any]  # data_ctf of its STAR file
    told: dict[str, Any]  # of its event


def finish(task: Task) -> Done | BadInput:
    """The CTF of one micrograph, its files written; or why it cannot be used."""
    start, used = time.perf_counter(), time.thread_time()
    try:
        result = estimate_ctf(_spectrum(task), task.optics, task.settings)
    except BadInput as error:
        return error
    values = _written(task, result)
    u, v, angle = result.defocus.tolist()
    told = {"found": result.found, "defocus": (u + v) / 2, "astigmatism": u - v, "angle": angle, "fom": result.fom,
            "phase_shift": result.phase_shift, "resolution": result.resolution, "ice": result.ice, "tilt": result.tilt[0],
            "flags": result.flags, "seconds": round(time.perf_counter() - start, 4),
            "cpu_seconds": round(time.thread_time() - used, 4)}  # fmt: skip
    return Done(values, told)


@lru_cache(maxsize=16)
def _bins(size: tuple[int, int] | int, pixel_size: float, settings: CtfSettings, device: str) -> PolarBins:
    """The bins of micrographs (rows, columns), or of saved spectra of one side, made once."""
    if isinstance(size, int):
        return saved_bins(size, pixel_size, settings, device)
    return tile_bins(tile_layout(size, pixel_size)[0], pixel_size, settings, device)


def spectrum_on(device: torch.device, pixels: Tensor, pixel_size: float, settings: CtfSettings) -> Spectrum:
    """The spectrum of pixels, made on a device; in main memory, without what only its making needs. Raises BadInput for bad pixels."""
    able = min(pixels.shape) >= LEAST_SIDE  # otherwise the step says what is wrong
    size = (pixels.shape[0], pixels.shape[1])
    spectrum = micrograph_spectrum(pixels, pixel_size, settings, device, _bins(size, pixel_size, settings, str(device)) if able else None)
    bins = _bins(size, pixel_size, settings, "cpu")
    return spectrum.on(replace(bins, index=bins.index[:0], edges=bins.edges[:0]))


def _spectrum(task: Task) -> Spectrum:
    """The spectrum of a task, made on the CPU where it is not there yet."""
    if isinstance(task.source, Spectrum):
        return task.source
    if not task.saved:
        return spectrum_on(torch.device("cpu"), read_micrograph(task.source), task.optics.pixel_size, task.settings)
    pixels = read_micrograph(task.source)
    pixel = micrograph_header(task.source)[1]  # of the spectrum itself: after rounding it is not that of the micrograph
    if pixel <= 0.1:
        raise BadInput(f"{task.source}: its header has no pixel size; run `frazil motion` again")
    height, width = pixels.shape
    able = height == width and height >= LEAST_SIDE
    return saved_spectrum(pixels, pixel, task.settings, "cpu", _bins(height, pixel, task.settings, "cpu") if able else None)


def _written(task: Task, result: CtfResult) -> dict[str, Any]:
    """data_ctf of the files of a micrograph, which are written; its STAR file last: it tells that the others are there."""
    image, picture, star = task.files
    image.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(image, result.picture, result.picture_pixel)
    write_picture(picture, Path(task.name).name, result)
    u, v, angle = result.defocus.tolist()
    values: dict[str, Any] = {
        "rlnMicrographName": task.name, "rlnDefocusU": round(u, 3), "rlnDefocusV": round(v, 3),
        "rlnCtfAstigmatism": round(u - v, 3), "rlnDefocusAngle": round(angle, 4), "rlnPhaseShift": round(result.phase_shift, 3),
        "rlnCtfFigureOfMerit": round(result.fom, 6), "rlnCtfMaxResolution": round(result.resolution, 4),
        "rlnCtfIceRingDensity": round(result.ice, 4), "frazilRingsFound": int(result.found), "frazilScore": round(result.score, 2),
    }  # fmt: skip
    errors = zip(("Defocus", "Astigmatism", "Angle", "PhaseShift"), result.error, strict=True)
    values |= {f"frazil{name}Error": round(value, 3) for name, value in errors}
    values |= {f"frazilTilt{name}": round(value, 2) for name, value in zip(("", "Error", "Direction"), result.tilt, strict=True)}
    values["frazilFlags"] = "; ".join(result.flags) or "none"
    c = result.curves
    curves = pd.DataFrame({"rlnResolution": c.k.numpy(), "frazilEquiphaseAverage": c.average.numpy(), "frazilModel": c.model.numpy(),
                           "frazilCtf2": c.ctf2.numpy(), "frazilCorrelation": c.correlation.numpy()}).round(6).dropna()  # fmt: skip
    write_star(star, {"equiphase_average": curves, "ctf": values}, COMMENT)  # what is_done looks for comes last
    return values


def is_done(files: Sequence[Path], name: str) -> bool:
    """Whether the files of the micrograph `name` are there and whole."""
    return are_whole(files, lambda star: read_values(star, name))


def read_values(path: Path, name: str) -> dict[str, Any]:
    """data_ctf of a NAME_ctf.star. Raises BadInput where it is not whole, or that of another micrograph."""
    star = read_whole_star(path)
    found, curves = star.get("ctf"), star.get("equiphase_average")
    if not isinstance(found, dict) or "frazilFlags" not in found or not isinstance(curves, pd.DataFrame):
        raise BadInput(f"{path}: is not a whole file of `frazil ctf`")
    if found.get("rlnMicrographName") != name:
        raise BadInput(f"{path}: is of {found.get('rlnMicrographName')}, not of {name}")
    return found
