"""Several processes, one classification: particles are shared out, sums added, poses gathered (spec/refinement 7.3, 10.14).

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment), each process takes every n-th particle on a device of its own and
adds its Statistics to the others'. All then hold the same sums, and go on with the model of rank 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from frazil.refine.model import Model, Poses, Statistics
from frazil.refine.windows import Engine

SMALLEST_SHARE = 16  # batches are halved down to this share of the plan before running out of memory is an error
PATIENCE = timedelta(hours=2)  # a process waits so long for the others: one may work on a smaller GPU, or in smaller batches
log = logging.getLogger("frazil.parallel")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that work together; one alone by default."""

    rank: int = 0
    size: int = 1

    def share(self, n: int, members: Tensor | None = None) -> Tensor:
        """int64 numbers of this process's part of n particles: every size-th, so that micrographs are spread evenly.

        members: the n particles are these (n,) of more. Places among them are returned, of those that are this process's among all:
        only their images are at hand.
        """
        if members is not None:
            return torch.nonzero(members % self.size == self.rank)[:, 0]
        return torch.arange(self.rank, n, self.size)

    def total(self, statistics: Statistics) -> Statistics:
        """The sum of all processes' statistics, on each of them; uses up the tensors of `statistics`."""
        if self.size == 1:
            return statistics
        values: dict[str, Any] = {f.name: getattr(statistics, f.name) for f in fields(statistics)}
        numbers = [name for name, value in values.items() if isinstance(value, (int, float))]
        row = torch.tensor([float(values[name]) for name in numbers], dtype=torch.float64)
        for value in values.values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Tensor):
                    _add_up_(part)
        values |= dict(zip(numbers, _add_up_(row).tolist(), strict=True))
        return Statistics(**{**values, "particles": round(values["particles"])})

    def gather(self, poses: Poses, n: int, members: Tensor | None = None) -> Poses:
        """Poses of all n particles from every process's share of them (see `share`), on each process."""
        if self.size == 1:
            return poses
        out = Poses.empty(n)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, {name: value.numpy() for name, value in vars(poses).items()})
        for rank, part in enumerate(parts):
            out.put_(World(rank, self.size).share(n, members), Poses(**{name: torch.from_numpy(value) for name, value in part.items()}))
        return out

    def own(self, n: int) -> range:
        """The numbers of n classes that this process works on."""
        return range(self.rank, n, self.size)

    def add_up_(self, value: Tensor) -> Tensor:
        """Σ over the processes of a contiguous tensor, in place, the same bits on each."""
        return value if self.size == 1 else _add_up_(value)

    def agree(self, model: Model, *, but: tuple[str, ...] = ()) -> Model:
        """Rank 0's model on every process: the M-step's sums on a GPU are not the same to the last bit twice.

        but: fields that are the same already.
        """
        if self.size == 1:
            return model
        values = {f.name: getattr(model, f.name) for f in fields(model) if f.name not in but}
        tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
        for value in tensors.values():
            dist.broadcast(value, 0)
        rest = self.tell({name: value for name, value in values.items() if name not in tensors})
        return replace(model, **tensors, **rest)

    def tell(self, value: T) -> T:
        """Rank 0's value of a small object (numbers, text, small tensors) on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]


def _add_up_(value: Tensor) -> Tensor:
    """Σ over the processes of a contiguous tensor, in place."""
    dist.all_reduce(torch.view_as_real(value) if value.is_complex() else value)
    return value


def world_of_environment() -> World:
    """What torchrun says in the environment: a world of one without it."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def local_device(device: str) -> str:
    """The device of this process: torchrun gives each its LOCAL_RANK, so that "cuda" or "cuda:0" means a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and device.startswith("cuda") else device


def join(device: str) -> World:
    """Meet the other processes of torchrun (NCCL between GPUs, gloo in main memory); a world of one where there are none."""
    world = world_of_environment()
    if world.size > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return world


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def with_less_memory(engine: Engine, work: Callable[[Engine], T]) -> tuple[T, int]:
    """(work(engine), the engine's `shrink` it took): begun again with smaller batches when the device runs out of memory."""
    while True:
        try:
            return work(engine), engine.shrink
        except torch.OutOfMemoryError:
            if engine.shrink >= SMALLEST_SHARE:
                raise
            log.warning("out of memory on %s: trying again with batches of 1/%d", engine.device, 2 * engine.shrink)
            engine = replace(engine, shrink=2 * engine.shrink)
        torch.cuda.empty_cache()
