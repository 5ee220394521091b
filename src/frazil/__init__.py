"""frazil: from particle images to a map, by regularised likelihood, on CPU and GPU, in RELION's files.

The names below are the public Python interface. They are loaded when first used, so that `import frazil` costs nothing.
"""
import os
from importlib import import_module
from typing import Any

# torch and Numba each have a pool of OpenMP threads; a pool that spins while the other works takes its cores. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_NAMES = {
    "frazil.data": ("BadInput", "HalfMaps", "Images", "Optics", "Particles", "Volume"),
    "frazil.io.mrc": ("read_map", "read_stack", "write_mrc"),
    "frazil.io.particles": ("open_images", "read_particles", "write_particles"),
    "frazil.io.models": ("density_from_model",),
    "frazil.maths.ctf": ("ctf",),
    "frazil.maths.fsc": ("corrected_fsc", "fsc", "resolution_at"),
    "frazil.maths.rotation": ("euler_to_matrix", "matrix_to_euler"),
    "frazil.maths.symmetry": ("operators",),
    "frazil.simulate": ("phantom", "simulate_particles"),
    "frazil.steps.project": ("prepare_map", "project_particles"),
    "frazil.steps.reconstruct": ("ReconstructParams", "make_target", "reconstruct_poses"),
    "frazil.steps.refine3d": ("Refine3dParams", "refine3d"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'frazil' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
