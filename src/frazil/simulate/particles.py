"""Particles of a phantom or a map: poses, CTF, shifts, micrographs, noise (spec/refinement 1.2).

    X(k) = s_m c(k) e^{iβ(k)} e^{+2πi k·o/(N a)} P(k) + noise

Every pixel of a transform is computed (Nyquist row and column are zero); the CTF wraps round the box as the image model says; noise
has variance 1 a pixel. Grey scale: the value of an image is the density summed along the ray in voxels of the *first* optics group's
pixel, the same physical function in every group. Hence X_g(k) = V(k/u_g)/u_g², u_g = (N_g a_g)/(N_1 a_1), V the transform of the map.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles, Volume
from frazil.maths.ctf import ctf, odd_phase
from frazil.maths.fourier import image_from_ft, padded_ft
from frazil.maths.gridding import sinc2
from frazil.maths.rotation import random_rotations
from frazil.ops.project import project
from frazil.simulate.phantom import Phantom, density, frequencies, project_phantom


@dataclass(frozen=True)
class Settings:
    """How particles are drawn. Lengths in Å, angles in degrees."""

    snr: float = 0.1  # variance of the noiseless images over variance of the noise, whole box; inf: no noise
    shift_sd: float = 5.0  # Å, standard deviation of either component of the shift
    defocus: tuple[float, float] = (8000.0, 20000.0)  # Å, range of the micrographs' mean defocus
    defocus_sd: float = 200.0  # Å, of particles within a micrograph
    astigmatism: float = 300.0  # Å, largest U − V of a micrograph
    per_micrograph: int = 50  # particles a micrograph
    scale_sd: float = 0.0  # relative standard deviation of the micrographs' scale s_m
    coloured: bool = False  # noise amplitude falls with k, as behind a camera and thick ice; else white
    preferred: float = 0.0  # fraction of views within about 20° of the x axis (0: uniform)
    seed: int = 1


@dataclass(frozen=True)
class ImageStacks:
    """Images by particle index where optics groups differ in box: one stack a group (data.Images)."""

    stacks: tuple[Tensor, ...]  # (n_g, N_g, N_g) float32 of each group
    group: Tensor  # (n,) int64
    place: Tensor  # (n,) int64, index into the group's stack

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, index: Tensor) -> Tensor:
        """(b, y, x) images at `index`, all of one optics group; ValueError where they are not."""
        groups = self.group[index].unique()
        if len(groups) != 1:
            raise ValueError(f"images of one optics group at a time, got groups {groups.tolist()}")
        return self.stacks[int(groups)][self.place[index]]


@dataclass(frozen=True)
class Simulated:
    """Images and everything that is true of them."""

    images: ImageStacks
    particles: Particles  # with true rotation, shift, defocus; half 0
    truth: Volume  # the map on the images' grey scale, box and pixel of optics group 1
    scale: Tensor  # (micrographs,) float64, s_m
    sigma2: tuple[Tensor, ...]  # (N_g/2+1,) float64 of each group: noise variance per component and shell (0 without noise)

    def single(self) -> Tensor:
        """(n, N, N) float32: all images as one tensor, where there is one optics group."""
        if len(self.images.stacks) != 1:
            raise ValueError("images of several optics groups do not fit one tensor")
        return self.images.stacks[0]


def project_volume(volume: Volume, rotation: Tensor, optics: Optics, padding: float = 2.0) -> Tensor:
    """(n, N, N//2+1) complex64 transforms of a map's projections by the engine's own slices (trilinear, sinc² pre-corrected).

    The grey scale is that of the module docstring with the map's pixel as the unit; frequencies above the map's Nyquist, and those
    beyond N/2 of the image, are zero.
    """
    box = volume.data.shape[-1]
    u = optics.box * optics.pixel_size / (box * volume.pixel_size)
    r_max = box // 2
    half = padded_ft(volume.data.double() / sinc2(box, padding, dtype=torch.float64), padding, r_max).to(torch.complex64)
    magnify = torch.tensor(optics.magnification, dtype=torch.float64).reshape(2, 2)
    k = frequencies(optics.box)
    scaled = (k @ magnify.T) / u
    inside = (scaled.square().sum(-1) <= (r_max * (1 - 1e-9)) ** 2) & (k.abs().amax(-1) < optics.box / 2)
    slices = project(half, rotation.float(), scaled[inside].float().contiguous(), padding)
    out = torch.zeros(len(rotation), *inside.shape, dtype=torch.complex64)
    out[:, inside] = slices.to(torch.complex64)
    return out / u**2


def simulate_particles(source: Phantom | Volume, n: int, optics: Sequence[Optics], settings: Settings | None = None) -> Simulated:
    """n particles of a phantom (exact projections) or of a map, in turn over the micrographs; each micrograph is of one optics group.

    The signal is scaled so that the mean variance of the noiseless images of group 1 over the whole box is `snr`; the noise has mean 0
    and variance 1 in every group. Without noise (snr = inf) the grey scale is that of the source. Images are float32, white on black
    (CTF(0) > 0). The same settings give the same particles on any machine of the same torch.
    """
    settings = settings or Settings()
    for group, item in enumerate(optics):
        if item.box < 8 or item.box % 2:
            raise BadInput(f"optics group {group + 1}: the box must be even and at least 8 px, got {item.box}")
    if n < 1 or not settings.snr > 0:
        raise BadInput(f"simulation needs at least one particle and an SNR above 0, got {n} and {settings.snr}")
    rng = torch.Generator().manual_seed(settings.seed)
    particles, scale = draw_particles(n, tuple(optics), settings, rng)
    first = optics[0]
    if isinstance(source, Phantom):
        truth = density(source, first.box, first.pixel_size)

        def slices(rotation: Tensor, item: Optics) -> Tensor:
            return project_phantom(source, rotation, item, first.pixel_size)
    else:
        truth = source

        def slices(rotation: Tensor, item: Optics) -> Tensor:
            return project_volume(source, rotation, item)

    signal = tuple(_clean_images(particles, g, scale, slices) for g in range(len(optics)))
    noiseless = math.isinf(settings.snr)
    factor = 1.0 if noiseless else math.sqrt(settings.snr / float(signal[0].double().var(dim=(1, 2), correction=0).mean()))
    stacks, sigma2 = [], []
    for images, item in zip(signal, optics, strict=True):
        spectrum = noise_spectrum(item.box, settings.coloured) * (0.0 if noiseless else 1.0)
        stacks.append(images if noiseless else factor * images + make_noise(len(images), spectrum, rng))
        sigma2.append(spectrum)
    place = torch.zeros(n, dtype=torch.int64)
    for g in range(len(optics)):
        members = particles.group == g
        place[members] = torch.arange(int(members.sum()))
    stored = ImageStacks(tuple(stacks), particles.group, place)
    return Simulated(stored, particles, Volume(truth.data * factor, truth.pixel_size), scale, tuple(sigma2))


def _clean_images(particles: Particles, group: int, scale: Tensor, slices: Callable[[Tensor, Optics], Tensor]) -> Tensor:
    """(n_g, N, N) float32 noiseless images of one optics group, with scale, CTF, aberration and shift."""
    optics = particles.optics[group]
    members = torch.nonzero(particles.group == group)[:, 0]
    k = frequencies(optics.box)
    flat = k.reshape(-1, 2) / (optics.box * optics.pixel_size)
    odd = odd_phase(flat, optics).reshape(k.shape[:2]) if optics.odd_zernike or any(optics.beam_tilt) else None
    out = torch.empty(len(members), optics.box, optics.box)
    start = 0
    for index in members.split(64):
        ft = slices(particles.rotation[index], optics)
        shift = particles.shift[index] / (optics.box * optics.pixel_size)
        phase = torch.exp(2j * math.pi * (k[:, :, 0] * shift[:, 0, None, None] + k[:, :, 1] * shift[:, 1, None, None]))
        some = particles[index]
        weight = ctf(flat, some.defocus, some.phase_shift, some.b_factor, some.ctf_scale, optics).reshape(len(index), *k.shape[:2])
        weight = weight * scale[particles.micrograph[index], None, None]
        phase = phase * weight if odd is None else phase * weight * torch.exp(1j * odd)
        out[start : start + len(index)] = image_from_ft(ft * phase.to(torch.complex64), optics.box)
        start += len(index)
    return out


def draw_particles(n: int, optics: tuple[Optics, ...], settings: Settings, rng: torch.Generator) -> tuple[Particles, Tensor]:
    """True poses, defoci and groups of n particles; and the scale of each micrograph, mean 1 over particles."""
    micrographs = max(len(optics), math.ceil(n / settings.per_micrograph))
    micrograph = torch.arange(n) * micrographs // n
    group = (torch.arange(micrographs) % len(optics))[micrograph]
    low, high = settings.defocus
    uniform = torch.rand(micrographs, 3, generator=rng, dtype=torch.float64)
    mean = (low + (high - low) * uniform[:, 0])[micrograph]
    mean = mean + settings.defocus_sd * torch.randn(n, generator=rng, dtype=torch.float64)
    apart = (0.5 * settings.astigmatism * uniform[:, 1])[micrograph]
    defocus = torch.stack([mean + apart, mean - apart, (180 * uniform[:, 2])[micrograph]], -1)
    rotation = random_rotations(n, rng)
    if settings.preferred > 0:
        rotation = _prefer(rotation, settings.preferred, rng)
    shift = settings.shift_sd * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    scale = (1 + settings.scale_sd * torch.randn(micrographs, generator=rng, dtype=torch.float64)).clamp(0.3, 3)
    scale = scale / scale[micrograph].mean()
    particles = Particles(
        optics, group, rotation, shift, defocus, torch.zeros(n, dtype=torch.int64), micrograph,
        tuple(f"mic{m + 1:04d}.mrc" for m in range(micrographs)), klass=torch.ones(n, dtype=torch.int64),
    )  # fmt: skip
    return particles, scale


def _prefer(rotation: Tensor, fraction: float, rng: torch.Generator) -> Tensor:
    """The same rotations, but a `fraction` of them seen from near the map's x axis (about 20° off); in-plane angles stay uniform."""
    n = len(rotation)
    chosen = torch.rand(n, generator=rng, dtype=torch.float64) < fraction
    near = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) + 0.25 * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    # A Q turns the viewing direction (row 3 of A) into `near`: rows of A Q are Qᵀ row.
    turned = rotation @ _turn(torch.nn.functional.normalize(near, dim=-1), rotation[:, 2])
    return torch.where(chosen[:, None, None], turned, rotation)


