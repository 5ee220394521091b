"""`frazil map`: arithmetic, scales, thresholds and filters of maps: what changes values and leaves the grid."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.mrc import read_map
from frazil.jobs.inputs import check_same_grid, read_cube, read_mask_for
from frazil.jobs.map_files import ANGSTROM, EXPERT, Changed, read_pair, save
from frazil.jobs.run import Run
from frazil.maths.filters import lowpass_map
from frazil.steps.map_filter import b_factor_map, bandpass_map, fitted_scale, highpass_map, matched_by_shell

SHELLS = {"unit": "Fourier shells", **EXPERT}


class ArithmeticParams(Changed):
    """Combine a map with another one of the same box and pixel size, or with a number, voxel by voxel."""

    other: Path | None = Field(None, description="the other map")
    value: float | None = Field(None, description="a number instead of a map")

    @model_validator(mode="after")
    def _one_of_them(self) -> ArithmeticParams:
        """Exactly one of the two is given."""
        if (self.other is None) == (self.value is None):
            raise ValueError("give another map or --value, one of the two")
        return self


class DifferenceParams(Changed):
    """Difference of two maps after bringing the second to the scale of the first: A − s·B."""

    other: Path = Field(description="the map to take away")
    scale: Literal["shells", "factor", "none"] = Field(
        "shells", description="how B is scaled: amplitudes of A in every shell, one factor fitted to A, or not at all")  # fmt: skip
    mask: Path | None = Field(None, description="fit the scale inside this mask, and write the difference inside it only")
    resolution: float | None = Field(None, gt=0, description="low-pass both maps first", json_schema_extra=ANGSTROM)


class NormaliseParams(Changed):
    """Shift and scale the values of a map to a mean and a standard deviation."""

    mean: float = Field(0.0, description="mean wanted")
    sd: float = Field(1.0, gt=0, description="standard deviation wanted")
    mask: Path | None = Field(None, description="take the statistics where this mask is above 0.5; else of the whole map")


class ThresholdParams(Changed):
    """Cut off values: those beyond a limit become the limit."""

    below: float | None = Field(None, description="smaller values become this")
    above: float | None = Field(None, description="larger values become this")
    binary: float | None = Field(None, description="instead: 1 where the map is at least this, 0 elsewhere")

    @model_validator(mode="after")
    def _something_to_do(self) -> ThresholdParams:
        """A limit is given, and they are in order."""
        if (self.binary is None) == (self.below is None and self.above is None):
            raise ValueError("give --below, --above or both, or --binary alone")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError(f"--below {self.below:g} is more than --above {self.above:g}")
        return self


class PassParams(Changed):
    """Filter a map with a soft edge in Fourier space."""

    resolution: float = Field(gt=0, description="where the filter passes one half", json_schema_extra=ANGSTROM)
    edge: float = Field(2.0, ge=0, description="width of the filter's edge", json_schema_extra=SHELLS)


class BandpassParams(Changed):
    """Keep what lies between two resolutions."""

    coarsest: float = Field(gt=0, description="remove what is coarser than this", json_schema_extra=ANGSTROM)
    finest: float = Field(gt=0, description="remove what is finer than this", json_schema_extra=ANGSTROM)
    edge: float = Field(2.0, ge=0, description="width of the filter's edges", json_schema_extra=SHELLS)

    @model_validator(mode="after")
    def _in_order(self) -> BandpassParams:
        """Something is left."""
        if self.finest >= self.coarsest:
            raise ValueError(f"--finest {self.finest:g} Å must be a smaller number than --coarsest {self.coarsest:g} Å")
        return self


class BFactorParams(Changed):
    """Multiply the transform of a map by exp(−B k²/4): negative B sharpens."""

    b_factor: float = Field(description="B; a negative one sharpens", json_schema_extra={"unit": "Å²"})
    resolution: float | None = Field(None, gt=0, description="low-pass afterwards", json_schema_extra=ANGSTROM)


def divided(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "divide": divided,
}  # fmt: skip


def arithmetic(name: str) -> Callable[[ArithmeticParams, Run | None], None]:
    """The action `name` of OPERATIONS."""

    def combine(params: ArithmeticParams, run: Run | None) -> None:
        if params.other is None:
            a = read_map(params.map)
            if name == "divide" and params.value == 0:
                raise BadInput("--value: 0 divides nothing; give another number")
            other = torch.tensor(float(params.value or 0.0))
        else:
            a, b = read_pair(params.map, params.other)
            other = b.data
        save(OPERATIONS[name](a.data, other), a, params.output)

    combine.__doc__ = f"Write the map after `{name}`."
    return combine


def difference(params: DifferenceParams, run: Run | None) -> None:
    """Write A − s·B and say how large it is."""
    a, b = read_cube(params.map), read_cube(params.other)
    check_same_grid(a, params.map, b, params.other)
    mask = read_mask_for(params.mask, a, params.map) if params.mask else torch.ones(())
    first, second = ((lowpass_map(v.data, a.pixel_size, params.resolution) if params.resolution else v.data) for v in (a, b))
    if params.scale == "shells":
        second = matched_by_shell(first, second, mask if params.mask else None)
    factor = 1.0 if params.scale == "none" else fitted_scale(first, second, mask if params.mask else None)
    left = (first - factor * second) * mask
    share = float(left.norm() / (first * mask).norm().clamp(min=1e-30))
    after = " after scaling its shells" if params.scale == "shells" else ""
    print(f"scale of {params.other}: {factor:.5g}{after}; difference / {params.map}: {share:.3f}")
    save(left, a, params.output)


def normalise(params: NormaliseParams, run: Run | None) -> None:
    """Write the normalised map."""
    volume = read_map(params.map)
    inside = volume.data
    if params.mask:
        mask = read_mask_for(params.mask, volume, params.map)
        inside = volume.data[mask > 0.5]
    mean, sd = float(inside.double().mean()), float(inside.double().std())
    if not sd > 0:
        raise BadInput(f"{params.map}: all values {'in the mask ' if params.mask else ''}are {mean:g}; expected a map that varies")
    print(f"mean was {mean:.5g}, standard deviation {sd:.5g}")
    save((volume.data - mean) * (params.sd / sd) + params.mean, volume, params.output)


def threshold(params: ThresholdParams, run: Run | None) -> None:
    """Write the map with its values cut off."""
    volume = read_map(params.map)
    data = volume.data
    data = data.clamp(min=params.below, max=params.above) if params.binary is None else (data >= params.binary).float()
    save(data, volume, params.output)


def check_resolution(resolution: float, volume: Volume, option: str) -> None:
    """Raise BadInput for a filter that lies beyond what the map can hold, which would do nothing."""
    if resolution < 2 * volume.pixel_size:
        raise BadInput(f"{option}: the map's pixels hold nothing finer than {2 * volume.pixel_size:g} Å; give that or more")


def lowpass(params: PassParams, run: Run | None) -> None:
    """Write the map without what is finer."""
    volume = read_cube(params.map)
    check_resolution(params.resolution, volume, "--resolution")
    save(lowpass_map(volume.data, volume.pixel_size, params.resolution, params.edge), volume, params.output)


def highpass(params: PassParams, run: Run | None) -> None:
    """Write the map without what is coarser."""
    volume = read_cube(params.map)
    check_resolution(params.resolution, volume, "--resolution")
    save(highpass_map(volume.data, volume.pixel_size, params.resolution, params.edge), volume, params.output)


def bandpass(params: BandpassParams, run: Run | None) -> None:
    """Write the map between two resolutions."""
    volume = read_cube(params.map)
    check_resolution(params.finest, volume, "--finest")
    save(bandpass_map(volume.data, volume.pixel_size, params.coarsest, params.finest, params.edge), volume, params.output)


def b_factor(params: BFactorParams, run: Run | None) -> None:
    """Write the sharpened or damped map."""
    volume = read_cube(params.map)
    data = b_factor_map(volume.data, volume.pixel_size, params.b_factor)
    if params.resolution:
        check_resolution(params.resolution, volume, "--resolution")
        data = lowpass_map(data, volume.pixel_size, params.resolution)
    save(data, volume, params.output)
