"""Particle STAR files of RELION 3.0 to 5 as `Particles`, and back without losing a column.

Angles follow spec/refinement 1.3: matrices act on xyz columns and take the map to the camera. Columns stay text, character by
character, until they are replaced; only what frazil refines is written anew. Files of RELION 3.0 and before (one table, offsets
in pixels) are converted on reading.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles
from frazil.io.images import StackImages, find_stack, split_image_name, usable_names
from frazil.io.mrc import read_header
from frazil.io.star import Block, Star, as_table, first_table, read_star, write_star

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
ANGLE_PRIORS = tuple(f"{label}Prior" for label in ANGLES)
ORIGINS = ("rlnOriginXAngst", "rlnOriginYAngst")
ORIGIN_PRIORS = ("rlnOriginXPriorAngst", "rlnOriginYPriorAngst")
_OPTICS_30 = (
    "rlnAmplitudeContrast", "rlnBeamTiltX", "rlnBeamTiltY", "rlnSphericalAberration", "rlnVoltage",
    "rlnDetectorPixelSize", "rlnMagnification", "rlnPixelSize", "rlnImagePixelSize",
)  # fmt: skip
_UNITS = {"rlnVoltage": "kV", "rlnSphericalAberration": "mm", "rlnAmplitudeContrast": "fraction", "rlnImagePixelSize": "Å"}
_DECIMALS = 9  # of angles and offsets: exact enough to go on from, without the noise of the last bits


@dataclass(frozen=True)
class ParticleSet:
    """A particle STAR file: what frazil understands of it (`particles`) and everything else as it was."""

    path: Path | None
    table: pd.DataFrame  # data_particles, every column text as in the file
    optics_table: pd.DataFrame  # data_optics, every column text
    particles: Particles
    blocks: dict[str, Block] = field(default_factory=dict)  # any further blocks
    comment: str = ""  # from the top of the file
    skipped_rows: int = 0  # rows with too few values, left out
    converted: bool = False  # from RELION 3.0 or before

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Tensor) -> ParticleSet:
        """The rows at `index` (int64 or bool tensor), particles and table alike."""
        return replace(self, table=self.table.iloc[index.cpu().numpy()].reset_index(drop=True), particles=self.particles[index])

    def from_here(self) -> ParticleSet:
        """The set with image names that are found from the current folder too, so that files written anywhere can be read again."""
        if "rlnImageName" not in self.table:
            return self
        return replace(self, table=self.table.assign(rlnImageName=usable_names(self.image_names, self.path)))

    @property
    def image_names(self) -> list[str]:
        """rlnImageName of every particle. Raises BadInput if there is no such column."""
        if "rlnImageName" not in self.table:
            raise BadInput(f"{self.path}: label _rlnImageName is missing from the table of particles; extract the particles first")
        return self.table["rlnImageName"].tolist()

    @property
    def boxes(self) -> Tensor:
        """(n,) int64 side of every particle image in px by its optics group, 0 where unknown."""
        return torch.tensor([o.box for o in self.particles.optics], dtype=torch.int64)[self.particles.group]

    @property
    def has_ctf(self) -> bool:
        """Whether the file gives a defocus."""
        return "rlnDefocusU" in self.table

    def numbers(self, label: str, default: float | None = None) -> np.ndarray:
        """(n,) float64 of any column of the table. A missing label gives `default`, or BadInput where that is None."""
        return _numbers(self.table, label, self.path, default)


def read_particles(path: str | os.PathLike[str]) -> ParticleSet:
    """Particles of a RELION STAR file; versions before 3.1 are converted.

    Missing angles, offsets, defocus and class are 0, norm and CTF scale 1. Box sizes that are not in the file are taken from
    the stacks, where these are found. Raises BadInput naming file, row and label: not a STAR file, no particles, missing voltage,
    Cs, amplitude contrast or pixel size, values that are no finite numbers, unknown optics groups, rlnRandomSubset other than 1 or 2.
    """
    path = Path(path)
    star = read_star(path, text=True)
    name, table = _particle_table(star, path)
    found = as_table(star["optics"]) if "optics" in star else None
    optics_table, table = _convert_30(table, path) if found is None else (found, table)
    optics_table = _with_box(optics_table, table, path)
    optics = tuple(_optics(row, k, path) for k, row in enumerate(optics_table.to_dict("records"), 1))
    group = _group(table, optics_table, path)
    table = _offsets_to_angstrom(table, np.array([o.pixel_size for o in optics])[group], path)
    others = {key: block for key, block in star.items() if key not in (name, "optics")}
    particles = _particles(table, optics, group, path)
    return ParticleSet(path, table, optics_table, particles, others, star.comment, star.skipped_rows, converted=found is None)


def make_particle_set(particles: Particles, image_names: Sequence[str]) -> ParticleSet:
    """A set for particles that came from no STAR file (simulated ones), ready for write_particles."""
    optics = [
        {
            "rlnOpticsGroup": str(k), "rlnOpticsGroupName": o.name, "rlnVoltage": repr(o.voltage), "rlnSphericalAberration": repr(o.cs),
            "rlnAmplitudeContrast": repr(o.amplitude_contrast), "rlnImagePixelSize": repr(o.pixel_size), "rlnImageSize": str(o.box),
            "rlnImageDimensionality": "2", "rlnCtfDataAreCtfPremultiplied": str(int(o.ctf_premultiplied)),
            "rlnBeamTiltX": repr(o.beam_tilt[0]), "rlnBeamTiltY": repr(o.beam_tilt[1]),
            "rlnOddZernike": _vector(o.odd_zernike), "rlnEvenZernike": _vector(o.even_zernike),
            **{f"rlnMagMat{ij}": repr(value) for ij, value in zip(("00", "01", "10", "11"), o.magnification, strict=True)},
        }
        for k, o in enumerate(particles.optics, 1)
    ]  # fmt: skip
    names = np.asarray(particles.micrographs, dtype=object)[particles.micrograph.numpy()]
    numbers = {
        "rlnDefocusU": particles.defocus[:, 0], "rlnDefocusV": particles.defocus[:, 1], "rlnDefocusAngle": particles.defocus[:, 2],
        "rlnPhaseShift": particles.phase_shift, "rlnCtfBfactor": particles.b_factor, "rlnCtfScalefactor": particles.ctf_scale,
    }  # fmt: skip
    columns = {
        "rlnImageName": list(image_names), "rlnMicrographName": [str(n) for n in names],
        "rlnOpticsGroup": [str(g + 1) for g in particles.group.tolist()],
        **{label: [repr(v) for v in values.tolist()] for label, values in numbers.items()},
    }  # fmt: skip
    return ParticleSet(None, pd.DataFrame(columns, dtype="str"), pd.DataFrame(optics, dtype="str"), particles)


def write_particles(
    path: str | os.PathLike[str],
    origin: ParticleSet,
    particles: Particles | None = None,
    extra: Mapping[str, Tensor | np.ndarray | Sequence[object]] | None = None,
) -> None:
    """Write `origin` in RELION's 3.1 form, atomically, with the poses, halves, norms and classes of `particles` (same rows).

    Columns keep their place and, unless replaced, their text; new ones come last. `extra`: further columns by label (without
    the underscore), one value a row. Raises BadInput naming the file if it cannot be written.
    """
    particles = origin.particles if particles is None else particles
    columns: dict[str, Tensor | np.ndarray | Sequence[object]] = {}
    angles = matrix_to_angles(particles.rotation)
    for k, label in enumerate(ANGLES):
        columns[label] = _rounded(angles[:, k])
    for k, label in enumerate(ORIGINS):
        columns[label] = _rounded(particles.shift[:, k])
    columns["rlnClassNumber"] = particles.klass
    columns["rlnNormCorrection"] = particles.norm
    if bool((particles.half > 0).any()):
        columns["rlnRandomSubset"] = particles.half
    columns.update(extra or {})
    table = origin.table.copy(deep=False)
    for label, values in columns.items():
        if len(values) != len(table):
            raise ValueError(f"{label}: {len(values)} values for {len(table)} particles")
        table[label] = values.cpu().numpy() if isinstance(values, Tensor) else values
    write_star(path, {"optics": origin.optics_table, "particles": table, **origin.blocks}, comment=origin.comment)


def open_images(origin: ParticleSet, root: str | os.PathLike[str] | None = None, memory_budget: int = 0, threads: int = 4) -> StackImages:
    """The images of a set, in its order; see StackImages. Raises BadInput if the set names no images."""
    return StackImages(origin.image_names, origin.path, root, origin.boxes, memory_budget, threads)


def match_by_image_name(a: ParticleSet | Sequence[str], b: ParticleSet | Sequence[str]) -> tuple[Tensor, Tensor]:
    """(i, j) int64 such that image a[i] is image b[j], for every image in both, in the order of a.

    "1@x.mrcs" and "000001@x.mrcs" are the same image. Raises BadInput if one list names an image twice.
    """
    keys = [[split_image_name(n) for n in (s.image_names if isinstance(s, ParticleSet) else s)] for s in (a, b)]
    for source, names in zip((a, b), keys, strict=True):
        if len(set(names)) < len(names):
            first = Counter(names).most_common(1)[0][0]
            raise BadInput(f"{getattr(source, 'path', 'list')}: image {first[0]:06d}@{first[1]} is named twice; images must be unique")
    where = {key: j for j, key in enumerate(keys[1])}
    pairs = [(i, where[key]) for i, key in enumerate(keys[0]) if key in where]
    i, j = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return i, j


def angles_to_matrix(angles: np.ndarray) -> Tensor:
    """(n, 3, 3) float64 rotations of (n, 3) rot, tilt, psi in degrees (spec/refinement 1.3)."""
    # The same formula as maths.rotation, which this layer may not import; a test holds the two equal.
    a, b, g = np.deg2rad(np.asarray(angles, np.float64)).T
    z1, y, z2 = (_turn(t, axes) for t, axes in ((a, (0, 1)), (b, (2, 0)), (g, (0, 1))))
    return torch.from_numpy(z2 @ y @ z1)


def matrix_to_angles(rotation: Tensor) -> Tensor:
    """(n, 3) rot, tilt, psi in degrees of (n, 3, 3): rot, psi in (−180, 180], tilt in [0, 180]; rot = 0 at the poles."""
    m = rotation.detach().cpu().double()
    sin_tilt = torch.hypot(m[:, 2, 0], m[:, 2, 1])
    pole = sin_tilt < 1e-7
    rot = torch.where(pole, 0.0, torch.atan2(m[:, 2, 1], m[:, 2, 0]))
    psi = torch.where(pole, torch.atan2(m[:, 0, 1], m[:, 1, 1]), torch.atan2(m[:, 1, 2], -m[:, 0, 2]))
    angles = torch.rad2deg(torch.stack([rot, torch.atan2(sin_tilt, m[:, 2, 2]), psi], 1))
    return torch.where(angles <= -180 + 1e-12, angles + 360, angles)


def _turn(angle: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """(n, 3, 3) passive rotations by `angle` (radians) in the plane from axis i to axis j."""
    i, j = axes
    out = np.broadcast_to(np.eye(3), (len(angle), 3, 3)).copy()
    out[:, i, i] = out[:, j, j] = np.cos(angle)
    out[:, i, j] = np.sin(angle)
    out[:, j, i] = -np.sin(angle)
    return out


def _rounded(values: Tensor) -> np.ndarray:
    return np.round(values.detach().cpu().double().numpy(), _DECIMALS) + 0.0  # + 0.0: no negative zeros


def _vector(values: Sequence[float]) -> str:
    return "[" + ",".join(repr(float(v)) for v in values) + "]"


def _particle_table(star: Star, path: Path) -> tuple[str, pd.DataFrame]:
    """Name and rows of the table of particles, whatever the version calls it."""
    block = star.get("particles")
    found = ("particles", block) if isinstance(block, pd.DataFrame) else first_table(star, "rlnImageName")
    if found is None:
        raise BadInput(f"{path}: no table of particles: expected data_particles with _rlnImageName, found {', '.join(star) or 'nothing'}")
    if star.long_line:
        raise BadInput(f"{path}: line {star.long_line} holds more values than labels; write names with spaces in double quotes")
    name, table = found
    if not len(table):
        raise BadInput(f"{path}: holds no particles (data_{name} is empty)")
    return name, table


def _numbers(table: pd.DataFrame, label: str, path: Path | None, default: float | None) -> np.ndarray:
    """Column `label` as finite float64."""
    if label not in table:
        if default is None:
            raise BadInput(f"{path}: label _{label} is missing from the table of particles")
        return np.full(len(table), default)
    try:
        values = pa.array(table[label], pa.large_string(), from_pandas=True).cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        values = np.array([_number_or_nan(text) for text in table[label].tolist()])
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(bad[0])
        raise BadInput(f"{path}: row {row + 1}: _{label} is {table[label].iloc[row]!r}; expected a finite number ({len(bad)} such rows)")
    return np.array(values, dtype=np.float64)


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _integers(table: pd.DataFrame, label: str, path: Path | None, default: int) -> np.ndarray:
    """Column `label` as int64."""
    values = _numbers(table, label, path, default)
    bad = np.flatnonzero(values != np.round(values))
    if len(bad):
        raise BadInput(f"{path}: row {bad[0] + 1}: _{label} is {table[label].iloc[int(bad[0])]!r}; expected an integer")
    return values.astype(np.int64)


def _optics(row: Mapping[str, str], number: int, path: Path) -> Optics:
    """One row of the optics table."""

    def number_of(label: str, default: float | None = None) -> float:
        if label not in row and default is None:
            raise BadInput(f"{path}: data_optics: label _{label} is missing ({_UNITS[label]}); add it for every optics group")
        value = _number_or_nan(row.get(label, str(default)))
        if not np.isfinite(value):
            raise BadInput(f"{path}: data_optics: row {number}: _{label} is {row[label]!r}; expected a finite number")
        return value

    def vector_of(label: str) -> tuple[float, ...]:
        text = row.get(label, "").strip("[]() ")
        try:
            return tuple(float(v) for v in text.replace(",", " ").split())
        except ValueError:
            raise BadInput(f"{path}: data_optics: row {number}: _{label} is {row[label]!r}; expected numbers like [0.1,0.2]") from None

    pixel_size = number_of("rlnImagePixelSize")
    if pixel_size <= 0:
        raise BadInput(f"{path}: data_optics: row {number}: _rlnImagePixelSize is {pixel_size}; expected Å per pixel, above 0")
    mag = tuple(number_of(f"rlnMagMat{i}{j}", float(i == j)) for i in (0, 1) for j in (0, 1))
    return Optics(
        pixel_size=pixel_size,
        box=int(number_of("rlnImageSize", 0)),
        voltage=number_of("rlnVoltage"),
        cs=number_of("rlnSphericalAberration"),
        amplitude_contrast=number_of("rlnAmplitudeContrast"),
        name=row.get("rlnOpticsGroupName", f"opticsGroup{number}"),
        ctf_premultiplied=number_of("rlnCtfDataAreCtfPremultiplied", 0) != 0,
        beam_tilt=(number_of("rlnBeamTiltX", 0), number_of("rlnBeamTiltY", 0)),
        odd_zernike=vector_of("rlnOddZernike"),
        even_zernike=vector_of("rlnEvenZernike"),
        magnification=(mag[0], mag[1], mag[2], mag[3]),
        mtf=row.get("rlnMtfFileName", ""),
    )


def _group(table: pd.DataFrame, optics_table: pd.DataFrame, path: Path) -> np.ndarray:
    """(n,) int64 index into the optics table of every particle."""
    numbers = _integers(optics_table, "rlnOpticsGroup", path, 1)
    if len(set(numbers.tolist())) < len(numbers):
        raise BadInput(f"{path}: data_optics: _rlnOpticsGroup must differ in every row, got {numbers.tolist()}")
    if "rlnOpticsGroup" not in table:
        if len(numbers) > 1:
            raise BadInput(f"{path}: label _rlnOpticsGroup is missing from data_particles, but data_optics has {len(numbers)} groups")
        return np.zeros(len(table), np.int64)
    wanted = _integers(table, "rlnOpticsGroup", path, 1)
    order = np.argsort(numbers)
    at = order[np.searchsorted(numbers[order], wanted).clip(max=len(numbers) - 1)]
    bad = np.flatnonzero(numbers[at] != wanted)
    if len(bad):
        raise BadInput(f"{path}: row {bad[0] + 1}: _rlnOpticsGroup is {wanted[bad[0]]}; data_optics has {sorted(numbers.tolist())}")
    return at


def _with_box(optics_table: pd.DataFrame, table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The optics table with rlnImageSize; where the file does not say, from the header of the group's first stack, if it is there."""
    if "rlnImageSize" in optics_table or "rlnImageName" not in table:
        return optics_table
    group = _group(table, optics_table, path)
    sides = []
    for g in range(len(optics_table)):
        rows = np.flatnonzero(group == g)
        found = find_stack(table["rlnImageName"].iloc[rows[0]].rpartition("@")[2], path) if len(rows) else None
        sides.append(str(read_header(found).shape[2]) if found else "0")
    if "0" in sides:
        return optics_table
    return optics_table.assign(rlnImageSize=pd.Series(sides, dtype="str"))


