"""Discrete Fourier transforms in RELION's normalisation (spec/refinement 1.1), pixel lists and padded volumes.

Images:   X(k) = (1/N²) Σ_x x(x) exp(−2πi k·(x − N/2)/N);  the origin of a box is pixel N/2.
Volumes:  V(p) = (1/N²) Σ_x v(x) exp(−2πi p·(x − N/2)/(P N)), p on the grid of the box padded P times: a central slice of V
          is the transform of the projection Σ_z v.
A *half volume* is stored centred: shape (2M+1, 2M+1, M+1) with M = round(P r_max) + 1, element [z+M, y+M, x] holds p = (x, y, z),
x ≥ 0, zero for |p| > M − 1. That is what ops.project and ops.insert work on.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

PRODUCT = 1 << 25  # elements of a chunk of a transform by products


def shell_round(x: Tensor) -> Tensor:
    """Nearest integer, halves away from zero (torch.round goes to even: wrong for shells and pre-shifts)."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def round_half_away(x: float) -> int:
    """Nearest integer of a float, halves away from zero."""
    return int(abs(x) + 0.5) * (1 if x >= 0 else -1)


def resolution_shell(box: int, pixel_size: float, resolution: float) -> int:
    """Shell index of a resolution in Å: round(N a / d)."""
    return round_half_away(box * pixel_size / resolution)


def image_ft(images: Tensor) -> Tensor:
    """(…, N, N//2+1) centred transform of (…, N, N) images, divided by N²; ky in FFT order."""
    return torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1))) / images.shape[-1] ** 2


def image_from_ft(ft: Tensor, box: int) -> Tensor:
    """(…, N, N) images of their centred transform: the inverse of image_ft."""
    return torch.fft.fftshift(torch.fft.irfft2(ft, s=(box, box)), dim=(-2, -1)) * box**2


@dataclass(frozen=True)
class PixelList:
    """The independent pixels of a half transform inside a window, by increasing |k|; pixel 0 is DC.

    The first `inside` have |k| ≤ size/2 exactly: slices live there. The rest belong to shell size/2 with |k| > size/2.
    Rule (spec 1.1): kx = 0 only with ky ≥ 0, each stored pixel once, round(|k|) ≤ size/2; ky in (−size/2, size/2] below
    Nyquist, as in a window of that size.
    """

    box: int  # side N of the image
    size: int  # side of the window
    kx: Tensor  # (p,) int64
    ky: Tensor  # (p,) int64
    shell: Tensor  # (p,) int64, round(|k|)
    index: Tensor  # (p,) int64, into the flattened (N, N//2+1) transform
    inside: int

    def count_inside(self, size: int) -> int:
        """How many leading pixels have |k| ≤ size/2: a smaller window is a prefix of the list."""
        k2 = self.kx[: self.inside] ** 2 + self.ky[: self.inside] ** 2
        return int((k2 * 4 <= size**2).sum())

    def k(self) -> Tensor:
        """(p, 2) float64 xy, cycles per box."""
        return torch.stack([self.kx, self.ky], -1).double()


def pixel_list(box: int, size: int, device: torch.device | str = "cpu") -> PixelList:
    """The pixels of a window of side `size` ≤ box (both even) of a half transform of side `box`. Not to be written to: it is kept."""
    kept = _pixel_list(box, size)
    if torch.device(device).type == "cpu":
        return kept
    return replace(kept, **{name: getattr(kept, name).to(device) for name in ("kx", "ky", "shell", "index")})


