"""Maps as the commands want them: cubes of even side with a pixel size, on the same grid where two belong together."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.mrc import read_map
from frazil.maths.masks import check_mask
from frazil.maths.symmetry import operators

PIXEL_TOLERANCE = 0.01  # relative difference of two pixel sizes that still are the same


def read_cube(path: Path, *, needs_pixel_size: bool = True) -> Volume:
    """A map (N, N, N) float32 with N even and (unless not needed) a pixel size; raises BadInput naming the file otherwise."""
    volume = read_map(path)
    shape = tuple(volume.data.shape)
    if len(set(shape)) != 1:
        raise BadInput(f"{path}: {shape[2]} x {shape[1]} x {shape[0]} voxels; expected a cube, `frazil map crop` makes one")
    if shape[0] % 2:
        raise BadInput(f"{path}: box of {shape[0]} px is odd; expected an even box, `frazil map crop --box {shape[0] - 1}` makes one")
    if volume.pixel_size <= 0 and needs_pixel_size:
        raise BadInput(f"{path}: has no pixel size in its header; write one with `frazil map resample --force-pixel-size`")
    return volume


def check_same_grid(a: Volume, path_a: Path, b: Volume, path_b: Path) -> None:
    """Raise BadInput, naming both files, unless two maps have the same box and pixel size."""
    if a.data.shape != b.data.shape:
        mine, other = b.data.shape[-1], a.data.shape[-1]
        raise BadInput(f"{path_b}: box {mine} px, but {path_a} has {other} px; `frazil map crop` makes them equal")
    if abs(a.pixel_size - b.pixel_size) > PIXEL_TOLERANCE * a.pixel_size:
        mine, other = b.pixel_size, a.pixel_size
        raise BadInput(f"{path_b}: pixel size {mine:g} Å, but {path_a} has {other:g} Å; `frazil map resample` makes them equal")


def read_mask_for(path: Path, volume: Volume, volume_path: Path) -> Tensor:
    """(N, N, N) mask on the grid of a map, values in [0, 1]; raises BadInput otherwise."""
    mask = read_cube(path)
    check_same_grid(volume, volume_path, mask, path)
    if fault := check_mask(mask.data, str(path)):
        raise BadInput(fault)
    return mask.data.clamp(0, 1)


def check_symmetry(group: str) -> Tensor:
    """(g, 3, 3) operators of a point group; raises BadInput naming --symmetry for one that does not exist."""
    try:
        return operators(group)
    except ValueError as error:
        raise BadInput(f"--symmetry: {error}") from None


def centre_of_mass(data: Tensor) -> Tensor:
    """(3,) xyz in px from the box centre, of the density more than two standard deviations above the mean."""
    weight = (data - data.mean() - 2 * data.std()).clamp(min=0).double()
    total = weight.sum()
    if total <= 0:
        return torch.zeros(3, dtype=torch.float64)
    line = torch.arange(data.shape[-1], dtype=torch.float64) - data.shape[-1] // 2
    return torch.stack([(weight.sum(tuple(a for a in range(3) if a != axis)) * line).sum() / total for axis in (2, 1, 0)])