def _turn(a: Tensor, b: Tensor) -> Tensor:
    """(n, 3, 3) the smallest rotations that map unit vectors a (n, 3) onto b: 1 + [v]× + [v]×²/(1 + a·b), v = a × b."""
    v = torch.linalg.cross(a, b)
    zero = torch.zeros_like(v[:, 0])
    rows = [zero, -v[:, 2], v[:, 1], v[:, 2], zero, -v[:, 0], -v[:, 1], v[:, 0], zero]
    cross = torch.stack(rows, -1).reshape(-1, 3, 3)
    cosine = (a * b).sum(-1).clamp(min=-1 + 1e-12)
    return torch.eye(3, dtype=a.dtype) + cross + cross @ cross / (1 + cosine)[:, None, None]


def noise_spectrum(box: int, coloured: bool = False) -> Tensor:
    """(N/2+1,) float64 noise variance per real or imaginary component of a shell, for unit variance a pixel.

    White: 1/(2N²). Coloured: amplitude² ∝ 0.25 + 1/(1 + (r/r0)²), r0 = N/8; corners of the transform take the last shell.
    """
    shells = torch.arange(box // 2 + 1, dtype=torch.float64)
    shape = 0.25 + 1 / (1 + (shells / (box / 8)) ** 2) if coloured else torch.ones_like(shells)
    radius = _shell_map(box)
    twice = torch.full((box // 2 + 1,), 2.0, dtype=torch.float64)
    twice[0] = twice[-1] = 1
    mean = (shape[radius] * twice).sum() / box**2
    return shape / mean / (2 * box**2)


def make_noise(n: int, sigma2: Tensor, rng: torch.Generator) -> Tensor:
    """(n, N, N) float32 Gaussian noise images whose transform has variance `sigma2` (N/2+1,) per component and shell."""
    box = 2 * (len(sigma2) - 1)
    gain = torch.sqrt(sigma2 * 2 * box**2).float()[_shell_map(box)]
    white = torch.randn(n, box, box, generator=rng)
    if bool((gain == gain[0, 0]).all()):
        return white * gain[0, 0]
    out = torch.empty_like(white)
    for start in range(0, n, 256):
        out[start : start + 256] = torch.fft.irfft2(torch.fft.rfft2(white[start : start + 256]) * gain, s=(box, box))
    return out


def _shell_map(box: int) -> Tensor:
    """(N, N//2+1) int64: nearest shell of each pixel of a half transform, at most N/2."""
    return (frequencies(box).norm(dim=-1) + 0.5).floor().long().clamp(max=box // 2)