@lru_cache(maxsize=8)
def _pixel_list(box: int, size: int) -> PixelList:
    half = size // 2
    kx = torch.arange(0, half + 1)
    ky = torch.arange(-half + 1, half + 1)
    ky, kx = (g.reshape(-1) for g in torch.meshgrid(ky, kx, indexing="ij"))
    k2 = kx**2 + ky**2
    shell = shell_round(k2.double().sqrt()).long()
    keep = (shell <= half) & ~((kx == 0) & (ky < 0))
    kx, ky, k2, shell = kx[keep], ky[keep], k2[keep], shell[keep]
    order = torch.argsort(k2, stable=True)
    kx, ky, k2, shell = kx[order], ky[order], k2[order], shell[order]
    index = (ky % box) * (box // 2 + 1) + kx
    return PixelList(box, size, kx, ky, shell, index, inside=int((k2 * 4 <= size**2).sum()))


def full_half_plane(box: int) -> tuple[Tensor, Tensor]:
    """(index, shell) of every half-plane pixel with round(|k|) ≤ N/2 of the whole transform (ky in (−N/2, N/2])."""
    pixels = pixel_list(box, box)
    return pixels.index, pixels.shell


def shell_counts(box: int) -> Tensor:
    """(N/2+1,) float64: number of half-plane pixels a shell, Npix(r) of spec 1.1."""
    return torch.bincount(full_half_plane(box)[1], minlength=box // 2 + 1).double()


def half_volume_radius(pad: float, r_max: int) -> int:
    """M of a half volume that reaches shell r_max at padding `pad`: round(P r_max) + 1."""
    return round_half_away(pad * r_max) + 1


def slabs(m: int, device: torch.device | str = "cpu", most: int = 1 << 24) -> Iterator[tuple[slice, Tensor]]:
    """Slabs of z planes of a half volume: (slice of axis 0, (dz, 2M+1, M+1) float64 |p|), at most about `most` elements each.

    Shell sums and spherical masks go through this, so that a box of 400 px padded to 800 needs no second volume of indices.
    """
    c = torch.arange(-m, m + 1, device=device, dtype=torch.float64)
    x = torch.arange(0, m + 1, device=device, dtype=torch.float64)
    plane2 = c[:, None] ** 2 + x[None, :] ** 2
    thick = max(1, most // plane2.numel())
    for start in range(0, 2 * m + 1, thick):
        part = slice(start, min(start + thick, 2 * m + 1))
        yield part, torch.sqrt(c[part, None, None] ** 2 + plane2)


def half_volume_radii(m: int, device: torch.device | str = "cpu") -> Tensor:
    """(2M+1, 2M+1, M+1) float64 |p| of every element of a half volume, whole: see `slabs` for large ones."""
    return torch.cat([radius for _, radius in slabs(m, device)])


def transform_axis(data: Tensor, dim: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """`transform` (which works along `dim` of what it is given) applied in chunks of another axis, to bound its workspace."""
    other = 1 if dim == 0 else 0
    chunks = max(1, data.numel() // (1 << 23))
    if chunks == 1:
        return transform(data)
    pieces = data.chunk(chunks, dim=other)
    first = transform(pieces[0])
    shape = list(first.shape)
    shape[other] = data.shape[other]
    out = first.new_empty(shape)
    start = 0
    for piece in pieces:
        out.narrow(other, start, piece.shape[other]).copy_(transform(piece))
        start += piece.shape[other]
    return out


def padded_ft(volume: Tensor, pad: float, r_max: int) -> Tensor:
    """Half volume (see module docstring) of a map (N, N, N) zero-padded P times, up to shell r_max.

    Each axis is transformed on its own and cropped at once, so that a low r_max costs little and nothing of side P·N cubed is held:
    by FFTs of the padded axis on a CPU, as a product with the few waves that are wanted on a GPU, where that is faster at any size.
    """
    n = volume.shape[-1]
    big, m = round_half_away(pad * n), half_volume_radius(pad, r_max)
    if volume.is_cuda:
        return _inside_sphere_(_padded_by_products(volume / n**2, big, m))
    take = torch.arange(-m, m + 1, device=volume.device) % big
    # Beyond Nyquist of the padded grid (only the border at full size) any value will do: the sphere below removes it.
    take_x = torch.arange(0, m + 1, device=volume.device).clamp(max=big // 2)

    def along(data: Tensor, dim: int) -> Tensor:
        """Transform of one axis, placed so that the box centre is the origin, elements −M…M (x: 0…M)."""
        shape = list(data.shape)
        shape[dim] = big
        padded = data.new_zeros(shape)
        padded.narrow(dim, 0, n - n // 2).copy_(data.narrow(dim, n // 2, n - n // 2))
        padded.narrow(dim, big - n // 2, n // 2).copy_(data.narrow(dim, 0, n // 2))
        if data.is_complex():
            return torch.fft.fft(padded, dim=dim).index_select(dim, take)
        return torch.fft.rfft(padded, dim=dim).index_select(dim, take_x)

    ft = volume / n**2
    for dim in (2, 1, 0):
        ft = transform_axis(ft, dim, lambda part, d=dim: along(part, d))
    return _inside_sphere_(ft)


def _inside_sphere_(half: Tensor) -> Tensor:
    """A half volume with zeros where |p| > M − 1, in place."""
    m = half.shape[-1] - 1
    for part, radius in slabs(m, half.device):
        half[part] *= radius <= m - 1
    return half


def _waves(frequencies: Tensor, box: int, big: int, like: Tensor) -> Tensor:
    """(box, k) complex exp(−2πi p (x − N/2)/(P N)), computed in double precision."""
    position = torch.arange(box, dtype=torch.float64, device=like.device) - box // 2
    angle = -2 * math.pi / big * position[:, None] * frequencies.to(position)
    return torch.polar(torch.ones_like(angle), angle).to(like.dtype if like.is_complex() else (like[:0] + 0j).dtype)


def _padded_by_products(volume: Tensor, big: int, m: int) -> Tensor:
    """(2M+1, 2M+1, M+1) transform of (N, N, N) as three products with waves, the axis in work last."""
    n = volume.shape[-1]
    both, positive = torch.arange(-m, m + 1, device=volume.device), torch.arange(m + 1, device=volume.device)
    right = torch.view_as_real(_waves(positive, n, big, volume)).reshape(n, -1).to(volume.dtype)  # (x, [re, im] of each kx)
    ft = torch.view_as_complex((volume.reshape(n * n, n) @ right).view(n, n, m + 1, 2))  # (z, y, kx)
    wave = _waves(both, n, big, ft)
    ft = ft.transpose(1, 2) @ wave  # (z, kx, ky)
    out = ft.new_empty(2 * m + 1, 2 * m + 1, m + 1)
    for part in torch.arange(m + 1).split(max(1, PRODUCT // (2 * m + 1) ** 2)):
        x = slice(int(part[0]), int(part[-1]) + 1)
        out[:, :, x] = (wave.T @ ft[:, x].reshape(n, -1)).view(2 * m + 1, len(part), 2 * m + 1).transpose(1, 2)
    return out


def _cropped_by_products(half: Tensor, big: int, box: int, scale: float) -> Tensor:
    """(N, N, N) inverse of `_padded_by_products`, times `scale`: ±P N/2 are one frequency of the padded grid, the rest is left out."""
    m = half.shape[-1] - 1
    both, positive = torch.arange(-m, m + 1, device=half.device), torch.arange(m + 1, device=half.device)
    share = torch.where(2 * both.abs() < big, 1.0, torch.where(2 * both.abs() == big, 0.5, 0.0)).to(half.real.dtype)
    wave = _waves(both, box, big, half).conj() * share  # (z, kz)
    twice = torch.where(2 * positive < big, 2.0, torch.where(2 * positive == big, 1.0, 0.0)).to(half.real.dtype) * scale
    twice[0].fill_(scale)  # an assignment would make the host wait for the GPU
    right = torch.view_as_real(_waves(positive, box, big, half) * twice).permute(1, 2, 0).reshape(-1, box)  # Re(f conj(w)) = re·re + im·im
    out = half.real.new_empty(box, box, box)
    for z in torch.arange(box).split(max(1, PRODUCT // half[0].numel())):
        some = slice(int(z[0]), int(z[-1]) + 1)
        part = (wave[some] @ half.reshape(2 * m + 1, -1)).view(-1, 2 * m + 1, m + 1)  # (z, ky, kx)
        part = (part.transpose(1, 2) @ wave.T).transpose(1, 2).contiguous()  # (z, y, kx)
        torch.mm(torch.view_as_real(part).reshape(len(z) * box, -1), right, out=out[some].view(-1, box))
    return out


def map_from_half_volume(half: Tensor, pad: float, box: int) -> Tensor:
    """(N, N, N) map of a half volume: inverse of padded_ft, cropped to the box. Axis by axis, cropping at once."""
    m = half.shape[-1] - 1
    big = round_half_away(pad * box)
    if half.is_cuda:
        return _cropped_by_products(half, big, box, box**2 / big**3)
    keep = torch.arange(-(box // 2), box - box // 2, device=half.device) % big
    reach = min(m, (big - 1) // 2)
    width = big // 2 + 1

    def along(data: Tensor, dim: int) -> Tensor:
        shape = list(data.shape)
        shape[dim] = big
        full = data.new_zeros(shape)
        full.narrow(dim, 0, reach + 1).copy_(data.narrow(dim, m, reach + 1))
        full.narrow(dim, big - reach, reach).copy_(data.narrow(dim, m - reach, reach))
        if m > reach:  # p = −P N/2 and +P N/2 are one frequency of the padded grid
            both = data.narrow(dim, m - reach - 1, 1) + data.narrow(dim, m + reach + 1, 1)
            full.narrow(dim, reach + 1, 1).copy_(both).mul_(0.5)
        return torch.fft.ifft(full, dim=dim).index_select(dim, keep)

    def along_x(data: Tensor) -> Tensor:
        full = data.new_zeros(*data.shape[:2], width)
        full[..., : min(m + 1, width)] = data[..., : min(m + 1, width)]
        return torch.fft.irfft(full, n=big, dim=2).index_select(2, keep)

    part = transform_axis(half, 0, lambda d: along(d, 0))
    part = transform_axis(part, 1, lambda d: along(d, 1))
    return transform_axis(part, 2, along_x) * box**2


def make_hermitian_(data: Tensor) -> Tensor:
    """Replace the x = 0 plane of half volumes (…, z, y, x) by f(y, z) + conj f(−y, −z) (spec 3.1), in place; also weights. Returns them.

    The origin is its own mate and stays as it is.
    """
    m = data.shape[-1] - 1
    origin = data[..., m, m, 0].clone()
    mate = data[..., 0].flip(-2, -1)
    data[..., 0] += mate.conj() if data.is_complex() else mate
    data[..., m, m, 0] = origin
    return data


def make_hermitian(data: Tensor) -> Tensor:
    """A copy of a half volume with a Hermitian plane x = 0, see make_hermitian_."""
    return make_hermitian_(data.clone())


def fourier_resample(data: Tensor, size: int, *, dims: int | None = None) -> Tensor:
    """Map (N, N, N) or image(s) (…, N, N) resampled to side `size` by cropping or padding the centred transform; values keep their scale.

    The Nyquist plane of the smaller size is dropped, so that the result is real and free of aliasing. dims: 3 for a map, 2 for
    images; by default what looks like a cube is a map, so a stack that may hold N images of side N must say dims=2.
    """
    n = data.shape[-1]
    if size == n:
        return data.clone()
    if dims is None:
        dims = 3 if data.ndim == 3 and data.shape[0] == n else 2
    axes = tuple(range(-dims, 0))
    ft = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(data, dim=axes), dim=axes), dim=axes)
    small = min(n, size)
    keep = slice(1, small) if small % 2 == 0 else slice(0, small)  # without −Nyquist
    shape = list(data.shape)
    for d in axes:
        shape[d] = size
    out = ft.new_zeros(shape)
    for_in = [slice(None)] * data.ndim
    for_out = [slice(None)] * data.ndim
    for d in axes:
        lo_in, lo_out = n // 2 - small // 2, size // 2 - small // 2
        for_in[d] = slice(lo_in + keep.start, lo_in + keep.stop)
        for_out[d] = slice(lo_out + keep.start, lo_out + keep.stop)
    out[tuple(for_out)] = ft[tuple(for_in)]
    back = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(out, dim=axes), dim=axes).real, dim=axes)
    return back * (size / n) ** dims
