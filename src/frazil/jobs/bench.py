"""`frazil bench class3d`: the standard classification benchmark on data made on the device (spec/refinement 7.4)."""
from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from frazil.data import BadInput, Optics
from frazil.io.images import StackImages, write_stack
from frazil.io.particles import make_particle_set
from frazil.jobs import Action
from frazil.jobs.classify_files import Output, write_iteration
from frazil.jobs.record import source_commit
from frazil.jobs.run import parse_memory, resolve_device
from frazil.refine.parallel import World, join, leave, local_device
from frazil.refine.residence import Stored, resident
from frazil.simulate.classes import ClassSet, simulate_classes
from frazil.simulate.particles import Settings
from frazil.steps.class3d import FORM, Class3dParams
from frazil.steps.classify import ClassifyJob, ClassifyState, expect, initial_state, iterate, make_engine

SCALING: dict[str, list[dict[str, int]]] = {
    "classes": [{"classes": k} for k in (1, 2, 4, 6, 8, 12, 16)],
    "box": [{"box": b} for b in (128, 192, 256, 360, 512)],
    "particles": [{"particles": n} for n in (1000, 2000, 4000, 8000, 16000)],
}
READ_IMAGES = 1000  # of which the time to read is measured
WARM = 2  # iterations before the timed ones: cross-correlation, random classes
PHASES = {
    "windows": ("windows",), "coarse": ("coarse slices", "coarse products", "thresholds"),
    "fine": ("fine slices", "fine products", "posterior"), "sums": ("sums",), "insertion": ("insertion",),
    "statistics": ("statistics", "neighbours"), "reference": ("reference",), "accuracies": ("accuracies",), "M-step": ("M-step",),
}  # fmt: skip


