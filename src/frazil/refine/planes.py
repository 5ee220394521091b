"""The M-step of 2D classes, all of them at once (spec/refinement 3 with κ = P², half planes for half volumes).

    τ²_k(r) = ½ mean |V_k|²      SSNR_k(r) = mean κ T τ²_k W_k      V_k = B_k / (W_k + 1/(κ T τ²_k))
"""

from __future__ import annotations

import torch
from torch import Tensor

from frazil.maths.fourier import shell_round
from frazil.maths.fourier2d import half_plane_radii, hermitian_planes, images_from_planes, padded_planes, shell_means_of_planes
from frazil.maths.gridding import sinc2
from frazil.maths.masks import mask_images, radii, soft_circle
from frazil.refine.classes import Reconstruction, filtered_alike
from frazil.refine.maximization import EDGE_PX, MIN_SHELL
from frazil.refine.model import Statistics
from frazil.refine.windows import Engine, pre_shift_images

CROWDED = 0.5  # density beyond the particle's circle over that within, from which on neighbours fill the box
MIDDLE = 0.8  # of the circle's radius: what is left of it then


def reference_planes(maps: Tensor, size: int, engine: Engine) -> Tensor:
    """(K, 2M+1, M+1) half planes of class averages (K, N, N), divided by the interpolation's sinc² before padding (spec 3.5)."""
    correction = interpolation(maps.shape[-1], engine)
    return padded_planes(maps.to(correction) / correction, engine.pad, size // 2)


def interpolation(box: int, engine: Engine) -> Tensor:
    """(N, N) what linear interpolation multiplies an average by."""
    return sinc2(box, engine.pad, device=engine.device, dtype=engine.dtype, dims=2)


def plane_power(planes: Tensor, box: int, pad: float) -> Tensor:
    """(K, N/2+1) float64 signal variance τ² of the half planes (K, 2M+1, M+1) the E-step sees (spec 3.3a)."""
    power = planes.real.square() + planes.imag.square()
    return 0.5 * shell_means_of_planes(power, pad, box // 2 + 1).cpu()


def reconstruct_planes(
    statistics: Statistics, tau2: Tensor, box: int, engine: Engine, place: str, *, alike: bool = False
) -> Reconstruction:
    """Averages of all classes from their sums and T·τ² (K, N/2+1), on the device `place`; a class without weight becomes zeros.

    alike: all are filtered with the mean of their filters.
    """
    pad, kappa = engine.pad, engine.pad**2
    data, weight = hermitian_planes(statistics.data), hermitian_planes(statistics.weight)
    strict = shell_means_of_planes(weight, pad, box // 2 + 1, strict=True).cpu() * kappa
    given = tau2
    if alike and len(tau2) > 1:
        given, tau2 = filtered_alike(tau2, shell_means_of_planes(weight, pad, tau2.shape[-1]).cpu())
    ft, coverage = divide(data, weight, given.to(device=data.device, dtype=torch.float64), pad)
    maps = images_from_planes(ft, pad, box).to(engine.dtype)
    maps = mask_images(maps, box / 2, EDGE_PX) / interpolation(box, engine)
    maps[(strict.amax(-1) <= 0).to(maps.device)] = 0
    sigma2_map = torch.where(strict > 0, 1 / strict.clamp(min=1e-300), 0)
    return Reconstruction(maps.to(place), data_vs_prior(weight, tau2, pad), sigma2_map, coverage.cpu())


def data_vs_prior(weight: Tensor, tau2: Tensor, pad: float) -> Tensor:
    """(K, N/2+1) SSNR mean(κ T τ² W) of half planes of weights; tau2 holds T·τ² (spec 3.3a)."""
    return shell_means_of_planes(weight, pad, tau2.shape[-1], strict=True).cpu() * pad**2 * tau2.cpu()


def completeness(weight: Tensor, tau2: Tensor, pad: float) -> Tensor:
    """(K, N/2+1) float64 part of the elements a shell of half planes with κ T τ² W ≥ 1 (3.3); tau2 holds T·τ²."""
    shells = tau2.shape[-1]
    shell = (half_plane_radii(weight.shape[-1] - 1, weight.device) / pad + 0.5).long().clamp(max=shells - 1)
    enough = pad**2 * tau2.to(weight.device)[:, shell] * weight.double() >= 1
    return shell_means_of_planes(enough.double(), pad, shells)


def divide(data: Tensor, weight: Tensor, tau2: Tensor | None, pad: float) -> tuple[Tensor, Tensor]:
    """(V, coverage) of half planes (K, 2M+1, M+1): B / W_reg inside the circle, direct division (3.3), tau2 (K, N/2+1) or None: no prior.

    coverage (K, shells) is the fraction of elements a shell with κ τ² W ≥ 1 (zeros without a prior).
    """
    m, kappa = data.shape[-1] - 1, pad**2
    radius = half_plane_radii(m, data.device)
    shells = tau2.shape[-1] if tau2 is not None else int((m - 1) / pad + 0.5) + 1
    shell, floor_shell = (radius / pad + 0.5).long(), (radius / pad).long()
    w, coverage = weight.double(), torch.zeros(len(data), shells, dtype=torch.float64, device=data.device)
    reg = w
    if tau2 is not None:
        t = tau2[:, shell.clamp(max=shells - 1)]
        none = torch.where(w > 1e-20, 1 / (0.001 * w.clamp(min=1e-300)), 0)
        prior = torch.where(t > 1e-20, 1 / (kappa * t.clamp(min=1e-300)), none)
        reg = torch.where(shell >= MIN_SHELL, w + prior, w)
        coverage = completeness(weight, tau2, pad)
    inside = radius <= m - 1
    last = int(floor_shell[inside].max())
    least = shell_means_of_planes(reg, pad, last + 1, floor=True)[:, floor_shell.clamp(max=last)] / 1000
    reg = torch.maximum(reg, least)
    return torch.where(inside & (reg > 0), data / reg.clamp(min=1e-300), 0), coverage


def flatten_planes(
    maps: Tensor, pixel_size: float, diameter: float, edge: float, mask: Tensor | None, mask2: Tensor | None = None
) -> Tensor:
    """Class averages (K, N, N) times a solvent mask (N, N), or a circle of the particle's diameter; mask2: a region set to its own mean."""
    box = maps.shape[-1]
    if mask is None:
        mask = soft_circle(box, diameter / (2 * pixel_size) if diameter > 0 else box / 2 - edge, edge)
    out = maps * mask.to(maps)
    if mask2 is not None:
        region = mask2.to(maps)
        mean = (maps * region).sum((-2, -1), keepdim=True) / region.sum().clamp(min=1e-12)
        out = out * (1 - region) + mean * region
    return out


def centre_offsets(maps: Tensor, reach: float, mask: Tensor) -> Tensor:
    """(K, 2) int64 xy: whole pixels that bring the centre of mass of each average (K, N, N) to pixel N/2, no farther than `reach` px.

    The mass is `standing_out`, times the mask (N, N) or (K, N, N) that holds the particle and keeps its neighbours out. Averages hold mass
    of both signs, so that the first moment of all values has no bound.
    """
    n, mask = maps.shape[-1], mask.to(device=maps.device, dtype=torch.float64)
    mass = standing_out(maps, mask) * mask
    line = torch.arange(n, device=maps.device, dtype=torch.float64) - n // 2
    total = mass.sum((-2, -1)).clamp(min=1e-300)
    centre = torch.stack([(mass.sum(-2) * line).sum(-1), (mass.sum(-1) * line).sum(-1)], -1) / total[:, None]
    length = centre.norm(dim=-1, keepdim=True)
    return shell_round(-centre * (reach / length.clamp(min=1e-12)).clamp(max=1)).long()


def standing_out(maps: Tensor, mask: Tensor) -> Tensor:
    """(K, N, N) float64 what of averages stands out of the solvent: their values above a tenth of the highest within the mask."""
    highest = (maps.double() * mask).amax((-2, -1), keepdim=True)
    return (maps.double() - 0.1 * highest).clamp(min=0)


def particle_circles(maps: Tensor, radius: float) -> Tensor:
    """(K, N, N) circles of `radius` px at pixel N/2 that hold the particle alone: smaller by up to a fifth where it has neighbours.

    The circle of a diameter given generously holds edges of neighbours, and an average that moves towards them shows more of them the next
    time. Neighbours are seen by the mass beyond the circle: its mean over that within, over CROWDED.
    """
    n = maps.shape[-1]
    r = radii(n, 2, maps.device)
    inside, beyond = (r < radius).double(), ((r >= radius) & (r <= n / 2)).double()
    mass = standing_out(maps, inside)
    mean = [(mass * part).sum((-2, -1)) / part.sum().clamp(min=1) for part in (inside, beyond)]
    crowd = (mean[1] / (CROWDED * mean[0]).clamp(min=1e-300)).clamp(max=1)
    return (r < radius * (1 - (1 - MIDDLE) * crowd[:, None, None])).double()


def moved(maps: Tensor, shift: Tensor) -> Tensor:
    """Averages (K, N, N) moved by whole pixels (K, 2) xy, zeros coming in."""
    return pre_shift_images(maps, shift)
