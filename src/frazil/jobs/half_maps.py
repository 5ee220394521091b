"""Two half maps, a mask and a detector's MTF, read and checked: what post-processing and local resolution begin with."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.star import read_star
from frazil.jobs.inputs import check_same_grid, read_cube, read_mask_for
from frazil.maths.independence import compare_shells, identical, not_two_halves
from frazil.maths.masks import check_mask

FREQUENCY, VALUE = "rlnResolutionInversePixel", "rlnMtfValue"


@dataclass(frozen=True)
class Halves:
    """Two half maps on one grid, on the device of the run, and a mask where one was given."""

    paths: tuple[Path, Path]
    first: Tensor  # (N, N, N) float32
    second: Tensor
    mask: Tensor | None
    pixel_size: float  # Å

    @property
    def box(self) -> int:
        """Side of the maps in px."""
        return self.first.shape[-1]


def other_half(path: Path) -> Path:
    """The second half map that belongs to a first one, by RELION's naming; raises BadInput where the name tells nothing."""
    if "half1" not in path.name:
        raise BadInput(f"{path}: has no 'half1' in its name, so the second half map cannot be found by name; give both half maps")
    return path.with_name(path.name.replace("half1", "half2"))


def read_halves(first: Path, second: Path | None, mask: Path | None, pixel_size: float | None, device: torch.device) -> Halves:
    """The half maps and the mask; raises BadInput for what does not belong together or cannot be two half maps.

    pixel_size: Å, instead of that in the headers.
    """
    second = second or other_half(first)
    if first.resolve() == second.resolve():
        raise BadInput(f"{second}: is given as both half maps; give the two half maps of one refinement")
    a, b = (read_map_at(path, pixel_size) for path in (first, second))
    check_same_grid(a, first, b, second)
    for path, volume in ((first, a), (second, b)):
        low, high = torch.aminmax(volume.data)
        if bool(low == high):
            raise BadInput(f"{path}: every voxel has the same value; expected an unfiltered half map")
    inside = None
    if mask is not None:
        inside = _read_mask(mask, a, first, pixel_size).to(device)
    one, two = a.data.to(device), b.data.to(device)
    if not identical(one, two) and (fault := not_two_halves(compare_shells(one, two))):
        raise BadInput(f"{first} and {second}: are not the two unfiltered half maps of one refinement: {fault}; "
                       "give run_half1_class001_unfil.mrc and run_half2_class001_unfil.mrc")  # fmt: skip
    return Halves((first, second), one, two, inside, a.pixel_size)


def read_map_at(path: Path, pixel_size: float | None) -> Volume:
    """A cube with the pixel size of its header, or the one given; raises BadInput."""
    if pixel_size is None:
        return read_cube(path)
    volume = read_cube(path, needs_pixel_size=False)
    return Volume(volume.data, pixel_size, volume.origin)


def _read_mask(path: Path, volume: Volume, volume_path: Path, pixel_size: float | None) -> Tensor:
    """The mask on the grid of a map; a mask without pixel size, where --pixel-size gives one, is taken to have that."""
    if pixel_size is None:
        return read_mask_for(path, volume, volume_path)
    mask = read_cube(path, needs_pixel_size=False)
    check_same_grid(volume, volume_path, Volume(mask.data, mask.pixel_size or pixel_size), path)
    if fault := check_mask(mask.data, str(path)):
        raise BadInput(fault)
    return mask.data.clamp(0, 1)


def read_mtf(path: Path, detector: float | None, pixel_size: float) -> tuple[np.ndarray, float]:
    """((n, 2) frequency in 1/px of the detector and MTF, pixel size of the detector in Å); raises BadInput for what is no MTF."""
    tables = [block for block in read_star(path).values() if isinstance(block, pd.DataFrame) and FREQUENCY in block and VALUE in block]
    if not tables:
        raise BadInput(f"{path}: no table with _{FREQUENCY} and _{VALUE}; expected the STAR file of a detector's MTF")
    values = tables[0][[FREQUENCY, VALUE]].to_numpy(dtype=float)
    rising = bool((np.diff(values[:, 0]) > 0).all())
    if len(values) < 2 or not np.isfinite(values).all() or not rising:
        raise BadInput(f"{path}: _{FREQUENCY} must rise from row to row, with at least two rows of numbers")
    if values[:, 1].min() < 0 or values[:, 1].max() > 1.5:
        raise BadInput(f"{path}: _{VALUE} runs from {values[:, 1].min():g} to {values[:, 1].max():g}; an MTF lies between 0 and 1")
    return values, detector or pixel_size
