"""Contrast transfer function and aberrations (spec/refinement 1.5, spec/processing 0.2-0.4, 8.5).

    chi(k) = π λ Δf(θ) |k|² − (π/2) Cs λ³ |k|⁴ + φ_ps + asin(Q0) − Σ c_i Z_i(k),      CTF(k) = sin chi(k) · scale · exp(−B |k|²/4)

with k in 1/Å, underfocus positive, so that CTF(0) = +Q0 and particles are white on black. An anisotropic magnification M is part
of the optics: everything here is evaluated at M·k. Odd aberrations are a phase of the image: observed = true · exp(i β).
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from frazil.data import Optics

SMALLEST = 1e-8  # |CTF| is never below this: images may be divided by it
MODES = ("normal", "intact_first_peak", "phase_flipped", "only_flip")


def wavelength(voltage: float) -> float:
    """Relativistic wavelength of the electron in Å; voltage in kV."""
    v = voltage * 1e3
    return 12.2643247 / math.sqrt(v * (1 + 0.978466e-6 * v))


def zernike(n: int, m: int, k: Tensor) -> Tensor:
    """(…) Z_n^m at k (…, 2) xy, not confined to a unit disc: R_n^|m|(|k|) · cos mθ for m ≥ 0, sin |m|θ for m < 0; Z_n^n = |k|^n cos nθ."""
    order = abs(m)
    radius2 = k.square().sum(-1)
    turning = torch.complex(k[..., 0], k[..., 1]) ** order  # |k|^m e^{imθ}, no angle needed at k = 0
    radial = torch.zeros_like(radius2)
    for j in range((n - order) // 2 + 1):
        weight = (-1) ** j * math.comb(n - j, j) * math.comb(n - 2 * j, (n - order) // 2 - j)
        radial = radial + weight * radius2 ** ((n - order) // 2 - j)
    return radial * (turning.real if m >= 0 else turning.imag)


def even_index(i: int) -> tuple[int, int]:
    """(n, m) of the i-th coefficient of rlnEvenZernike: 0,0; 2,-2; 2,0; 2,2; 4,-4; ..."""
    q = math.isqrt(i)
    return 2 * q, 2 * (i - q * q - q)


def odd_index(i: int) -> tuple[int, int]:
    """(n, m) of the i-th coefficient of rlnOddZernike: 1,-1; 1,1; 3,-3; 3,-1; ..."""
    q = (math.isqrt(1 + 4 * i) - 1) // 2
    n = 2 * q + 1
    return n, 2 * (i - q * q - q) - n


def aberration(k: Tensor, coefficients: tuple[float, ...], index: Callable[[int], tuple[int, int]]) -> Tensor:
    """(…) Σ c_i Z_i(k) in radians at k (…, 2) in 1/Å; coefficients in Å^n; `index` is even_index or odd_index."""
    total = torch.zeros_like(k[..., 0])
    for i, c in enumerate(coefficients):
        if c != 0:
            total = total + c * zernike(*index(i), k)
    return total


def magnified(k: Tensor, optics: Optics) -> Tensor:
    """(…, 2) M·k: the frequency of the undistorted specimen that an image frequency k (…, 2) shows."""
    a, b, c, d = optics.magnification
    if (a, b, c, d) == (1.0, 0.0, 0.0, 1.0):
        return k
    x, y = k.unbind(-1)
    return torch.stack([a * x + b * y, c * x + d * y], -1)


def phase_argument(k: Tensor, defocus: Tensor, phase_shift: Tensor, optics: Optics) -> Tensor:
    """(b, p) float64 chi in radians: CTF = sin chi. k (p, 2) in 1/Å; defocus (b, 3) u, v in Å and degrees; phase_shift (b,) degrees.

    The defocus term is a quadratic form of k, so it is a product of (b, 3) and (3, p) matrices; the rest does not depend on b.
    """
    k = magnified(k.double(), optics)
    defocus, phase_shift = defocus.to(k), phase_shift.to(k)
    lam = wavelength(optics.voltage)
    x, y = k.unbind(-1)
    k2 = x * x + y * y
    u, v, angle = defocus.unbind(-1)
    mean, half = 0.5 * (u + v), 0.5 * (u - v)
    twice = torch.deg2rad(2 * angle)
    form = torch.stack([mean, half * twice.cos(), half * twice.sin()], -1)  # Δf|k|² = mean k² + half (cos2α (x²−y²) + sin2α 2xy)
    common = -0.5 * math.pi * (optics.cs * 1e7) * lam**3 * k2**2 + math.asin(optics.amplitude_contrast)
    common = common - aberration(k, optics.even_zernike, even_index)
    chi = (math.pi * lam) * form @ torch.stack([k2, x * x - y * y, 2 * x * y])
    return chi + common + torch.deg2rad(phase_shift)[:, None]


def ctf(
    k: Tensor,
    defocus: Tensor,
    phase_shift: Tensor,
    b_factor: Tensor,
    scale: Tensor,
    optics: Optics,
    *,
    mode: str = "normal",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(b, p) CTF of b particles at k (p, 2) xy in 1/Å, on k's device, in `dtype` (default: k's).

    defocus (b, 3): u, v in Å, angle in degrees; phase_shift (b,) degrees; b_factor (b,) Å²; scale (b,). The phase, up to 1e4 rad,
    is calculated in float64 and brought into one turn before it is rounded, so float32 results are good to 1e-6.
    mode: "normal"; "intact_first_peak" (1 below the first maximum); "phase_flipped" (|CTF|); "only_flip" (sign).
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
    dtype = dtype or k.dtype
    chi = phase_argument(k, defocus, phase_shift, optics)
    out = torch.sin(torch.remainder(chi, 2 * math.pi).to(dtype))
    k2 = magnified(k.double(), optics).square().sum(-1)
    if mode == "intact_first_peak":
        out = torch.where(chi.abs() < math.pi / 2, torch.ones_like(out), out)
    if out.is_cuda or bool((b_factor != 0).any()):  # looking would make the host wait for a GPU, and these change nothing there
        out = out * torch.exp(-0.25 * b_factor.to(k2)[:, None] * k2).to(dtype)
    if out.is_cuda or bool((scale != 1).any()):
        out = out * scale.to(out)[:, None]
    if mode == "phase_flipped":
        out = out.abs()
    elif mode == "only_flip":
        out = torch.where(out < 0, -1.0, 1.0).to(dtype)
    return torch.where(out.abs() < SMALLEST, torch.copysign(torch.full_like(out, SMALLEST), out), out)


def odd_phase(k: Tensor, optics: Optics) -> Tensor:
    """(p,) phase β in radians of beam tilt and odd Zernike terms at k (p, 2) xy in 1/Å; zeros where the optics have none.

    Observed image = true image · exp(iβ): multiply an image by exp(−iβ) to correct it. Beam tilt b (rad): −2π Cs λ² |k|² (k·b).
    """
    where = magnified(k.double(), optics)
    phase = aberration(where, optics.odd_zernike, odd_index)
    if optics.beam_tilt != (0.0, 0.0):
        tilt = torch.tensor(optics.beam_tilt, dtype=torch.float64, device=k.device) * 1e-3
        strength = -2 * math.pi * (optics.cs * 1e7) * wavelength(optics.voltage) ** 2
        phase = phase + strength * where.square().sum(-1) * (where @ tilt)
    return phase.to(k.dtype)
