"""`frazil pick`: particles in micrographs, by templates, views of a map, or as round blobs; coordinates as RELION's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput
from frazil.io.coordinates import SCORE, X, Y
from frazil.io.micrographs import Micrographs, read_micrograph, read_micrographs
from frazil.io.star import write_star
from frazil.jobs.pick_files import (
    Spent,
    Writers,
    finished_picks,
    output_names,
    picks_table,
    read_ahead,
    read_maps,
    write_lists,
    write_maps,
)
from frazil.jobs.pick_pictures import SHOWN, Shown, preview_of, stretched, write_picture, write_report
from frazil.jobs.pick_plan import FOM_SCALE, FOM_THRESHOLD, INSIDE, NEARBY, Plan, bank_for, make_plan, prepared_of
from frazil.jobs.record import read_events
from frazil.jobs.run import Run
from frazil.maths.peaks import highest_apart
from frazil.steps.blobs import blob_candidates, blob_map
from frazil.steps.pick import Picks, ScoreMap, candidates, match

POSITIONAL = ("micrographs",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}
FINE: JsonDict = {"unit": "Å", "level": "expert"}
EVERYTHING = 0.4  # share of the area above the threshold from which the threshold means nothing
WRITERS = 8  # threads: most of what they do (PNG, files) runs beside the device and the other threads
CROWDED = 1.25  # mean distance over the least one in a picture full of picks


class Params(BaseModel):
    """Find particles in micrographs: give --templates, --reference, --log-diameter, or --read-fom of an earlier run."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    micrographs: Path = Field(description="STAR file of micrographs, with or without CTF; or one image (.mrc, .tif)")
    templates: Path | None = Field(None, description="templates, white on black: a stack (.mrcs) or a STAR file of class averages")
    reference: Path | None = Field(None, description="a map whose views are the templates")
    log_diameter: tuple[float, float] | None = Field(None, description="without templates: round particles of a smallest to a largest "
                                                     "diameter, by Laplacian of Gaussian", json_schema_extra=ANGSTROM)  # fmt: skip
    read_fom: str | None = Field(None, description="only choose peaks anew, from the score maps of this run of --write-fom")
    diameter: float | None = Field(None, gt=0, description="diameter of the mask around a particle; measured on the templates if not given",
                                   json_schema_extra=ANGSTROM)  # fmt: skip
    lowpass: float = Field(20.0, ge=0, description="low-pass filter of micrographs and templates; 0: none", json_schema_extra=ANGSTROM)
    angular_step: float = Field(5.0, gt=0, le=360, description="in-plane angular step", json_schema_extra={"unit": "degrees"})
    threshold: float | None = Field(None, description=f"least score of a pick; for fom {FOM_THRESHOLD:g}, else found from the scores")
    min_distance: float | None = Field(None, ge=0, description=f"least distance of two picks; {NEARBY:g} of the diameter if not given",
                                       json_schema_extra=ANGSTROM)  # fmt: skip
    score: Literal["auto", "z", "fom", "ncc"] = Field(
        "auto",
        description="z: standard deviations above what the micrograph's background usually gives; fom: probability ratio to background, "
        "1 for a perfect match; ncc: correlation coefficient, less where contrast is low; auto: ncc for --reference without CTF, fom where "
        f"--greyscale or a threshold below {FOM_SCALE:g} is given, else z",
    )
    symmetry: str = Field("C1", description="point group of --reference")
    view_step: float = Field(30.0, gt=0, description="angle between views of --reference", json_schema_extra={"unit": "degrees", **EXPERT})
    greyscale: Literal["auto", "file", "calibrate"] = Field(
        "auto",
        description="scale of the templates: as in the file (in standard deviations of the background), or so that a typical particle has "
        "fom 1; auto: file for --templates of the micrographs' pixel size, else calibrate",
        json_schema_extra=EXPERT,
    )
    edge: float | None = Field(None, ge=0, description=f"least distance of a pick from the edge; {INSIDE:g} of the diameter if not given",
                               json_schema_extra=FINE)  # fmt: skip
    max_stddev_noise: float = Field(1.1, description="largest local standard deviation, that of the micrograph = 1; -1: any",
                                    json_schema_extra=EXPERT)  # fmt: skip
    min_avg_noise: float = Field(-999.0, description="smallest local mean, in standard deviations", json_schema_extra=EXPERT)
    max_picks: int | None = Field(None, ge=1, description="picks of a micrograph at most; as many discs as fit if not given",
                                  json_schema_extra=EXPERT)  # fmt: skip
    invert: bool = Field(True, description="particles are dark in the micrographs", json_schema_extra=EXPERT)
    ctf: bool = Field(True, description="multiply templates by the micrographs' CTF where it is given", json_schema_extra=EXPERT)
    intact_first_peak: bool = Field(False, description="leave the CTF out up to its first maximum", json_schema_extra=EXPERT)
    pixel_size: float | None = Field(None, gt=0, description="of the micrographs, instead of what files say", json_schema_extra=FINE)
    template_pixel_size: float | None = Field(
        None, gt=0, description="of templates or reference, instead of the header's", json_schema_extra=FINE
    )
    log_rounds: int = Field(4, ge=0, le=20, description="rounds in which blobs teach the profile that is then matched; 0: plain LoG, "
                            "whose score counts standard deviations above the mean", json_schema_extra=EXPERT)  # fmt: skip
    write_fom: bool = Field(False, description="keep the score maps, for --read-fom", json_schema_extra=EXPERT)
    pictures: bool = Field(True, description="write a picture with the picks for every micrograph", json_schema_extra=EXPERT)

    @model_validator(mode="after")
    def _one_way(self) -> Params:
        """Exactly one way to pick, and diameters in order."""
        if sum(x is not None for x in (self.templates, self.reference, self.log_diameter, self.read_fom)) != 1:
            raise ValueError("give one of --templates, --reference, --log-diameter and --read-fom")
        if self.log_diameter and not 0 < self.log_diameter[0] <= self.log_diameter[1]:
            raise ValueError(
                f"--log-diameter: {self.log_diameter[0]:g} {self.log_diameter[1]:g}; expected a smallest and a largest diameter"
            )
        return self


