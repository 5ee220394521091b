"""What flows between the steps: frozen records, units Å, degrees, kV, mm; first axis = item; arrays (…, z, y, x)."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line: file, row or field, what was expected, what to do.

    The command line prints it and exits with code 2; nothing else may use this class.
    """


@dataclass(frozen=True)
class Watch:
    """Who looks on while a step works: told how far it is, and given what is finished, so that an interrupted step goes on from there."""

    progress: Callable[[str, float, float], None] = lambda what, done, total: None  # may raise, which stops the step
    known: Mapping[str, Tensor] = field(default_factory=dict)  # what an interrupted call with the same arguments gave to keep
    keep: Callable[[str, Tensor], None] = lambda name, value: None


@dataclass(frozen=True)
class Optics:
    """One optics group: everything particles taken with the same microscope setting share."""

    pixel_size: float  # Å
    box: int = 0  # px, side of the particle images (0: unknown)
    voltage: float = 300.0  # kV
    cs: float = 2.7  # mm, spherical aberration
    amplitude_contrast: float = 0.1  # fraction
    name: str = "opticsGroup1"
    ctf_premultiplied: bool = False  # the images are already c·X
    beam_tilt: tuple[float, float] = (0.0, 0.0)  # mrad, x y
    odd_zernike: tuple[float, ...] = ()  # rad, antisymmetric aberration (RELION's rlnOddZernike)
    even_zernike: tuple[float, ...] = ()  # rad, symmetric aberration
    magnification: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0)  # rlnMagMat00 01 10 11
    mtf: str = ""  # STAR file of the detector's MTF, if the images are to be divided by it


@dataclass(frozen=True)
class Particles:
    """What is known of n particles. Pixels stay on disk: `Images[index]` reads them."""

    optics: tuple[Optics, ...]
    group: Tensor  # (n,) int64, index into optics
    rotation: Tensor  # (n, 3, 3) float64, map frame -> camera frame, acts on xyz columns
    shift: Tensor  # (n, 2) float64 Å, xy: moving the image by +shift brings the particle to the centre
    defocus: Tensor  # (n, 3) float64: u, v in Å (underfocus positive), angle of u from x in degrees
    half: Tensor  # (n,) int64: 1 or 2, 0 = not assigned
    micrograph: Tensor  # (n,) int64, index into micrographs: particles of one index share a scale
    micrographs: tuple[str, ...] = ("",)
    phase_shift: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,) degrees
    b_factor: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,) Å²
    ctf_scale: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,)
    norm: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,) norm correction
    klass: Tensor = field(default_factory=lambda: torch.zeros(0))  # (n,) int64, 1-based, 0 = none
    prior_rotation: Tensor | None = None  # (n, 3, 3), centre of a local search, or None
    prior_shift: Tensor | None = None  # (n, 2) Å, centre of the shift prior, or None

    def __post_init__(self) -> None:
        n = len(self.group)
        defaults = {"phase_shift": 0.0, "b_factor": 0.0, "ctf_scale": 1.0, "norm": 1.0}
        for name, value in defaults.items():
            if len(getattr(self, name)) != n:
                object.__setattr__(self, name, torch.full((n,), value, dtype=torch.float64))
        if len(self.klass) != n:
            object.__setattr__(self, "klass", torch.zeros(n, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.group)

    def to(self, device: str) -> Particles:
        """The same with all columns on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})

    def __getitem__(self, index: Tensor) -> Particles:
        """The particles at `index` (int64 or bool tensor); optics and micrograph tables stay whole."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in values.items() if isinstance(v, Tensor)})


class Images(Protocol):
    """Pixels by particle index: a tensor in a test, a lazy reader of stacks in a job."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """(b, y, x) float32 images at `index` (int64), all of one optics group; CPU tensor."""
        ...


@runtime_checkable
class ResidentImages(Protocol):
    """Images that lie on a device."""

    def of_group(self, group: int, index: Tensor) -> Tensor:
        """(b, y, x) images of an optics group at `index` (int64, on the device), on the device."""
        ...


@dataclass(frozen=True)
class Volume:
    """A map with its sampling."""

    data: Tensor  # (z, y, x)
    pixel_size: float  # Å
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)  # Å, xyz of the first voxel, for files only


@dataclass(frozen=True)
class HalfMaps:
    """Two independently refined maps of the same thing."""

    half1: Volume
    half2: Volume
