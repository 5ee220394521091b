"""Particle images on disk, read lazily: thousands of stacks, float32 or float16, a batch at a time.

    images = StackImages(table["rlnImageName"], star="particles.star", boxes=64, memory_budget=4 << 30)
    images.check()                       # every header, once, in seconds
    batch = images[torch.tensor([3, 1, 2000])]

Consecutive images of a stack are one scattered read (preadv), and stacks are read side by side in threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Images
from frazil.io.files import below_here, why
from frazil.io.mrc import MrcHeader, read_header, write_mrc

_IMAGES_A_TASK = 128  # far below the 1024 buffers one preadv takes


def split_image_name(name: str) -> tuple[int, str]:
    """(index from 1, stack) of "000001@stack.mrcs"; a bare file name is its first image. ValueError for a bad index."""
    number, mark, stack = name.partition("@")
    return (int(number), stack) if mark else (1, name)


def find_stack(stack: str, star: str | os.PathLike[str] | None = None, root: str | os.PathLike[str] | None = None) -> Path | None:
    """The file a STAR file calls `stack`, or None.

    Looked for in the folder of the STAR file, the current folder, `root`, and then the folders above the STAR file: RELION
    writes paths relative to the project, which is one of those.
    """
    return next((folder / stack for folder in _folders(star, root) if (folder / stack).is_file()), None)


def usable_names(names: Iterable[str], star: str | os.PathLike[str] | None) -> list[str]:
    """Image names that are found from the current folder too: as they are where they are, else with the path to where they were found."""
    known: dict[str, str] = {}

    def usable(name: str) -> str:
        number, mark, stack = name.rpartition("@")
        if stack not in known:
            found, here = find_stack(stack, star), Path(stack)
            if found is None or (here.is_file() and found.samefile(here)):  # another of that name may lie here
                known[stack] = stack
            else:
                known[stack] = str(below_here(found))
        return f"{number}{mark}{known[stack]}"

    return [usable(name) for name in names]


def _folders(star: str | os.PathLike[str] | None, root: str | os.PathLike[str] | None) -> list[Path]:
    """Where stacks are looked for, in order."""
    folders = [Path(star).parent] if star is not None else []
    folders.append(Path("."))
    if root is not None:
        folders.append(Path(root))
    if star is not None:
        folders.extend(Path(star).absolute().parent.parents)
    return folders


@dataclass(frozen=True)
class _Layout:
    """What the headers say: a stack per entry of `headers`, and the box of every particle."""

    headers: tuple[MrcHeader, ...]
    box: np.ndarray  # (n,) px
    half: bool  # every stack is float16


class StackImages:
    """`data.Images` over MRC stacks: images[index] is (b, y, x) float32 on the CPU, in the order of `index`.

    names: rlnImageName of every particle; star: the STAR file they are from (for paths and messages); boxes: expected side
    in px, one number or one a particle, 0 = any. With at most `memory_budget` bytes the whole set stays in memory once read
    (in float16 if the files are); otherwise every access reads. Headers are read by check(), or at the first access.
    Raises BadInput naming the file and the row: see check().
    """

    def __init__(
        self,
        names: Sequence[str],
        star: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        boxes: int | Tensor | Sequence[int] = 0,
        memory_budget: int = 0,
        threads: int = 4,
    ) -> None:
        self._star, self._root = star, root
        self._names = list(names)
        self._slot, stacks = self._split()
        self._file, self._stacks = pd.factorize(np.asarray(stacks, dtype=object))
        self._expected = np.broadcast_to(np.asarray(boxes, dtype=np.int64), (len(self._names),))
        self._budget = memory_budget
        self._threads = max(1, threads)
        self._layout: _Layout | None = None
        self._cache: dict[int, Tensor] = {}
        self._row = np.zeros(0, np.int64)  # of a particle in the cache of its box
        self._loaded = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(b, y, x) float32 images at `index` (int64 or bool), which must share one box."""
        layout = self._known()
        wanted = torch.as_tensor(index)
        wanted = (wanted.nonzero()[:, 0] if wanted.dtype == torch.bool else wanted).cpu().numpy().astype(np.int64)
        if not len(wanted):
            return torch.zeros(0, 0, 0)
        sides = np.unique(layout.box[wanted])
        if len(sides) > 1:
            raise ValueError(f"one access must stay within one box, got boxes {sides.tolist()}")
        side = int(sides[0])
        if not self.cached:
            return self._read(wanted, side, torch.float32)
        kept = self._kept(side)
        missing = np.unique(wanted[~self._loaded[wanted]])
        if len(missing):
            kept[torch.from_numpy(self._row[missing])] = self._read(missing, side, kept.dtype)
            self._loaded[missing] = True
        return kept[torch.from_numpy(self._row[wanted])].float()

    @property
    def half_precision(self) -> bool:
        """Whether every stack is float16."""
        return self._known().half

    @property
    def boxes(self) -> Tensor:
        """(n,) int64 side of every image in px."""
        return torch.from_numpy(self._known().box.copy())

    @property
    def bytes_in_memory(self) -> int:
        """Bytes the whole set takes in memory: 2 a pixel if every stack is float16, else 4."""
        layout = self._known()
        return int((layout.box**2).sum()) * (2 if layout.half else 4)

    @property
    def cached(self) -> bool:
        """Whether images stay in memory once read."""
        return self.bytes_in_memory <= self._budget

    def check(self) -> None:
        """Read and validate the header of every stack, once.

        Raises BadInput for a stack that is missing, not MRC, truncated or not square, an index out of range and a box that is
        not the expected one: the message names the first and says how many rows are affected.
        """
        self._known()

    def _known(self) -> _Layout:
        """The layout, from the headers at the first call."""
        if self._layout is None:
            with ThreadPoolExecutor(self._threads) as pool:
                found = list(pool.map(self._header, self._stacks))
            self._layout = self._validate(found)
            self._row = np.zeros(len(self), np.int64)
            for side in np.unique(self._layout.box):
                here = self._layout.box == side
                self._row[here] = np.arange(int(here.sum()))
            self._loaded = np.zeros(len(self), bool)
        return self._layout

    def _where(self, row: int) -> str:
        """Start of a message about a row (0-based): the STAR file, the row and its image."""
        return f"{self._star if self._star is not None else 'images'}: row {row + 1}: {self._names[row]}"

    def _split(self) -> tuple[np.ndarray, list[str]]:
        """Image index within its stack (from 0) and stack name of every particle."""
        slots, stacks = np.zeros(len(self._names), np.int64), []
        for row, name in enumerate(self._names):
            try:
                number, stack = split_image_name(name)
            except ValueError:
                raise BadInput(f"{self._where(row)}: expected rlnImageName as index@stack, like 000001@stack.mrcs") from None
            slots[row] = number - 1
            stacks.append(stack)
        return slots, stacks

    def _header(self, stack: str) -> MrcHeader | str:
        """Header of a stack, or what is wrong with it."""
        path = find_stack(stack, self._star, self._root)
        if path is None:
            tried = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in _folders(self._star, self._root)[:3]))
            return f"stack {stack} not found (looked in {tried} and above); give the project folder or move the files back"
        try:
            header = read_header(path)
        except BadInput as error:
            return str(error)
        if path.suffix == ".gz":
            return f"{path}: compressed stacks cannot be read in pieces; unpack it with gunzip"
        if header.shape[1] != header.shape[2]:
            return f"{path}: images are {header.shape[2]} x {header.shape[1]} px; expected square particles"
        return header

    def _validate(self, found: Sequence[MrcHeader | str]) -> _Layout:
        """The layout, if nothing is wrong with any row."""
        good = np.array([isinstance(h, MrcHeader) for h in found], bool)
        counts = np.array([h.shape[0] if isinstance(h, MrcHeader) else 0 for h in found], np.int64)[self._file]
        sides = np.array([h.shape[1] if isinstance(h, MrcHeader) else 0 for h in found], np.int64)[self._file]
        bad_file = ~good[self._file]
        bad_slot = ~bad_file & ((self._slot < 0) | (self._slot >= counts))
        bad_box = ~bad_file & (self._expected > 0) & (sides != self._expected)
        rows = np.flatnonzero(bad_file | bad_slot | bad_box)
        if len(rows):
            row = int(rows[0])
            if bad_file[row]:
                problem = str(found[self._file[row]])
            elif bad_slot[row]:
                problem = f"image {self._slot[row] + 1} is out of range: the stack holds images 1 to {counts[row]}"
            else:
                problem = f"images are {sides[row]} px, the optics group says rlnImageSize {self._expected[row]}"
            files = len(np.unique(self._file[rows]))
            more = f" ({len(rows)} rows in {files} stacks have problems)" if len(rows) > 1 else ""
            raise BadInput(f"{self._where(row)}: {problem}{more}")
        headers = tuple(h for h in found if isinstance(h, MrcHeader))
        return _Layout(headers, sides, bool(headers) and all(h.dtype.kind == "f" and h.dtype.itemsize == 2 for h in headers))

    def _kept(self, side: int) -> Tensor:
        """The cache of one box, made at first need."""
        if side not in self._cache:
            layout = self._known()
            dtype = torch.float16 if layout.half else torch.float32
            self._cache[side] = torch.empty((int((layout.box == side).sum()), side, side), dtype=dtype)
        return self._cache[side]

    def _read(self, wanted: np.ndarray, side: int, dtype: torch.dtype) -> Tensor:
        """(b, side, side) images of particles `wanted`, in that order, read in threads."""
        out = torch.empty((len(wanted), side, side), dtype=dtype)
        order = np.lexsort((self._slot[wanted], self._file[wanted]))
        files = self._file[wanted][order]
        cuts = [0, *(np.flatnonzero(np.diff(files)) + 1), len(order)]
        tasks = [order[i : min(i + _IMAGES_A_TASK, stop)] for start, stop in zip(cuts, cuts[1:], strict=False)
                 for i in range(start, stop, _IMAGES_A_TASK)]  # fmt: skip

        def run(places: np.ndarray) -> None:
            header = self._known().headers[self._file[wanted[places[0]]]]
            _read_places_(out, header, self._slot[wanted[places]], places)

        if len(tasks) == 1 or self._threads == 1:
            for places in tasks:
                run(places)
        else:
            with ThreadPoolExecutor(min(self._threads, len(tasks))) as pool:
                list(pool.map(run, tasks))
        return out