@dataclass(frozen=True)
class Result:
    """What is kept in memory of a micrograph that is done."""

    index: int
    number: int
    mean: float
    xy: np.ndarray  # candidates that keep the distance, also below the threshold
    value: np.ndarray
    full: bool = False  # stopped at the largest number of picks
    area: float = 0.0  # share of the area above the threshold
    shown: Shown | None = None


def run(params: Params, run: Run) -> None:
    """Pick every micrograph and write coordinates, pictures and the lists."""
    spent = Spent()
    micrographs = read_micrographs(params.micrographs, params.pixel_size)
    announce(params, micrographs, run)
    plan = make_plan(params, micrographs, run)
    bases = output_names(micrographs)
    finished = finished_before(params, plan, bases, run)
    todo = [i for i in range(len(micrographs)) if i not in finished]
    gallery = set(np.unique(np.linspace(0, len(micrographs) - 1, SHOWN).round().astype(int)).tolist())
    results = [result for i, result in finished.items() if i not in gallery]
    bad: list[str] = []
    writers = Writers(max(1, min(WRITERS, run.threads)))
    spent.on("plan")
    try:
        for i in sorted(gallery & finished.keys()):
            writers.submit(with_picture, params, plan, micrographs, bases[i], finished[i])
        for done, (index, found) in enumerate(source(params, plan, micrographs, todo, bases, run, spent), 1):
            spent.on("matching")
            if isinstance(found, BadInput):
                bad.append(str(found))
                run.warn(f"left out: {found}")
            else:
                writers.submit(finish, params, plan, micrographs, index, bases[index], found, run, index in gallery)
            run.progress(done + len(finished), len(micrographs), "picking")
            run.check_stop()
            spent.on("waiting for writers")
    finally:
        writers.close()
        spent.on("waiting for writers")
    conclude(params, plan, micrographs, bases, sorted([*results, *writers.done], key=lambda r: r.index), bad, run)
    spent.on("report")
    run.event("seconds", **spent.rounded())


def finished_before(params: Params, plan: Plan, bases: Sequence[str], run: Run) -> dict[int, Result]:
    """What an earlier part of this run finished, by index: micrographs of which all files are there and whole."""
    if not run.resumed:
        return {}
    known = {event["name"]: event for event in read_events(run.path) if event["event"] == "micrograph"}
    maps = params.write_fom and plan.blobs is None
    out: dict[int, Result] = {}
    for i, base in enumerate(bases):
        table = finished_picks(run.path, base, params.pictures, maps)
        if table is not None:
            value, said = table[SCORE].to_numpy(float), known.get(base, {})
            mean = float(value.mean()) if len(table) else 0.0
            full, area = said.get("full", False), said.get("area", 0.0)
            out[i] = Result(i, len(table), mean, table[[X, Y]].to_numpy(float), value, full, area)
    run.note(f"{len(out)} of {len(bases)} micrographs are there and whole")
    return out


