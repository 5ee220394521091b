"""What the pipeline tests share: reconstruction from true poses in a few lines, FSC on a plain grid."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from frazil.data import Particles
from frazil.maths.ctf import ctf
from frazil.maths.fourier import half_volume_radius, image_ft, map_from_half_volume
from frazil.maths.gridding import sinc2
from frazil.maths.masks import soft_sphere
from frazil.ops.insert import insert_
from frazil.refine.maximization import prepare_sums_, wiener_
from frazil.refine.windows import Engine, make_frame
from frazil.simulate import ImageStacks, Phantom, PoseDifference, Simulated, density

PAD = 2.0


def sums_of_true_poses(
    images: ImageStacks, particles: Particles, made: Simulated, group: str = "C1", only: int | None = None
) -> tuple[Tensor, Tensor]:
    """(B, W) of images inserted at the poses of `particles`, noise spectra and scales being the true ones (1/(2N²) without noise).

    only: this optics group alone.
    """
    box, pixel_size = made.truth.data.shape[-1], made.truth.pixel_size
    m = half_volume_radius(PAD, box // 2)
    data = torch.zeros(2 * m + 1, 2 * m + 1, m + 1, dtype=torch.complex128)
    weight = torch.zeros(data.shape, dtype=torch.float64)
    for g, optics in enumerate(particles.optics):
        if only not in (None, g):
            continue
        frame = make_frame(optics, box, box, pixel_size, Engine(diameter=-1, dtype=torch.float64))
        sigma2 = made.sigma2[g] if made.sigma2[g].max() > 0 else torch.full_like(made.sigma2[g], 0.5 / optics.box**2)
        precision = 1 / sigma2[frame.pixels.shell[: frame.inside]]
        for index in torch.nonzero(particles.group == g)[:, 0].split(200):
            x = image_ft(images[index].double()).flatten(1)[:, frame.pixels.index[: frame.inside]]
            x = x * torch.exp(-2j * math.pi * (particles.shift[index] @ frame.k.T))
            about = (particles.defocus, particles.phase_shift, particles.b_factor, particles.ctf_scale)
            gain = ctf(frame.k, *(a[index] for a in about), optics)
            gain = gain * frame.amplitude * made.scale[particles.micrograph[index], None]
            insert_(data, weight, gain * precision * x, gain.square() * precision, particles.rotation[index], frame.coords, PAD)
    return prepare_sums_(data, weight, group)


def plain_map(data: Tensor, weight: Tensor, box: int, tau2: Tensor | None = None) -> Tensor:
    """(N, N, N) float64 B/W (regularised with tau2) without the soft sphere of a finished map."""
    volume = data.clone()
    wiener_(volume, weight, tau2, PAD, box)
    return map_from_half_volume(volume, PAD, box).double() / sinc2(box, PAD, dtype=torch.float64)


def true_pose_map(made: Simulated, particles: Particles | None = None, group: str = "C1") -> Tensor:
    """The unregularised map of all images at true poses (or at those of `particles`)."""
    return plain_map(*sums_of_true_poses(made.images, particles or made.particles, made, group), made.truth.data.shape[-1])


def shells(box: int) -> Tensor:
    """(N, N, N) int64 shell of each voxel of a centred transform."""
    line = torch.arange(box, dtype=torch.float64) - box // 2
    return (torch.sqrt(line[:, None, None] ** 2 + line[:, None] ** 2 + line**2) + 0.5).long()


def transform(volume: Tensor) -> Tensor:
    """(N, N, N) centred transform in the 2D normalisation, plainly, without a half array."""
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(volume.double()))) / volume.shape[-1] ** 2


def in_sphere(volume: Tensor) -> Tensor:
    """(N, N, N) the map without what lies beyond Nyquist in the corners of its transform, where no image reaches."""
    box = volume.shape[-1]
    ft = transform(volume) * (shells(box) < box // 2 + 1)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(ft))).real * box**2


def plain_fsc(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N/2+1,) FSC of two maps; written here again, so that frazil's own is not its own judge."""
    box = a.shape[-1]
    fa, fb = (transform(v * (1 if mask is None else mask)) for v in (a.double(), b.double()))
    shell = shells(box).flatten()

    def total(values: Tensor) -> Tensor:
        return torch.zeros(2 * box, dtype=torch.float64).index_add_(0, shell, values.flatten())[: box // 2 + 1]

    return total((fa * fb.conj()).real) / (total(fa.abs().square()) * total(fb.abs().square())).sqrt()


def sphere(box: int, radius: float = 0.42, edge: float = 0.06) -> Tensor:
    """(N, N, N) soft sphere; radius and edge as fractions of the box."""
    return soft_sphere(box, radius * box, edge * box).double()


def moved_truth(shape: Phantom, difference: PoseDifference, box: int, pixel_size: float) -> Tensor:
    """(N, N, N) the phantom where the refinement has put it, exactly."""
    return density(shape.moved(difference.rotation, difference.translation), box, pixel_size).data.double()