def find_bad(images: Images, index: Tensor, group: Tensor | None = None, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """Particles that cannot be used: (indices with values that are not finite, indices of constant images), each sorted.

    Reads the images at `index` (int64) a `chunk` at a time; `group` (optics group of each of them) keeps boxes apart.
    """
    groups = torch.zeros_like(index) if group is None else group
    not_finite, constant = [], []
    for g in groups.unique().tolist():
        for part in index[groups == g].split(chunk):
            flat = images[part].flatten(1)
            finite = torch.isfinite(flat).all(1)
            same = finite & (flat.amax(1) == flat.amin(1))
            not_finite.append(part[~finite])
            constant.append(part[same])
    empty = [index[:0]]
    return torch.cat(not_finite + empty).sort().values, torch.cat(constant + empty).sort().values


def write_stack(path: str | os.PathLike[str], images: Tensor, pixel_size: float, dtype: str = "float32") -> None:
    """Write images (n, y, x) as an MRC stack, atomically; dtype "float32" or "float16". Raises BadInput as write_mrc does."""
    write_mrc(path, images, pixel_size, dtype, stack=True)


def _read_places_(out_: Tensor, header: MrcHeader, slots: np.ndarray, places: np.ndarray) -> None:
    """Images `slots` (ascending) of one stack into out_[places]."""
    target = out_.numpy()
    direct = header.dtype == target.dtype and header.dtype.isnative
    if direct:
        buffers = [target[place] for place in places]
    else:
        scratch = np.empty((len(slots), *target.shape[1:]), header.dtype)
        buffers = list(scratch)
    try:
        handle = os.open(header.path, os.O_RDONLY)
        try:
            _preadv_runs(handle, header, slots, buffers)
        finally:
            os.close(handle)
    except OSError as error:
        raise BadInput(f"{header.path}: cannot be read: {why(error)}") from error
    if not direct:
        native = scratch if scratch.dtype.isnative else scratch.astype(scratch.dtype.newbyteorder("="))
        values = torch.from_numpy(native) if native.dtype != np.uint16 else torch.from_numpy(native.astype(np.int32))
        out_[torch.from_numpy(places)] = values.to(out_.dtype)


def _preadv_runs(handle: int, header: MrcHeader, slots: np.ndarray, buffers: Sequence[np.ndarray]) -> None:
    """Fill buffers[i] with image slots[i]: a run of consecutive images is one scattered read."""
    starts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1), len(slots)]
    for start, stop in zip(starts, starts[1:], strict=False):
        offset = header.offset + int(slots[start]) * header.image_bytes
        views = [b.view(np.uint8).data.cast("B") for b in buffers[start:stop]]
        while views:
            got = os.preadv(handle, views, offset)
            if got <= 0:
                raise BadInput(f"{header.path}: ends before image {int(slots[stop - 1]) + 1}; was it changed while frazil read it?")
            offset += got
            while views and got >= len(views[0]):  # a read may stop early: go on with what is left
                got -= len(views[0])
                views.pop(0)
            if got:
                views[0] = views[0][got:]
