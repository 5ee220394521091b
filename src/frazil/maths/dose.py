"""Radiation damage and the weights of a movie's frames (Grant & Grigorieff 2015, eLife 4:e06980).

    N_e(k) = (0.24499 k^−1.6649 + 2.8141) · v      critical exposure in e/Å², k in 1/Å, v = 1 at 300 kV
    w_f(k) = exp(−N_f / 2 N_e(k))                   signal left of frame f, N_f the exposure at its end
    sum    = Σ_f w_f F_f / √(Σ_f w_f²)              white noise of the sum is that of a single frame
"""
from __future__ import annotations

import torch
from torch import Tensor

# (kV, factor): measured at 300 and 200 kV; at 100 kV programs use 0.45 to 0.64, here RELION's. Linear between.
VOLTAGE_FACTORS = ((100.0, 0.64), (200.0, 0.8), (300.0, 1.0))
HIGHEST_EXPONENT = 60.0  # exp(−60) is nothing in float32


def voltage_factor(voltage: float) -> float:
    """How much smaller the critical exposure is than at 300 kV; constant outside 100 to 300 kV."""
    (low, first), (middle, second), (high, third) = VOLTAGE_FACTORS
    v = min(max(voltage, low), high)
    if v <= middle:
        return first + (second - first) * (v - low) / (middle - low)
    return second + (third - second) * (v - middle) / (high - middle)


def critical_exposure(k: Tensor, voltage: float = 300.0) -> Tensor:
    """Exposure in e/Å² at which the signal at k (any shape, 1/Å) has fallen to 1/√e of its amplitude; infinite at k = 0."""
    return (0.24499 * k.clamp(min=0) ** -1.6649 + 2.8141) * voltage_factor(voltage)


def damage(k: Tensor, exposure: Tensor, voltage: float = 300.0) -> Tensor:
    """(f, …k) amplitude left at k after exposures (f,) in e/Å²: exp(−N/2N_e); 1 at k = 0."""
    critical = critical_exposure(k, voltage)
    shaped = exposure.reshape(-1, *[1] * k.ndim)
    return torch.exp(-(shaped / (2 * critical)).clamp(max=HIGHEST_EXPONENT))


def frame_exposures(frames: int, dose: float, before: float = 0.0) -> Tensor:
    """(f,) float64 exposure in e/Å² at the end of each frame."""
    return before + dose * torch.arange(1, frames + 1, dtype=torch.float64)


def dose_weights(k: Tensor, exposure: Tensor, voltage: float = 300.0) -> Tensor:
    """(f, …k) weights w_f(k)/√(Σ w²): the sum of frames so weighted keeps the noise of one frame at every k > 0.

    At k = 0 all weights are equal: 1/√f. Where all signal is gone the weights tend to those of the first frame alone.
    """
    critical = critical_exposure(k, voltage)
    shaped = exposure.reshape(-1, *[1] * k.ndim)
    # Relative to the first frame, so that nothing underflows before it is divided.
    left = torch.exp(-((shaped - exposure[0]) / (2 * critical)).clamp(max=HIGHEST_EXPONENT))
    return left / left.square().sum(0).sqrt()
