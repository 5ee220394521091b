"""What the tests of `frazil refine3d` share: a tiny simulated set and the command on it."""
from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from frazil.cli import main
from frazil.io.mrc import read_map
from frazil.jobs.record import read_events

BOX, PIXEL, LOW, COUNT = 32, 5.0, 25.0, 200
FAST = ("--device", "cpu", "--threads", 1, "--seed", 1, "--gpu-memory", "1GB")  # a given budget: batches, so rounding, are the same
SMALL = ("--initial-lowpass", LOW, "--diameter", 120, "--offset-range", 2, "--max-order", 2)
HALVES = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
MAPS = ("run_class001.mrc", *HALVES)


def simulate(folder: Path, *options: object) -> Path:
    """Simulated particles of an asymmetric phantom, well visible, in a folder."""
    usual = ("--particles", COUNT, "--box", BOX, "--pixel-size", PIXEL, "--snr", 1, "--shift-sd", 4, "--per-micrograph", 40,
             "--lowpass", LOW, "--device", "cpu", "--threads", 1, "--seed", 4)  # fmt: skip
    words = ["simulate", "--output", folder, "--quiet", *with_defaults(usual, options)]
    assert main([str(word) for word in words]) == 0
    for star in ("particles.star", "truth.star"):  # stacks named relative to the table, so that a copy of the folder is whole
        text = (folder / star).read_text()
        (folder / star).write_text(re.sub(r"@\S*stacks/", "@stacks/", text))
    return folder


def command(data: Path, output: Path, *options: object, star: str = "particles.star", quiet: bool = True) -> list[str]:
    """The command line of a small refinement; `options` may repeat and so replace any of its own."""
    words = [data / star, *with_defaults(("--reference", data / "reference_lowpass.mrc", *SMALL, *FAST), options), "--output", output]
    return ["refine3d", *map(str, words), *(["--quiet"] if quiet else [])]


def with_defaults(defaults: tuple[object, ...], options: tuple[object, ...]) -> list[object]:
    """`options` and those pairs of `defaults` that they do not name."""
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [word for name, value in pairs if name not in options for word in (name, value)] + list(options)


def refine(data: Path, output: Path, *options: object, star: str = "particles.star") -> Path:
    """Run it in this process; the output directory of a run that ended well."""
    assert main(command(data, output, *options, star=star)) == 0
    return output


def iterations(run: Path) -> list[dict]:
    """The recorded iterations of a run."""
    return [event for event in read_events(run) if event["event"] == "iteration"]


def warnings_of(run: Path) -> list[str]:
    """What a run warned of."""
    return [event["message"] for event in read_events(run) if event["event"] == "warning"]


def density(path: Path) -> Tensor:
    """The voxels of a map."""
    return read_map(path).data


def assert_same_maps(a: Path, b: Path) -> None:
    """The final maps of two runs are the same but for rounding."""
    for name in MAPS:
        one, other = density(a / name), density(b / name)
        assert float((one - other).norm() / one.norm()) < 1e-5, name


def nothing_half_written(run: Path) -> bool:
    """Whether no temporary file is left."""
    return not list(run.rglob("*.tmp"))


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Plots take longer than these refinements: leave them out, except where a test asks for them. One thread, also of Numba."""
    import numba

    numba.set_num_threads(1)  # starts its pool, which would else set torch's threads anew in the middle of the first run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frazil.jobs.refine3d.refine3d_report", lambda folder: None)
        yield


def copy_of(data: Path, folder: Path) -> Path:
    """A copy of a simulated set that a test may spoil."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.json", "*.jsonl", "log.txt"))
    return folder


def poke(stack: Path, image: int, value: float) -> None:
    """Overwrite one image (from 0) of a float32 stack on disk."""
    with open(stack, "rb+") as file:
        file.seek(1024 + image * BOX * BOX * 4)
        file.write(np.full(BOX * BOX, value, np.float32).tobytes())


def angles_between(a: Tensor, b: Tensor) -> Tensor:
    """(n,) degrees between rotations (n, 3, 3)."""
    trace = (a * b).sum((-1, -2))
    return torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
