"""Images kept on the device: found by particle, stored as float16 only where that changes nothing or must be."""
from __future__ import annotations

from dataclasses import replace

import torch

from frazil.data import Optics, Particles
from frazil.refine.residence import Resident, exact_in_half, resident, share
from frazil.refine.windows import Engine


def particles(n: int) -> Particles:
    f = torch.float64
    zero = torch.zeros(n, dtype=torch.int64)
    rotation, optics = torch.eye(3, dtype=f).repeat(n, 1, 1), (Optics(2.0, 8), Optics(2.0, 6))
    return Particles(optics, torch.arange(n) % 2, rotation, torch.zeros(n, 2, dtype=f), torch.zeros(n, 3, dtype=f), zero, zero)


def test_images_are_found_by_particle_in_the_stack_of_their_group(rng: torch.Generator) -> None:
    stacks = (torch.randn(3, 8, 8, generator=rng), torch.randn(2, 6, 6, generator=rng))
    images = Resident(stacks, torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2]))
    assert torch.equal(images[torch.tensor([4, 0])], stacks[0][[2, 0]])
    assert torch.equal(images[torch.tensor([3])], stacks[1][[1]])


def test_a_part_of_the_images_is_found_by_the_numbers_of_all(rng: torch.Generator) -> None:
    """What a process holds of all particles (among), and what is asked for of it again (share)."""
    stacks, group = (torch.randn(2, 8, 8, generator=rng), torch.randn(1, 6, 6, generator=rng)), torch.tensor([0, 1, 0, 1, 0])
    mine = torch.tensor([0, 3, 4])
    held = Resident(stacks, group[mine], torch.tensor([0, 0, 1])).among(mine, group)
    assert torch.equal(held[torch.tensor([4, 0])], stacks[0][[1, 0]]) and torch.equal(held[torch.tensor([3])], stacks[1])
    again = share(held, mine)
    assert torch.equal(again[torch.tensor([2, 0])], stacks[0][[1, 0]]) and torch.equal(again[torch.tensor([1])], stacks[1])


def test_half_precision_is_exact_for_what_came_from_it_only(rng: torch.Generator) -> None:
    values = torch.randn(6, 8, 8, generator=rng)
    one = replace(particles(6), group=torch.zeros(6, dtype=torch.int64))
    assert exact_in_half(values.half().float(), one, 0)
    assert not exact_in_half(values, one, 0)


def test_a_cpu_keeps_its_images_and_its_budget(rng: torch.Generator) -> None:
    values, engine = torch.randn(4, 8, 8, generator=rng), Engine(diameter=10.0)
    images, same = resident(values, particles(4), engine)
    assert images is values and same is engine
