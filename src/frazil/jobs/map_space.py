"""`frazil map`: cutting, resampling, moving, turning, symmetrising and aligning maps."""
from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import Field, model_validator

from frazil.data import BadInput, Volume
from frazil.io.mrc import read_header, read_map
from frazil.jobs.inputs import check_same_grid, check_symmetry, read_cube, read_mask_for
from frazil.jobs.map_files import ANGSTROM, EXPERT, MAX_BOX, PX, Changed, save
from frazil.jobs.run import Run, resolve_device
from frazil.maths.rotation import euler_to_matrix, matrix_to_euler
from frazil.steps.align import align, hand_matrix
from frazil.steps.map_symmetry import find_symmetry
from frazil.steps.map_transform import (
    centre_of_mass,
    crop,
    mirror,
    moved_origin,
    resample,
    resample_isotropic,
    shift,
    symmetrise,
    transform,
)

DEVICE = "where to compute: auto, cpu, cuda or cuda:0, cuda:1, …"


class CropParams(Changed):
    """Cut a map, or pad it with zeros, to another box; the centre stays the centre."""

    box: int = Field(ge=2, le=MAX_BOX, multiple_of=2, description="new side, even", json_schema_extra=PX)


class ResampleParams(Changed):
    """Resample a map in Fourier space to another pixel size, or give its header a corrected pixel size."""

    pixel_size: float | None = Field(None, gt=0, description="new pixel size", json_schema_extra=ANGSTROM)
    box: int | None = Field(None, ge=2, le=MAX_BOX, multiple_of=2, description="new side, even; as large as before in Å if not given",
                            json_schema_extra=PX)  # fmt: skip
    force_pixel_size: float | None = Field(None, gt=0, description="first take this for the map's own pixel size, instead of its header's",
                                           json_schema_extra={"unit": "Å", **EXPERT})  # fmt: skip

    @model_validator(mode="after")
    def _something_to_do(self) -> ResampleParams:
        """At least one of the three is given."""
        if self.pixel_size is None and self.box is None and self.force_pixel_size is None:
            raise ValueError("give --pixel-size, --box or both")
        return self


class MirrorParams(Changed):
    """The other hand of a map: x becomes −x (or y, or z), the centre stays where it is."""

    axis: str = Field("x", pattern="^[xyz]$", description="the axis that is turned round: x, y or z", json_schema_extra=EXPERT)


class ShiftParams(Changed):
    """Move the density within its box; what leaves on one side enters on the other."""

    by: tuple[float, float, float] | None = Field(None, description="move by this, x y z", json_schema_extra=PX)
    centre: bool = Field(False, description="move the centre of mass of the density into the centre of the box instead")

    @model_validator(mode="after")
    def _one_of_them(self) -> ShiftParams:
        """Exactly one of the two is given."""
        if (self.by is None) != self.centre:
            raise ValueError("give --by X Y Z or --centre, one of the two")
        return self


class RotateParams(Changed):
    """Turn a map about the centre of its box by rot, tilt, psi: new(A x) = old(x). Mirror first, shift last."""

    angles: tuple[float, float, float] = Field(description="rot tilt psi", json_schema_extra={"unit": "degrees"})
    shift: tuple[float, float, float] = Field((0.0, 0.0, 0.0), description="move by this afterwards, x y z", json_schema_extra=PX)
    mirror: bool = Field(False, description="take the other hand (x becomes −x) first")


class SymmetriseParams(Changed):
    """Average a map over a point group about the centre of its box."""

    symmetry: str = Field(description="point group in RELION's setting: C4, D2, T, O, I1, …")


class FindSymmetryParams(Changed):
    """Symmetry axes and point group of a map; writes it centred and turned into the group's setting."""

    output: Path | None = Field(None, description="map to write, its axes as RELION's point group has them")  # pyright: ignore
    max_order: int = Field(8, ge=2, le=30, description="highest order of axes looked for")
    threshold: float = Field(0.5, gt=0, lt=1, description="correlation from which a turn counts as a symmetry", json_schema_extra=EXPERT)
    resolution: float | None = Field(None, gt=0, description="compare to this resolution; else some three waves across the particle and up",
                                     json_schema_extra=ANGSTROM)  # fmt: skip
    device: str = Field("auto", description=DEVICE, json_schema_extra=EXPERT)


class AlignParams(Changed):
    """Bring a map onto another: all orientations, all shifts and both hands are tried."""

    target: Path = Field(description="the map to bring it onto, same box and pixel size")
    mask: Path | None = Field(None, description="compare inside this mask of the target only")
    resolution: float | None = Field(None, gt=0, description="finest compared; else as far as both agree", json_schema_extra=ANGSTROM)
    max_shift: float | None = Field(None, ge=0, description="largest shift tried; else any", json_schema_extra=ANGSTROM)
    same_hand: bool = Field(False, description="do not try the mirrored map")
    device: str = Field("auto", description=DEVICE, json_schema_extra=EXPERT)


def crop_map(params: CropParams, run: Run | None) -> None:
    """Write the cut or padded map; also mends odd and unequal sides."""
    volume = read_map(params.map)
    data = crop(volume.data, params.box)
    sizes = [volume.pixel_size] * 3
    save(data, volume, params.output, moved_origin(volume.origin, (volume.data.shape, sizes), (data.shape, volume.pixel_size)))


