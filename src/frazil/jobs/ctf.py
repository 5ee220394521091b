"""`frazil ctf`: defocus, astigmatism and phase shift of micrographs or their saved power spectra, in RELION's labels."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from frazil.data import BadInput
from frazil.io.micrographs import Micrographs, read_micrographs
from frazil.io.star import write_star
from frazil.jobs import ctf_work
from frazil.jobs.ctf_report import write_report
from frazil.jobs.ctf_work import Done, Source, Task, finish, is_done, read_values, spectrum_on
from frazil.jobs.pick_files import Spent, Writers, output_names, read_ahead
from frazil.jobs.processes import Processes
from frazil.jobs.run import Run
from frazil.ops.dispatch import set_threads
from frazil.steps.ctf import CtfSettings

POSITIONAL = ("micrographs",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}
DEGREES: JsonDict = {"unit": "degrees", **EXPERT}
SPECTRUM, UNWEIGHTED = "rlnCtfPowerSpectrum", "rlnMicrographNameNoDW"
LABELS = ("rlnCtfImage", "rlnDefocusU", "rlnDefocusV", "rlnCtfAstigmatism", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfFigureOfMerit",
          "rlnCtfMaxResolution", "rlnCtfIceRingDensity")  # fmt: skip
MOST_WORKERS = 16  # micrographs at a time: each takes three times its pixels in memory
MANY = 12  # micrographs from which processes are worth their start; three times as many for two, which are less in the way as threads
STALE = (*LABELS, "rlnCtfValidationScore", "rlnCtfBfactor", "rlnCtfScalefactor")  # columns of an earlier estimate


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
    device: torch.device  # where spectra are made
    values: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the micrographs that were done: data_ctf of NAME_ctf.star
    bad: dict[int, str] = field(default_factory=dict)  # micrographs that could not be used, and why

    def task(self, index: int, source: Source) -> Task:
        """What is to be done for a micrograph."""
        return Task(self.table.names[index], self.outputs(index), source, self.table.optics_of(index), self.settings,
                    self.params.use_power_spectra)  # fmt: skip

    def tell(self, done: int, of: int) -> None:
        """How far the run is; the place to stop."""
        self.run.progress(done + len(self.table) - of, len(self.table), "micrographs")
        self.run.check_stop()

    def outputs(self, index: int) -> tuple[Path, Path, Path]:
        """Diagnostic image (.ctf, MRC), its picture, and the STAR file that is written last."""
        base = self.run.path / self.bases[index]
        return tuple(base.with_name(base.name + ending) for ending in (".ctf", "_ctf.png", "_ctf.star"))  # type: ignore[return-value]



def run(params: Params, run: Run) -> None:
    """Write NAME.ctf, NAME_ctf.png and NAME_ctf.star of every micrograph that is not done, then micrographs_ctf.star and report.html."""
    job = _prepare(params, run)
    todo = [i for i in range(len(job.table)) if not (run.resumed and is_done(job.outputs(i), job.table.names[i]))]
    if run.resumed:
        run.note(f"{len(job.table) - len(todo)} of {len(job.table)} micrographs are there and whole")
    workers, spent = max(1, min(run.threads, MOST_WORKERS)), Spent()
    before = torch.get_num_threads()
    set_threads(1)
    try:
        if workers > 1 and len(todo) >= MANY * (1 + 2 / (workers - 1)):
            _in_processes(job, todo, workers, spent)
        else:
            _in_threads(job, todo, workers, spent)
    finally:
        set_threads(before)
    spent.on("spectra and waiting for fits")
    _conclude(job)
    spent.on("report")
    run.event("seconds", **spent.rounded())


def _in_processes(job: _Job, todo: Sequence[int], workers: int, spent: Spent) -> None:
    """Each process has a micrograph of its own. Not threads: a fit is thousands of steps on few numbers, between which threads would wait
    for each other."""
    with Processes(workers, (ctf_work.__name__,)) as processes:
        for done, (index, source) in enumerate(_sources(job, todo, spent), 1):
            if isinstance(source, BadInput):
                _record(job, index, source)
            else:
                processes.submit(finish, job.task(index, source), partial(_record, job, index))
            spent.on("spectra and waiting for fits")
            job.tell(done, len(todo))


def _in_threads(job: _Job, todo: Sequence[int], workers: int, spent: Spent) -> None:
    """The same for few micrographs: processes take a second or two to start."""
    writers = Writers(workers, workers)

    def work(index: int, source: Source | BadInput) -> None:
        _record(job, index, source if isinstance(source, BadInput) else finish(job.task(index, source)))

    try:
        for done, (index, source) in enumerate(_sources(job, todo, spent), 1):
            writers.submit(work, index, source)
            spent.on("spectra and waiting for fits")
            job.tell(done, len(todo))
    finally:
        writers.close()


def _sources(job: _Job, todo: Sequence[int], spent: Spent) -> Iterator[tuple[int, Source | BadInput]]:
    """Files, which the system is asked to read ahead; of a GPU the spectra, which it makes one after the other."""
    if job.device.type != "cpu":
        for index, pixels in spent.waiting("waiting for pixels", read_ahead(job.read, todo, job.device)):
            try:
                size = job.table.optics_of(index).pixel_size
                found = pixels if isinstance(pixels, BadInput) else spectrum_on(job.device, pixels, size, job.settings)
            except BadInput as error:
                found = error
            yield index, found
        return
    for index in todo:
        try:
            file = job.read.file(index)
            with suppress(OSError, AttributeError), open(file, "rb") as opened:  # not every system can
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            yield index, file
        except BadInput as error:
            yield index, error


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
    device = torch.device("cpu") if params.use_power_spectra else run.device  # of a saved spectrum little is left to be made
    return _Job(params, run, table, read, settings, output_names(table), device)


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


def _record(job: _Job, index: int, done: Done | BadInput) -> None:
    """An event, and lines for what a user should look at; or why the micrograph is left out."""
    if isinstance(done, BadInput):
        name, said = job.read.names[index], str(done)
        job.bad[index] = said if name in said else f"{name}: {said}"
        job.run.warn(f"left out: {job.bad[index]}")
        return
    job.values[index] = done.values
    job.run.event("micrograph", name=job.table.names[index], **done.told)
    for flag in done.told["flags"]:
        job.run.note(f"{job.table.names[index]}: {flag}")


def _conclude(job: _Job) -> None:
    """micrographs_ctf.star of those with rings, lists of the others, report, summary."""
    run, total, bad = job.run, len(job.table), job.bad
    values = {i: job.values.get(i) or read_values(job.outputs(i)[2], job.table.names[i]) for i in range(total) if i not in bad}
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
