"""`frazil ctf`: defocus, astigmatism and phase shift of micrographs or their saved power spectra, in RELION's labels."""
from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput
from frazil.io.micrographs import Micrographs, micrograph_header, read_micrographs
from frazil.io.mrc import read_header, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.ctf_picture import write_picture
from frazil.jobs.ctf_report import write_report
from frazil.jobs.pick_files import Spent, Writers, output_names, read_ahead
from frazil.jobs.run import Run
from frazil.maths.thon import PolarBins
from frazil.ops.dispatch import set_threads
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

POSITIONAL = ("micrographs",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}
DEGREES: JsonDict = {"unit": "degrees", **EXPERT}
SPECTRUM, UNWEIGHTED = "rlnCtfPowerSpectrum", "rlnMicrographNameNoDW"
LABELS = ("rlnCtfImage", "rlnDefocusU", "rlnDefocusV", "rlnCtfAstigmatism", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfFigureOfMerit",
          "rlnCtfMaxResolution", "rlnCtfIceRingDensity")  # fmt: skip
MOST_WORKERS = 16  # micrographs at a time: each takes three times its pixels in memory
STALE = (*LABELS, "rlnCtfValidationScore", "rlnCtfBfactor", "rlnCtfScalefactor")  # columns of an earlier estimate
COMMENT = "frazil…: standard deviations in Å and degrees; curves by frequency"


