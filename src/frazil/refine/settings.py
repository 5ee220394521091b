"""Parameters that refinement and classification share, and the engine that follows from them."""
from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from frazil.refine.windows import Engine


def setting(default: Any, text: str, unit: str = "", level: str = "expert", **limits: Any) -> Any:
    """A field of the parameters of a step."""
    return Field(default, description=text, json_schema_extra={"unit": unit, "level": level}, **limits)


class Settings(BaseModel):
    """Parameters that are no one's but the step's; none may be written to, none unknown."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class MatchParams(Settings):
    """How particles are compared with references, whatever these are.

    Fields come in the order of the bases, the last one's first: a step that inherits (MatchParams, Start) shows those of Start before these
    and its own after them.
    """

    pad: float = setting(2.0, "padding of Fourier volumes", ge=1, le=4)
    mask_edge: float = setting(5.0, "width of soft mask edges", "px", ge=0)
    perturb: float = setting(0.5, "random perturbation of the sampling each iteration, in coarse steps; 0: none", ge=0, le=1)
    sigma_offset: float = setting(10.0, "first standard deviation of the shifts", "Å", gt=0)
    adaptive_fraction: float = setting(0.999, "posterior mass of the coarse samples that go to the fine pass", gt=0, le=1)
    max_significant: int = setting(
        1000, "most coarse samples a particle may take to the fine pass (only flat posteriors have more); -1: no limit, as RELION"
    )
    norm: bool = setting(True, "estimate a norm correction for every particle")
    scale: bool = setting(True, "estimate a scale for every micrograph")
    ctf_intact_first_peak: bool = setting(False, "leave the CTF 1 before its first peak")


def make_engine(
    params: MatchParams, *, diameter: float, zero_mask: bool, device: str = "cpu", dtype: torch.dtype = torch.float32,
    budget: int = 4 << 30, **more: Any,
) -> Engine:  # fmt: skip
    """Engine settings of a step. diameter: Å of the circular mask on the particles, ≤ 0: the box less the mask's edge."""
    return Engine(
        diameter=diameter, mask_edge=params.mask_edge, zero_mask=zero_mask, pad=params.pad, fraction=params.adaptive_fraction,
        max_significant=params.max_significant, correct_norm=params.norm, correct_scale=params.scale,
        ctf_mode="intact_first_peak" if params.ctf_intact_first_peak else "normal", device=device, dtype=dtype, budget=budget, **more,
    )  # fmt: skip
