"""The M-step: from sums over particles to maps, spectra and priors (spec/refinement 3).

Everything about one half map happens on one pair of half volumes (B, W) at a time; what two halves must share (their low-resolution
terms, the averages the FSC needs) is small and is taken out first, so that a 400 px box refined to Nyquist needs one pair in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.maths.fourier import half_volume_radius, make_hermitian_, map_from_half_volume, shell_counts, shell_round, slabs
from frazil.maths.gridding import sinc2
from frazil.maths.masks import soft_sphere
from frazil.maths.symmetry import operators
from frazil.ops.symmetrise import symmetrise
from frazil.refine.model import Model, Statistics

EDGE_PX = 3.0  # soft edge of the sphere of radius N/2 a reconstruction is cut to (spec 3.4)
MIN_SHELL = 5  # shells below are never regularised, and no resolution is below (minres_map)


def prepare_sums_(data: Tensor, weight: Tensor, group: str, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Hermitian plane x = 0 (in place), then the sum over the point group (spec 3.2, this order); of C1 of several half volumes too."""
    data, weight = make_hermitian_(data), make_hermitian_(weight)
    ops = operators(group)
    if len(ops) == 1:
        return data, weight
    return symmetrise(data, weight, ops.to(weight), implementation=implementation)


def shell_means(value: Tensor, pad: float, shells: int, *, floor: bool = False, strict: bool = False) -> Tensor:
    """(…, shells) float64 means of half volumes (…, 2M+1, 2M+1, M+1) over shells round(|p|/P) (or floor) within their sphere.

    Real values, or complex ones, of which |value|² is averaged; 0 where a shell is empty. strict: |p| below the sphere's radius only, as
    spec (3.2) has it; else up to it. Several volumes go through each slab of planes together.
    """
    m = value.shape[-1] - 1
    stack = value.reshape(-1, *value.shape[-3:])
    total = torch.zeros(len(stack), shells, dtype=torch.float64, device=value.device)
    count = total.new_zeros(1, shells)
    for part, radius in slabs(m, value.device, most=max(1, (1 << 24) // len(stack))):
        inside = radius < m - 1 if strict else radius <= m - 1
        shell = ((radius / pad) if floor else (radius / pad + 0.5)).long()
        shell = torch.where(inside & (shell < shells), shell, shells)
        some = stack[:, part]
        total += by_shell(shell, some.real.square() + some.imag.square() if some.is_complex() else some, shells)
        count += by_shell(shell, torch.ones_like(shell)[None], shells)
    return torch.where(count > 0, total / count.clamp(min=1), 0).cpu().reshape(*value.shape[:-3], shells)


def by_shell(shell: Tensor, values: Tensor, shells: int) -> Tensor:
    """(k, shells) float64 sums of `values` (k, …) over the elements of each shell (…) below `shells`; numbers beyond: shells."""
    shell, values = shell.reshape(-1), values.reshape(len(values), -1)
    if shell.is_cuda:
        return _by_shell_at_once(shell, values, shells)
    return torch.stack([torch.bincount(shell, v.double(), minlength=shells + 1)[:shells] for v in values])


def _by_shell_at_once(shell: Tensor, values: Tensor, shells: int) -> Tensor:
    """`by_shell` of flat shells (n,) and values (k, n) as one histogram: on a GPU each makes the host wait."""
    k = len(values)
    of_class = shell + torch.arange(k, device=shell.device)[:, None] * (shells + 1)
    sums = torch.bincount(of_class.reshape(-1), values.double().reshape(-1), minlength=k * (shells + 1))
    return sums.view(k, shells + 1)[:, :shells]


def map_variance(weight: Tensor, pad: float, box: int) -> Tensor:
    """(…, N/2+1) float64 σ²_ref(r) = 1 / mean(κ W), κ = P³, of weights (…, 2M+1, 2M+1, M+1); 0 where there is no weight (3.2)."""
    mean = shell_means(weight, pad, box // 2 + 1, strict=True) * pad**3
    return torch.where(mean > 0, 1 / mean.clamp(min=1e-300), 0)


def averages(data: Tensor, weight: Tensor, pad: float) -> Tensor:
    """(2R+1, 2R+1, R+1) complex F = ΣB/ΣW of the padded voxels nearest to each voxel of the unpadded grid (spec 3.7)."""
    m = data.shape[-1] - 1
    r = int((m - 1) / pad + 0.5)
    axis = shell_round(torch.arange(-m, m + 1, dtype=torch.float64, device=data.device) / pad).long().clamp(-r, r) + r
    axis_x = shell_round(torch.arange(0, m + 1, dtype=torch.float64, device=data.device) / pad).long().clamp(0, r)
    side = 2 * r + 1
    top = torch.zeros(side * side * (r + 1), dtype=torch.complex128, device=data.device)
    bottom = torch.zeros(len(top), dtype=torch.float64, device=data.device)
    for part, radius in slabs(m, data.device, most=1 << 22):
        target = ((axis[part, None, None] * side + axis[None, :, None]) * (r + 1) + axis_x).expand_as(radius).reshape(-1)
        top.index_add_(0, target, data[part].reshape(-1).to(torch.complex128))
        bottom.index_add_(0, target, weight[part].reshape(-1).double())
    return torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0).reshape(side, side, r + 1)


def fsc_of_averages(a: Tensor, b: Tensor, box: int) -> Tensor:
    """(N/2+1,) float64 FSC of two downsampled averages; FSC(0) = 1, zero beyond what they hold."""
    r = a.shape[-1] - 1
    radii = torch.cat([radius for _, radius in slabs(r, a.device)])
    # The last shell ends at the window's edge: the little that splatting put beyond is not independent data.
    shell, inside = shell_round(radii).long(), radii <= min(r, box // 2)
    sums = torch.zeros(3, box // 2 + 1, dtype=torch.float64, device=a.device)
    for i, v in enumerate(((a * b.conj()).real, a.abs().square(), b.abs().square())):
        sums[i].index_add_(0, shell[inside], v[inside])
    curve = torch.where((sums[1] > 0) & (sums[2] > 0), sums[0] / (sums[1] * sums[2]).clamp(min=1e-300).sqrt(), 0)
    curve[0] = 1.0
    return curve.cpu()


def low_resolution_part(data: Tensor, weight: Tensor, pad: float, shell: int) -> tuple[Tensor, Tensor]:
    """Copies of the block |components| ≤ P·shell of (B, W): what the halves are to share."""
    m, reach = data.shape[-1] - 1, min(data.shape[-1] - 1, half_volume_radius(pad, shell))
    cut = (slice(m - reach, m + reach + 1),) * 2 + (slice(0, reach + 1),)
    return data[cut].clone(), weight[cut].clone()


def join_low_resolution_(
    data: Tensor, weight: Tensor, mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], pad: float, shell: int
) -> None:
    """Replace (B, W) for |k| ≤ shell by the mean of both halves' (spec 3.6.3), in place."""
    m, reach = data.shape[-1] - 1, mine[0].shape[-1] - 1
    cut = (slice(m - reach, m + reach + 1),) * 2 + (slice(0, reach + 1),)
    low = torch.cat([radius for _, radius in slabs(reach, data.device)]) <= pad * shell
    data[cut] = torch.where(low, 0.5 * (mine[0] + other[0]), data[cut])
    weight[cut] = torch.where(low, 0.5 * (mine[1] + other[1]), weight[cut])


@dataclass(frozen=True)
class Spectra:
    """Signal and noise of a reconstruction by shell, (N/2+1,) float64 each."""

    tau2: Tensor
    data_vs_prior: Tensor
    sigma2_map: Tensor
    coverage: Tensor


def gold_standard_spectra(fsc: Tensor, sigma2_map: Tensor, tau_fudge: float, joined: bool) -> tuple[Tensor, Tensor]:
    """(τ², SSNR) of a half map (or the joined map) from the FSC of the halves (spec 3.3b; T enters once, see CONVENTIONS)."""
    f = fsc.clamp(0.001, 0.999)
    if joined:
        f = (2 * f / (1 + f)).sqrt().clamp(max=0.999)
    ssnr = tau_fudge * f / (1 - f)
    return ssnr * sigma2_map, ssnr


def wiener_(data: Tensor, weight: Tensor, tau2: Tensor | None, pad: float, box: int) -> Tensor:
    """Coverage of half volumes whose `data` become B / W_reg inside the sphere (3.3), direct division; tau2 None: no regularisation.

    data, weight (…, 2M+1, 2M+1, M+1), tau2 (…, N/2+1). coverage (…, N/2+1) is the fraction of voxels a shell with κ τ² W ≥ 1.
    """
    m, kappa, shells = data.shape[-1] - 1, pad**3, box // 2 + 1
    stack, weights = data.view(-1, *data.shape[-3:]), weight.view(-1, *weight.shape[-3:])
    k, at = len(stack), data.device
    table = None if tau2 is None else tau2.to(device=at, dtype=torch.float64).reshape(k, -1)
    floor_sum = torch.zeros(k, shells + 1, dtype=torch.float64, device=at)
    floor_count, hits, count = floor_sum.new_zeros(1, shells + 1), floor_sum.new_zeros(k, shells), floor_sum.new_zeros(1, shells)
    most = max(1, (1 << 22) // k)

    def regularised(part: slice, radius: Tensor) -> Tensor:
        w = weights[:, part].double()
        if table is None:
            return w
        shell = (radius / pad + 0.5).long().clamp(max=shells - 1)
        t = table[:, shell]
        none = torch.where(w > 1e-20, 1 / (0.001 * w.clamp(min=1e-300)), 0)
        prior = torch.where(t > 1e-20, 1 / (kappa * t.clamp(min=1e-300)), none)
        return torch.where(shell >= MIN_SHELL, w + prior, w)

    for part, radius in slabs(m, at, most=most):
        inside = radius <= m - 1
        reg = regularised(part, radius)
        floor_shell = torch.where(inside, (radius / pad).long().clamp(max=shells), shells + 1)
        floor_sum += by_shell(floor_shell, reg, shells + 1)
        floor_count += by_shell(floor_shell, torch.ones_like(radius)[None], shells + 1)
        if table is not None:
            shell = torch.where(inside, (radius / pad + 0.5).long().clamp(max=shells), shells)
            hit = kappa * table[:, shell.clamp(max=shells - 1)] * weights[:, part].double() >= 1
            hits += by_shell(shell, hit, shells)
            count += by_shell(shell, torch.ones_like(radius)[None], shells)
    least = torch.where(floor_count > 0, floor_sum / floor_count.clamp(min=1), 0) / 1000
    for part, radius in slabs(m, at, most=most):
        reg = regularised(part, radius)
        reg = torch.maximum(reg, least[:, (radius / pad).long().clamp(max=shells)])
        good = (radius < m - 1 + 1e-9) & (reg > 0)
        stack[:, part] = torch.where(good, stack[:, part] / reg.clamp(min=1e-300), 0)
    return (hits / count.clamp(min=1)).cpu().reshape(*data.shape[:-3], shells)


@dataclass(frozen=True)
class Finish:
    """What every map of a box is cut and divided by at the end: made once for all classes."""

    sphere: Tensor  # (N, N, N) 1 inside N/2, cosine edge to 0
    outside: Tensor  # sum of 1 − sphere
    correction: Tensor  # (N, N, N) sinc² of the interpolation


def make_finish(box: int, pad: float, device: torch.device | str, dtype: torch.dtype) -> Finish:
    """The soft sphere and the interpolation's sinc² of a box (spec 3.4)."""
    sphere = soft_sphere(box, box / 2, EDGE_PX, device, dtype)
    return Finish(sphere, (1 - sphere).sum().clamp(min=1e-12), sinc2(box, pad, device=device, dtype=dtype))


def reconstruct(
    data: Tensor, weight: Tensor, tau2: Tensor | None, pad: float, box: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(map (N, N, N), coverage) of a half volume's sums, of which `data` is used up: division, transform, soft sphere (spec 3.4)."""
    coverage = wiener_(data, weight, tau2, pad, box)
    return finished_map(data, pad, box, dtype), coverage


def finished_map(volume: Tensor, pad: float, box: int, dtype: torch.dtype, finish: Finish | None = None) -> Tensor:
    """(N, N, N) map of a half volume: transform, soft sphere, interpolation's sinc² (spec 3.4).

    Outside the sphere comes the mean of what was there. `finish`: made before, for several maps on one device.
    """
    density = map_from_half_volume(volume, pad, box).to(dtype)
    finish = finish or make_finish(box, pad, density.device, dtype)
    fill = (density.sum() - density.reshape(-1) @ finish.sphere.reshape(-1)) / finish.outside
    return torch.lerp(fill, density, finish.sphere) / finish.correction


def solvent_sphere(like: Tensor, pixel_size: float, diameter: float, edge: float) -> Tensor:
    """(N, N, N) soft sphere of the particle's diameter (≤ 0: the box less the edge), of the type and on the device of a map."""
    box = like.shape[-1]
    return soft_sphere(box, diameter / (2 * pixel_size) if diameter > 0 else box / 2 - edge, edge, like.device, like.dtype)


def flatten_solvent(
    density: Tensor, pixel_size: float, diameter: float, edge: float, mask: Tensor | None, mask2: Tensor | None = None
) -> Tensor:
    """Map times its solvent mask (given, or a sphere of the particle's diameter), spec 3.6.10; mask2: a region set to its own mean."""
    if mask is None:
        mask = solvent_sphere(density, pixel_size, diameter, edge)
    out = density * mask.to(density)
    if mask2 is not None:
        m2 = mask2.to(density)
        out = out * (1 - m2) + m2 * (density * m2).sum() / m2.sum().clamp(min=1e-12)
    return out


def update_noise(statistics: Statistics, old: Model, boxes: list[int]) -> tuple[Tensor, ...]:
    """σ² of every optics group from the residual power (spec 3.8); a group without particles keeps its old spectrum."""
    out = []
    for total, weight, before, box in zip(statistics.sigma2, statistics.sigma2_weight, old.sigma2, boxes, strict=True):
        if weight <= 0:
            out.append(before)
            continue
        s = total / (2 * weight * shell_counts(box))
        for r in range(len(s)):
            if s[r] < 1e-14:
                s[r] = s[r - 1] if r else s[s >= 1e-14][0]
        out.append(s)
    return tuple(out)


def update_scales(statistics: Statistics, old: Model, particles_per_micrograph: Tensor) -> Tensor:
    """s_m, clamped around the median, divided by the particle-weighted mean (spec 1.6); unchanged with one micrograph."""
    present = particles_per_micrograph > 0
    if int(present.sum()) < 2:
        return old.scales
    s = torch.where(statistics.scale_power > 0, statistics.scale_cross / statistics.scale_power.clamp(min=1e-300), 1.0)
    ordered = s[present].sort().values
    median = float(ordered[len(ordered) // 2])
    s = torch.where(present, s.clamp(median / 5, 5 * median), old.scales)
    mean = float((s * particles_per_micrograph)[present].sum() / particles_per_micrograph.sum())
    return torch.where(present, s / mean, old.scales)


def class_offsets(model: Model, statistics: Statistics) -> Tensor | None:
    """(K, 2) mean offset of every class in Å where the model has such (2D), by the class's own weight; an empty class keeps its old one."""
    if model.prior_offset is None:
        return None
    share = statistics.direction.sum(1)[:, None]
    return torch.where(share > 0, statistics.offset_sum / share.clamp(min=1e-300), model.prior_offset)


def update_parameters(
    model: Model, statistics: Statistics, boxes: list[int], per_micrograph: Tensor, *, cc: bool, norm: bool, scale: bool
) -> Model:
    """The model with noise, scales, norm, offset and direction priors of the E-step (spec 3.8); maps and spectra are left."""
    total = statistics.direction.sum()
    return replace(
        model,
        sigma2=model.sigma2 if cc else update_noise(statistics, model, boxes),
        scales=update_scales(statistics, model, per_micrograph) if scale and not cc else model.scales,
        norm_average=statistics.norm / statistics.particles if norm else model.norm_average,
        sigma_offset=max(statistics.offset2 / (2 * float(total)), 2.0) ** 0.5,
        pdf_class=statistics.direction.sum(1) / total,
        pdf_direction=statistics.direction / total,
        prior_offset=class_offsets(model, statistics),
        ave_pmax=statistics.pmax / float(total),
        log_likelihood=statistics.log_likelihood,
    )
