"""`frazil map ACTION`: make, filter, cut, resample, mirror or describe a map. Each action reads and writes MRC files."""
from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.models import density_from_model
from frazil.io.mrc import read_header, read_map, write_mrc
from frazil.jobs import Action
from frazil.jobs.inputs import centre_of_mass, read_cube
from frazil.jobs.run import Run
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import fourier_resample, round_half_away
from frazil.maths.masks import soft_sphere

EXPERT: JsonDict = {"level": "expert"}
PX: JsonDict = {"unit": "px"}
ANGSTROM: JsonDict = {"unit": "Å"}
SQUARE: JsonDict = {"unit": "Å²", "level": "expert"}
MAX_BOX = 2048
PADDING_TRIED = 64  # px by which a box is padded at most to come nearer to the pixel size wanted


class _Written(BaseModel):
    """What every action that writes a map has."""

    model_config = ConfigDict(extra="forbid")
    output: Path = Field(description="map to write (.mrc)")


class _Changed(_Written):
    """What every action that changes a map has."""

    map: Path = Field(description="the map to start from")


class InfoParams(BaseModel):
    """Size, pixel size, values and centre of mass of maps."""

    model_config = ConfigDict(extra="forbid")
    maps: tuple[Path, ...] = Field(description="the maps", min_length=1)


class FromModelParams(_Written):
    """Density of an atomic model, its centre of mass in the middle of the box."""

    model: Path = Field(description="atomic model (PDB or mmCIF, may be gzipped)")
    box: int = Field(ge=8, le=MAX_BOX, multiple_of=2, description="side of the map, even", json_schema_extra=PX)
    pixel_size: float = Field(gt=0, description="pixel size", json_schema_extra=ANGSTROM)
    resolution: float | None = Field(None, gt=0, description="low-pass filter; else what the grid holds", json_schema_extra=ANGSTROM)
    b_factor: float | None = Field(None, ge=0, description="B-factor for all atoms instead of their own", json_schema_extra=SQUARE)
    keep_origin: bool = Field(False, description="the origin of the coordinates, not their centre, in the middle", json_schema_extra=EXPERT)


class SphereParams(_Written):
    """A soft sphere with values 0 to 1: a mask, or a first reference."""

    box: int = Field(ge=8, le=MAX_BOX, multiple_of=2, description="side of the map, even", json_schema_extra=PX)
    pixel_size: float = Field(gt=0, description="pixel size", json_schema_extra=ANGSTROM)
    diameter: float = Field(gt=0, description="diameter up to which the sphere is 1", json_schema_extra=ANGSTROM)
    edge: float = Field(5.0, ge=0, description="width of the soft edge", json_schema_extra=PX)

    @model_validator(mode="after")
    def _fits(self) -> SphereParams:
        """The sphere fits into its box."""
        if self.diameter > self.box * self.pixel_size:
            raise ValueError(f"--diameter: {self.diameter:g} Å is more than the box of {self.box * self.pixel_size:g} Å")
        return self


class LowpassParams(_Changed):
    """Low-pass filter a map with a soft edge in Fourier space."""

    resolution: float = Field(gt=0, description="keep what is coarser than this", json_schema_extra=ANGSTROM)
    edge: float = Field(2.0, ge=0, description="width of the filter's edge", json_schema_extra={"unit": "Fourier shells", **EXPERT})


class CropParams(_Changed):
    """Cut a map, or pad it with zeros, to another box; the centre stays the centre."""

    box: int = Field(ge=2, le=MAX_BOX, multiple_of=2, description="new side, even", json_schema_extra=PX)


class ResampleParams(_Changed):
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


class MirrorParams(_Changed):
    """The other hand of a map: x becomes −x, the centre stays where it is."""


