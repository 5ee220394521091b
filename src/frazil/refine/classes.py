"""The M-step of K maps without half sets: signal power, data against prior; models whose classes empty (spec/refinement 3.3a, 3.8).

    τ²_k(r) = ½ mean |V_k|²  of the reference the E-step used        SSNR_k(r) = mean κ T τ²_k W_k
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.refine.maximization import MIN_SHELL, finished_map, make_finish, map_variance, prepare_sums_, shell_means, wiener_
from frazil.refine.model import Model, Statistics
from frazil.refine.parallel import World
from frazil.refine.windows import Engine

BY_CLASS = ("maps", "pdf_class", "pdf_direction", "tau2", "data_vs_prior", "sigma2_map", "coverage", "prior_offset")


@dataclass(frozen=True)
class Reconstruction:
    """What the sums of an E-step give, class by class."""

    maps: Tensor  # (K, N, N, N) or (K, N, N), regularised, not masked
    data_vs_prior: Tensor  # (K, N/2+1) float64
    sigma2_map: Tensor  # (K, N/2+1) float64
    coverage: Tensor  # (K, N/2+1) float64


def reference_power(volumes: Tensor, box: int, pad: float) -> Tensor:
    """(K, N/2+1) float64 signal variance τ² of the half volumes (K, …) the E-step sees (spec 3.3a)."""
    return 0.5 * shell_means(volumes, pad, box // 2 + 1)


def first_data_vs_prior(tau2: Tensor, sigma2: Tensor, particles: Tensor) -> Tensor:
    """(K, N/2+1) SSNR to expect of `particles` (K,) images with noise σ²: N τ²/(2 r σ̄²), 0 at r = 0 (spec 3.3)."""
    r = torch.arange(tau2.shape[-1], dtype=torch.float64)
    return torch.where(r > 0, particles[:, None] * tau2 / (2 * r.clamp(min=1) * sigma2.mean()), 0)


def filtered_alike(tau2: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """((K, N/2+1) signal variances that filter every map as the class of a typical particle, their common T·τ²).

    A map is multiplied by κTτ²W/(1 + κTτ²W) when it is made. With its own W the largest of several maps that are alike is weakened least,
    resembles every particle most, and takes them all within a few iterations. τ²_k = τ²·W̃/W_k, where τ² and W̃ are means over the
    particles: Σ W_k τ²_k/Σ W_k, Σ W_k²/Σ W_k; w (K, N/2+1) are the shells' mean weights W_k.
    """
    w = w.to(tau2)
    total = w.sum(0).clamp(min=1e-300)
    common, typical = (w * tau2).sum(0) / total, w.square().sum(0) / total
    return torch.where(w > 0, common * typical / w.clamp(min=1e-300), tau2), common.expand(len(tau2), -1)


def reconstruct_classes(
    statistics: Statistics, tau2: Tensor, group: str, box: int, engine: Engine, place: str,
    *, alike: bool = False, world: World | None = None,
) -> Reconstruction:  # fmt: skip
    """Maps of all classes from their sums (used up) and T·τ² (K, N/2+1), the maps on the device `place`.

    alike: all are filtered with the mean of their filters. A class without weight becomes a map of zeros. world: each process makes
    its `World.own` classes and leaves the maps of the others zeros; the spectra are of all.
    """
    world = world or World()
    k, pad = len(tau2), engine.pad
    given = tau2
    if alike and k > 1:
        given, tau2 = filtered_alike(tau2, shell_means(statistics.weight, pad, tau2.shape[1]))
    maps = torch.zeros(k, box, box, box, dtype=engine.dtype, device=place)
    spectra, own = torch.zeros(3, k, box // 2 + 1, dtype=torch.float64), slice(world.rank, k, world.size)
    data, weight = statistics.data[own], statistics.weight[own]
    if len(data):
        if group == "C1":
            prepare_sums_(data, weight, group)
        else:  # a class at a time: the sums over the group are made beside it
            for d, w in zip(data, weight, strict=True):
                d[:], w[:] = prepare_sums_(d, w, group, engine.implementation)
        spectra[0, own] = data_vs_prior(weight, tau2[own], pad)
        spectra[1, own] = map_variance(weight, pad, box)
        spectra[2, own] = wiener_(data, weight, given[own], pad, box)
        finish = make_finish(box, pad, data.device, engine.dtype)
        for i, volume in zip(world.own(k), data, strict=True):
            maps[i] = finished_map(volume, pad, box, engine.dtype, finish)
    return Reconstruction(maps, *world.add_up_(spectra))


def data_vs_prior(weight: Tensor, tau2: Tensor, pad: float) -> Tensor:
    """(…, N/2+1) SSNR mean(κ T τ² W) of half volumes' weights (…, 2M+1, 2M+1, M+1); tau2 holds T·τ² (spec 3.3a)."""
    return shell_means(weight, pad, tau2.shape[-1]) * pad**3 * tau2


def class_shells(ssnr: Tensor) -> Tensor:
    """(K,) int64 resolution shell of each class: the one before the first with SSNR < 1, at least 5 (spec 3.9)."""
    below = ssnr[:, 1:] < 1
    first = torch.where(below.any(1), below.int().argmax(1), ssnr.shape[1] - 1)
    return first.clamp(min=MIN_SHELL)


def classes_of(model: Model, index: Tensor) -> Model:
    """The model of the classes `index` (k,) of it, in that order, one perhaps repeatedly; their priors are scaled to sum to 1."""
    if index.tolist() == list(range(model.classes)):
        return model
    some = {name: getattr(model, name)[index] for name in BY_CLASS if getattr(model, name, None) is not None}
    total = some["pdf_class"].sum()
    return replace(model, **{**some, "pdf_class": some["pdf_class"] / total, "pdf_direction": some["pdf_direction"] / total})


def spread(model: Model, index: Tensor, classes: int) -> Model:
    """The model of `classes` classes of which `index` are those given and the others empty: maps, spectra and priors 0."""
    if len(index) == classes:
        return model
    out = {}
    for name in BY_CLASS:
        if (value := getattr(model, name, None)) is not None:
            out[name] = value.new_zeros(classes, *value.shape[1:])
            out[name][index] = value
    return replace(model, **out)


def copied(model: Model, classes: int) -> Model:
    """The model of one class as so many equal ones, each with its part of the prior (spec 2.3)."""
    out = {name: value.expand(classes, *value.shape[1:]) for name in BY_CLASS if (value := getattr(model, name, None)) is not None}
    return replace(model, **{**out, "pdf_class": out["pdf_class"] / classes, "pdf_direction": out["pdf_direction"] / classes})
