"""From particle images to the pixels the likelihood sees: normalise, pre-shift, mask, transform, cut the window (spec 1.2–1.6, 2.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from frazil.data import Images, Optics, Particles, ResidentImages
from frazil.maths.ctf import ctf, odd_phase
from frazil.maths.fourier import PixelList, full_half_plane, image_from_ft, image_ft, pixel_list, shell_round
from frazil.maths.masks import mask_images, soft_circle
from frazil.ops.prepare import prepare
from frazil.ops.prepare.reference import move
from frazil.ops.shells import shell_power
from frazil.refine.model import Model


@dataclass(frozen=True)
class Engine:
    """How the computation is done: everything that is neither model, sampling nor data."""

    diameter: float  # Å, particle mask
    mask_edge: float = 5.0  # px
    zero_mask: bool = True
    pad: float = 2.0
    fraction: float = 0.999  # posterior mass kept
    max_significant: int = -1
    correct_norm: bool = True
    correct_scale: bool = True
    ctf_mode: str = "normal"
    cc: bool = False  # cross-correlation instead of the likelihood, of a first iteration (spec 2.8)
    residual: bool = False  # back-project X − s c P V, not X (gradient methods, spec 5.2)
    strict: bool = False  # the fine pass compares in the coarse window too (--strict_highres_exp of spec 2.6); sums are of the whole window
    subpixel: bool = False  # move the images by the whole old shift, its fraction too (nothing is searched around it)
    relion_form: bool = False  # RELION 5's own offset prior, local prior and fine window: for tests of parity (CONVENTIONS.md)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    implementation: str | None = None  # of the ops; None: by device
    budget: int = 4 << 30  # bytes of memory on the device
    timed: bool = False  # wait for the device at the end of every phase, so that their times are true: for bench/
    shrink: int = 1  # divides the batches: doubled each time the device runs out of memory
    seed: int = 0

    @property
    def complex(self) -> torch.dtype:
        return torch.complex64 if self.dtype == torch.float32 else torch.complex128


@dataclass(frozen=True)
class Frame:
    """What particles of one optics group share in an iteration."""

    optics: Optics
    pixels: PixelList  # of the group's own box and window
    inside: int  # leading pixels whose slice position lies within the reference's sphere
    coords: Tensor  # (inside, 2) cycles per model box: where a slice is sampled
    k: Tensor  # (inside, 2) 1/Å
    amplitude: float  # slice values of the model, times this, are the group's: 1/u²
    scale: float  # u = N_g a_g / (N_m a_m)
    sign: Tensor  # (p,) ±1/N²: makes a centred transform of FFT(image) at the pixels of the window
    full_index: Tensor  # half-plane pixels of the whole transform, shell by shell, and
    full_start: Tensor  # (N_g/2+2,) where each shell starts
    window_start: Tensor  # (n_g/2+2,) the same of the window's pixels

    def coarse_inside(self, size: int) -> int:
        """Leading pixels of the coarse window, `size` being that of the model."""
        return min(self.inside, self.pixels.count_inside(group_size(self.optics, self.scale, size)))


def group_size(optics: Optics, scale: float, size: int) -> int:
    """Window side of an optics group for a model window `size` (spec 1.1)."""
    return min(optics.box, 2 * math.ceil(scale * size / 2 - 1e-9))


def make_frame(optics: Optics, size: int, box: int, pixel_size: float, engine: Engine) -> Frame:
    """Frame of an optics group for a model window of side `size` in a box of `box` px of `pixel_size` Å."""
    device, dtype = engine.device, engine.dtype
    u = optics.box * optics.pixel_size / (box * pixel_size)
    u = 1.0 if abs(u - 1) < 1e-6 else u
    own = group_size(optics, u, size)
    if engine.relion_form:  # its images are one ring of pixels larger than the references
        own = min(optics.box, own + 2)
    pixels = pixel_list(optics.box, own, device)
    magnify = torch.tensor(optics.magnification, dtype=torch.float64, device=device).reshape(2, 2)
    coords = pixels.k()[: pixels.inside] @ magnify.T / u
    # A slice position may leave the reference's sphere when boxes differ or the magnification is not 1: end before the first.
    outside = torch.nonzero(coords.norm(dim=-1) > size / 2 + 1e-9)
    inside = int(outside[0]) if len(outside) else pixels.inside
    index, full_start, window_start = _shell_tables(optics.box, own)
    return Frame(
        optics=optics,
        pixels=pixels,
        inside=inside,
        coords=coords[:inside].to(dtype),
        k=pixels.k()[:inside] / (optics.box * optics.pixel_size),
        amplitude=1.0 / u**2,
        scale=u,
        sign=((1 - 2 * ((pixels.kx + pixels.ky) % 2)) / optics.box**2).to(dtype),
        full_index=index.to(device),
        full_start=full_start.to(device),
        window_start=window_start.to(device),
    )


@lru_cache(maxsize=8)
def _shell_tables(box: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(full_index, full_start, window_start) of a Frame, in main memory: what is kept on a GPU would tear its free memory in pieces."""
    index, shell = full_half_plane(box)
    return index, shell_starts(shell, box // 2 + 1), shell_starts(pixel_list(box, size).shell, size // 2 + 1)


def shell_starts(shell: Tensor, shells: int) -> Tensor:
    """(shells + 1,) int64: where each shell starts among pixels sorted by shell, and their number."""
    return torch.nn.functional.pad(torch.bincount(shell, minlength=shells).cumsum(0), (1, 0))


@dataclass(frozen=True)
class Windows:
    """A batch of particles, cut to the window of an iteration."""

    masked: Tensor  # (b, inside) complex, masked images
    unmasked: Tensor  # (b, inside) complex
    gain: Tensor  # (b, inside) real: s·c (or s·c² for premultiplied data): model = gain · slice
    data_gain: Tensor  # (b, inside) real: s·c (or s): what multiplies the image in the numerator
    weight_gain: Tensor  # (b, inside) real: s²c²: in the denominator
    power: Tensor  # (b, N_g/2+1) float64 power of the masked image a shell, whole shells
    window_power: Tensor  # (b, n_g/2+1) float64 the same inside the window
    pre_shift: Tensor  # (b, 2) Å, applied already
    pre_shift_px: Tensor  # (b, 2) px


def pre_shift_images(images: Tensor, shift_px: Tensor) -> Tensor:
    """(b, N, N) images moved by whole pixels (b, 2) xy, zeros where nothing comes in (spec 1.4)."""
    return move(images, shift_px.to(images.device).long())


def mask_radius(optics: Optics, engine: Engine) -> float:
    """Radius in px of the particle mask; a diameter ≤ 0 means the whole box less the edge (spec 2.4)."""
    diameter = engine.diameter if engine.diameter > 0 else (optics.box - engine.mask_edge) * optics.pixel_size
    return diameter / (2 * optics.pixel_size)


def noise_images(sigma2: Tensor, box: int, seeds: list[int], device: str, dtype: torch.dtype) -> Tensor:
    """(b, N, N) Gaussian noise of a spectrum (variance per component, a shell), one seed each: the fill outside a mask."""
    half = torch.arange(box // 2 + 1, dtype=torch.float64)
    ky = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    shell = shell_round(torch.hypot(ky[:, None], half[None])).long().clamp(max=box // 2)
    sd = sigma2.cpu().sqrt()[shell]
    out = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        out.append(image_from_ft(torch.complex(*(torch.randn(2, *sd.shape, generator=generator, dtype=torch.float64) * sd)), box))
    return torch.stack(out).to(device=device, dtype=dtype)


def prepare_images(images: Tensor, particles: Particles, index: Tensor, optics: Optics, model: Model, engine: Engine, group: int):
    """Normalised, aberration-corrected, pre-shifted images: (unmasked, masked, pre-shift in px); N even.

    `index` (b,) are rows of `particles`, both on one device, `images` their pixels. The odd aberration is removed before anything
    is cut out in real space, so that the mask sees the particle where it is.
    """
    shift = shell_round(particles.shift[index] / optics.pixel_size)
    odd = optics.beam_tilt != (0.0, 0.0) or bool(optics.odd_zernike)
    norm = particles.norm[index]
    factor = model.norm_average / norm if engine.correct_norm else torch.ones_like(norm)
    factor = factor.to(engine.device, engine.dtype)
    x, radius = images.to(engine.device), mask_radius(optics, engine)
    if engine.zero_mask and not odd:
        circle = soft_circle(optics.box, radius, engine.mask_edge, engine.device, engine.dtype)
        return *prepare(x, shift.to(engine.device).long(), factor, circle, implementation=engine.implementation), shift
    x = x.to(engine.dtype) * factor[:, None, None]
    if odd:
        x = without_odd_phase(x, optics, engine)
    x = pre_shift_images(x, shift)
    noise = None
    if not engine.zero_mask:
        noise = noise_images(model.sigma2[group], optics.box, [engine.seed + int(i) for i in index], engine.device, engine.dtype)
    return x, mask_images(x, radius, engine.mask_edge, noise), shift


def without_odd_phase(x: Tensor, optics: Optics, engine: Engine) -> Tensor:
    """(b, N, N) images freed of the phase of the antisymmetric aberration (spec 1.2)."""
    n = optics.box
    ky = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    kx = torch.arange(n // 2 + 1, dtype=torch.float64)
    grid = torch.stack(torch.broadcast_tensors(kx[None], ky[:, None]), -1).reshape(-1, 2) / (n * optics.pixel_size)
    phase = odd_phase(grid, optics).reshape(n, -1)
    return image_from_ft(image_ft(x) * torch.polar(torch.ones_like(phase), -phase).to(device=x.device, dtype=engine.complex), n)


def particle_ctf(particles: Particles, index: Tensor, k: Tensor, optics: Optics, engine: Engine) -> Tensor:
    """(b, p) CTF of particles at k (p, 2) in 1/Å."""
    at = [getattr(particles, f)[index].to(k.device) for f in ("defocus", "phase_shift", "b_factor", "ctf_scale")]
    return ctf(k, at[0], at[1], at[2], at[3], optics, mode=engine.ctf_mode).to(engine.dtype)


def windows_in_parts(images: Images, particles: Particles, index: tuple[Tensor, Tensor], frame: Frame, model: Model, engine: Engine,
                     group: int, most: int) -> Windows:
    """A batch of particles, at most so many whole images in work at once; index: in main memory, and on the particles' device."""
    parts = []
    for some, at in zip(index[0].split(most), index[1].split(most), strict=True):
        pixels = images.of_group(group, at) if isinstance(images, ResidentImages) else images[some]
        parts.append(make_windows(pixels, particles, at, frame, model, engine, group))
    if len(parts) == 1:
        return parts[0]
    return Windows(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def make_windows(images: Tensor, particles: Particles, index: Tensor, frame: Frame, model: Model, engine: Engine, group: int) -> Windows:
    """The batch `index` of particles (all of optics group `group`), ready for the E-step."""
    optics, p = frame.optics, frame.pixels
    plain, masked, shift = prepare_images(images, particles, index, optics, model, engine, group)
    inside, sign = p.index[: frame.inside], frame.sign[: frame.inside]
    # FFTs of the images as they lie: the window's pixels get the sign that centring would give them, a power needs none.
    unmasked = torch.fft.rfft2(plain).flatten(1)[:, inside] * sign
    del plain
    ft = torch.fft.rfft2(masked).flatten(1)
    del masked
    window, unit = ft[:, inside] * sign, 1.0 / optics.box**4
    power = shell_power(ft, frame.full_index, frame.full_start, implementation=engine.implementation) * unit
    window_power = shell_power(ft, p.index, frame.window_start, implementation=engine.implementation) * unit
    del ft
    c = particle_ctf(particles, index, frame.k, optics, engine)
    s = c.new_ones(len(index), 1)
    if engine.correct_scale:
        s = model.scales.to(index.device)[particles.micrograph[index]].clamp(min=0.001).to(c)[:, None]
    gain = s * c * (c if optics.ctf_premultiplied else 1)
    moved = shift * optics.pixel_size
    if engine.subpixel:
        rest = (particles.shift[index] - moved).to(frame.k)
        turn = torch.polar(torch.ones_like(rest[:, :1] * frame.k[:, 0]), -2 * math.pi * rest @ frame.k.T).to(engine.complex)
        window, unmasked, moved = window * turn, unmasked * turn, particles.shift[index]
    return Windows(
        masked=window,
        unmasked=unmasked,
        gain=gain * frame.amplitude,
        data_gain=(s.expand_as(c) if optics.ctf_premultiplied else s * c) * frame.amplitude,
        weight_gain=(s * c * frame.amplitude) ** 2,
        power=power,
        window_power=window_power,
        pre_shift=moved,
        pre_shift_px=shift,
    )
