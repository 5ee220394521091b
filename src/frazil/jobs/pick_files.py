"""Files of a picking run: micrographs read ahead, coordinates, score maps, the lists at the end."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.coordinates import CLASS, FILE, NAME, PSI, SCORE, X, Y
from frazil.io.files import write_text
from frazil.io.micrographs import Micrographs, read_micrograph_into
from frazil.io.mrc import read_mrc, write_mrc
from frazil.io.star import first_table, read_whole_star, write_star
from frazil.jobs.resuming import are_whole
from frazil.maths.tiling import WorkGrid
from frazil.steps.pick import Picks, ScoreMap

Item = TypeVar("Item")
AHEAD = 4  # micrographs read before they are needed
MAPS = {"fom": "value", "psi": "psi", "template": "template", "avgNoise": "mu", "stddevNoise": "sigma"}


def read_ahead(micrographs: Micrographs, wanted: Sequence[int], device: torch.device) -> Iterator[tuple[int, Tensor | BadInput]]:
    """(index, pixels on the device or what was wrong), in order, read by threads; pinned buffers are used again on a GPU."""
    pinned = device.type == "cuda"
    free: list[Tensor] = []

    def load(index: int) -> tuple[Tensor, Tensor | None] | BadInput:
        try:
            file = micrographs.file(index)
            buffer = free.pop() if free else None
            if pinned and (buffer is None or buffer.numel() < file.stat().st_size):
                buffer = torch.empty(file.stat().st_size, dtype=torch.uint8, pin_memory=True)  # slow, so here, beside the device's work
            pixels = read_micrograph_into(file, buffer)
        except BadInput as error:
            return error
        return pixels, buffer

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[tuple[int, Future[Any]]] = deque()
        todo = iter(wanted)
        for index in todo:
            waiting.append((index, pool.submit(load, index)))
            if len(waiting) > AHEAD:
                break
        while waiting:
            index, future = waiting.popleft()
            found = future.result()
            if isinstance(found, BadInput):
                yield index, found
            else:
                pixels, buffer = found
                if buffer is not None:
                    yield index, pixels.to(device, non_blocking=True)
                    torch.cuda.current_stream(device).synchronize()  # the copy is done with the buffer
                    free.append(buffer)
                else:
                    yield index, pixels
            for following in todo:
                waiting.append((following, pool.submit(load, following)))
                break


def output_names(micrographs: Micrographs) -> list[str]:
    """For each micrograph a path without ending below the run: its folder less RELION's Type/jobNNN, its name; never two alike."""
    taken: set[str] = set()
    out = []
    for name in micrographs.names:
        parts = [p for p in Path(name).parts if p not in ("/", "..", ".")]
        if len(parts) > 3 and parts[1].startswith("job"):
            parts = parts[2:]
        elif Path(name).is_absolute() or ".." in Path(name).parts:
            parts = parts[-1:]
        stem = str(Path(*parts).with_suffix(""))
        unique, k = stem, 1
        while unique in taken:
            k += 1
            unique = f"{stem}_{k}"
        taken.add(unique)
        out.append(unique)
    return out


def picks_table(picks: Picks, chosen: np.ndarray) -> pd.DataFrame:
    """RELION's columns of the picks at `chosen`, best first."""
    psi = np.asarray(picks.psi)[chosen].astype(float)
    return pd.DataFrame({
        X: np.asarray(picks.xy)[chosen, 0].round(3), Y: np.asarray(picks.xy)[chosen, 1].round(3),
        CLASS: np.asarray(picks.template)[chosen].astype(np.int64) + 1, SCORE: np.asarray(picks.value)[chosen].astype(float).round(6),
        PSI: np.where(psi > 180, psi - 360, psi).round(4),
    })  # fmt: skip


def finished_picks(folder: Path, base: str, picture: bool, maps: bool) -> pd.DataFrame | None:
    """The picks of a micrograph that an earlier part of the run finished; None if one of its files is not there or not whole."""
    fom = folder / "fom" / base
    files = [folder / "pictures" / f"{base}.png"] if picture else []
    files += [Path(f"{fom}_{suffix}.mrc") for suffix in MAPS] if maps else []
    try:
        found = first_table(read_whole_star(folder / f"{base}_autopick.star"), X)
        if maps:
            read_grid(fom)
    except BadInput:
        return None
    return found[1] if found is not None and SCORE in found[1] and are_whole(files, read_whole_star) else None


