"""`frazil map`: making, describing, showing and converting maps; what all actions share."""
from __future__ import annotations

import gzip
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.files import atomic_path, write_bytes
from frazil.io.models import density_from_model
from frazil.io.mrc import read_header, read_map, read_mrc, write_mrc
from frazil.jobs.html import png
from frazil.jobs.inputs import centre_of_mass, check_same_grid, read_cube
from frazil.jobs.plots import plot_map
from frazil.jobs.run import Run
from frazil.maths.masks import soft_sphere

EXPERT: JsonDict = {"level": "expert"}
PX: JsonDict = {"unit": "px"}
ANGSTROM: JsonDict = {"unit": "Å"}
SQUARE: JsonDict = {"unit": "Å²", "level": "expert"}
MAX_BOX = 2048
MRC_SUFFIXES = (".mrc", ".map", ".ccp4", ".mrcs", ".st", ".rec", ".ali")
LARGEST = {"int8": 127, "int16": 32767, "uint16": 65535}


class Written(BaseModel):
    """What every action that writes a map has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    output: Path = Field(description="map to write (.mrc)")


class Changed(Written):
    """What every action that changes a map has."""

    map: Path = Field(description="the map to start from")


def save(data: Tensor, like: Volume, output: Path, origin: Sequence[float] | None = None, pixel_size: float | None = None) -> None:
    """Write a map with the pixel size and origin of `like` unless others are given, and say so."""
    size = like.pixel_size if pixel_size is None else pixel_size
    write_mrc(output, data.float(), size, origin=like.origin if origin is None else origin)
    shape = f"{data.shape[-1]} px" if len(set(data.shape)) == 1 else " x ".join(str(side) for side in reversed(data.shape)) + " px"
    print(f"{output}: {shape} of {size:.5g} Å")


def read_pair(first: Path, second: Path) -> tuple[Volume, Volume]:
    """Two maps of the same shape and pixel size; raises BadInput naming both otherwise."""
    a, b = read_map(first), read_map(second)
    if a.data.shape != b.data.shape and a.data.shape[-1] == b.data.shape[-1]:
        one, other = (" x ".join(str(side) for side in reversed(v.data.shape)) for v in (a, b))
        raise BadInput(f"{second}: {other} px, but {first} has {one} px; `frazil map crop` makes them equal")
    check_same_grid(a, first, b, second)
    return a, b


class InfoParams(BaseModel):
    """Size, pixel size, values, origin and centre of mass of maps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    maps: tuple[Path, ...] = Field(description="the maps", min_length=1)


class FromModelParams(Written):
    """Density of an atomic model, its centre of mass in the middle of the box."""

    model: Path = Field(description="atomic model (PDB or mmCIF, may be gzipped)")
    box: int = Field(ge=8, le=MAX_BOX, multiple_of=2, description="side of the map, even", json_schema_extra=PX)
    pixel_size: float = Field(gt=0, description="pixel size", json_schema_extra=ANGSTROM)
    resolution: float | None = Field(None, gt=0, description="low-pass filter; else what the grid holds", json_schema_extra=ANGSTROM)
    b_factor: float | None = Field(None, ge=0, description="B-factor for all atoms instead of their own", json_schema_extra=SQUARE)
    keep_origin: bool = Field(False, description="the origin of the coordinates, not their centre, in the middle", json_schema_extra=EXPERT)