class Class3dBench(BaseModel):
    """Time 3D classification of simulated ribosome-like particles with the settings of the standard benchmark."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    particles: int = Field(8000, ge=10, description="number of particles")
    box: int = Field(360, ge=32, multiple_of=2, description="box", json_schema_extra={"unit": "px"})
    pixel_size: float = Field(1.34, gt=0, description="pixel size at a box of 360 px; other boxes show the same field of view",
                              json_schema_extra={"unit": "Å"})  # fmt: skip
    classes: int = Field(6, ge=1, description="number of classes")
    iterations: int = Field(5, ge=3, description="iterations; of those after the second the median is told")
    healpix_order: int = Field(2, ge=0, le=5, description="HEALPix order of the coarse grid; standard: 2")
    offset_range: float = Field(5, gt=0, description="range of the shift search; standard: 5", json_schema_extra={"unit": "px"})
    offset_step: float = Field(2, gt=0, description="its coarse step; standard: 2", json_schema_extra={"unit": "px"})
    auto_sampling: bool = Field(False, description="finer, local searches after a quarter of the iterations; standard: no")
    snr: float = Field(0.03, gt=0, description="signal to noise of the images, whole box")
    device: str = Field("auto", description="where to compute: auto, cpu, cuda, cuda:1, …; under torchrun each process takes its own GPU")
    gpu_memory: str | None = Field(None, description="memory to use at most, such as 4GB")
    scaling: Literal["none", "classes", "box", "particles"] = Field("none", description="a table over the numbers of one of these")
    output: Path | None = Field(None, description="JSON-lines file to append the measurements to")
    seed: int = Field(1, ge=0, description="seed of the data set and the run", json_schema_extra={"level": "expert"})


@dataclass(frozen=True)
class Measured:
    """One configuration, measured."""

    seconds: float  # an iteration, median of those timed
    each: list[float]  # of every iteration
    phases: dict[str, float]  # seconds of each phase of one iteration, the device waited for after each
    files: dict[str, float]  # seconds to read the images, to write an iteration: a run does both beside the computation
    busy: float | None  # share of the E-step in which a kernel ran; None where that is not known
    coarse_tflops: float  # of the coarse pass, thresholds included
    coarse_ceiling: float  # TFLOP/s of the matrix product alone at the same shapes
    windows_gbs: float  # bytes of the images and transforms, read and written once each way, over the time of the windows
    copy_gbs: float  # bytes a second of a plain copy
    peak_gb: float | None
    correct: float  # share of particles in the right class, under the best one-to-one naming
    occupancy_error: float  # largest difference of a class's share from the true one, under that naming
    state: ClassifyState


def run(params: Class3dBench) -> None:
    """Print a table, append lines to --output."""
    device = local_device(str(resolve_device(params.device)))
    world = join(device)
    try:
        rows: list[tuple[Class3dBench, Measured]] = []
        for changes in SCALING.get(params.scaling, [{}]):
            one = params.model_copy(update=changes)
            found = measure(one, device, world)
            if world.rank == 0:
                rows.append((one, found))
                if params.output is not None:
                    append(params.output, one, found, device, world.size)
        if rows:
            Console(width=150).print(phase_table(rows[0][0], rows[0][1], world.size) if len(rows) == 1 else scaling_table(rows))
    finally:
        leave()


def measure(params: Class3dBench, device: str, world: World) -> Measured:
    """Simulate, classify, time."""
    pixel_size = params.pixel_size * 360 / params.box
    settings = Settings(snr=params.snr, seed=params.seed)
    on_gpu = device.startswith("cuda")
    made = simulate_classes(
        params.particles, Optics(pixel_size, params.box), params.classes, settings, device=device,
        dtype=torch.float16 if on_gpu else torch.float32,
    )  # fmt: skip
    job, state = prepare(params, made, device, world, pixel_size)
    reset_peak(on_gpu)
    seconds = []
    for _ in range(params.iterations):
        start = time.perf_counter()
        state = iterate(job, state)
        wait(device)
        seconds.append(time.perf_counter() - start)
    peak = peak_gb(on_gpu)
    last = iterate(replace(job, engine=replace(job.engine, timed=True)), state)
    phases = {name: sum(last.seconds.get(part, 0.0) for part in parts) for name, parts in PHASES.items()}
    flop, ceiling = coarse_work(job, last, on_gpu)
    correct, off = agreement(made.particles.klass - 1, state.poses.klass, state.model.pdf_class)
    pixels = params.particles / world.size * params.box**2
    return Measured(
        seconds=median(seconds[WARM:]), each=seconds, phases=phases,
        files=file_seconds(params, made, last), busy=busy_share(job, last) if on_gpu else None,
        coarse_tflops=flop / phases["coarse"] / 1e12,
        coarse_ceiling=ceiling, windows_gbs=34 * pixels / phases["windows"] / 1e9, copy_gbs=copy_rate(device), peak_gb=peak,
        correct=correct, occupancy_error=off, state=state,
    )  # fmt: skip


def prepare(params: Class3dBench, made: ClassSet, device: str, world: World, pixel_size: float) -> tuple[ClassifyJob, ClassifyState]:
    """The job of the standard benchmark, from the first class low-passed to 60 Å; poses are unknown to it."""
    n = params.particles
    unknown = replace(
        made.particles, rotation=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), shift=torch.zeros(n, 2, dtype=torch.float64),
        klass=torch.zeros(n, dtype=torch.int64),
    )  # fmt: skip
    wanted = Class3dParams(
        classes=params.classes, iterations=params.iterations, tau_fudge=4, initial_lowpass=60,
        diameter=320 / (360 * 1.34) * params.box * pixel_size, healpix_order=params.healpix_order, offset_range=params.offset_range,
        offset_step=params.offset_step, auto_sampling=params.auto_sampling,
    )  # fmt: skip
    budget, images = parse_memory(params.gpu_memory), made.images
    if device.startswith("cuda"):
        if budget:  # as from a file
            images = images.cpu()
            made = replace(made, images=images)
        if budget:
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info(device)[1]), device)
        budget = budget or int(0.9 * torch.cuda.mem_get_info(device)[0])
    engine = make_engine(wanted, device=device, budget=budget or 4 << 30, seed=params.seed)
    images, engine = resident(Stored(made.images), unknown, engine)
    job = ClassifyJob(images, wanted, engine, FORM, world=world)
    return job, initial_state(job, unknown, made.maps[0].data[None], pixel_size)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(on_gpu: bool) -> None:
    """Begin to watch the memory."""
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(on_gpu: bool) -> float | None:
    """Most GPU memory held since reset_peak, resident images included; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None


def file_seconds(params: Class3dBench, made: ClassSet, state: ClassifyState) -> dict[str, float]:
    """Seconds to read the images from a float16 stack (of READ_IMAGES, scaled to all) and to write all files of an iteration."""
    particles, n = state.particles, min(params.particles, READ_IMAGES)
    with TemporaryDirectory(prefix="frazil-bench-") as name:
        folder = Path(name)
        write_stack(folder / "images.mrcs", made.images[:n].cpu().float(), particles.optics[0].pixel_size, "float16")
        table = make_particle_set(particles, [f"{i % n + 1:06d}@{folder}/images.mrcs" for i in range(len(particles))])
        start = time.perf_counter()
        StackImages(table.image_names[:n], boxes=params.box)[torch.arange(n)]
        read = (time.perf_counter() - start) * params.particles / n
        start = time.perf_counter()
        write_iteration(Output(folder, table, Class3dParams(classes=params.classes), params.seed), state)
        return {"read": read, "write": time.perf_counter() - start}