def write_maps(base: Path, scores: ScoreMap, preview: Tensor | None) -> None:
    """The score maps of a micrograph: BASE_fom.mrc and the rest, and the grid they are on."""
    grid = scores.grid
    for suffix, name in MAPS.items():
        values = getattr(scores, name).float().cpu()
        write_mrc(f"{base}_{suffix}.mrc", values, grid.work_pixel, "float32" if suffix == "fom" else "float16")
    if preview is not None:
        write_mrc(f"{base}_preview.mrc", preview.float().cpu(), grid.work_pixel, "float16")
    grid_record = {"shape": grid.shape, "padded": grid.padded, "size": grid.size, "pixel_size": grid.pixel_size, "border": scores.border}
    write_text(f"{base}_grid.json", json.dumps(grid_record))


def read_grid(base: Path) -> tuple[WorkGrid, tuple[float, float, float, float]]:
    """Grid and border of the score maps of a micrograph."""
    try:
        record = json.loads(Path(f"{base}_grid.json").read_text())
        grid = WorkGrid(tuple(record["shape"]), tuple(record["padded"]), tuple(record["size"]), record["pixel_size"])
        return grid, tuple(record["border"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{base}_grid.json: cannot be read ({error}); were score maps written there with --write-fom?") from None


def read_maps(base: Path) -> tuple[ScoreMap, Tensor | None]:
    """What write_maps wrote. Raises BadInput naming what is missing."""
    grid, border = read_grid(base)
    found = {name: read_mrc(f"{base}_{suffix}.mrc").data[0] for suffix, name in MAPS.items()}
    preview = Path(f"{base}_preview.mrc")
    scores = ScoreMap(grid, found["value"], found["psi"], found["template"].to(torch.int16), found["mu"], found["sigma"], border)
    return scores, read_mrc(preview).data[0] if preview.exists() else None


def write_lists(folder: Path, rows: Sequence[tuple[str, str, float, int, float]]) -> None:
    """autopick.star and summary.star of rows (micrograph, coordinate file below the folder, mean score, number, pixel size)."""
    inside = folder.resolve().is_relative_to(Path.cwd())
    named = folder.resolve().relative_to(Path.cwd()) if inside else folder.resolve()
    names, files = [row[0] for row in rows], [str(named / row[1]) for row in rows]
    write_star(folder / "autopick.star", {"coordinate_files": pd.DataFrame({NAME: names, FILE: files}, dtype="str")})
    write_star(folder / "summary.star", {"": pd.DataFrame({
        NAME: pd.Series(names, dtype="str"), SCORE: [round(row[2], 6) for row in rows], "rlnGroupNrParticles": [row[3] for row in rows],
        "rlnMicrographPixelSize": [row[4] for row in rows],
    })})  # fmt: skip


class Spent:
    """Seconds that one thread has spent, by what on: where a run's time goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def on(self, name: str) -> None:
        """What has passed since the last call was spent on `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def waiting(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time each took to come was spent on `name`, the rest is left to others."""
        for item in items:
            self.on(name)
            yield item

    def rounded(self) -> dict[str, float]:
        """For an event."""
        return {name: round(value, 4) for name, value in self.seconds.items()}


class Writers:
    """A few threads that finish micrographs while the next ones are matched; not more than `most` wait."""

    def __init__(self, threads: int, most: int = 16) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[Future[Any]] = deque()
        self._most = most
        self.done: list[Any] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> None:
        """Do work(*args) in a thread; errors come out here or in `close`."""
        self._waiting.append(self._pool.submit(work, *args))
        while len(self._waiting) > self._most:
            self.done.append(self._waiting.popleft().result())

    def close(self) -> None:
        """Wait for all."""
        try:
            while self._waiting:
                self.done.append(self._waiting.popleft().result())
        finally:
            self._pool.shutdown(cancel_futures=True)