class SphereParams(Written):
    """A soft sphere or hollow shell with values 0 to 1: a mask, or a first reference."""

    diameter: float | None = Field(None, gt=0, description="diameter up to which the sphere is 1", json_schema_extra=ANGSTROM)
    outer: float | None = Field(None, gt=0, description="the same as a radius: half the diameter", json_schema_extra=ANGSTROM)
    inner: float = Field(0.0, ge=0, description="radius inside which the map is 0: a hollow shell", json_schema_extra=ANGSTROM)
    box: int | None = Field(None, ge=8, le=MAX_BOX, multiple_of=2, description="side, even; none: 1.4 diameters", json_schema_extra=PX)
    pixel_size: float | None = Field(None, gt=0, description="pixel size; none: a 48th of the diameter", json_schema_extra=ANGSTROM)
    edge: float = Field(5.0, ge=0, description="width of the soft edge", json_schema_extra=PX)

    @property
    def radius(self) -> float:
        """Å, outer."""
        return self.outer if self.outer is not None else (self.diameter or 0.0) / 2

    @property
    def sampling(self) -> tuple[int, float]:
        """Box and pixel size."""
        pixel_size = self.pixel_size or self.radius / 24
        return self.box or 2 * math.ceil(1.4 * self.radius / pixel_size), pixel_size

    @model_validator(mode="after")
    def _fits(self) -> SphereParams:
        """One size, and the sphere fits into its box."""
        if (self.diameter is None) == (self.outer is None):
            raise ValueError("give one of --diameter and --outer (a radius)")
        if self.inner >= self.radius:
            raise ValueError(f"--inner: {self.inner:g} Å is not inside the outer radius of {self.radius:g} Å")
        box, pixel_size = self.sampling
        if 2 * self.radius > box * pixel_size:
            raise ValueError(f"--diameter: {2 * self.radius:g} Å is more than the box of {box * pixel_size:g} Å")
        return self


