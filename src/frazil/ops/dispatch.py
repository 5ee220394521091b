"""Which implementation of an op runs, and on how many threads.

The device of the data decides: cuda → Triton, cpu → Numba. `FRAZIL_OPS=reference` (or cpu, triton) in the environment
overrides, and so does `implementation=` of an op. Importing this module prepares Numba without importing it: its OpenMP
layer (the work queue aborts the process when two Python threads enter a kernel) and a cache of compiled kernels that is
named after their sources, so that an edited kernel is never taken from an old cache.
"""
from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "cpu", "triton")
log = logging.getLogger("frazil.ops")
_announced: set[tuple[str, str]] = set()


def pick(tensor: Tensor, implementation: str | None, *, op: str | None = None, cpu_dtypes: tuple[torch.dtype, ...] | None = None) -> str:
    """'reference', 'cpu' or 'triton' for an op whose main argument is `tensor`; logged once an op and choice.

    `implementation` is the caller's wish (None: FRAZIL_OPS, else by device). `cpu_dtypes` are what the op's Numba kernel
    takes (None: every float type); others run the reference. Raises ValueError where the wish cannot run on this tensor.
    """
    op = op or str(sys._getframe(1).f_globals.get("__name__", "op")).removeprefix("frazil.ops.")
    choice = implementation or os.environ.get("FRAZIL_OPS", "")
    if not choice:
        choice = "triton" if tensor.is_cuda else "cpu"
        if tensor.device.type not in ("cuda", "cpu") or (choice == "cpu" and cpu_dtypes and tensor.dtype not in cpu_dtypes):
            choice = "reference"
    if choice not in IMPLEMENTATIONS:
        raise ValueError(f"{op} has no implementation {choice!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if choice == "cpu":
        if tensor.device.type != "cpu":
            raise ValueError(f"{op}: the cpu implementation needs a tensor in main memory, got one on {tensor.device}")
        _refuse_workqueue()
    if choice == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{op}: the triton implementation needs a GPU tensor (or TRITON_INTERPRET=1), got one on {tensor.device}")
    if (op, choice) not in _announced:
        _announced.add((op, choice))
        log.info("%s runs its %s implementation on %s", op, choice, tensor.device)
    return choice


def set_threads(n: int) -> None:
    """Use n CPU threads from now on: torch's own, and those of every Numba kernel."""
    if n < 1:
        raise ValueError(f"threads must be at least 1, got {n}")
    torch.set_num_threads(n)


def threads() -> int:
    """CPU threads in use. A Numba kernel's wrapper passes it to numba.set_num_threads (through `numba_threads`)."""
    return torch.get_num_threads()


def numba_threads(numba) -> int:
    """Make Numba follow `threads()`; returns the number it will use (never more than Numba was started with)."""
    _skip_blas(numba.__name__)
    wanted = threads()
    n = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(n)
    if threads() != wanted:  # the first call starts Numba's pool, which sets OpenMP's threads, torch's too, to all there are
        torch.set_num_threads(wanted)
    return n


@cache
def _skip_blas(numba: str) -> None:
    """Keep Numba from loading scipy.linalg, 0.1 s, to see whether there is a BLAS: there is, and no kernel of ours calls it."""
    with suppress(Exception):
        setattr(import_module(f"{numba}.np.linalg"), "ensure_blas", lambda: None)  # noqa: B010 (a module has no such attribute for pyright)


def _refuse_workqueue() -> None:
    config = getattr(sys.modules.get("numba"), "config", None)  # another thread may be in the middle of importing it
    layer = config.THREADING_LAYER if config else os.environ.get("NUMBA_THREADING_LAYER")
    if layer == "workqueue" and threads() > 1:
        raise RuntimeError("Numba's workqueue layer aborts when two threads use it: unset NUMBA_THREADING_LAYER, or use one thread")


def _kernel_cache() -> str:
    """Folder of compiled kernels for exactly these sources."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*/cpu.py")):
        digest.update(source.read_bytes())
    name = f"numba-{digest.hexdigest()[:12]}"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frazil" / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return str(folder)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        pass
    return tempfile.mkdtemp(prefix=f"frazil-{name}-")  # private to this process: kernels are compiled once more


def _prepare_numba() -> None:
    settings = {"THREADING_LAYER": "omp", "CACHE_DIR": _kernel_cache()}
    loaded = sys.modules.get("numba")
    for name, value in settings.items():
        os.environ.setdefault(f"NUMBA_{name}", value)
        # Someone imported Numba first: it has read the environment already, so its own record is set too, where still at default.
        if loaded is not None and getattr(loaded.config, name) in ("default", ""):
            setattr(loaded.config, name, value)


_prepare_numba()