def resample_map(params: ResampleParams, run: Run | None) -> None:
    """Write the resampled map and say what pixel size came out."""
    header, volume = read_header(params.map), read_map(params.map, anisotropic=True)
    sizes = [params.force_pixel_size] * 3 if params.force_pixel_size else list(header.pixel_size)
    if min(sizes) <= 0:
        raise BadInput(f"{params.map}: has no pixel size in its header; give it with --force-pixel-size")
    if params.pixel_size is None and params.box is None:
        return save(volume.data, volume, params.output, pixel_size=sizes[0])
    data, shape = volume.data, volume.data.shape
    even_cube = len(set(shape)) == 1 and shape[0] % 2 == 0
    if even_cube and max(sizes) - min(sizes) <= 1e-3 * max(sizes):
        wanted = params.pixel_size or shape[-1] * sizes[0] / (params.box or shape[-1])
        data, made = resample(data, sizes[0], wanted, params.box)
    else:
        made = params.pixel_size or min(sizes)
        data = resample_isotropic(data, sizes, made)
        data = crop(data, params.box or 2 * math.ceil(max(data.shape) / 2))
    save(data, volume, params.output, moved_origin(volume.origin, (shape, sizes), (data.shape, made)), made)
    return None


def mirror_map(params: MirrorParams, run: Run | None) -> None:
    """Write the other hand."""
    volume = read_cube(params.map)
    save(mirror(volume.data, -1 - "xyz".index(params.axis)), volume, params.output)


def shift_map(params: ShiftParams, run: Run | None) -> None:
    """Write the moved map."""
    volume = read_map(params.map)
    by = params.by or tuple((-centre_of_mass(volume.data)).tolist())
    print(f"moved by {', '.join(f'{x:.3f}' for x in by)} px (x, y, z)")
    save(shift(volume.data, by), volume, params.output)


def rotate_map(params: RotateParams, run: Run | None) -> None:
    """Write the turned map."""
    volume = read_cube(params.map)
    matrix = euler_to_matrix(torch.tensor(params.angles, dtype=torch.float64)) @ hand_matrix(params.mirror)
    save(transform(volume.data, matrix, params.shift), volume, params.output)


def symmetrise_map(params: SymmetriseParams, run: Run | None) -> None:
    """Write the averaged map and say how far the map was from it."""
    group = check_symmetry(params.symmetry)
    volume = read_cube(params.map)
    data = symmetrise(volume.data, group)
    centred = volume.data - volume.data.mean()
    share = float(((data - data.mean()) * centred).sum() / (centred.norm() * (data - data.mean()).norm()).clamp(min=1e-30))
    print(f"correlation of the map with its {params.symmetry.upper()} average: {share:.4f}")
    save(data, volume, params.output)


def symmetry_of_map(params: FindSymmetryParams, run: Run | None) -> None:
    """Print the axes and the group; write the map in the group's setting where asked for."""
    volume = read_cube(params.map)
    side = volume.data.shape[-1] * volume.pixel_size
    finest = side / params.resolution if params.resolution else None
    data = volume.data.to(resolve_device(params.device))
    found = find_symmetry(data, max_order=params.max_order, threshold=params.threshold, finest=finest)
    print(f"{'order':>5} {'axis x, y, z':>24} {'correlation':>12}")
    for axis in found.axes:
        print(f"{axis.order:5d} {', '.join(f'{x:.4f}' for x in axis.direction):>24} {axis.correlation:12.3f}")
    angles = " ".join(f"{x:.3f}" for x in matrix_to_euler(found.rotation).tolist())
    centre = ", ".join(f"{x:.2f}" for x in found.centre.tolist())
    print(f"point group {found.group} (lowest correlation {found.correlation:.3f}, to {side / found.resolution_shell:.1f} Å), "
          f"centre at {centre} px from the centre of the box; rot tilt psi into its setting: {angles}")  # fmt: skip
    if params.output is not None:
        moved = transform(data, found.rotation, (-found.rotation @ found.centre).tolist()).cpu()
        save(moved, volume, params.output)


def align_map(params: AlignParams, run: Run | None) -> None:
    """Write the map where it lies on the target, and say how it got there."""
    target, moving = read_cube(params.target), read_cube(params.map)
    check_same_grid(target, params.target, moving, params.map)
    device, side = resolve_device(params.device), target.data.shape[-1] * target.pixel_size
    data = target.data * read_mask_for(params.mask, target, params.target) if params.mask else target.data
    for path, volume in ((params.target, data), (params.map, moving.data)):
        if not bool((volume != volume.flatten()[0]).any()):
            raise BadInput(f"{path}: every voxel has the same value{' in the mask' if params.mask else ''}; expected a map that varies")
    found = align(
        data.to(device), moving.data.to(device), finest=side / params.resolution if params.resolution else None,
        max_shift=None if params.max_shift is None else params.max_shift / target.pixel_size, both_hands=not params.same_hand,
    )  # fmt: skip
    by = found.shift.tolist()
    angles, offset = (" ".join(f"{x:.3f}" for x in values) for values in (matrix_to_euler(found.rotation).tolist(), by))
    which = "the mirrored map" if found.mirrored else "this hand"
    hand = "" if params.same_hand else f"; {which} fits (other hand {found.other_hand:.3f})"
    print(f"mean FSC to {side / found.shell:.2f} Å: {found.correlation:.3f}{hand}")
    if not params.same_hand and found.correlation < 1.1 * found.other_hand:
        print("warning: both hands fit about equally well; take the hand from something else")
    if found.correlation < 0.3:
        print("warning: the maps hardly agree; are they of the same thing, with the right pixel size?")
    print(f"the same for other maps: frazil map rotate --angles {angles} --shift {offset}{' --mirror' if found.mirrored else ''}")
    moved = transform(moving.data.to(device), found.matrix, by).cpu()
    save(moved, Volume(moved, target.pixel_size, target.origin), params.output)
