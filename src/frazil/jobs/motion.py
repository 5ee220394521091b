"""`frazil motion`: movies in, dose-weighted micrographs out, with the motion of every movie in RELION's labels."""
from __future__ import annotations

import ctypes
import math
import time
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput
from frazil.io.gain import OTHER_FORM, fit_gain, gain_form, oriented, read_defects, read_gain
from frazil.io.movie_table import UPSAMPLING, MotionRecord, MovieTable, drawn, read_motion, read_movies, write_motion
from frazil.io.movies import EER, TIFF, Movie, open_movie
from frazil.io.mrc import write_mrc
from frazil.io.star import write_star
from frazil.jobs.resuming import are_whole
from frazil.jobs.run import Run
from frazil.jobs.writer import Writer
from frazil.maths.bad_pixels import ORIENTATIONS, gain_match
from frazil.maths.motion import path_lengths
from frazil.ops.dispatch import set_threads
from frazil.steps.motion import MotionResult, MotionSettings, correct_motion

POSITIONAL = ("movies",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
SURE = 8.0  # standard deviations by which another orientation of the gain must be better to stop the job
GAIN_MOVIES = 5  # looked at until the gain is recognised
GAIN_FRAMES, GAIN_SIDE = 4, 768  # of the first look: frames, and px of the middle of the field
BYTES_A_PIXEL = 8  # of a movie that is being corrected: its frames, read ahead and kept, and their transforms
KEPT_BLOCK, KEPT_FREE = 1 << 28, 1 << 29  # bytes: arrays below the first are cut from memory that is kept, up to the second of it free
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD, MALLOC_ARENA_MAX = -1, -3, -8  # of mallopt(3)
REPORT, KERNELS = "frazil.jobs.motion_report", "frazil.ops.warp.cpu"
COMMENT = "motion in unbinned px, rlnAccumMotion… in Å"


def _expert(unit: str) -> JsonDict:
    return {"level": "expert", "unit": unit}


class Params(BaseModel):
    """Correct the motion of movies: gain, bad pixels, alignment of frames and patches, dose-weighted sums."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    movies: Path = Field(description="STAR file of movies, as `frazil import` writes it")
    dose: float = Field(0.0, ge=0, description="dose of a frame (of EER: of a camera frame); 0: not known, no "
        "weighting", json_schema_extra={"unit": "e/Å²"})
    pre_exposure: float = Field(0.0, ge=0, description="dose before the first frame", json_schema_extra={"unit": "e/Å²"})
    gain: Path | None = Field(None, description="gain reference (MRC, TIFF, .gain)")
    gain_rotation: int = Field(0, ge=0, le=3, description="turn the gain so many times by 90° clockwise as displayed")
    gain_flip: int = Field(0, ge=0, le=2, description="then flip it: 1 upside down, 2 left-right")
    defects: Path | None = Field(None, description="defects: lines `x y width height`, or an image that is not zero there")
    patches: tuple[int, int] = Field((5, 5), description="columns and rows of patches; 1 1: whole frames only")
    bin: float = Field(1.0, ge=1, le=8, description="binning of the micrographs, in Fourier space")
    b_factor: float = Field(150.0, gt=0, description="damping of the first alignment", json_schema_extra=_expert("px²"))
    group_frames: int = Field(0, ge=0, description="frames aligned together; 0: by their dose", json_schema_extra=EXPERT)
    finest: float = Field(5.0, gt=1, description="finest detail used for alignment", json_schema_extra=_expert("Å"))
    search: float = Field(50.0, gt=1, description="largest shift between frames", json_schema_extra=_expert("px"))
    hot: float = Field(6.0, gt=3, description="threshold of hot pixels", json_schema_extra=_expert("standard deviations"))
    dose_weighting: bool = Field(True, description="weight frames by radiation damage, where the dose is given")
    no_dose_weighting_too: bool = Field(False, description="write sums without dose weighting as well (_noDW.mrc)")
    even_odd: bool = Field(False, description="write sums of even and of odd frames (_EVN.mrc, _ODD.mrc)")
    aligned_frames: bool = Field(False, description="write the aligned frames (_frames.mrcs)", json_schema_extra=EXPERT)
    spectrum_size: int = Field(512, ge=0, le=4096, multiple_of=2, description="side of the power spectra for `frazil ctf`; 0: none",
                               json_schema_extra=_expert("px"))  # fmt: skip
    eer_grouping: int = Field(32, ge=1, description="EER: camera frames a frame", json_schema_extra=EXPERT)
    eer_upsampling: int = Field(1, ge=-1, le=3, description="EER: 1 4K, 2 8K, 3 16K, -1 2K", json_schema_extra=EXPERT)
    float16: bool = Field(False, description="write micrographs as MRC mode 12", json_schema_extra=EXPERT)
    skip_gain_test: bool = Field(False, description="do not compare the gain's orientation with the frames", json_schema_extra=EXPERT)
    memory: float = Field(5.0, gt=0.1, description="memory for the frames of a movie; larger ones are read "
        "again", json_schema_extra=_expert("GB"))


@dataclass(frozen=True)
class _Movie:
    """A movie, its frames in memory already unless it is a large one."""

    file: Movie
    frames: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        return self.file.shape

    def load(self, start: int, stop: int) -> Tensor:
        """(stop − start, H, W) frames as stored."""
        return self.file.load(start, stop) if self.frames is None else self.frames[start:stop]


@dataclass(frozen=True)
class _Job:
    """What is the same for all movies."""

    params: Params
    run: Run
    table: MovieTable
    settings: MotionSettings

    def root(self, index: int) -> Path:
        """Output path of a movie without ending: below the run directory as the movie is below the project."""
        name = Path(self.table.names[index])
        inside = not name.is_absolute() and ".." not in name.parts
        return self.run.path / (name.with_suffix("") if inside else Path("movies") / name.stem)

    def outputs(self, index: int) -> dict[str, Path]:
        """Label → file."""
        root, p = self.root(index), self.params
        wanted = {"rlnCtfPowerSpectrum": "_PS.mrc" if p.spectrum_size else "", "rlnMicrographName": ".mrc",
                  "rlnMicrographNameNoDW": "_noDW.mrc" if p.no_dose_weighting_too else "",
                  "rlnMicrographNameEven": "_EVN.mrc" if p.even_odd else "",
                  "rlnMicrographNameOdd": "_ODD.mrc" if p.even_odd else "", "rlnMicrographMetadata": ".star"}  # fmt: skip
        return {label: root.with_name(root.name + ending) for label, ending in wanted.items() if ending}

    def frames_file(self, index: int) -> Path:
        """The aligned frames; RELION has no label for them."""
        return self.root(index).with_name(self.root(index).name + "_frames.mrcs")

    def files(self, index: int) -> list[Path]:
        """All that is written of a movie."""
        return [*self.outputs(index).values(), *([self.frames_file(index)] if self.params.aligned_frames else [])]

    def open(self, index: int, threads: int = 1) -> Movie:
        """The movie, header read."""
        p = self.params
        return open_movie(self.table.file(index), threads=threads, grouping=p.eer_grouping, upsampling=p.eer_upsampling)

    def fetch(self, index: int, threads: int) -> _Movie:
        """The movie, decoded where two such movies fit into --memory."""
        file = self.open(index, threads)
        pixels, memory = math.prod(file.shape), self.settings.memory
        # A pixel has one to four bytes: looked up only where it matters.
        size = 4 if 2 * 4 * pixels <= memory else file.load(0, 1).element_size()
        return _Movie(file, file.load(0, file.shape[0]) if 2 * size * pixels <= memory else None)


def run(params: Params, run: Run) -> None:
    """Write micrographs, power spectra and STAR files of all movies that are not done yet, then corrected_micrographs.star and
    report.html.
    """
    _keep_memory()
    table = drawn(read_movies(params.movies), params.eer_upsampling, run.note)
    if min(params.patches) < 1 or max(params.patches) > 30:
        raise BadInput(f"--patches: columns and rows from 1 to 30, got {params.patches[0]} {params.patches[1]}")
    job = _Job(params, run, table, _settings(params, table))
    _check_names(job)
    failed: dict[str, str] = {}
    waiting = [index for index in range(len(table.names)) if not are_whole(job.files(index), partial(read_motion, whole=True))]
    done = sorted(set(range(len(table.names))) - set(waiting))
    if run.resumed:
        run.note(f"{len(done)} of {len(table.names)} movies are there and whole")
    # Movies are read ahead and computed in threads, one that is finished is written while the next ones go on.
    with Writer() as writer, closing(_results(job, waiting)) as results:
        for index in waiting:
            run.progress(len(done), len(table.names), "movies")
            run.check_stop()
            try:
                movie, result, seconds = next(results).result()
            except _LeftOut as left:
                said = str(left)
                failed[table.names[index]] = said if table.names[index] in said else f"{table.names[index]}: {said}"
                run.warn(f"left out: {failed[table.names[index]]}")
                continue
            writer.do(partial(_write, job, index, movie, result))
            _record(job, index, movie, result, seconds)
            done.append(index)
    run.progress(len(table.names), len(table.names), "movies")
    if not done:
        raise BadInput(f"{params.movies}: none of its {len(table.names)} movies could be corrected; first: {next(iter(failed.values()))}")
    motion = _write_star(job, sorted(done))
    from frazil.jobs.motion_report import write_report

    write_report(run, motion, failed)
    run.summary(
        f"{len(done)} of {len(table.names)} movies corrected" + (f", {len(failed)} left out (log.txt names them)" if failed else ""),
        f"median motion {motion['rlnAccumMotionTotal'].median():.1f} Å; {run.path / 'corrected_micrographs.star'}",
    )


class _LeftOut(BadInput):
    """A movie that cannot be read or corrected; the others go on."""


def _results(job: _Job, waiting: list[int]) -> Generator[Future[tuple[Movie, MotionResult, float]], None, None]:
    """A future a movie, in order: the movie, what came of it, the seconds it took; _LeftOut where it is no good.

    On the CPU movies are computed side by side, as many as --memory holds, each with its share of the threads: torch's own threads have
    little to do between one small array and the next. Otherwise one after the other, the next being read meanwhile. Raises
    BadInput where the gain is wrong. While the first movies are aligned, the modules of sums and report are loaded.
    """
    workers = _workers(job, waiting)
    threads = max(1, job.run.threads // workers)
    gain: Future[Tensor | None] = Future()

    def work(index: int, read: Future[_Movie]) -> tuple[Movie, MotionResult, float]:
        start = time.perf_counter()
        try:
            movie = read.result()
            flat = gain.result()
            return movie.file, _correct(job, index, movie, flat), time.perf_counter() - start
        except BadInput as error:
            raise _LeftOut(str(error)) from error

    reader, computer = (ThreadPoolExecutor(workers, initializer=set_threads, initargs=(threads,)) for _ in range(2))

    def begin(index: int) -> Future[tuple[Movie, MotionResult, float]]:
        read[index] = reader.submit(job.fetch, index, threads)
        return computer.submit(work, index, read[index])

    read: dict[int, Future[_Movie]] = {}
    ahead = deque(begin(index) for index in waiting[: workers + 1])
    try:
        try:
            gain.set_result(_gain(job, read))
        except BaseException as error:
            gain.set_exception(error)
            raise
        for module in (REPORT, *([KERNELS] if job.run.device.type == "cpu" else [])):
            import_module(module)
        for index in waiting[len(ahead) :]:
            read.clear()  # held by those who compute them
            yield ahead.popleft()
            begun = begin(index)
            ahead.append(begun)
        read.clear()
        while ahead:
            yield ahead.popleft()
    finally:
        for pool in (reader, computer):
            pool.shutdown(cancel_futures=True)
        set_threads(job.run.threads)  # what threads begin with from now on


def _workers(job: _Job, waiting: list[int]) -> int:
    """Movies to compute side by side: with what is kept of their frames and transforms they fit into --memory."""
    if job.run.device.type != "cpu":
        return 1
    for index in waiting:
        with suppress(BadInput):
            fit = job.settings.memory // (BYTES_A_PIXEL * math.prod(job.open(index).shape))
            return max(1, min(job.run.threads, len(waiting), fit))
    return 1


def _keep_memory() -> None:
    """Keep freed memory of large arrays in the process: handed back to the kernel it has to be cleared at each use, an eighth of the time.

    Larger arrays, as super-resolution frames are, still come and go by themselves. Does nothing where the C library is not glibc.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MALLOC_ARENA_MAX, 1)  # threads of their own arenas do not keep much
        mallopt(MALLOC_MMAP_THRESHOLD, KEPT_BLOCK)
        mallopt(MALLOC_TRIM_THRESHOLD, KEPT_FREE)


