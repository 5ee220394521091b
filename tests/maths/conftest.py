"""Plain trilinear gather and splat on centred half volumes, written for these tests alone."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


class Trilinear:
    """The definitions of a slice and of its adjoint (architecture of a half volume: maths/fourier.py), corner by corner."""

    def corners(self, p: Tensor, m: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(flat index, weight) of the eight corners of positions p (n, 3) xyz with x ≥ 0."""
        low = p.floor()
        for bits in range(8):
            corner = low + torch.tensor([bits & 1, bits >> 1 & 1, bits >> 2 & 1])
            weight = (1 - (p - corner).abs()).prod(-1)
            x, y, z = corner.long().unbind(-1)
            yield ((z + m) * (2 * m + 1) + y + m) * (m + 1) + x.clamp(max=m), weight

    def positions(self, rotations: Tensor, k: Tensor, pad: float) -> tuple[Tensor, Tensor]:
        """P Rᵀ (kx, ky, 0) folded to x ≥ 0, and where it was folded."""
        p = pad * torch.einsum("nji,pj->npi", rotations[:, :2], k).reshape(-1, 3)
        folded = p[:, 0] < 0
        return torch.where(folded[:, None], -p, p), folded

    def gather(self, volume: Tensor, rotations: Tensor, k: Tensor, pad: float) -> Tensor:
        """(n, p) complex slices of a half volume at k (p, 2) xy cycles per box."""
        p, folded = self.positions(rotations, k, pad)
        total = sum(volume.reshape(-1)[index] * weight for index, weight in self.corners(p, volume.shape[-1] - 1))
        assert isinstance(total, Tensor)
        return torch.where(folded, total.conj(), total).reshape(len(rotations), -1)

    def splat(self, values: Tensor, rotations: Tensor, k: Tensor, pad: float, m: int) -> Tensor:
        """Half volume of radius m: values (n, p) complex spread on the eight neighbours."""
        p, folded = self.positions(rotations, k, pad)
        flat = torch.where(folded, values.reshape(-1).conj(), values.reshape(-1))
        out = torch.zeros((2 * m + 1) ** 2 * (m + 1), dtype=flat.dtype)
        for index, weight in self.corners(p, m):
            out.index_add_(0, index, flat * weight)
        return out.reshape(2 * m + 1, 2 * m + 1, m + 1)


@pytest.fixture
def trilinear() -> Trilinear:
    return Trilinear()


class Blobs:
    """A few Gaussian blobs in a box: the map, its projections' transforms, all in closed form."""

    def __init__(self, box: int, width: float, centres: Tensor, weights: Tensor) -> None:
        self.box, self.width, self.centres, self.weights = box, width, centres, weights  # px from the box centre, xyz

    def turned(self, rotation: Tensor) -> Blobs:
        """The same blobs with centres moved to R c."""
        return Blobs(self.box, self.width, self.centres @ rotation.T, self.weights)

    def map(self) -> Tensor:
        """(N, N, N) float64, z y x."""
        c = torch.arange(self.box, dtype=torch.float64) - self.box // 2
        grid = torch.stack(torch.meshgrid(c, c, c, indexing="ij")[::-1], -1)
        distance2 = (grid[..., None, :] - self.centres).square().sum(-1)
        return (torch.exp(-distance2 / (2 * self.width**2)) * self.weights).sum(-1)

    def slices(self, rotations: Tensor, k: Tensor) -> Tensor:
        """(n, p) transforms of the projections seen by the rotations at k (p, 2) xy cycles per box, in RELION's normalisation."""
        seen = torch.einsum("nij,cj->nci", rotations, self.centres)[..., :2]
        phase = torch.exp(-2j * torch.pi / self.box * torch.einsum("nci,pi->ncp", seen, k))
        envelope = (2 * torch.pi * self.width**2) ** 1.5 * torch.exp(-2 * torch.pi**2 * self.width**2 * k.square().sum(-1) / self.box**2)
        return (phase * self.weights[:, None]).sum(1) * envelope / self.box**2


@pytest.fixture
def blobs() -> Blobs:
    """Three blobs within a quarter of a 24 px box."""
    centres = torch.tensor([[4.0, 1.0, -2.0], [-3.0, 4.0, 1.0], [0.5, -2.0, 5.0]], dtype=torch.float64)
    return Blobs(24, 1.7, centres, torch.tensor([1.0, 0.6, -0.8], dtype=torch.float64))
