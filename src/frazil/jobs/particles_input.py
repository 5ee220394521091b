"""What jobs that align particles ask of their input: images that can be used, references that fit them, memory to work in."""
from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field
from torch import Tensor

from frazil.data import BadInput, Particles, Volume
from frazil.io.files import write_text
from frazil.io.images import StackImages, find_bad, split_image_name
from frazil.io.particles import ParticleSet, open_images, read_particles
from frazil.jobs.inputs import PIXEL_TOLERANCE, read_cube
from frazil.jobs.run import Run
from frazil.maths.fourier import resolution_shell

MOST_SHIFTS = 10_000  # coarse, of an orientation
CPU_BUDGET = 0.5  # share of the free main memory a CPU run works in


def option(default: Any, text: str, level: str = "expert", *, may_change: bool = False, **limits: Any) -> Any:
    """A field of the parameters of a job on particles; may_change: between a run and its --resume."""
    return Field(default, description=text, json_schema_extra={"unit": "", "level": level, "may_change": may_change}, **limits)


def check_diameter(value: float) -> float:
    """The mask's diameter as it is; ValueError unless it is above 0, or −1 for the whole box."""
    if value <= 0 and value != -1:
        raise ValueError("should be above 0, or -1 for the whole box")
    return value



def read_table(path: Path) -> ParticleSet:
    """A table of particles with CTF whose boxes are even, its image names such that outputs find them; raises BadInput for others."""
    table = read_particles(path).from_here()
    if not table.has_ctf:
        raise BadInput(f"{path}: label _rlnDefocusU is missing: refinement needs the CTF of every particle; estimate it first")
    for g in table.particles.group.unique().tolist():
        if (box := table.particles.optics[g].box) % 2:
            raise BadInput(f"{path}: optics group {g + 1} has an odd box of {box} px; re-extract with an even box")
    return table


def open_checked(table: ParticleSet, threads: int) -> StackImages:
    """The images of a table, kept in main memory where they fit; all headers checked."""
    room = int(CPU_BUDGET * psutil.virtual_memory().available) // 2  # they are kept in main memory, whatever computes
    images = open_images(table, memory_budget=room, threads=threads)
    images.check()
    return images


def tick(run: Run, total: int, done: int) -> None:
    """Progress of an iteration; stops between batches when asked to."""
    run.progress(done, total, "particles")
    run.check_stop()


def load_reference(path: Path, particles: Particles, initial_lowpass: float) -> Volume:
    """The reference, of the box and pixel size of the first optics group that has particles."""
    volume, group = read_cube(path), int(particles.group.min())
    box, first = volume.data.shape[-1], particles.optics[group]
    whose = "the particles'" if len(particles.optics) == 1 else f"that of the particles in optics group {group + 1}"
    remedy = "`frazil map resample` changes box and pixel size, `frazil map crop` the box alone"
    if box != first.box:
        raise BadInput(f"{path}: box {box} px, but {whose} is {first.box} px; {remedy}")
    if abs(volume.pixel_size - first.pixel_size) > PIXEL_TOLERANCE * first.pixel_size:
        raise BadInput(f"{path}: pixel size {volume.pixel_size:g} Å, but {whose} is {first.pixel_size:g} Å; {remedy}")
    if float(volume.data.max()) == float(volume.data.min()):
        raise BadInput(f"{path}: every voxel is {float(volume.data.max()):g}; expected a map of the particle")
    if resolution_shell(box, first.pixel_size, initial_lowpass) < 1:
        side = f"{box * first.pixel_size:g} Å"
        raise BadInput(f"--initial-lowpass {initial_lowpass:g} leaves nothing of {path}, {side} a side; give fewer Å")
    return Volume(volume.data.float(), first.pixel_size)


def usable_particles(run: Run, table: ParticleSet, images: StackImages, check: Callable[[Tensor], None]) -> Tensor:
    """Indices of the particles whose images can be used; the others are counted and listed in dropped_particles.txt.

    check: raises BadInput if these are too few for the job; called before anything is written.
    """
    particles, names = table.particles, table.image_names
    keep = torch.ones(len(particles), dtype=torch.bool)
    reasons = {}
    for index, reason in zip(find_bad(images, torch.arange(len(particles)), particles.group), ("not finite", "constant"), strict=True):
        keep[index] = False
        reasons |= dict.fromkeys(index.tolist(), reason)
    used = torch.nonzero(keep)[:, 0]
    check(used)
    if reasons:
        first = min(reasons)
        write_text(run.file("dropped_particles.txt"), "".join(f"{names[i]}\t{reasons[i]}\n" for i in sorted(reasons)))
        run.warn(
            f"{len(reasons)} of {len(particles)} particles are constant or hold NaN and are left out "
            f"(first: row {first + 1}, {names[first]}); dropped_particles.txt lists them"
        )
    return used