def coarse_work(job: ClassifyJob, state: ClassifyState, on_gpu: bool) -> tuple[float, float]:
    """(floating-point operations of a coarse pass over this process's particles, TFLOP/s of its product alone at the same shapes)."""
    from frazil.refine.sampling import make_grid
    from frazil.refine.windows import make_frame

    grid, model = make_grid(state.sampling), state.model
    frame = make_frame(state.particles.optics[0], state.progress.size, model.box, model.pixel_size, job.engine)
    p, h = frame.coarse_inside(state.progress.coarse_size), len(grid.first_half()) * model.classes
    rows = len(job.world.share(len(state.particles))) * len(grid.shifts)
    m, inner = min(rows, 1 << 13), -(-p // 16) * 16
    device = job.engine.device
    a, b = torch.randn(m, inner, device=device), torch.randn(h, inner, device=device)
    before, best = torch.backends.cuda.matmul.fp32_precision, float("inf")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on_gpu else before
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b.T)
        wait(device)
        best = min(best, time.perf_counter() - start)
    torch.backends.cuda.matmul.fp32_precision = before
    return 4.0 * rows * h * p, 2.0 * m * h * p / best / 1e12


def copy_rate(device: str) -> float:
    """GB/s, read and written, of a plain copy of 256 MB (64 MB on a CPU)."""
    x = torch.empty((1 << 26) if device.startswith("cuda") else (1 << 24), device=device)
    y, best = torch.zeros_like(x), float("inf")
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        x.copy_(y)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best / 1e9


def busy_share(job: ClassifyJob, state: ClassifyState) -> float:
    """Σ of kernel times of an E-step (from the profiler) over the wall time of the quicker of two that were not profiled."""
    from torch.profiler import ProfilerActivity, profile

    def e_step() -> None:
        expect(job, state, None, False)
        wait(job.engine.device)

    walls = []
    for _ in range(2):
        start = time.perf_counter()
        e_step()
        walls.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CUDA]):  # the first use of the profiler in a process loses events
        wait(job.engine.device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        e_step()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / min(walls)


def agreement(true: torch.Tensor, found: torch.Tensor, shares: torch.Tensor) -> tuple[float, float]:
    """(share of particles in the right class, largest error of a class's share) under the best one-to-one naming of the classes."""
    from scipy.optimize import linear_sum_assignment

    classes = len(shares)
    table = torch.bincount(true * classes + found, minlength=classes**2).reshape(classes, classes)
    rows, columns = linear_sum_assignment(-table.numpy())
    truth = torch.bincount(true, minlength=classes)[rows] / len(true)
    return float(table[rows, columns].sum() / len(true)), float((shares[columns] - truth).abs().max())


def phase_table(params: Class3dBench, found: Measured, processes: int) -> Table:
    """Seconds of an iteration by phase, and what they amount to."""
    made = Table(title=f"class3d, {params.particles} particles of {params.box} px, K = {params.classes}, {processes} process(es)")
    made.add_column("phase")
    for name in ("s an iteration", "rate", "ceiling here"):
        made.add_column(name, justify="right")
    rate = {
        "coarse": (f"{found.coarse_tflops:.1f} TFLOP/s", f"{found.coarse_ceiling:.1f} TFLOP/s"),
        "windows": (f"{found.windows_gbs:.0f} GB/s", f"{found.copy_gbs:.0f} GB/s"),
    }
    for name, value in found.phases.items():
        made.add_row(name, f"{value:.4f}", *rate.get(name, ("", "")))
    made.add_row("sum of phases, each waited for", f"{sum(found.phases.values()):.4f}")
    made.add_row("read all images, once a run", f"{found.files['read']:.4f}", "beside it")
    made.add_row("write an iteration's files", f"{found.files['write']:.4f}", "beside it")
    busy = "" if found.busy is None else f"GPU busy {100 * found.busy:.0f} % of the E-step"
    made.add_row("right class after the last", f"{100 * found.correct:.1f} %", f"shares within {100 * found.occupancy_error:.1f} %")
    peak = "" if found.peak_gb is None else f"peak {found.peak_gb:.1f} GB"
    made.add_row("[b]iteration, not interrupted", f"[b]{found.seconds:.4f}", busy, peak)
    return made


def scaling_table(rows: list[tuple[Class3dBench, Measured]]) -> Table:
    """A line a configuration."""
    made = Table(title="class3d")
    for name in ("particles", "box", "classes", "s an iteration", "E-step", "M-step", "peak GB", "busy"):
        made.add_column(name, justify="right")
    for params, found in rows:
        e_step = sum(value for name, value in found.phases.items() if name != "M-step")
        made.add_row(
            str(params.particles), str(params.box), str(params.classes), f"{found.seconds:.3f}", f"{e_step:.3f}",
            f"{found.phases['M-step']:.3f}", "" if found.peak_gb is None else f"{found.peak_gb:.1f}",
            "" if found.busy is None else f"{100 * found.busy:.0f} %",
        )  # fmt: skip
    return made


def append(path: Path, params: Class3dBench, found: Measured, device: str, processes: int) -> None:
    """One JSON line."""
    values: dict[str, Any] = {name: value for name, value in vars(found).items() if name != "state"}
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    shape = params.model_dump(mode="json", exclude={"output", "scaling"})
    line = {"bench": "class3d", "commit": source_commit(), "device": name, "processes": processes, "shape": shape, **values}
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None


ACTIONS: dict[str, Action] = {"class3d": Action(Class3dBench, (), lambda params, _: run(params))}