def _convert_30(table: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(optics table, table of particles) of a file of one table: an optics group for every different setting, by appearance."""
    for label in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"):
        if label not in table:
            raise BadInput(f"{path}: label _{label} is missing ({_UNITS[label]}), and there is no data_optics; add the column")
    keys = [label for label in _OPTICS_30 if label in table]
    group = table.groupby(keys, sort=False).ngroup().to_numpy() if keys else np.zeros(len(table), np.int64)
    first = [int(np.flatnonzero(group == g)[0]) for g in range(int(group.max()) + 1)]
    optics = table[keys].iloc[first].reset_index(drop=True)
    if "rlnDetectorPixelSize" in keys and "rlnMagnification" in keys:
        pixel = 1e4 * _numbers(optics, "rlnDetectorPixelSize", path, None) / _numbers(optics, "rlnMagnification", path, None)
    elif "rlnPixelSize" in keys or "rlnImagePixelSize" in keys:
        pixel = _numbers(optics, "rlnImagePixelSize" if "rlnImagePixelSize" in keys else "rlnPixelSize", path, None)
    else:
        raise BadInput(f"{path}: the pixel size is missing: expected _rlnDetectorPixelSize and _rlnMagnification (or data_optics)")
    optics = optics.drop(columns=["rlnImagePixelSize"], errors="ignore")
    optics.insert(0, "rlnOpticsGroupName", pd.Series([f"opticsGroup{g + 1}" for g in range(len(first))], dtype="str"))
    optics.insert(1, "rlnOpticsGroup", pd.Series([str(g + 1) for g in range(len(first))], dtype="str"))
    optics["rlnImagePixelSize"] = pd.Series([f"{p:.10g}" for p in pixel], dtype="str")
    optics["rlnImageDimensionality"] = pd.Series(["2"] * len(first), dtype="str")
    table = table.drop(columns=keys)
    return optics, table.assign(rlnOpticsGroup=pd.Series((group + 1).astype(str), dtype="str"))


def _offsets_to_angstrom(table: pd.DataFrame, pixel_size: np.ndarray, path: Path) -> pd.DataFrame:
    """The table with rlnOriginX/Y (and their priors) in pixels replaced by columns in Å, at the same place."""
    for pixels, angstrom in zip(("rlnOriginX", "rlnOriginY", "rlnOriginXPrior", "rlnOriginYPrior"), ORIGINS + ORIGIN_PRIORS, strict=True):
        if pixels in table and angstrom not in table:
            text = [f"{v:.6f}" for v in _numbers(table, pixels, path, None) * pixel_size]
            table = table.assign(**{pixels: pd.Series(text, dtype="str")}).rename(columns={pixels: angstrom})
    return table


def _particles(table: pd.DataFrame, optics: tuple[Optics, ...], group: np.ndarray, path: Path) -> Particles:
    """What frazil understands of a table."""

    def column(label: str, default: float = 0.0) -> np.ndarray:
        return _numbers(table, label, path, default)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    half = _integers(table, "rlnRandomSubset", path, 0)
    bad = np.flatnonzero((half != 1) & (half != 2))
    if "rlnRandomSubset" in table and len(bad):
        raise BadInput(
            f"{path}: row {bad[0] + 1}: _rlnRandomSubset is {half[bad[0]]}; expected 1 or 2 in every row, "
            f"or remove the column ({len(bad)} such rows)"
        )
    scale_label = next((label for label in ("rlnGroupName", "rlnMicrographName") if label in table), None)
    micrograph, names = (np.zeros(len(table), np.int64), [""]) if scale_label is None else pd.factorize(table[scale_label].to_numpy(object))
    u = column("rlnDefocusU")
    defocus = np.stack([u, column("rlnDefocusV") if "rlnDefocusV" in table else u, column("rlnDefocusAngle")], 1)
    angles = np.stack([column(label) for label in ANGLES], 1)
    shift = np.stack([column(label) for label in ORIGINS], 1)
    prior_rotation = prior_shift = None
    if any(label in table for label in ANGLE_PRIORS):  # an angle without a prior of its own keeps its value
        prior_rotation = angles_to_matrix(np.stack([column(p) if p in table else angles[:, k] for k, p in enumerate(ANGLE_PRIORS)], 1))
    if any(label in table for label in ORIGIN_PRIORS):
        prior_shift = tensor(np.stack([column(p) for p in ORIGIN_PRIORS], 1))
    return Particles(
        optics=optics,
        group=tensor(group),
        rotation=angles_to_matrix(angles),
        shift=tensor(shift),
        defocus=tensor(defocus),
        half=tensor(half),
        micrograph=tensor(micrograph.astype(np.int64)),
        micrographs=tuple(str(n) for n in names),
        phase_shift=tensor(column("rlnPhaseShift")),
        b_factor=tensor(column("rlnCtfBfactor")),
        ctf_scale=tensor(column("rlnCtfScalefactor", 1.0)),
        norm=tensor(column("rlnNormCorrection", 1.0)),
        klass=tensor(_integers(table, "rlnClassNumber", path, 0)),
        prior_rotation=prior_rotation,
        prior_shift=prior_shift,
    )