class Params(BaseModel):
    """Estimate the CTF of micrographs from their Thon rings: defocus, astigmatism, on request the phase shift; and how good it is."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    micrographs: Path = Field(description="STAR file of micrographs, as `frazil motion` writes it, or one image")
    use_power_spectra: bool = Field(False, description="use the spectra that motion correction saved (rlnCtfPowerSpectrum)")
    min_defocus: float = Field(3000.0, gt=0, description="least mean defocus searched", json_schema_extra=ANGSTROM)
    max_defocus: float = Field(60000.0, gt=0, description="largest mean defocus searched", json_schema_extra=ANGSTROM)
    coarsest: float = Field(30.0, gt=0, description="coarsest detail of the fit", json_schema_extra=ANGSTROM)
    finest: float = Field(4.0, gt=0, description="finest detail of the fit; 4 keeps it off the ice ring", json_schema_extra=ANGSTROM)
    max_astigmatism: float = Field(3000.0, ge=0, description="largest U - V looked for", json_schema_extra={**ANGSTROM, **EXPERT})
    phase_plate: bool = Field(False, description="find the phase shift of a phase plate too")
    min_phase: float = Field(0.0, ge=0, lt=180, description="least phase shift tried", json_schema_extra=DEGREES)
    max_phase: float = Field(180.0, gt=0, le=180, description="largest phase shift tried", json_schema_extra=DEGREES)
    phase_step: float = Field(10.0, gt=0, le=45, description="step of the phase shifts tried", json_schema_extra=DEGREES)
    dose_weighted: bool = Field(False, description="use dose-weighted sums even where unweighted ones are listed", json_schema_extra=EXPERT)
    pixel_size: float | None = Field(None, gt=0, description="of the micrographs, instead of the files'", json_schema_extra=ANGSTROM)
    voltage: float | None = Field(None, gt=0, description="instead of the table's", json_schema_extra={"unit": "kV"})
    cs: float | None = Field(None, ge=0, description="spherical aberration, instead of the table's", json_schema_extra={"unit": "mm"})
    amplitude_contrast: float | None = Field(None, ge=0, le=1, description="instead of the table's")
    box: int = Field(512, ge=128, le=2048, multiple_of=2, description="side of the pictures", json_schema_extra={"unit": "px", **EXPERT})


@dataclass
class _Job:
    """What is the same for all micrographs."""

    params: Params
    run: Run
    table: Micrographs  # as given, names of the micrographs
    read: Micrographs  # names of the files that are read
    settings: CtfSettings
    bases: list[str]
    bins: dict[tuple[Any, ...], PolarBins] = field(default_factory=dict)  # by what they depend on, and device
    bad: dict[int, str] = field(default_factory=dict)  # micrographs that could not be used, and why

    def outputs(self, index: int) -> tuple[Path, Path, Path]:
        """Diagnostic image (.ctf, MRC), its picture, and the STAR file that is written last."""
        base = self.run.path / self.bases[index]
        return tuple(base.with_name(base.name + ending) for ending in (".ctf", "_ctf.png", "_ctf.star"))  # type: ignore[return-value]

    def bins_of(self, key: tuple[Any, ...], device: torch.device | str, make: Callable[[torch.device | str], PolarBins]) -> PolarBins:
        """The bins for `key` on a device, made once."""
        whole = (*key, str(device))
        if whole not in self.bins:
            self.bins[whole] = make(device)
        return self.bins[whole]


def run(params: Params, run: Run) -> None:
    """Write NAME.ctf, NAME_ctf.png and NAME_ctf.star of every micrograph that is not done, then micrographs_ctf.star and report.html."""
    job = _prepare(params, run)
    total = len(job.table)
    todo = [i for i in range(total) if not (run.resumed and is_done(job.outputs(i)))]
    spent = Spent()
    # CPU threads each have a micrograph of their own. A GPU makes the spectra, one after the other, and leaves what is small to them: a fit
    # is thousands of steps on few numbers, which a core does as fast, and there are several.
    workers = max(1, min(run.threads, MOST_WORKERS))
    writers = Writers(workers, workers)
    before = torch.get_num_threads()
    set_threads(1)
    try:
        for done, (index, pixels) in enumerate(spent.waiting("waiting for pixels", read_ahead(job.read, todo, run.device)), 1):
            if run.device.type == "cpu":
                writers.submit(_work, job, index, pixels)
            else:
                writers.submit(_finish, job, index, _measured(job, index, pixels))
            spent.on("spectra and waiting for fits")
            run.progress(done + total - len(todo), total, "micrographs")
            run.check_stop()
    finally:
        writers.close()
        set_threads(before)
    spent.on("spectra and waiting for fits")
    _conclude(job)
    spent.on("report")
    run.event("seconds", **spent.rounded())


def _prepare(params: Params, run: Run) -> _Job:
    """The table, what is read of each micrograph, the optics. Raises BadInput for options and tables that cannot work."""
    if params.min_defocus >= params.max_defocus:
        raise BadInput(f"--min-defocus {params.min_defocus:g} is not below --max-defocus {params.max_defocus:g}")
    if params.finest >= params.coarsest / 1.5:
        raise BadInput(f"--finest {params.finest:g} is not well below --coarsest {params.coarsest:g}: no rings fit between")
    if params.phase_plate and params.min_phase >= params.max_phase:
        raise BadInput(f"--min-phase {params.min_phase:g} is not below --max-phase {params.max_phase:g}")
    table = _with_optics(read_micrographs(params.micrographs, params.pixel_size, constants=False), params)
    settings = CtfSettings(params.coarsest, params.finest, params.min_defocus, params.max_defocus, params.max_astigmatism,
                           params.phase_plate, (params.min_phase, params.max_phase, params.phase_step), params.box)  # fmt: skip
    label = SPECTRUM if params.use_power_spectra else UNWEIGHTED
    read = table
    if label in table.table and not (label == UNWEIGHTED and params.dose_weighted):
        read = replace(table, names=tuple(table.table[label]))
        if label == UNWEIGHTED:
            run.note(f"unweighted sums are used ({UNWEIGHTED}): dose weighting damps the rings")
    elif params.use_power_spectra:
        raise BadInput(f"{params.micrographs}: has no column _{SPECTRUM}; run without --use-power-spectra, or `frazil motion` again")
    if not params.use_power_spectra:
        for optics in table.optics:
            if optics.pixel_size <= 0:
                raise BadInput(f"{params.micrographs}: no pixel size for {optics.name}, in neither table nor image; give --pixel-size")
            if 2.2 * optics.pixel_size > params.coarsest / 1.5:
                raise BadInput(f"{params.micrographs}: pixels of {optics.pixel_size:g} Å show nothing finer than {params.coarsest:g} Å; "
                               "use micrographs that are binned less")  # fmt: skip
    return _Job(params, run, table, read, settings, output_names(table))


def _with_optics(table: Micrographs, params: Params) -> Micrographs:
    """The table with the microscope's constants from the options; they must be in one or the other."""
    given = {"rlnVoltage": params.voltage, "rlnSphericalAberration": params.cs, "rlnAmplitudeContrast": params.amplitude_contrast}
    options = {"rlnVoltage": "--voltage", "rlnSphericalAberration": "--cs", "rlnAmplitudeContrast": "--amplitude-contrast"}
    names = {"rlnVoltage": "voltage", "rlnSphericalAberration": "cs", "rlnAmplitudeContrast": "amplitude_contrast"}
    for label, value in given.items():
        if value is None and label not in table.table and label not in table.optics_table:
            raise BadInput(f"{table.path}: has no _{label}; give {options[label]}")
    changed = {names[label]: value for label, value in given.items() if value is not None}
    optics = tuple(replace(item, **changed) for item in table.optics)
    for item in optics:
        if item.voltage <= 0:
            raise BadInput(f"{table.path}: {item.name}: _rlnVoltage is {item.voltage:g}; expected kV, above 0")
    return replace(table, optics=optics)


