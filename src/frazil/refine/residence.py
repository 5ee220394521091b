"""Keeping the particle images where they are computed with (architecture 3.5): read once, in half precision on the GPU if they fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.refine.windows import Engine

SHARE = 0.5  # of the memory budget that images may take
READ = 1 << 26  # pixels read at a time
LARGEST = 3e4  # grey values beyond do not go into half precision (its largest number is 65504)


@dataclass(frozen=True)
class Resident:
    """Images by particle index, held on a device: a stack an optics group."""

    stacks: tuple[Tensor, ...]  # (n_g, N_g, N_g) of each group
    group: Tensor  # (n,) int64
    place: Tensor  # (n,) int64 on the device, index into the group's stack

    def __getitem__(self, index: Tensor) -> Tensor:
        """(b, y, x) images at `index`, all of one optics group, on the device."""
        place = self.place[index.to(self.place.device)]
        return self.stacks[int(self.group[index[0]])][place]


def resident(images: Images, particles: Particles, engine: Engine) -> tuple[Images, Engine]:
    """The images on the engine's GPU in float16, and the engine with what they take off its budget; unchanged on a CPU or if too many.

    Rounding to float16 adds noise of 3e-4 of a grey value to images whose noise is 1. Images whose values do not fit float16 stay
    where they are.
    """
    pixels = sum(int((particles.group == g).sum()) * o.box**2 for g, o in enumerate(particles.optics))
    if engine.device == "cpu" or 2 * pixels > SHARE * engine.budget:
        return images, engine
    place, stacks = torch.zeros(len(particles), dtype=torch.int64), []
    for g, optics in enumerate(particles.optics):
        members = torch.nonzero(particles.group == g)[:, 0]
        place[members] = torch.arange(len(members))
        stack = torch.empty(len(members), optics.box, optics.box, dtype=torch.float16, device=engine.device)
        start = 0
        for index in members.split(max(1, READ // max(1, optics.box**2))):
            some = images[index].to(engine.device)
            if not bool(some.abs().amax() < LARGEST):
                return images, engine
            stack[start : start + len(index)] = some
            start += len(index)
        stacks.append(stack)
    return Resident(tuple(stacks), particles.group, place.to(engine.device)), replace(engine, budget=engine.budget - 2 * pixels)