def with_picture(params: Params, plan: Plan, micrographs: Micrographs, base: str, result: Result) -> Result:
    """The result with its picture for the gallery, of picks only: candidates below the threshold were not kept."""
    try:
        if params.read_fom:
            scores, preview = read_maps(Path(params.read_fom) / "fom" / base)
            shape = scores.grid.shape
        else:
            pixels, size = read_micrograph(micrographs.file(result.index)), micrographs.optics_of(result.index).pixel_size
            shape, preview = (pixels.shape[0], pixels.shape[1]), preview_of(pixels, size, params.lowpass, plan.diameter, params.invert)
    except BadInput:  # gone since
        return result
    return result if preview is None else replace(result, shown=Shown(base, stretched(preview), shape, result.xy, result.value))


def announce(params: Params, micrographs: Micrographs, run: Run) -> None:
    """Say what is unusual about the micrographs."""
    missing = [optics.name for optics in micrographs.optics if optics.pixel_size <= 0]
    if missing:
        raise BadInput(f"{params.micrographs}: no pixel size for {missing[0]}, in neither table nor image; give --pixel-size")
    sizes = sorted({optics.pixel_size for optics in micrographs.optics})
    if len(sizes) > 1:
        run.note(f"{len(sizes)} pixel sizes ({', '.join(f'{s:g}' for s in sizes)} Å): templates are resampled for each")
    with_ctf = int(micrographs.has_ctf.sum())
    if params.read_fom or (params.log_diameter and not with_ctf):
        return
    if not params.ctf or not with_ctf:
        run.note("no CTF is applied: " + ("as asked" if not params.ctf else f"{params.micrographs} gives none"))
    elif with_ctf < len(micrographs):
        first = micrographs.names[int((~micrographs.has_ctf).nonzero()[0])]
        run.warn(f"{len(micrographs) - with_ctf} of {len(micrographs)} micrographs have no CTF values (first: {first}); picked without CTF")


def star_path(folder: Path, base: str) -> Path:
    """Where the coordinates of a micrograph are."""
    return folder / f"{base}_autopick.star"


Found = tuple[Picks, "ScoreMap | None", "Tensor | None", tuple[int, int], float]


def source(params: Params, plan: Plan, micrographs: Micrographs, todo: Sequence[int], bases: Sequence[str], run: Run, spent: Spent):
    """(index, Found or what was wrong) of each micrograph to do."""
    lowest = lowest_of_interest(plan)

    def peaks(scores: ScoreMap) -> Picks:
        limits = params.max_stddev_noise, params.min_avg_noise
        return candidates(scores, lowest, plan.edge, *limits, plan.threshold, plan.min_distance)

    if params.read_fom:
        for index in todo:
            try:
                scores, preview = read_maps(Path(params.read_fom) / "fom" / bases[index])
            except BadInput as error:
                yield index, error
                continue
            yield index, (peaks(scores), scores, preview, scores.grid.shape, scores.grid.pixel_size)
        return
    for index, pixels in spent.waiting("waiting for pixels", read_ahead(micrographs, todo, run.device)):
        if isinstance(pixels, BadInput):
            yield index, pixels
            continue
        size, shape = micrographs.optics_of(index).pixel_size, (pixels.shape[0], pixels.shape[1])
        try:
            if plan.blobs:
                found = blob_map(pixels, size, plan.blobs)
                scores, picks, preview = None, blob_candidates(found, lowest, plan.edge, plan.threshold, plan.min_distance), found.preview
            else:
                if index in plan.matched:
                    scores, preview = plan.matched.pop(index)
                else:
                    bank = bank_for(params, plan, pixels, size, run)
                    ready = prepared_of(params, micrographs, index, pixels, bank)
                    scores, preview = match(ready, bank), ready.preview
                picks = peaks(scores)
        except BadInput as error:
            yield index, BadInput(f"{micrographs.names[index]}: {error}")
            continue
        yield index, (picks, scores if params.write_fom else None, None if preview is None else preview.cpu(), shape, size)


