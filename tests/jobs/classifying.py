"""What the tests of `frazil class3d` share: particles of two phantoms in one set, and the command on it."""
from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tests.jobs.refining import BOX, FAST, LOW, PIXEL, simulate, with_defaults

from frazil.cli import main
from frazil.io.star import read_star, write_star

COUNT = 120  # of each phantom
SMALL = ("--initial-lowpass", LOW, "--diameter", 120, "--offset-range", 3, "--iterations", 6, "--classes", 2)

__all__ = ["BOX", "COUNT", "FAST", "LOW", "PIXEL", "SMALL", "classify", "command", "two_phantoms"]


def two_phantoms(folder: Path, count: int = COUNT) -> Path:
    """Particles of two different phantoms in one table, particles.star; their kinds are in the stacks' names (a/…, b/…)."""
    tables = []
    for seed, name in ((4, "a"), (9, "b")):
        simulate(folder / name, "--particles", count, "--seed", seed, "--snr", 1)
        star = read_star(folder / name / "particles.star", text=True)
        particles = star["particles"]
        assert isinstance(particles, pd.DataFrame)
        particles["rlnImageName"] = particles["rlnImageName"].str.replace("@", f"@{name}/")
        particles["rlnMicrographName"] = name + particles["rlnMicrographName"]
        tables.append(particles)
    write_star(folder / "particles.star", {"optics": star["optics"], "particles": pd.concat(tables, ignore_index=True)})
    return folder


def command(data: Path, output: Path, *options: object, star: str = "particles.star", without: tuple[str, ...] = ()) -> list[str]:
    """The command line of a small classification; `options` replace those of its own that they name, `without` leaves some out."""
    usual = with_defaults(("--reference", data / "a" / "reference_lowpass.mrc", *SMALL, *FAST), (*options, *without))
    usual = usual[: len(usual) - len(without)] if without else usual
    words = [data / star, *usual, "--output", output]
    return ["class3d", *map(str, words), "--quiet"]


def classify(data: Path, output: Path, *options: object, star: str = "particles.star", without: tuple[str, ...] = ()) -> Path:
    """Run it in this process; the output directory of a run that ended well."""
    assert main(command(data, output, *options, star=star, without=without)) == 0
    return output


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Plots take longer than these runs: left out but where a test asks for them. One thread, also of Numba."""
    import numba

    numba.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("frazil.jobs.class3d.class_report", lambda folder: None)
        yield
