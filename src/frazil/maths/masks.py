"""Soft circular and spherical masks (spec/refinement 2.4, 3.4, 3.6): 1 for r < R, raised cosine down to 0 at r = R + w.

    weight(r) = ½ − ½ cos(π (R + w − r)/w)    for R ≤ r ≤ R + w,    r from pixel N/2 of every axis
"""
from __future__ import annotations

import math

import torch
from torch import Tensor


def radii(box: int, ndim: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, …, N) with `ndim` axes: distance in pixels from the centre N/2."""
    line = (torch.arange(box, device=device, dtype=dtype) - box // 2).square()
    total = line
    for _ in range(ndim - 1):
        total = total[..., None] + line
    return total.sqrt()


def soft_edge(r: Tensor, radius_px: float, edge_px: float) -> Tensor:
    """Weight of each distance r in pixels: 1 inside radius, 0 beyond radius + edge, raised cosine between."""
    if edge_px <= 0:
        return (r < radius_px).to(r.dtype)
    depth = ((radius_px + edge_px - r) / edge_px).clamp(0, 1)  # 1 at the radius, 0 at the outer end
    return 0.5 - 0.5 * torch.cos(math.pi * depth)


def soft_circle(
    box: int, radius_px: float, edge_px: float, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N, N) weights of a circle: 1 inside, raised cosine to 0 at radius + edge."""
    return soft_edge(radii(box, 2, device, dtype), radius_px, edge_px)


def soft_sphere(
    box: int, radius_px: float, edge_px: float, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N, N, N) weights of a sphere: 1 inside, raised cosine to 0 at radius + edge."""
    # Some planes at a time: a box of 400 px would take five times the mask's memory at once.
    line = (torch.arange(box, device=device, dtype=dtype) - box // 2).square()
    plane, out = line[:, None] + line, torch.empty(box, box, box, device=device, dtype=dtype)
    for rows in torch.arange(box).split(max(1, (1 << 23) // plane.numel())):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        out[part] = soft_edge((line[part, None, None] + plane).sqrt(), radius_px, edge_px)
    return out


def _filled(data: Tensor, weight: Tensor) -> Tensor:
    """data · weight + fill · (1 − weight), fill = mean of each item weighted by 1 − weight over the axes of `weight`."""
    outside = 1 - weight
    total = outside.sum()
    # As a product of a matrix and a vector: images are read once, and no copy of them is made.
    fill = (data.reshape(*data.shape[: -weight.ndim], -1) @ outside.reshape(-1)) / total.clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.lerp(fill.reshape(*fill.shape, *(1,) * weight.ndim), data, weight)


def mask_images(images: Tensor, radius_px: float, edge_px: float, noise: Tensor | None = None) -> Tensor:
    """(…, N, N) images masked by a soft circle (spec 2.4), new tensors of the same dtype.

    Outside is filled with each image's own mean of the outside (`--zero_mask`), or with the `noise` images (…, N, N) where given.
    """
    weight = soft_circle(images.shape[-1], radius_px, edge_px, images.device, images.dtype)
    if noise is not None:
        return torch.lerp(noise, images, weight)
    return _filled(images, weight)


def mask_volume(volume: Tensor, radius_px: float, edge_px: float) -> Tensor:
    """(N, N, N) map masked by a soft sphere, the outside filled with its own mean (spec 3.4)."""
    return _filled(volume, soft_sphere(volume.shape[-1], radius_px, edge_px, volume.device, volume.dtype))


def check_mask(mask: Tensor, name: str = "mask", box: int | None = None) -> str | None:
    """One clear line that says what is wrong with a mask (N, N, N), None if it can be used: finite values in [0, 1], not all 0."""
    if box is not None and tuple(mask.shape) != (box, box, box):
        shape = " x ".join(map(str, mask.shape))
        return f"{name}: box is {shape} px, the map's is {box}; resample the mask to the map's box and pixel size"
    bad = int((~torch.isfinite(mask)).sum())
    if bad:
        return f"{name}: {bad} voxels are NaN or infinite; make the mask again"
    low, high = float(mask.min()), float(mask.max())
    if low < -1e-5 or high > 1 + 1e-5:  # files in half precision or after resampling stray by a little
        return f"{name}: values run from {low:.4g} to {high:.4g}, expected 0 to 1; threshold the map and add a soft edge to make a mask"
    if high <= 0:
        return f"{name}: every voxel is 0, nothing would be left of the map"
    return None
