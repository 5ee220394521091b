"""Power spectrum of a movie's aligned frames, for CTF estimation (spec/processing 2.4)."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from frazil.maths.align import reduced_transform, shift_phases

SPECTRUM_PIXEL = 1.4  # Å: frequencies beyond those of such pixels are left out


def movie_spectrum(
    transform: Callable[[int], Tensor], track: Tensor, observed: Tensor, size: tuple[int, int], pixel_size: float, side: int, dose: float
) -> tuple[Tensor, float]:
    """(side, side) centred amplitude spectrum Σ_groups |Σ_f F_f| for CTF estimation, and the pixel size in Å that its Nyquist stands for.

    transform: the reduced transform (h, w//2+1) of a frame of `size` (H, W), asked for in order. Groups of about 4 e/Å² (dose: of a frame,
    0: not known), aligned by the track (f, 2); cropped to the frequencies of pixels of SPECTRUM_PIXEL or the frame's own, made square, and
    resampled by cropping the transform of the spectrum.
    """
    group = max(1, round(4 / dose)) if dose > 0 else 4
    frames = observed.nonzero()[:, 0].tolist()
    summed = transform(frames[0]).clone()
    h, shape = len(summed), (len(summed), 2 * (summed.shape[1] - 1))
    total, moved = torch.zeros_like(summed.real), torch.empty_like(summed)
    for start in range(0, len(frames), group):
        first, *others = frames[start : start + group]
        summed.copy_(transform(first))  # the group is moved onto its first frame: |Σ| is that of any other common place
        for f in others:
            y, x = shift_phases(shape, size, (track[f] - track[first]).to(total.device))
            summed.addcmul_(torch.mul(transform(f), x, out=moved), y)
        total += summed.abs()
    target = max(pixel_size, SPECTRUM_PIXEL)
    # On a square grid of the longer side's sampling: 1/(L a) Å⁻¹ a pixel, up to 1/(2 target).
    longest = max(size)
    held = min(h * longest // size[0], shape[1] * longest // size[1])
    edge = max(side, min(held // 2 * 2, 2 * round(longest * pixel_size / target / 2)))
    realised = longest * pixel_size / edge
    line = torch.arange(-(edge // 2), edge // 2, device=total.device, dtype=torch.float32)
    ky, kx = (line * size[0] / longest)[:, None].expand(edge, edge), (line * size[1] / longest)[None, :].expand(edge, edge)
    flip = torch.where(kx < 0, -1.0, 1.0)
    rows, columns = ky * flip + h // 2, kx * flip
    centred = torch.fft.fftshift(total, dim=0)
    where = torch.stack([2 * columns / (centred.shape[1] - 1) - 1, 2 * rows / (h - 1) - 1], -1)
    image = torch.nn.functional.grid_sample(centred[None, None], where[None], align_corners=True, padding_mode="border")[0, 0]
    if edge == side:
        return image.cpu(), realised
    # The transform of the spectrum is cropped about its centre; the middle of the spectrum stays pixel side/2.
    small = torch.fft.irfft2(reduced_transform(torch.fft.ifftshift(image), (side, side), whole=True))
    return (torch.fft.fftshift(small) * (side / edge) ** 2).clamp(min=0).cpu(), realised