class PictureParams(BaseModel):
    """Central slices and projections along the three axes as a PNG picture."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    map: Path = Field(description="the map")
    output: Path = Field(description="picture to write (.png)")
    diameter: float = Field(0.0, ge=0, description="of the particle, to leave out empty margins; 0: none", json_schema_extra=ANGSTROM)


class ConvertParams(Changed):
    """Another file format, by the name of the output (.mrc, .map, .npy, .gz of these), or another MRC mode, or a mended header."""

    mode: Literal["float32", "float16", "int8", "int16", "uint16"] = Field("float32", description="how values are stored in MRC files")
    rescale: bool = Field(False, description="spread the values over the range of an integer mode; the density's scale is lost")
    pixel_size: float | None = Field(None, gt=0, description="write this into the header; the voxels stay", json_schema_extra=ANGSTROM)
    reset_origin: bool = Field(False, description="put the first voxel at 0, 0, 0", json_schema_extra=EXPERT)
    replace_nan: float | None = Field(None, description="write this for values that are not finite", json_schema_extra=EXPERT)


def info(params: InfoParams, run: Run | None) -> None:
    """Print a line for each map."""
    values = " ".join(f"{name:>10}" for name in ("min", "max", "mean", "sd"))
    print(f"{'x, y, z / px':>16} {'pixel / Å':>10} {'mode':>8} {values} {'centre of mass xyz / px':>26} {'origin xyz / Å':>24}  map")
    for path in params.maps:
        header, volume = read_header(path), read_map(path, anisotropic=True)
        data = volume.data.double()
        centre = ", ".join(f"{c:.1f}" for c in centre_of_mass(data).tolist()) if len(set(data.shape)) == 1 else "–"
        values = " ".join(f"{float(v):10.4g}" for v in (data.min(), data.max(), data.mean(), data.std()))
        shape = " x ".join(str(side) for side in reversed(data.shape))
        sizes = [f"{size:.5g}" for size in header.pixel_size]
        pixel = sizes[0] if len(set(sizes)) == 1 else " x ".join(sizes)
        origin = ", ".join(f"{x:.2f}" for x in volume.origin)
        print(f"{shape:>16} {pixel:>10} {header.dtype.name:>8} {values} {centre:>26} {origin:>24}  {path}")


def from_model(params: FromModelParams, run: Run | None) -> None:
    """Write the density of a model."""
    if params.resolution is not None and params.resolution < 2 * params.pixel_size:
        finest = 2 * params.pixel_size
        raise BadInput(f"--resolution: pixels of {params.pixel_size:g} Å hold nothing finer than {finest:g} Å; give that or more")
    centre = "origin" if params.keep_origin else "mass"
    volume = density_from_model(params.model, params.box, params.pixel_size, params.resolution, params.b_factor, centre)
    save(volume.data, volume, params.output)


def sphere(params: SphereParams, run: Run | None) -> None:
    """Write a soft sphere or shell."""
    box, pixel_size = params.sampling
    data = soft_sphere(box, params.radius / pixel_size, params.edge)
    if params.inner:  # its soft edge lies inside the inner radius
        edge = min(params.edge, params.inner / pixel_size)
        data = data - soft_sphere(box, params.inner / pixel_size - edge, edge)
    save(data, Volume(data, pixel_size), params.output)


def picture(params: PictureParams, run: Run | None) -> None:
    """Write the picture."""
    volume = read_cube(params.map)
    write_bytes(params.output, png(plot_map(volume.data.numpy(), volume.pixel_size, params.diameter)))
    print(f"{params.output}: slices and projections of {params.map}")


def convert(params: ConvertParams, run: Run | None) -> None:
    """Write the same voxels in another form."""
    volume = read_any(params.map)
    bad = ~torch.isfinite(volume.data)
    if bool(bad.any()):
        if params.replace_nan is None:
            raise BadInput(f"{params.map}: {int(bad.sum())} values are NaN or infinite; give --replace-nan VALUE")
        volume = Volume(torch.where(bad, params.replace_nan, volume.data), volume.pixel_size, volume.origin)
    size = params.pixel_size or volume.pixel_size
    name = params.output.name.removesuffix(".gz")
    data = volume.data
    if name.endswith(".npy"):
        with atomic_path(params.output) as temporary, _opened(temporary, params.output) as file:
            np.save(file, data.numpy())
        print(f"{params.output}: {tuple(data.shape)} float32, z y x")
        return
    if not name.endswith(MRC_SUFFIXES):
        raise BadInput(f"{params.output}: unknown format; expected a name ending in {', '.join(MRC_SUFFIXES)} or .npy, with or without .gz")
    if params.mode in LARGEST:
        data = integers(data, params, params.output)
    origin = (0.0, 0.0, 0.0) if params.reset_origin else volume.origin
    stack = name.endswith((".mrcs", ".st", ".ali"))
    if params.output.suffix == ".gz":
        with tempfile.TemporaryDirectory() as folder:
            write_mrc(Path(folder) / name, data, size, params.mode, stack=stack, origin=origin)
            write_bytes(params.output, gzip.compress((Path(folder) / name).read_bytes(), 6))
    else:
        write_mrc(params.output, data, size, params.mode, stack=stack, origin=origin)
    print(f"{params.output}: {' x '.join(str(side) for side in reversed(data.shape))} px of {size:.5g} Å, {params.mode}")


def _opened(temporary: Path, output: Path) -> gzip.GzipFile:
    """A file that is compressed if its final name says so."""
    return gzip.open(temporary, "wb") if output.suffix == ".gz" else open(temporary, "wb")  # type: ignore[return-value]


def read_any(path: Path) -> Volume:
    """An MRC file as it is, or a .npy array (z, y, x) without pixel size; raises BadInput naming the file."""
    if not path.name.endswith(".npy"):
        header, volume = read_header(path), read_mrc(path)
        if max(header.pixel_size) - min(header.pixel_size) > 0.01 * max(header.pixel_size):
            shown = ", ".join(f"{size:.4g}" for size in header.pixel_size)
            raise BadInput(f"{path}: pixel sizes differ along x, y, z: {shown} Å; use `frazil map resample`")
        return volume
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as a NumPy array: {error}") from error
    if array.ndim != 3 or not np.isrealobj(array):
        raise BadInput(f"{path}: is {array.dtype} {array.shape}; expected real numbers on three axes, z y x")
    return Volume(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), 0.0)


def integers(data: Tensor, params: ConvertParams, output: Path) -> Tensor:
    """Values ready to be rounded to an integer mode; raises BadInput where that would destroy the map."""
    largest = LARGEST[params.mode]
    if params.rescale:
        low, high = float(data.min()), float(data.max())
        if params.mode == "uint16":
            return (data - low) * (largest / max(high - low, 1e-30))
        return data * (largest / max(abs(low), abs(high), 1e-30))
    if bool((data != data.round()).any()) and float(data.std()) < 10:
        raise BadInput(f"{output}: the values (sd {float(data.std()):.3g}) would be lost in rounding to {params.mode}; give --rescale")
    return data