def lowest_of_interest(plan: Plan) -> float:
    """Score below the threshold down to which candidates are kept for the report. A FOM below 0: background explains the place better."""
    assert plan.threshold is not None
    if plan.score == "fom":
        return min(plan.threshold, 0.0) - 0.1
    return plan.threshold - {"ncc": 0.1}.get(plan.score, 1.0)


def most_picks(plan: Plan, shape: tuple[int, int], pixel_size: float) -> int:
    """More picks than a micrograph can hold: discs a little wider than the least distance (or the diameter if less)."""
    side = min(plan.diameter, CROWDED * plan.min_distance) if plan.min_distance > 0 else plan.diameter
    return max(10, int(shape[0] * shape[1] * (pixel_size / side) ** 2))


def finish(params: Params, plan: Plan, micrographs: Micrographs, index: int, base: str, found: Found, run: Run, show: bool) -> Result:
    """Peaks that keep the distance, coordinates, maps and picture of one micrograph."""
    picks, scores, preview, shape, size = found
    assert plan.threshold is not None
    xy, value = picks.xy.numpy(), picks.value.double().numpy()
    most = params.max_picks or most_picks(plan, shape, size)
    kept = highest_apart(xy, value, plan.min_distance / size, 2 * most)
    above = value[kept] >= plan.threshold
    chosen = kept[above][:most]
    star = star_path(run.path, base)
    star.parent.mkdir(parents=True, exist_ok=True)
    if scores is not None and params.write_fom:
        maps = run.path / "fom" / base
        maps.parent.mkdir(parents=True, exist_ok=True)
        write_maps(maps, scores, preview)
    shown = None
    if preview is not None and (params.pictures or show):
        grey = stretched(preview)
        if params.pictures:
            picture = run.path / "pictures" / f"{base}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            write_picture(picture, grey, xy[chosen], shape, plan.diameter / size)
        shown = Shown(base, grey, shape, xy[kept], value[kept]) if show else None
    write_star(star, {"": picks_table(picks, chosen)})
    mean, full = float(value[chosen].mean()) if len(chosen) else 0.0, int(above.sum()) > most
    run.event("micrograph", name=base, picks=len(chosen), full=full, area=picks.area)
    return Result(index, len(chosen), mean, xy[kept], value[kept], full, picks.area, shown)


def conclude(
    params: Params, plan: Plan, micrographs: Micrographs, bases: Sequence[str], results: Sequence[Result], bad: Sequence[str], run: Run
) -> None:
    """Lists, report, and what a person wants to know."""
    if not results:
        raise BadInput(f"none of {len(micrographs)} micrographs could be picked; the first fault: {bad[0]}")
    assert plan.threshold is not None
    write_lists(run.path, [(micrographs.names[r.index], f"{bases[r.index]}_autopick.star", r.mean, r.number,
                            micrographs.optics_of(r.index).pixel_size) for r in results])  # fmt: skip
    torch.save({"diameter": plan.diameter, "min_distance": plan.min_distance, "edge": plan.edge, "threshold": plan.threshold,
                "score": plan.score}, run.path / "plan.pt")  # fmt: skip
    total, empty = sum(r.number for r in results), [r for r in results if not r.number]
    lines = list(bad)
    if bad:
        lines.append(f"{len(bad)} of {len(micrographs)} micrographs were left out")
    if empty:
        lines.append(f"{len(empty)} micrographs have no picks (first: {micrographs.names[empty[0].index]}); "
                     "lower --threshold if the report shows particles there")  # fmt: skip
    full = [r for r in results if r.full or r.area > EVERYTHING]
    if full:
        lines.append(f"the threshold {plan.threshold:.3g} selects nearly everything in {len(full)} micrographs (stopped when full: as many "
                     "discs as fit): raise --threshold, the slider of report.html shows by how much")  # fmt: skip
    for line in lines[len(bad) :]:
        run.warn(line)
    size = micrographs.optics_of(results[0].index).pixel_size
    counts = {bases[r.index]: r.number for r in results}
    values = np.concatenate([r.value for r in results])
    write_report(run, [r.shown for r in results if r.shown], values, counts, plan.threshold, plan.score, plan.diameter / size, lines)
    run.event("picked", micrographs=len(results), picks=total, left_out=len(bad), threshold=plan.threshold)
    run.summary(f"{total} picks in {len(results)} micrographs ({total / len(results):.0f} each): {run.path / 'autopick.star'}",
                *([f"{len(bad)} micrographs left out, see log.txt"] if bad else []))  # fmt: skip
