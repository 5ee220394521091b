"""Keeping the particle images where they are computed with (architecture 3.5): read once, in half precision on the GPU if they fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frazil.data import Images, Particles
from frazil.refine.windows import Engine

SHARE = 0.5  # of the memory budget that images may take in half precision
FULL_SHARE = 0.25  # and in float32, where half precision would change them
READ = 1 << 26  # pixels read at a time
LARGEST = 3e4  # grey values beyond do not go into half precision (its largest number is 65504)


@dataclass(frozen=True)
class Resident:
    """Images by particle index, held on a device: a stack an optics group."""

    stacks: tuple[Tensor, ...]  # (n_g, N_g, N_g) of each group
    group: Tensor  # (n,) int64
    place: Tensor  # (n,) int64 on the device, index into the group's stack

    def __getitem__(self, index: Tensor) -> Tensor:
        """(b, y, x) images at `index` (in main memory), all of one optics group, on the device."""
        return self.of_group(int(self.group[index[0]]), index.to(self.place.device))

    def of_group(self, group: int, index: Tensor) -> Tensor:
        """(b, y, x) images of an optics group at `index`, all on the device."""
        return self.stacks[group][self.place[index]]


    def among(self, members: Tensor, group: Tensor) -> Resident:
        """The same images by the numbers their particles have among all: `members` of all, whose groups are (n,) `group`."""
        place = torch.zeros(len(group), dtype=torch.int64, device=self.place.device)
        place[members.to(place.device)] = self.place
        return Resident(self.stacks, group, place)


@dataclass(frozen=True)
class Stored:
    """A tensor of images, on any device, as data.Images."""

    images: Tensor  # (n, y, x)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[index.to(self.images.device)]


@dataclass(frozen=True)
class _Some:
    """Images of some particles, by their number among them."""

    images: Images
    members: Tensor

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.members[index]]


def share(images: Images, members: Tensor) -> Images:
    """The images of the particles `members` (in main memory), by their number among them."""
    if isinstance(images, Resident):
        return Resident(images.stacks, images.group[members], images.place[members.to(images.place.device)])
    return _Some(images, members)


def resident(images: Images, particles: Particles, engine: Engine) -> tuple[Images, Engine]:
    """The images on the engine's GPU, and the engine with what they take off its budget; unchanged on a CPU or if they are too many.

    They are kept as float16 where that changes nothing (they come from float16 stacks), else as float32 if there is plenty of room, else
    as float16: that adds noise of 3e-4 of a grey value to images whose noise is 1. Values beyond 3e4 do not go into float16: such
    images are kept as float32 or stay where they are.
    """
    pixels = sum(int((particles.group == g).sum()) * o.box**2 for g, o in enumerate(particles.optics))
    if engine.device == "cpu" or 2 * pixels > SHARE * engine.budget:
        return images, engine
    half = 4 * pixels > FULL_SHARE * engine.budget or all(exact_in_half(images, particles, g) for g in particles.group.unique().tolist())
    place, stacks = torch.zeros(len(particles), dtype=torch.int64), []
    for g, optics in enumerate(particles.optics):
        members = torch.nonzero(particles.group == g)[:, 0]
        place[members] = torch.arange(len(members))
        stack = torch.empty(len(members), optics.box, optics.box, dtype=torch.float16 if half else torch.float32, device=engine.device)
        start = 0
        for index in members.split(max(1, READ // max(1, optics.box**2))):
            some = images[index].to(engine.device)
            if half and not bool(some.abs().amax() < LARGEST):
                return images, engine
            stack[start : start + len(index)] = some
            start += len(index)
        stacks.append(stack)
    size = sum(stack.nbytes for stack in stacks)
    return Resident(tuple(stacks), particles.group, place.to(engine.device)), replace(engine, budget=engine.budget - size)


def exact_in_half(images: Images, particles: Particles, group: int) -> bool:
    """Whether some images of an optics group are the same in float16."""
    members = torch.nonzero(particles.group == group)[:, 0]
    some = images[members[:: max(1, len(members) // 16)][:16]].float()
    return bool((some.half().float() == some).all())