def _settings(p: Params, table: MovieTable) -> MotionSettings:
    """Of the step. For EER the dose is given a camera frame."""
    eer = Path(table.names[0]).suffix.lower() in EER
    return MotionSettings(
        p.patches, p.b_factor, p.bin, p.group_frames, p.dose * (p.eer_grouping if eer else 1), p.pre_exposure, p.dose_weighting,
        p.no_dose_weighting_too, p.even_odd, p.spectrum_size, p.aligned_frames, p.finest, p.search, p.hot,
        memory=int(p.memory * 1e9), wide_repair=eer,
    )  # fmt: skip


def _check_names(job: _Job) -> None:
    """Raise BadInput where two movies would be written to one file."""
    seen: dict[Path, str] = {}
    for index, name in enumerate(job.table.names):
        root = job.root(index)
        if root in seen:
            raise BadInput(f"{job.table.path}: row {index + 1}: {name} and {seen[root]} would both become {root}.mrc; rename one of them")
        seen[root] = name


# ---- gain


def _gain(job: _Job, read: Mapping[int, Future[_Movie]]) -> Tensor | None:
    """(H, W) multiplicative gain in the orientation asked for, compared with the first movies. Raises BadInput for a wrong one.

    read: the movies that are being read already, by index.
    """
    p = job.params
    if p.gain is None:
        return None
    eer = Path(job.table.names[0]).suffix.lower() in EER
    plain = read_gain(p.gain, eer)
    if gain_form(p.gain, eer) == "counts":
        job.run.note(f"{p.gain}: mean counts, as references of EER movies are: inverted, mean/reference")
    gain = oriented(plain, p.gain_rotation, p.gain_flip)
    some = plain[::3, ::3]
    if p.skip_gain_test or float(some[some > 0].std()) < 1e-3 * float(some[some > 0].mean()):
        return gain
    total: Tensor | None = None
    for index in range(min(GAIN_MOVIES, len(job.table.names))):
        try:
            movie = read[index].result() if index in read else job.open(index)
            first = _sum_of(movie, 0, GAIN_FRAMES)
        except BadInput:
            continue  # named when its turn comes
        fitted = fit_gain(gain, (movie.shape[1], movie.shape[2]), p.gain, eer)
        if gain_match(_middle(first), _middle(fitted)) > SURE:
            return gain
        try:
            first += _sum_of(movie, GAIN_FRAMES, movie.shape[0])
        except BadInput:
            continue
        total = first if total is None or total.shape != first.shape else total + first
        if gain_match(total, fitted) > SURE:
            return gain
    if total is not None:
        _name_right_gain(job, plain, total, eer)
    return gain


