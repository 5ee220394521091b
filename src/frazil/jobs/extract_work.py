"""The work of `frazil extract`: one micrograph after another, read ahead by threads; stacks are finished by threads too."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Optics
from frazil.io.micrographs import Micrographs
from frazil.io.stacks import StackWriter, read_some
from frazil.jobs.extract_files import IMAGE, POSITIONS, Item, Wanted, ctf_particles, finished_part, positions_of, rows_of, write_part
from frazil.jobs.pick_files import Writers, read_ahead
from frazil.jobs.run import Run
from frazil.maths.ctf import ctf
from frazil.steps.extract import ExtractSettings, extract, first_of_each, place

SHOWN = 60  # particles in the report


@dataclass(frozen=True)
class Job:
    """What is to be done, the same for every micrograph."""

    micrographs: Micrographs
    wanted: Wanted
    settings: ExtractSettings
    optics: pd.DataFrame
    precision: str
    distance: float  # Å, least of two particles
    max_outside: float
    premultiply: bool
    seed: int


@dataclass
class Tally:
    """Particles that were not extracted."""

    outside: int = 0
    duplicates: int = 0
    flat: int = 0
    first: str = ""  # micrograph of the first

    def add(self, outside: int, duplicates: int, flat: int, first: str) -> None:
        """Those of another part."""
        self.outside, self.duplicates, self.flat = self.outside + outside, self.duplicates + duplicates, self.flat + flat
        self.first = self.first or first

    def said(self) -> dict[str, str | int]:
        """For the STAR file of a part."""
        first = {"frazilFirstOutside": self.first} if self.first else {}
        return {"frazilOutside": self.outside, "frazilDuplicates": self.duplicates, "frazilFlat": self.flat, **first}

    def add_said(self, said: Mapping[str, str]) -> None:
        """What `said` gave, as it was read."""
        outside, duplicates, flat = (int(said[f"frazil{name}"]) for name in ("Outside", "Duplicates", "Flat"))
        self.add(outside, duplicates, flat, said.get("frazilFirstOutside", ""))

    def lines(self, max_outside: float, distance: float) -> list[str]:
        """What to tell the user."""
        out = []
        if self.outside:
            out.append(f"{self.outside} positions are outside their micrograph, or more than {100 * max_outside:.0f} % of their box is: "
                       f"left out (first: {self.first})")  # fmt: skip
        if self.duplicates:
            out.append(f"{self.duplicates} particles lie within {distance:g} Å of a better one and are left out")
        if self.flat:
            out.append(f"{self.flat} particles have a background without spread, or values that are not finite, and are left out")
        return out


@dataclass
class Made:
    """What the work gave."""

    parts: dict[str, pd.DataFrame] = field(default_factory=dict)  # rows by item
    bad: list[str] = field(default_factory=list)  # micrographs that could not be read
    shown: list[Tensor] = field(default_factory=list)  # some particles


def kept_before(job: Job, items: Sequence[Item], tally: Tally, made: Made) -> None:
    """Take what an earlier part of the run finished of the items: rows, counts, some particles."""
    every = how_often(job)
    for item in items:
        found = finished_part(item, positions_of(job.micrographs, job.wanted, item))
        if found is not None:
            made.parts[item.base] = found[0]
            tally.add_said(found[1])
            made.shown.extend(read_some(item.stack, range(0, len(found[0]), every))[: SHOWN - len(made.shown)])


def how_often(job: Job) -> int:
    """Each how manyth particle is shown."""
    return max(1, sum(map(len, job.wanted.places.values())) // SHOWN)


def work(job: Job, items: Sequence[Item], run: Run, tally: Tally, made: Made) -> None:
    """Extract what the items list, and add it."""
    order = [i for item in items for i in item.indices]
    last = {item.indices[-1]: item for item in items}
    of = {i: item for item in items for i in item.indices}
    every = how_often(job)
    writers, stack, tables, counts = Writers(max(1, min(4, run.threads))), None, [], Tally()
    try:
        for done, (index, pixels) in enumerate(read_ahead(job.micrographs, order, run.device), 1):
            item = of[index]
            if isinstance(pixels, BadInput):
                made.bad.append(str(pixels))
                run.warn(f"left out: {pixels}")
            else:
                if stack is None:
                    item.stack.parent.mkdir(parents=True, exist_ok=True)
                    pixel = job.micrographs.optics_of(index).pixel_size * job.settings.box / job.settings.size
                    stack = StackWriter(item.stack, job.settings.size, pixel, job.precision).__enter__()
                tables.append(one(job, index, pixels.float(), item, stack, counts, made.shown, every))
            if index in last:
                if stack is not None:
                    writers.submit(finish, job, item, stack, tables, counts)
                tally.add(counts.outside, counts.duplicates, counts.flat, counts.first)
                stack, tables, counts = None, [], Tally()
            run.progress(done, len(order), "extracting")
            run.check_stop()
    except BaseException as error:
        if stack is not None:
            stack.__exit__(type(error), error, error.__traceback__)
        raise
    finally:
        writers.close()
    made.parts |= {base: table for base, table in writers.done if table is not None}


def finish(job: Job, item: Item, stack: StackWriter, tables: list[pd.DataFrame], counts: Tally) -> tuple[str, pd.DataFrame | None]:
    """Close a stack and write its rows."""
    stack.__exit__(None, None, None)
    whole = len(tables) == len(item.indices)  # where a micrograph could not be read, --resume tries again
    tables = [table for table in tables if len(table)]
    if not tables:
        return item.base, None
    table = pd.concat(tables, ignore_index=True)
    positions = positions_of(job.micrographs, job.wanted, item) if whole else "incomplete"
    write_part(item, job.optics, table, {**counts.said(), POSITIONS: positions})
    return item.base, table


def one(
    job: Job, index: int, pixels: Tensor, item: Item, stack: StackWriter, tally: Tally, shown: list[Tensor], every: int
) -> pd.DataFrame:  # fmt: skip
    """Extract the particles of one micrograph into a stack; their rows."""
    xy, size = job.wanted.places[index], job.micrographs.optics_of(index).pixel_size
    placed = place(xy, (pixels.shape[0], pixels.shape[1]), job.settings.box)
    inside = placed.outside <= job.max_outside
    kept = torch.nonzero(inside)[:, 0]
    if len(kept) < len(xy):
        tally.outside += len(xy) - len(kept)
        tally.first = tally.first or job.micrographs.names[index]
    if job.distance > 0 and len(kept) > 1:
        best = kept[first_of_each(xy[kept], job.wanted.quality[index][kept], job.distance / size)]
        tally.duplicates += len(kept) - len(best)
        kept = best
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + index)
    factors = ctf_of(job, index, kept.numpy(), pixels.device) if job.premultiply and len(kept) else None
    good = torch.zeros(len(kept), dtype=torch.bool)
    first = stack.count
    for part, images, found in extract(pixels, placed.centre[kept], job.settings, generator, factors):
        fine = torch.isfinite(found).all(-1) & (found[:, 1] > 0)
        good[part] = fine
        chosen = images[fine.to(images.device)]
        chosen = (chosen.half() if job.precision == "float16" else chosen).cpu()
        stack.append(chosen)
        start = stack.count - len(chosen)
        shown += [chosen[k].float() for k in range(-start % every, len(chosen), every) if len(shown) < SHOWN]
    tally.flat += int((~good).sum())
    kept = kept[good]
    rows = rows_of(job.micrographs, job.wanted, index, kept.numpy(), placed.centre[kept].numpy(), (placed.residual[kept] * size).numpy())
    names = [f"{first + k + 1:06d}@{item.name}" for k in range(len(rows))]
    return rows.assign(**{IMAGE: pd.Series(names, dtype="str")})


def ctf_of(job: Job, index: int, kept: np.ndarray, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Factors (b, N, N//2+1) of the particles `kept` of a micrograph, by index among them."""
    micrographs, box, size = job.micrographs, job.settings.box, job.micrographs.optics_of(index).pixel_size
    optics, particles, rows = ctf_particles(micrographs, job.wanted, index, kept)
    if particles is None and not bool(micrographs.has_ctf[index]):
        raise BadInput(f"--premultiply: {micrographs.names[index]} has no CTF")
    lines = (torch.fft.fftfreq(box, size, dtype=torch.float64), torch.fft.rfftfreq(box, size, dtype=torch.float64))
    ky, kx = torch.meshgrid(*lines, indexing="ij")
    k = torch.stack([kx, ky], -1).reshape(-1, 2).to(device)

    def factors(part: Tensor) -> Tensor:
        if particles is None:
            one = torch.ones(1, dtype=torch.float64)
            values = (micrographs.defocus[index][None], micrographs.phase_shift[index][None], 0 * one, one)
        else:
            at = rows[part]
            values = (particles.defocus[at], particles.phase_shift[at], particles.b_factor[at], particles.ctf_scale[at])
        return whole(k, values, optics, device).view(-1, box, box // 2 + 1)

    return factors


def whole(k: Tensor, values: tuple[Tensor, ...], optics: Optics, device: torch.device) -> Tensor:
    """(b, p) float32 CTF."""
    defocus, phase, b_factor, scale = (v.to(device) for v in values)
    return ctf(k, defocus, phase, b_factor, scale, optics, dtype=torch.float32)
