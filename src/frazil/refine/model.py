"""What a refinement knows: references, spectra, priors (one Model a half set). Frozen; the M-step makes the next one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """References and parameters of one half set (spec/refinement 8.3 names the same quantities)."""

    maps: Tensor  # (K, N, N, N) references, after solvent flattening; 2D classes (K, N, N)
    pixel_size: float  # Å
    sigma2: tuple[Tensor, ...]  # per optics group (N_g/2+1,) float64: noise variance per real or imaginary component, a shell
    scales: Tensor  # (micrographs,) float64 scale s_m
    norm_average: float  # mean norm correction
    sigma_offset: float  # Å, sd of the shift prior
    pdf_class: Tensor  # (K,) float64
    pdf_direction: Tensor  # (K, directions) float64, sums to 1 over both
    tau2: Tensor  # (K, N/2+1) float64 signal variance
    data_vs_prior: Tensor  # (K, N/2+1) float64, SSNR of the map
    fsc: Tensor  # (N/2+1,) float64 between half maps (zeros where there are none)
    sigma2_map: Tensor  # (K, N/2+1) float64 variance of the reconstruction (rlnReferenceSigma2)
    coverage: Tensor  # (K, N/2+1) float64 fraction of voxels with data above prior (rlnFourierCompleteness)
    prior_offset: Tensor | None = None  # (K, 2) float64 Å: centre of each class's shift prior; None: 0, or the particles' prior shift
    ave_pmax: float = 0.0
    log_likelihood: float = 0.0

    @property
    def box(self) -> int:
        return self.maps.shape[-1]

    @property
    def classes(self) -> int:
        return len(self.maps)


@dataclass(frozen=True)
class Statistics:
    """Sums of the E-step over particles. Two of them add up (batches, devices); spec/refinement 3.1 and 3.8."""

    data: Tensor  # (K, half volume or plane) complex: Σ Γ s c/σ² X
    weight: Tensor  # (K, half volume or plane) real: Σ Γ s² c²/σ²
    sigma2: tuple[Tensor, ...]  # per optics group (N_g/2+1,) float64 residual power
    sigma2_weight: Tensor  # (groups,) float64 Σ Γ
    direction: Tensor  # (K, directions) float64 Σ Γ
    offset2: float  # Σ Γ |o − c|², Å²
    offset_sum: Tensor  # (K, 2) float64 Σ Γ o, Å
    scale_cross: Tensor  # (micrographs,) float64 Σ Γ Re⟨c P V, X⟩
    scale_power: Tensor  # (micrographs,) float64 Σ Γ ‖c P V‖²
    norm: float  # Σ ν'
    log_likelihood: float
    pmax: float
    particles: int

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            data=self.data + other.data,
            weight=self.weight + other.weight,
            sigma2=tuple(a + b for a, b in zip(self.sigma2, other.sigma2, strict=True)),
            sigma2_weight=self.sigma2_weight + other.sigma2_weight,
            direction=self.direction + other.direction,
            offset2=self.offset2 + other.offset2,
            offset_sum=self.offset_sum + other.offset_sum,
            scale_cross=self.scale_cross + other.scale_cross,
            scale_power=self.scale_power + other.scale_power,
            norm=self.norm + other.norm,
            log_likelihood=self.log_likelihood + other.log_likelihood,
            pmax=self.pmax + other.pmax,
            particles=self.particles + other.particles,
        )


@dataclass(frozen=True)
class Poses:
    """Per particle results of an E-step, in the order of the particles it was given."""

    rotation: Tensor  # (n, 3, 3) float64
    shift: Tensor  # (n, 2) float64 Å
    klass: Tensor  # (n,) int64, from 0
    norm: Tensor  # (n,) float64 norm correction
    pmax: Tensor  # (n,) float64
    significant: Tensor  # (n,) int64 significant coarse samples
    log_likelihood: Tensor  # (n,) float64

    @staticmethod
    def empty(n: int, device: str = "cpu") -> Poses:
        """Room for n particles."""
        f, i = ({"dtype": dtype, "device": device} for dtype in (torch.float64, torch.int64))
        return Poses(
            torch.zeros(n, 3, 3, **f), torch.zeros(n, 2, **f), torch.zeros(n, **i), torch.ones(n, **f), torch.zeros(n, **f),
            torch.zeros(n, **i), torch.zeros(n, **f),
        )  # fmt: skip

    def with_part(self, index: Tensor | None, part: Poses) -> Poses:
        """These poses with those of `part` at index (m,); None: `part` is of all."""
        if index is None:
            return part
        out = Poses(**{name: value.clone() for name, value in vars(self).items()})
        out.put_(index, part)
        return out

    def put_(self, index: Tensor, part: Poses) -> None:
        """Write the results of some particles in their places; all on one device, so that nobody waits for it."""
        for name, value in vars(self).items():
            value[index] = getattr(part, name).to(value.dtype)

    def to(self, device: str) -> Poses:
        """The same on a device."""
        return Poses(**{name: value.to(device) for name, value in vars(self).items()})