def _sum_of(movie: Movie | _Movie, start: int, stop: int) -> Tensor:
    """(H, W) float32 sum of frames start to stop − 1, as far as there are so many."""
    total = torch.zeros(movie.shape[1:])
    for f in range(start, min(stop, movie.shape[0])):
        total += movie.load(f, f + 1)[0].float()
    return total


def _middle(image: Tensor) -> Tensor:
    """The middle of an image, at most GAIN_SIDE px a side."""
    y, x = (max(0, side - GAIN_SIDE) // 2 for side in image.shape)
    return image[y : y + GAIN_SIDE, x : x + GAIN_SIDE]


def _name_right_gain(job: _Job, plain: Tensor, total: Tensor, eer: bool) -> None:
    """Raise BadInput naming the orientation that fits, or say that none does."""
    p = job.params
    assert p.gain is not None
    scores = {}
    for turn, flip in ORIENTATIONS:
        try:
            scores[turn, flip] = gain_match(total, fit_gain(oriented(plain, turn, flip), (total.shape[0], total.shape[1]), p.gain, eer))
        except BadInput:
            continue  # not square
    (turn, flip), best = max(scores.items(), key=lambda item: item[1])
    if best > SURE:
        raise BadInput(f"{p.gain}: does not fit the frames as it is turned; --gain-rotation {turn} --gain-flip {flip} does "
                       f"({best:.0f} standard deviations); --skip-gain-test goes on with it as it is")  # fmt: skip
    inverse = gain_match(total, torch.where(plain > 0, 1 / plain.clamp(min=1e-6), 0.0)) if plain.shape == total.shape else 0.0
    if inverse > SURE:
        raise BadInput(f"{p.gain}: {OTHER_FORM[gain_form(p.gain, eer)]}; --skip-gain-test goes on with it as it is")
    job.run.warn(f"{p.gain}: resembles the frames in no orientation (best {best:.1f} standard deviations): is it the gain of these movies?")


# ---- one movie


def _correct(job: _Job, index: int, movie: _Movie, gain: Tensor | None) -> MotionResult:
    """Align and sum."""
    p, shape = job.params, (movie.shape[1], movie.shape[2])
    fitted = None if gain is None or p.gain is None else fit_gain(gain, shape, p.gain, movie.file.kind == "EER")
    defects = None if p.defects is None else read_defects(p.defects, shape, movie.file.path.suffix.lower() in TIFF)
    optics = job.table.optics[int(job.table.group[index])]
    return correct_motion(movie, optics, job.settings, gain=fitted, defects=defects, seed=job.run.seed + index, device=job.run.device)


def _write(job: _Job, index: int, movie: Movie, result: MotionResult) -> None:
    """All files of a movie, its STAR file last: it tells that the others are there."""
    files = job.outputs(index)
    files["rlnMicrographName"].parent.mkdir(parents=True, exist_ok=True)
    images = {"rlnMicrographName": result.micrograph, "rlnMicrographNameNoDW": result.no_dw, "rlnMicrographNameEven": result.even,
              "rlnMicrographNameOdd": result.odd}  # fmt: skip
    for label, image in images.items():
        if image is not None:
            write_mrc(files[label], image, result.pixel_size, "float16" if job.params.float16 else "float32")
    if result.spectrum is not None:
        write_mrc(files["rlnCtfPowerSpectrum"], result.spectrum, result.spectrum_pixel)
    if result.aligned is not None:
        write_mrc(job.frames_file(index), result.aligned, result.pixel_size, stack=True)
    p, optics = job.params, job.table.optics[int(job.table.group[index])]
    n, height, width = movie.shape
    general: dict[str, Any] = {"rlnImageSizeX": width, "rlnImageSizeY": height, "rlnImageSizeZ": n}
    general["rlnMicrographMovieName"] = job.table.names[index]
    if p.gain is not None:
        general["rlnMicrographGainName"] = str(p.gain)
    if p.defects is not None:
        general["rlnMicrographDefectFile"] = str(p.defects)
    general |= {"rlnMicrographBinning": p.bin, "rlnMicrographOriginalPixelSize": optics.pixel_size,
                "rlnMicrographDoseRate": job.settings.dose,
                "rlnMicrographPreExposure": p.pre_exposure, "rlnVoltage": optics.voltage, "rlnMicrographStartFrame": 1}  # fmt: skip
    if movie.kind == "EER":
        general |= {"rlnEERUpsampling": p.eer_upsampling, "rlnEERGrouping": p.eer_grouping}
    size = torch.tensor([width, height], dtype=torch.float64)
    record = MotionRecord(general, result.track, result.observed, result.coefficients, result.bad, result.patch_shifts,
                          result.patch_places * size)  # fmt: skip
    write_motion(files["rlnMicrographMetadata"], record, COMMENT)


def _record(job: _Job, index: int, movie: Movie, result: MotionResult, seconds: float) -> None:
    """An event and the notes of a movie."""
    name, fit = job.table.names[index], result.fit
    notes = list(result.notes)
    if movie.dropped:
        notes.append(f"{len(movie.dropped)} corrupt camera frames left out, first {movie.dropped[0]}")
    rest = movie.camera_frames - movie.shape[0] * job.params.eer_grouping if movie.kind == "EER" else 0
    if rest:
        lost = f" ({rest * job.params.dose:.2g} e/Å²)" if job.params.dose else ""
        notes.append(f"the last {rest} of {movie.camera_frames} camera frames make no whole frame and are left out{lost}")
    for note in notes:
        job.run.note(f"{name}: {note}")
    job.run.event("movie", movie=name, seconds=round(seconds, 3), frames=movie.shape[0], hot_pixels=len(result.bad), error_px=fit.error,
                  local_error_px=fit.error_local, local=result.coefficients is not None, notes=notes)  # fmt: skip


def _write_star(job: _Job, done: list[int]) -> pd.DataFrame:
    """corrected_micrographs.star of the movies that are done; returns its table of micrographs."""
    inside = job.run.path.resolve().is_relative_to(Path.cwd())
    rows = []
    for index in done:
        files = job.outputs(index)
        record = read_motion(files["rlnMicrographMetadata"])
        pixel = job.table.optics[int(job.table.group[index])].pixel_size
        track = record.track[record.observed] * pixel
        lengths = path_lengths(track, float(record.general["rlnMicrographDoseRate"]), job.params.pre_exposure)
        whole = {label: path.resolve() for label, path in files.items()}
        row: dict[str, Any] = {label: str(path.relative_to(Path.cwd()) if inside else path) for label, path in whole.items()}
        row["rlnOpticsGroup"] = int(job.table.group[index]) + 1
        row |= dict(zip(("rlnAccumMotionTotal", "rlnAccumMotionEarly", "rlnAccumMotionLate"), lengths, strict=True))
        rows.append(row)
    table, optics = pd.DataFrame(rows), job.table.optics_table.drop(columns=UPSAMPLING, errors="ignore")
    optics["rlnOpticsGroup"] = [str(k) for k in range(1, len(optics) + 1)]
    optics["rlnMicrographPixelSize"] = [repr(o.pixel_size * job.params.bin) for o in job.table.optics]
    write_star(job.run.path / "corrected_micrographs.star", {"optics": optics, "micrographs": table}, COMMENT)
    return table