def check_search(offset_range: float, offset_step: float, particles: Particles, finest: float | None = None) -> None:
    """Raise BadInput for shifts (px) that no search can hold, or a finest resolution (--strict-highres) that leaves nothing."""
    box, count = max(o.box for o in particles.optics), math.pi * (offset_range / offset_step) ** 2
    if offset_range > box / 2:
        raise BadInput(f"--offset-range {offset_range:g}: shifts of more than half the box of {box} px; give {box // 2} or less")
    if count > MOST_SHIFTS:
        raise BadInput(
            f"--offset-range {offset_range:g} by --offset-step {offset_step:g}: {count:.0f} shifts of every orientation, "
            f"at most {MOST_SHIFTS}; give a larger step or a smaller range"
        )
    optics = particles.optics[int(particles.group.min())]
    if finest and resolution_shell(optics.box, optics.pixel_size, finest) < 1:
        raise BadInput(f"--strict-highres {finest:g} leaves nothing of images of {optics.box * optics.pixel_size:g} Å a side; give fewer Å")


def warn_of_oddities(run: Run, diameter: float, table: ParticleSet, images: StackImages, used: Tensor) -> None:
    """Warn of what can be refined but is probably a mistake."""
    particles, names = table.particles, table.image_names
    optics = [particles.optics[g] for g in particles.group[used].unique().tolist()]
    smallest = min(o.box * o.pixel_size for o in optics)
    if diameter > smallest:
        run.warn(f"--diameter {diameter:g} is larger than the box ({smallest:g} Å), nothing is masked; give the particle's own in Å")
    if 0 < diameter < 4 * max(o.pixel_size for o in optics):
        run.warn(f"--diameter {diameter:g} is only a few pixels; it is in Å, not in nm or pixels")
    copies = len(names) - len({split_image_name(name) for name in names})
    if copies:
        run.warn(f"{copies} of {len(names)} rows repeat the image of an earlier row; copies in both half sets inflate the resolution")
    warn_unnormalised(run, diameter, particles, images, used)


def warn_unnormalised(run: Run, diameter: float, particles: Particles, images: StackImages, used: Tensor) -> None:
    """Warn if the background of the first particles is not mean 0, sd 1 (spec 1.6)."""
    some = used[particles.group[used] == particles.group[used[0]]][:100]
    optics = particles.optics[int(particles.group[used[0]])]
    n = optics.box
    y, x = torch.meshgrid(*(2 * [torch.arange(n) - n // 2]), indexing="ij")
    radius = (diameter if diameter > 0 else n * optics.pixel_size) / (2 * optics.pixel_size)
    outside = images[some][:, torch.hypot(y.float(), x.float()) > min(radius, n / 2 - 1)]
    sd, mean = outside.std(1), outside.mean(1)
    off = (mean.abs() > 0.5 * sd) | (sd < 0.5) | (sd > 2)
    if float(off.float().mean()) > 0.5:
        found = f"background mean {float(mean.mean()):.2f}, sd {float(sd.mean()):.2f}"
        run.warn(f"particles look un-normalised: {found}, expected 0 and 1; re-extract them")


def memory_budget(run: Run, before: int = 0) -> int:
    """Bytes the engine may work in: what --gpu-memory says, else 90 % of a GPU's free memory or about half of the main memory.

    The budget decides the batches, these the rounding of sums, and rounding which of two like samples counts: a resumed run keeps
    what it had `before` if there is room, and main memory goes by powers of two, so that a repeated run gives the same map.
    """
    if run.gpu_memory:
        if run.device.type == "cuda":  # makes torch give cached blocks back rather than pass the limit
            torch.cuda.set_per_process_memory_fraction(min(1.0, run.gpu_memory / torch.cuda.mem_get_info(run.device)[1]), run.device)
        return run.gpu_memory
    free = torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else psutil.virtual_memory().available
    if 0 < before < free:
        return before
    return int(0.9 * free) if run.device.type == "cuda" else 1 << (int(CPU_BUDGET * free).bit_length() - 1)


def peak_memory(run: Run) -> int:
    """Most bytes held so far: reserved on the GPU, or resident in main memory."""
    if run.device.type == "cuda":
        return torch.cuda.max_memory_reserved(run.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