def is_done(files: Sequence[Path]) -> bool:
    """Whether the files of a micrograph are there and whole: read, not only looked for."""
    image, picture, star = files
    try:
        read_header(image)
        _values(star)
        with open(picture, "rb") as file:
            file.seek(-8, 2)
            return file.read() == b"IEND\xaeB`\x82"  # the end of every PNG
    except (BadInput, OSError):
        return False


def _values(path: Path) -> dict[str, Any]:
    """data_ctf of a NAME_ctf.star. Raises BadInput where it is not whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are cut off: counted below
        star = read_star(path)
    found, curves = star.get("ctf"), star.get("equiphase_average")
    if star.skipped_rows or not isinstance(found, dict) or "frazilFlags" not in found or not isinstance(curves, pd.DataFrame):
        raise BadInput(f"{path}: is not a whole file of `frazil ctf`")
    return found


def _work(job: _Job, index: int, pixels: Tensor | BadInput) -> None:
    """All of one micrograph."""
    _finish(job, index, _measured(job, index, pixels))


def _measured(job: _Job, index: int, pixels: Tensor | BadInput) -> Spectrum | BadInput:
    """The spectrum of one micrograph in main memory, or what is wrong with it."""
    if isinstance(pixels, BadInput):
        return pixels
    try:
        return _spectrum(job, index, pixels)
    except BadInput as error:
        return error


def _finish(job: _Job, index: int, spectrum: Spectrum | BadInput) -> None:
    """The CTF of one spectrum, recorded and written; a line why where it cannot be used."""
    start = time.perf_counter()
    try:
        if isinstance(spectrum, BadInput):
            raise spectrum
        result = estimate_ctf(spectrum, job.table.optics_of(index), job.settings)
    except BadInput as error:
        name, said = job.read.names[index], str(error)
        job.bad[index] = said if name in said else f"{name}: {said}"
        job.run.warn(f"left out: {job.bad[index]}")
        return
    _record(job, index, result, time.perf_counter() - start)
    _write(job, index, result)


def _spectrum(job: _Job, index: int, pixels: Tensor) -> Spectrum:
    """Of one micrograph, or as it was saved; in main memory."""
    optics, device = job.table.optics_of(index), job.run.device
    shape = (pixels.shape[0], pixels.shape[1])
    if job.params.use_power_spectra:
        path = job.read.file(index)
        pixel = micrograph_header(path)[1]  # of the spectrum itself: after rounding it is not that of the micrograph
        if pixel <= 0.1:
            raise BadInput(f"{path}: its header has no pixel size; run `frazil motion` again")
        bins = None  # saved_spectrum says what is wrong
        if shape[0] == shape[1] and shape[0] >= LEAST_SIDE:
            bins = job.bins_of((shape, pixel), "cpu", lambda where: saved_bins(shape[0], pixel, job.settings, where))
        return saved_spectrum(pixels.cpu(), pixel, job.settings, "cpu", bins)

    def made(where: torch.device | str) -> PolarBins:
        return tile_bins(tile_layout(shape, optics.pixel_size)[0], optics.pixel_size, job.settings, where)

    key, able = (shape, optics.pixel_size), min(shape) >= LEAST_SIDE
    spectrum = micrograph_spectrum(pixels, optics.pixel_size, job.settings, device, job.bins_of(key, device, made) if able else None)
    return spectrum if device.type == "cpu" else spectrum.on(job.bins_of(key, "cpu", made))


def _write(job: _Job, index: int, result: CtfResult) -> None:
    """The files of a micrograph, its STAR file last: it tells that the others are there."""
    image, picture, star = job.outputs(index)
    image.parent.mkdir(parents=True, exist_ok=True)
    write_mrc(image, result.picture, result.picture_pixel)
    write_picture(picture, Path(job.table.names[index]).name, result)
    u, v, angle = result.defocus.tolist()
    values: dict[str, Any] = {
        "rlnMicrographName": job.table.names[index], "rlnDefocusU": round(u, 3), "rlnDefocusV": round(v, 3),
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


def _record(job: _Job, index: int, result: CtfResult, seconds: float) -> None:
    """An event, and lines for what a user should look at."""
    name = job.table.names[index]
    u, v, angle = result.defocus.tolist()
    job.run.event("micrograph", name=name, found=result.found, defocus=(u + v) / 2, astigmatism=u - v, angle=angle, fom=result.fom,
                  phase_shift=result.phase_shift, resolution=result.resolution, ice=result.ice, tilt=result.tilt[0], flags=result.flags,
                  seconds=round(seconds, 4))  # fmt: skip
    for flag in result.flags:
        job.run.note(f"{name}: {flag}")


def _conclude(job: _Job) -> None:
    """micrographs_ctf.star of those with rings, lists of the others, report, summary."""
    run, total, bad = job.run, len(job.table), job.bad
    values = {i: _values(job.outputs(i)[2]) for i in range(total) if i not in bad}
    good = [i for i, v in values.items() if int(v["frazilRingsFound"])]
    none = [i for i in values if i not in good]
    path = run.path / "micrographs_ctf.star"
    reasons = {job.table.names[i]: bad.get(i, "no Thon rings found") for i in (*none, *bad)}
    lost = pd.DataFrame(list(reasons.items()), columns=["rlnMicrographName", "frazilReason"])
    (run.path / "left_out.star").unlink(missing_ok=True)
    if len(lost):
        write_star(run.path / "left_out.star", {"micrographs": lost})
    if not good:
        first = next(iter(bad.values())) if bad else f"{job.table.names[none[0]]}: no Thon rings found"
        raise BadInput(f"{job.params.micrographs}: no CTF for any of its {total} micrographs; first: {first}")
    table = _write_table(job, good, values, path)
    flagged = write_report(run, table, {i: values[i] for i in good}, reasons)
    mean = 0.5 * (table["rlnDefocusU"].astype(float) + table["rlnDefocusV"].astype(float))
    median = table["rlnCtfMaxResolution"].astype(float).median()
    kinds = Counter("unreadable" if i in bad else "without rings" for i in (*bad, *none))
    missing = "".join(f", {count} {kind}" for kind, count in kinds.items()) + (" (left_out.star)" if kinds else "")
    run.summary(
        f"CTF of {len(good)} of {total} micrographs{missing}; {flagged} flagged (report.html)",
        f"defocus {mean.min() / 1e4:.2f} to {mean.max() / 1e4:.2f} µm, rings to {median:.1f} Å (median); {path}",
    )


def _write_table(job: _Job, good: Sequence[int], values: dict[int, dict[str, Any]], path: Path) -> pd.DataFrame:
    """The input's table with the CTF's columns, and its optics."""
    inside = job.run.path.resolve().is_relative_to(Path.cwd())
    table = job.table.table.iloc[list(good)].drop(columns=[c for c in STALE if c in job.table.table]).reset_index(drop=True)
    images = [job.outputs(i)[0].resolve() for i in good]
    table["rlnCtfImage"] = [f"{p.relative_to(Path.cwd()) if inside else p}:mrc" for p in images]
    for label in LABELS[1:]:
        if label != "rlnPhaseShift" or job.params.phase_plate:
            table[label] = [float(values[i][label]) for i in good]
    optics = _optics_table(job)
    if "rlnOpticsGroup" not in table:
        table["rlnOpticsGroup"] = [optics["rlnOpticsGroup"].iloc[int(job.table.group[i])] for i in good]
    write_star(path, {"optics": optics, "micrographs": table, **job.table.blocks})
    return table


def _optics_table(job: _Job) -> pd.DataFrame:
    """data_optics: the input's, with what options changed; made where there was none."""
    optics = job.table.optics_table.copy()
    if not len(optics):
        groups = job.table.optics
        optics = pd.DataFrame({"rlnOpticsGroupName": [o.name for o in groups], "rlnOpticsGroup": range(1, len(groups) + 1)})

    if "rlnOpticsGroup" not in optics:
        optics["rlnOpticsGroup"] = range(1, len(optics) + 1)

    def values(kind: str) -> list[str]:
        return [repr(float(getattr(o, kind))) for o in job.table.optics]

    for label, kind, given in (("rlnVoltage", "voltage", job.params.voltage), ("rlnSphericalAberration", "cs", job.params.cs),
                               ("rlnAmplitudeContrast", "amplitude_contrast", job.params.amplitude_contrast),
                               ("rlnMicrographPixelSize", "pixel_size", job.params.pixel_size)):  # fmt: skip
        known = kind != "pixel_size" or all(o.pixel_size > 0 for o in job.table.optics)
        if known and (given is not None or label not in optics):
            optics[label] = values(kind)
    if "rlnMicrographOriginalPixelSize" not in optics and "rlnMicrographPixelSize" in optics:
        optics["rlnMicrographOriginalPixelSize"] = values("pixel_size")
    return optics
