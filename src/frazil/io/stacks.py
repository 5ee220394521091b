"""Stacks of images written a batch at a time: as many as come, at the speed of the disk, complete or not there at all.

    with StackWriter("Extract/job012/mic1.mrcs", side=256, pixel_size=0.85, kind="float16") as stack:
        stack.append(images)            # (n, side, side), any number of times
    stack.count
"""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE
from torch import Tensor

from frazil.data import BadInput
from frazil.io.files import atomic_path, why
from frazil.io.mrc import HEADER_BYTES, read_header

KINDS = {"float32": 2, "float16": 12}  # MRC modes


class StackWriter:
    """A context manager, see the module. Leaving it gives the file its name; after an error, or with no image, there is none.

    `count`: images so far. Raises BadInput naming the file where it cannot be written or values do not fit float16.
    """

    def __init__(self, path: str | os.PathLike[str], side: int, pixel_size: float, kind: str = "float32") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.path, self.count = Path(path), 0
        self._side, self._pixel, self._kind = side, pixel_size, kind
        self._low, self._high, self._sum, self._squares = math.inf, -math.inf, 0.0, 0.0
        self._close = ExitStack()

    def __enter__(self) -> StackWriter:
        self._tmp = self._close.enter_context(atomic_path(self.path))
        try:
            self._file = self._close.enter_context(open(self._tmp, "wb"))
            self._file.write(bytes(HEADER_BYTES))
        except OSError as error:
            self._close.close()
            raise BadInput(f"{self.path}: cannot be written: {why(error)}") from error
        return self

    def append(self, images: Tensor) -> None:
        """Add images (n, side, side)."""
        values = np.ascontiguousarray(images.detach().cpu().numpy(), self._kind)
        if values.ndim != 3 or values.shape[1:] != (self._side, self._side):
            raise ValueError(f"{self.path}: images {values.shape}, expected (n, {self._side}, {self._side})")
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BadInput(f"{self.path}: values do not fit {self._kind} (beyond 65504, or not finite); normalise, or write float32")
        self._low, self._high, self.count = min(self._low, low), max(self._high, high), self.count + len(values)
        some = values[:: max(1, len(values) // 8)].astype(np.float32)  # for the header's mean and rms a sample will do
        self._sum += float(some.mean(dtype=np.float64)) * len(values)
        self._squares += float(np.square(some).mean(dtype=np.float64)) * len(values)
        self._file.write(values.data)  # ndarray.tofile does not say why it fails

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self.count:
            self._file.seek(0)
            self._file.write(self._header())
        if error is None and not self.count:
            error = _Empty()
            kind = _Empty
        try:
            self._close.__exit__(kind, error, trace)
        except _Empty:
            return
        except OSError as failure:
            raise BadInput(f"{self.path}: cannot be written: {why(failure)}") from failure

    def _header(self) -> bytes:
        head = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        sides = (self._side, self._side, self.count)
        for name, side in zip("xyz", sides, strict=True):
            head[f"n{name}"], head[f"m{name}"] = side, side
            head["cella"][name] = side * self._pixel
            head["cellb"][{"x": "alpha", "y": "beta", "z": "gamma"}[name]] = 90.0
        head["mz"], head["cella"]["z"] = 1, self._pixel  # a stack: sections are images, each a volume of its own
        head["mode"], head["mapc"], head["mapr"], head["maps"] = KINDS[self._kind], 1, 2, 3
        mean = self._sum / self.count
        head["dmin"], head["dmax"], head["dmean"] = self._low, self._high, mean
        head["rms"] = math.sqrt(max(0.0, self._squares / self.count - mean**2))
        head["map"], head["machst"] = b"MAP ", np.frombuffer(b"\x44\x44\0\0", np.uint8)
        head["nversion"] = 20140
        return head.tobytes()


class _Empty(Exception):
    """Nothing was appended: leave no file."""


def stack_count(path: Path) -> int:
    """Number of images of a stack, 0 where there is none that is whole."""
    try:
        return read_header(path).shape[0]
    except BadInput:
        return 0


def read_some(path: Path, places: Sequence[int]) -> Tensor:
    """(n, y, x) float32 images of a stack that StackWriter wrote, by place from 0. Raises BadInput where it is not whole."""
    header = read_header(path)
    with open(path, "rb") as file:
        images = np.memmap(file, header.dtype, "r", header.offset, header.shape)
        return torch.from_numpy(images[list(places)].astype(np.float32))
