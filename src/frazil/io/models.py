"""Atomic models (mmCIF, PDB, also .gz) as density on the grid of a particle box.

Each atom is the sum of five Gaussians of its electron scattering factor (International Tables C, 4.3.2.2), widened by its
B-factor:  ρ(r) = Σ_j a_j (4π/(b_j+B))^{3/2} exp(−4π²r²/(b_j+B)),  in Å⁻² (times 47.88 V Å² it is a potential in volts).
Needs gemmi: the optional extra `models`.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frazil.data import BadInput, Volume

_FINER = 2  # the atoms are drawn on a grid this much finer than asked for …
_BLUR_PER_AREA = 23.0  # … with at least this B per pixel area, so that what folds back is below exp(−23/2) = 1e-5
_EDGE_SHELLS = 5  # width of the low-pass edge


def density_from_model(
    path: str | os.PathLike[str],
    box: int,
    pixel_size: float,
    resolution: float | None = None,
    b_factor: float | None = None,
    centre: str = "mass",
    grid_origin: Sequence[float] | None = None,
) -> Volume:
    """Density (z, y, x) float32 of the first model in a file, all its atoms with their occupancies.

    The centre of mass (or, with centre="origin", the origin of the file's coordinates) lies at pixel box//2; with grid_origin
    (xyz, Å, as in a map's header) the atoms stay at their coordinates and the first voxel lies there. b_factor (Å²) replaces the
    atoms' own; resolution (Å) low-passes with a raised cosine of 5 shells around it. Without it the map is band-limited by the
    grid alone. Raises BadInput: gemmi missing, file missing or not a model, atoms outside the box.
    """
    if centre not in ("mass", "origin"):
        raise ValueError(f"centre must be 'mass' or 'origin', got {centre!r}")
    gemmi = _gemmi()
    model = _first_model(gemmi, Path(path))
    atoms = [site.atom for site in model.all()]
    to_centre = box // 2 * pixel_size
    if grid_origin is not None:
        middle = np.array(grid_origin, dtype=float) + to_centre
    else:
        middle = np.array(model.calculate_center_of_mass().tolist() if centre == "mass" else (0.0, 0.0, 0.0))
    positions = np.array([atom.pos.tolist() for atom in atoms]) - middle
    low, high = -to_centre, (box - box // 2 - 1) * pixel_size
    if grid_origin is not None:
        check_inside(path, positions + to_centre, box, pixel_size)
    elif positions.min() < low or positions.max() > high:
        needed = math.ceil(2 * np.abs(positions).max() / pixel_size) + 2
        reach = np.abs(positions).max()
        needed = 2 * math.ceil(reach / pixel_size) + 2
        raise BadInput(
            f"{path}: the model reaches {reach:.0f} Å from its centre, the box of {box} px ({box * pixel_size:.0f} Å) is too small for it; "
            f"use at least {needed} px"
        )
    spacing = pixel_size / _FINER
    for atom, position in zip(atoms, positions.tolist(), strict=True):
        atom.pos = gemmi.Position(*(x + to_centre for x in position))
        if b_factor is not None:
            atom.b_iso = b_factor
            atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    blur = max(0.0, _BLUR_PER_AREA * pixel_size**2 - min(atom.b_iso for atom in atoms))
    fine = _draw(gemmi, model, _FINER * box, spacing, blur)
    data = _crop_transform(torch.from_numpy(fine.grid.array).permute(2, 1, 0), box, pixel_size, blur, resolution)
    return Volume(data, pixel_size, (0.0, 0.0, 0.0) if grid_origin is None else (grid_origin[0], grid_origin[1], grid_origin[2]))


@dataclass(frozen=True)
class Atoms:
    """The atoms of a model but for hydrogens, in file order, and how many residues of which kind it has."""

    position: Tensor  # (n, 3) float64 Å, xyz in the file's frame
    b_factor: Tensor  # (n,) float64 Å²
    occupancy: Tensor  # (n,) float64
    residue: Tensor  # (n,) int64, index into the lists below
    chains: tuple[str, ...]  # of each residue
    numbers: tuple[str, ...]  # of each residue, with its insertion code
    names: tuple[str, ...]  # of each residue
    kinds: tuple[str, ...]  # of each residue: protein, nucleic, water or ligand


def read_atoms(path: str | os.PathLike[str]) -> Atoms:
    """Atoms of the first model of a coordinate file without hydrogens; raises BadInput as density_from_model does."""
    gemmi = _gemmi()
    model = _first_model(gemmi, Path(path))
    rows, residues = [], []
    for chain in model:
        for residue in chain:
            heavy = [atom for atom in residue if not atom.is_hydrogen()]
            rows += [(*atom.pos.tolist(), atom.b_iso, atom.occ, len(residues)) for atom in heavy]
            residues.append((chain.name, f"{residue.seqid.num}{residue.seqid.icode.strip()}", residue.name, _kind(gemmi, residue.name)))
    if not rows:
        raise BadInput(f"{path}: holds hydrogens only; expected an atomic model")
    table = torch.tensor(rows, dtype=torch.float64)
    chains, numbers, names, kinds = zip(*residues, strict=True)
    return Atoms(table[:, :3], table[:, 3], table[:, 4], table[:, 5].long(), chains, numbers, names, kinds)


def check_inside(path: str | os.PathLike[str], position: np.ndarray, box: int, pixel_size: float) -> None:
    """Raise BadInput naming the file unless all positions (n, 3), xyz in Å from the first voxel, lie in a box."""
    low, high = position.min(0), position.max(0)
    side = (box - 1) * pixel_size
    if (low < 0).any() or (high > side).any():
        spans = ", ".join(f"{axis} {a:.0f} to {b:.0f}" for axis, a, b in zip("xyz", low, high, strict=True))
        outside = int(((position < 0) | (position > side)).any(1).sum())
        raise BadInput(f"{path}: {outside} of {len(position)} atoms lie outside the map: they reach {spans} Å from its first voxel, "
                       f"the map 0 to {side:.0f} Å; check the map's origin, or pad it with `frazil map crop`")  # fmt: skip


def _kind(gemmi: Any, name: str) -> str:
    """What a residue is, by its name."""
    info = gemmi.find_tabulated_residue(name)
    if info.is_amino_acid():
        return "protein"
    if info.is_nucleic_acid():
        return "nucleic"
    return "water" if info.is_water() else "ligand"


def _gemmi() -> ModuleType:
    """The gemmi module, or a clear word about what to install."""
    try:
        import gemmi
    except ImportError:
        raise BadInput("atomic models need the package gemmi; install it with: pip install 'frazil[models]'") from None
    return gemmi


def _first_model(gemmi: Any, path: Path) -> Any:
    """A copy of the first model of a coordinate file; atoms of unknown elements are an error."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected an atomic model (.cif or .pdb, also .gz)")
    try:
        if path.suffix == ".gz":  # unpacked here: gemmi reads a gzip file that was cut short without complaint
            structure = gemmi.read_structure_string(gzip.decompress(path.read_bytes()))
        else:
            structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read as an atomic model: {str(error).splitlines()[0]}") from error
    if not len(structure) or not structure[0].count_atom_sites():
        raise BadInput(f"{path}: holds no atoms; expected an atomic model (.cif or .pdb, also .gz)")
    model = structure[0].clone()
    for site in model.all():
        if site.atom.element.name == "X":
            raise BadInput(f"{path}: atom {site.atom.name} of residue {site.residue} has no known element; correct its element column")
    return model


def _draw(gemmi: Any, model: Any, side: int, spacing: float, blur: float) -> Any:
    """gemmi's calculator with the density of the atoms on its grid (a cube), each Gaussian widened by `blur` (Å²)."""
    calculator = gemmi.DensityCalculatorE()
    length = side * spacing
    calculator.grid.set_unit_cell(gemmi.UnitCell(length, length, length, 90, 90, 90))
    calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
    calculator.grid.set_size(side, side, side)
    calculator.blur = blur
    # The radius of an atom ends where its density falls below this: 1e-5 of the peak of a blurred carbon (2.5 Å).
    calculator.cutoff = 1e-5 * 2.5 * (4 * math.pi / (_BLUR_PER_AREA * (_FINER * spacing) ** 2 + 20)) ** 1.5
    calculator.add_model_density_to_grid(model)
    return calculator


def _crop_transform(fine: Tensor, box: int, pixel_size: float, blur: float, resolution: float | None) -> Tensor:
    """(z, y, x) map of side `box` from one that is _FINER times finer: crop its transform, take the blur off, low-pass.

    Cropped plane by plane: a whole transform of the fine grid would take several times the memory of the map.
    """
    side = fine.shape[0]
    keep = torch.arange(-((box - 1) // 2), (box - 1) // 2 + 1)  # without Nyquist of an even box: the result is real
    half = len(keep) // 2 + 1
    planes = torch.empty(side, len(keep), half, dtype=torch.complex64)
    for z in range(side):
        planes[z] = torch.fft.fft(torch.fft.rfft(fine[z], dim=1)[:, :half], dim=0)[keep % side]
    out = torch.zeros(box, box, box // 2 + 1, dtype=torch.complex64)
    for y in range(len(keep)):
        column = torch.fft.fft(planes[:, y], dim=0)[keep % side]
        shell2 = (keep[:, None] ** 2 + keep[y] ** 2 + torch.arange(half)[None, :] ** 2).double()
        weight = torch.exp(blur * shell2 / (4 * (box * pixel_size) ** 2))
        if resolution is not None:
            weight *= _low_pass(shell2.sqrt(), box * pixel_size / resolution)
        out[keep % box, keep[y] % box, :half] = (column * weight).to(out.dtype)
    return torch.fft.irfftn(out, s=(box, box, box)) / _FINER**3


def _low_pass(shell: Tensor, cut: float) -> Tensor:
    """Raised cosine from 1 to 0 over _EDGE_SHELLS shells around shell `cut`."""
    t = ((shell - cut) / _EDGE_SHELLS + 0.5).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(math.pi * t)