def crop(data: Tensor, box: int) -> Tensor:
    """(box, box, box) cut out of, or padded with zeros around, a map (N, N, N) with pixel N/2 staying at pixel box/2."""
    n = data.shape[-1]
    out = data.new_zeros(box, box, box)
    low = [max(0, n // 2 - box // 2), max(0, box // 2 - n // 2)]
    length = min(n - low[0], box - low[1])
    source, target = (slice(start, start + length) for start in low)
    out[target, target, target] = data[source, source, source]
    return out


def resample(data: Tensor, pixel_size: float, wanted: float, box: int | None) -> tuple[Tensor, float]:
    """(map, its pixel size): resampled as near to `wanted` Å as an even box padded a little allows, cut or padded to `box`."""
    n = data.shape[-1]
    choices = []
    for padded in range(n, n + PADDING_TRIED + 1, 2):
        side = 2 * max(1, round_half_away(padded * pixel_size / wanted / 2))
        choices.append((round(abs(padded * pixel_size / side / wanted - 1), 4), padded, side))
    _, padded, side = min(choices)  # the least padding among equals
    out = fourier_resample(crop(data, padded), side)
    final = box or 2 * max(1, round_half_away(n * pixel_size / wanted / 2))
    return crop(out, final), padded * pixel_size / side


def mirror(data: Tensor) -> Tensor:
    """x → −x about pixel N/2; the plane at −N/2 of an even box is its own mate."""
    turned = data.flip(-1)
    return turned.roll(1, -1) if data.shape[-1] % 2 == 0 else turned


def save(data: Tensor, pixel_size: float, output: Path) -> None:
    """Write a map and say so."""
    write_mrc(output, data.float(), pixel_size)
    print(f"{output}: {data.shape[-1]} px of {pixel_size:.5g} Å")


def info(params: InfoParams, run: Run | None) -> None:
    """Print a line for each map."""
    values = " ".join(f"{name:>10}" for name in ("min", "max", "mean", "sd"))
    print(f"{'x, y, z / px':>16} {'pixel / Å':>10} {'mode':>8} {values} {'centre of mass xyz / px':>26}  map")
    for path in params.maps:
        header, volume = read_header(path), read_map(path)
        data = volume.data.double()
        centre = ", ".join(f"{c:.1f}" for c in centre_of_mass(data).tolist()) if len(set(data.shape)) == 1 else "–"
        values = " ".join(f"{float(v):10.4g}" for v in (data.min(), data.max(), data.mean(), data.std()))
        shape = " x ".join(str(side) for side in reversed(data.shape))
        print(f"{shape:>16} {volume.pixel_size:10.5g} {header.dtype.name:>8} {values} {centre:>26}  {path}")


def from_model(params: FromModelParams, run: Run | None) -> None:
    """Write the density of a model."""
    if params.resolution is not None and params.resolution < 2 * params.pixel_size:
        finest = 2 * params.pixel_size
        raise BadInput(f"--resolution: pixels of {params.pixel_size:g} Å hold nothing finer than {finest:g} Å; give that or more")
    centre = "origin" if params.keep_origin else "mass"
    volume = density_from_model(params.model, params.box, params.pixel_size, params.resolution, params.b_factor, centre)
    save(volume.data, volume.pixel_size, params.output)


def sphere(params: SphereParams, run: Run | None) -> None:
    """Write a soft sphere."""
    save(soft_sphere(params.box, params.diameter / (2 * params.pixel_size), params.edge), params.pixel_size, params.output)


def lowpass(params: LowpassParams, run: Run | None) -> None:
    """Write the filtered map."""
    volume = read_cube(params.map)
    save(lowpass_map(volume.data, volume.pixel_size, params.resolution, params.edge), volume.pixel_size, params.output)


def crop_map(params: CropParams, run: Run | None) -> None:
    """Write the cut or padded map; also mends odd and unequal sides."""
    volume = read_map(params.map)
    sides = set(volume.data.shape)
    if len(sides) > 1:  # bring it to a cube first
        largest = max(sides)
        cube = volume.data.new_zeros(largest, largest, largest)
        starts = [largest // 2 - side // 2 for side in volume.data.shape]
        cube[tuple(slice(start, start + side) for start, side in zip(starts, volume.data.shape, strict=True))] = volume.data
        volume = Volume(cube, volume.pixel_size)
    save(crop(volume.data, params.box), volume.pixel_size, params.output)


def resample_map(params: ResampleParams, run: Run | None) -> None:
    """Write the resampled map and say what pixel size came out."""
    volume = read_map(params.map) if params.force_pixel_size else read_cube(params.map)
    own = params.force_pixel_size or volume.pixel_size
    if params.pixel_size is None and params.box is None:
        return save(volume.data, own, params.output)
    n = volume.data.shape[-1]
    wanted = params.pixel_size or n * own / (params.box or n)
    data, pixel_size = resample(volume.data, own, wanted, params.box)
    save(data, pixel_size, params.output)
    return None


def mirror_map(params: MirrorParams, run: Run | None) -> None:
    """Write the other hand."""
    volume = read_cube(params.map)
    save(mirror(volume.data), volume.pixel_size, params.output)


ACTIONS: dict[str, Action] = {
    "info": Action(InfoParams, ("maps",), info),
    "from-model": Action(FromModelParams, ("model",), from_model),
    "sphere": Action(SphereParams, (), sphere),
    "lowpass": Action(LowpassParams, ("map",), lowpass),
    "crop": Action(CropParams, ("map",), crop_map),
    "resample": Action(ResampleParams, ("map",), resample_map),
    "mirror": Action(MirrorParams, ("map",), mirror_map),
}
