"""`frazil doctor`: what this machine offers and what is missing, before a job finds out."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

import frazil
from frazil.jobs.record import source_commit
from frazil.jobs.run import Run, cpu_threads, parse_memory
from frazil.refine.planner import table

POSITIONAL = ()
HAS_RUN_DIRECTORY = False
LIBRARIES = ("torch", "numpy", "scipy", "numba", "mrcfile", "starfile", "pandas", "pyarrow", "healpix", "pydantic", "cyclopts", "rich",
             "structlog", "matplotlib", "psutil")  # fmt: skip
OPTIONAL = {
    "gemmi": "frazil map from-model will not work: pip install 'frazil[models]'",
    "triton": "GPU kernels will not work; CUDA builds of torch bring it along",
}
PROGRAMS = {"relion_refine": "bench/against_relion.py and tests/agree skip what compares with RELION"}
LITTLE_DISK = 10.0  # GB
GB = 1e9


class Params(BaseModel):
    """Say what this machine offers: devices, memory, versions, and what is missing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    gpu_memory: str = Field("6GB", description="memory budget for the table of what a refinement needs at each box")
    folder: Path = Field(Path("."), description="folder whose free disk space is shown", json_schema_extra={"level": "expert"})


def version(library: str) -> str | None:
    """The installed version of a library, None where it is absent."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[tuple[str, str]]:
    """(name, description) of what can be computed on."""
    memory = psutil.virtual_memory()
    found = [("cpu", f"{platform.machine()}, {cpu_threads(0)} threads usable of {os.cpu_count()}, "
              f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB memory free")]  # fmt: skip
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_properties(i).name
        found.append((f"cuda:{i}", f"{name}, {free / GB:.1f} of {total / GB:.1f} GB memory free"))
    return found


def problems(folder: Path) -> list[str]:
    """One line for each thing that is missing or that will hold jobs up."""
    found = []
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        why = "torch is a CPU build" if cuda is None else f"torch is built for CUDA {cuda} but finds no usable GPU"
        found.append(f"no GPU: {why}; jobs run on the CPU")
    found += [f"{name} is not installed; frazil needs it: pip install frazil" for name in LIBRARIES if version(name) is None]
    for name, meaning in OPTIONAL.items():
        if importlib.util.find_spec(name) is None and not (name == "triton" and not torch.cuda.is_available()):
            found.append(f"{name} is not installed: {meaning}")
    found += [f"{name} is not on the PATH: {meaning}" for name, meaning in PROGRAMS.items() if shutil.which(name) is None]
    if folder.is_dir() and shutil.disk_usage(folder).free < LITTLE_DISK * GB:
        found.append(f"{folder.resolve()}: only {shutil.disk_usage(folder).free / GB:.1f} GB of disk free")
    return found


def memory_table(budget: int) -> Table:
    """What a refinement to Nyquist needs of a GPU by box, as the planner divides a budget."""
    out = Table(title=f"refinement to Nyquist, one class, padding 2, in {budget / GB:g} GB of GPU memory", title_justify="left", box=None)
    for column in ("box", "volumes", "left for batches", "particles a batch", "fits"):
        out.add_column(column, justify="right")
    for box, volumes, working, images in table(budget):
        fits = "yes" if volumes + working <= 1.01 * budget / GB else "no"
        out.add_row(f"{box} px", f"{volumes:.2f} GB", f"{working:.2f} GB", str(images), fits)
    return out


def run(params: Params, run: Run | None) -> None:
    """Print devices, versions, what is missing, and what the planner makes of a memory budget."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    overview = Table.grid(padding=(0, 2))
    commit = source_commit()
    overview.add_row("frazil", frazil.__version__ + (f", commit {commit[:12]}" if commit else ""))
    overview.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.release()}")
    for name, description in devices():
        overview.add_row(name, description)
    if params.folder.is_dir():
        usage = shutil.disk_usage(params.folder)
        overview.add_row("disk", f"{params.folder.resolve()}: {usage.free / GB:.0f} of {usage.total / GB:.0f} GB free")
    for name in (*LIBRARIES, *OPTIONAL):
        overview.add_row(name, version(name) or "missing")
    console.print(overview)
    missing = problems(params.folder)
    console.print("\n".join(["", *missing]) if missing else "\nnothing is missing")
    console.print()
    console.print(memory_table(parse_memory(params.gpu_memory) or 0))
