"""Shell powers straight from the formula, in float64; on a CPU, where the transforms before it take longer, also the one in use."""
from __future__ import annotations

import torch
from torch import Tensor


def shell_power(values: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """See frazil.ops.shells."""
    power = torch.view_as_real(values[:, index].resolve_conj()).square().sum(-1)
    return torch.stack([part.sum(1, dtype=torch.float64) for part in power.split(start.diff().tolist(), dim=1)], 1)
