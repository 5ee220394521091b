"""Before the first iteration: half sets and noise spectra (spec/refinement 2.2, 4.5)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.maths.fourier import image_ft, shell_round
from frazil.maths.masks import mask_images
from frazil.refine.windows import Engine, mask_radius, pre_shift_images

MOST_PARTICLES = 1000


def split_halves(particles: Particles, seed: int) -> Particles:
    """Particles with half sets: those they have, else a random split into two of equal size."""
    if len(particles) and bool((particles.half > 0).all()):
        return particles
    order = torch.randperm(len(particles), generator=torch.Generator().manual_seed(seed))
    half = torch.empty(len(particles), dtype=torch.int64)
    half[order] = torch.arange(len(particles)) % 2 + 1
    return replace(particles, half=half)


def stored_shells(box: int) -> Tensor:
    """(N, N//2+1) shell of every stored pixel of a half transform."""
    ky = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    kx = torch.arange(box // 2 + 1, dtype=torch.float64)
    return shell_round(torch.hypot(ky[:, None], kx[None])).long()


def initial_noise(images: Images, particles: Particles, model: tuple[int, float], engine: Engine) -> tuple[Tensor, ...]:
    """(N_g/2+1,) float64 noise variance of every optics group from up to 1000 of its particles.

    ½ (mean power − power of the mean image), shell means over every stored pixel; the mean image is over all groups with the
    first group's box and pixel size (others are compared with their own mean). Masked with zero fill as the E-step's are.
    """
    generator = torch.Generator().manual_seed(engine.seed)
    out: list[Tensor] = []
    for g, optics in enumerate(particles.optics):
        members = torch.nonzero(particles.group == g)[:, 0]
        if len(members) == 0:
            out.append(torch.full((optics.box // 2 + 1,), 0.5 / max(optics.box, 1) ** 2, dtype=torch.float64))
            continue
        members = members[torch.randperm(len(members), generator=generator)[:MOST_PARTICLES]].sort().values
        shells = stored_shells(optics.box)
        power = torch.zeros(shells.shape, dtype=torch.float64, device=engine.device)
        mean = torch.zeros(shells.shape, dtype=torch.complex128, device=engine.device)
        for index in members.split(max(1, (1 << 22) // optics.box**2)):
            x = images[index].to(engine.device).double()
            if engine.correct_norm:
                x = x * (particles.norm.mean() / particles.norm[index]).to(x)[:, None, None]
            x = pre_shift_images(x, shell_round(particles.shift[index] / optics.pixel_size))
            if engine.zero_mask:
                x = mask_images(x, mask_radius(optics, engine), engine.mask_edge)
            ft = image_ft(x)
            power += ft.abs().square().sum(0)
            mean += ft.sum(0)
        signal, power = (mean / len(members)).abs().square().cpu(), power.cpu()
        out.append(positive(0.5 * (shell_mean(power / len(members), shells) - shell_mean(signal, shells))))
    return tuple(out)


def shell_mean(values: Tensor, shells: Tensor) -> Tensor:
    """(N/2+1,) means of stored pixels by shell."""
    n = values.shape[0] // 2 + 1
    inside = shells < n
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, shells[inside], values[inside].double())
    return total / torch.bincount(shells[inside], minlength=n)


def positive(spectrum: Tensor) -> Tensor:
    """Non-positive entries take the shell before, leading ones the next positive one."""
    good = torch.nonzero(spectrum > 0)[:, 0]
    if len(good) == 0:
        raise ValueError("the noise spectrum has no positive shell: the images hold no noise")
    at = torch.searchsorted(good, torch.arange(len(spectrum)), right=True) - 1
    return spectrum[good[at.clamp(min=0)]]
