"""Positions that `frazil extract` starts from, and the tables it writes."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles
from frazil.io.coordinates import CLASS, NAME, PSI, SCORE, X, Y, read_coordinates, root
from frazil.io.micrographs import Micrographs
from frazil.io.particles import ORIGIN_PRIORS, ORIGINS, ParticleSet, read_particles
from frazil.io.stacks import stack_count
from frazil.io.star import Block, column_text, read_whole_star, write_star
from frazil.jobs.extract_scale import pick_pixels, refined_pixels, scale_factors
from frazil.jobs.pick_files import output_names
from frazil.jobs.run import Run
from frazil.steps.extract import ExtractSettings, refined_places

CTF_COLUMNS = ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor", "rlnCtfScalefactor",
               "rlnCtfMaxResolution", "rlnCtfFigureOfMerit")  # fmt: skip
IMAGE, GROUP = "rlnImageName", "rlnOpticsGroup"
POSITIONS = "frazilPositions"
QUALITY = ("rlnMaxValueProbDistribution", SCORE)  # of two particles that are one the higher stays; in this order


@dataclass
class Wanted:
    """Positions by index of their micrograph."""

    places: dict[int, Tensor]  # (n, 2) float64 px: where the particles are
    tables: dict[int, pd.DataFrame]  # columns to carry along, text, n rows
    quality: dict[int, Tensor]  # (n,)
    origin: ParticleSet | None = None  # refined particles
    rows: dict[int, Tensor] = field(default_factory=dict)  # of them, by micrograph
    blocks: dict[str, Block] = field(default_factory=dict)  # further blocks for particles.star
    notes: tuple[str, ...] = ()

    @property
    def has_ctf(self) -> bool:
        """Whether the particles bring their own."""
        return self.origin is not None and self.origin.has_ctf


@dataclass(frozen=True)
class Item:
    """What is written at once: a stack, and the rows of the particles in it."""

    base: str  # path without ending, below the run
    indices: tuple[int, ...]  # micrographs
    stack: Path
    star: Path
    name: str  # of the stack in STAR files: from the folder of the project


def match_names(found: Sequence[str], micrographs: Micrographs, by_file_name: bool) -> dict[str, int]:
    """Index of the micrograph of each name: the same name; or for a bare name (coordinate files have no folder), or where asked for, the
    same file name without endings, if only one micrograph has it."""
    exact = {name: i for i, name in enumerate(micrographs.names)}
    roots: dict[str, list[int]] = {}
    for i, name in enumerate(micrographs.names):
        roots.setdefault(root(name), []).append(i)
    out: dict[str, int] = {}
    for name in found:
        if name in exact:
            out[name] = exact[name]
        elif (by_file_name or "/" not in name) and root(name) in roots:
            several = roots[root(name)]
            if len(several) > 1:
                raise BadInput(f"{name}: {len(several)} micrographs have that file name (first: {micrographs.names[several[0]]}); "
                               "give coordinates that name them in full")  # fmt: skip
            out[name] = several[0]
    return out


def pick_positions(path: str, micrographs: Micrographs, by_file_name: bool, min_score: float | None, scaled: bool = True) -> Wanted:
    """Picked positions. Raises BadInput where none belongs to a micrograph, or scores are asked for that are not there."""
    found = read_coordinates(path)
    where = match_names(list(found), micrographs, by_file_name)
    wanted, notes = Wanted({}, {}, {}), []
    unknown = [name for name in found if name not in where]
    if found and not where:
        raise BadInput(f"{path}: none of its {len(found)} micrographs is in {micrographs.path} (first: {unknown[0]}); "
                       "are they of another job? --by-file-name matches names without folders")  # fmt: skip
    if unknown:
        notes.append(f"{path}: {len(unknown)} micrographs are not in {micrographs.path} and are passed over (first: {unknown[0]})")
    names = [name for name in where if len(found[name])]
    sizes, now = pick_pixels(Path(path), found) if scaled else {}, [micrographs.optics_of(where[name]).pixel_size for name in names]
    factors, lines = scale_factors(path, np.array([sizes.get(name, 0.0) for name in names]), np.array(now))
    factor_of = dict(zip(names, factors.tolist(), strict=True))
    notes += lines
    taken: dict[int, str] = {}
    for name, index in where.items():
        table = found[name]
        if index in taken:
            raise BadInput(f"{path}: {taken[index]} and {name} are both positions of {micrographs.names[index]}; give one of them")
        taken[index] = name
        if min_score is not None:
            if SCORE not in table:
                raise BadInput(f"{path}: --min-score was given, but {name} has no _{SCORE}")
            table = table.iloc[np.flatnonzero(table[SCORE].to_numpy(float) >= min_score)].reset_index(drop=True)
        if not len(table):
            continue
        wanted.places[index] = torch.from_numpy(table[[X, Y]].to_numpy(float) * factor_of[name])
        kept = [label for label in (CLASS, PSI, SCORE) if label in table]
        wanted.tables[index] = pd.DataFrame({label: as_text(table, label) for label in kept}, index=table.index, dtype="str")
        scores = table[SCORE].to_numpy(float) if SCORE in table else -np.arange(len(table), dtype=float)
        wanted.quality[index] = torch.from_numpy(scores.copy())
    empty = len(where) - len(wanted.places)
    if not wanted.places:
        limit = "" if min_score is None else f" of score {min_score:g} or more"
        raise BadInput(f"{path}: holds no positions{limit}; look at the report of the picking job")
    if empty:
        notes.append(f"{empty} of {len(where)} micrographs have no positions")
    wanted.notes = tuple(notes)
    return wanted


def refined_positions(
    path: Path, micrographs: Micrographs, by_file_name: bool, recentre: tuple[float, float, float] | None, reset: bool, scaled: bool = True
) -> Wanted:
    """Positions of refined particles, with everything known of them. Raises BadInput where none belongs to a micrograph."""
    origin = read_particles(path)
    if NAME not in origin.table:
        raise BadInput(f"{path}: label _{NAME} is missing: it says which micrograph a particle is from")
    names = origin.table[NAME]
    where = match_names(list(dict.fromkeys(names)), micrographs, by_file_name)
    if not where:
        raise BadInput(f"{path}: none of its micrographs is in {micrographs.path} (first: {names.iloc[0]}); were they corrected again? "
                       "--by-file-name matches names without folders")  # fmt: skip
    index = np.array([where.get(name, -1) for name in names])
    size = torch.tensor([o.pixel_size for o in micrographs.optics], dtype=torch.float64)[micrographs.group][index.clip(min=0)]
    factors, lines = scale_factors(path, np.where((index < 0) | (not scaled), 0.0, refined_pixels(origin)), size.numpy())
    coordinate = torch.from_numpy(np.stack([origin.numbers(X), origin.numbers(Y)], -1) * factors[:, None])
    p = origin.particles
    shift = torch.zeros_like(p.shift) if reset else p.shift
    point = None if recentre is None else torch.tensor(recentre, dtype=torch.float64)
    places = torch.cat([refined_places(coordinate[i : i + 1], shift[i : i + 1], p.rotation[i : i + 1], s, point)
                        for i, s in enumerate(size.tolist())]) if len(size.unique()) > 1 else refined_places(
        coordinate, shift, p.rotation, float(size[0]), point)  # fmt: skip
    label = next((label for label in QUALITY if label in origin.table), None)
    quality = -np.arange(len(origin), dtype=float) if label is None else origin.numbers(label)
    wanted = Wanted({}, {}, {}, origin, blocks=dict(origin.blocks))
    for i in np.unique(index[index >= 0]).tolist():
        rows = torch.from_numpy(np.flatnonzero(index == i))
        wanted.places[i], wanted.quality[i], wanted.rows[i] = places[rows], torch.from_numpy(quality)[rows], rows
        wanted.tables[i] = origin.table.iloc[rows.numpy()].reset_index(drop=True)
    if lost := int((index < 0).sum()):
        first = names.iloc[int(np.flatnonzero(index < 0)[0])]
        lines.append(f"{path}: {lost} particles of micrographs that are not in {micrographs.path} are left out (first: {first})")
    wanted.notes = tuple(lines)
    return wanted


def as_text(table: pd.DataFrame, label: str) -> list[str]:
    """A column as it would stand in a STAR file."""
    return column_text(pd.Series(table[label])).to_pylist()


def optics_rows(micrographs: Micrographs, wanted: Wanted, settings: ExtractSettings, premultiplied: bool, run: Run) -> pd.DataFrame:
    """data_optics of the particles: the rows and numbers of refined particles, or of the micrographs, for the images written."""
    source = wanted.origin
    if source is not None:
        table, optics = source.optics_table.copy(), list(source.particles.optics)
        sizes = [0.0] * len(table)
        for i, rows in wanted.rows.items():
            for g in source.particles.group[rows].unique().tolist():
                size = micrographs.optics_of(i).pixel_size
                if sizes[g] and abs(sizes[g] - size) > 1e-6 * size:
                    raise BadInput(f"{source.path}: optics group {optics[g].name} has micrographs of {sizes[g]:g} and {size:g} Å a pixel; "
                                   "give them optics groups of their own")  # fmt: skip
                sizes[g] = size
        sizes = [size or micrographs.optics[0].pixel_size for size in sizes]
    else:
        optics = list(micrographs.optics)
        table = micrographs.optics_table.copy() if len(micrographs.optics_table) else pd.DataFrame(
            {"rlnOpticsGroupName": [o.name for o in optics], GROUP: [str(g + 1) for g in range(len(optics))]}, dtype="str")  # fmt: skip
        sizes = [o.pixel_size for o in optics]
        missing = [label for label in add_constants_(table, optics) if label not in micrographs.table]
        if missing:
            run.warn(f"{micrographs.path}: no {', '.join(missing)}: 300 kV, 2.7 mm and 0.1 are written; correct data_optics if wrong")
        if GROUP not in table:
            table.insert(0, GROUP, pd.Series([str(g + 1) for g in range(len(table))], dtype="str"))
    scale = settings.box / settings.size
    columns = {
        "rlnImagePixelSize": [f"{size * scale:.6f}" for size in sizes], "rlnImageSize": [str(settings.size)] * len(table),
        "rlnImageDimensionality": ["2"] * len(table), "rlnCtfDataAreCtfPremultiplied": [str(int(premultiplied))] * len(table),
        "rlnMicrographPixelSize": [f"{size:.6f}" for size in sizes],
    }  # fmt: skip
    if "rlnMicrographOriginalPixelSize" not in table:
        columns["rlnMicrographOriginalPixelSize"] = columns["rlnMicrographPixelSize"]
    return table.assign(**{label: pd.Series(values, dtype="str") for label, values in columns.items()})


def add_constants_(table: pd.DataFrame, optics: Sequence[Optics]) -> list[str]:
    """Voltage, Cs and amplitude contrast, which every particle file has, where the table lacks them; their labels."""
    missing = []
    for label, attribute in (("rlnVoltage", "voltage"), ("rlnSphericalAberration", "cs"), ("rlnAmplitudeContrast", "amplitude_contrast")):
        if label not in table:
            table[label] = pd.Series([f"{getattr(o, attribute):g}" for o in optics], dtype="str")
            missing.append(label)
    return missing


def rows_of(micrographs: Micrographs, wanted: Wanted, index: int, kept: np.ndarray, centre: np.ndarray, shift: np.ndarray) -> pd.DataFrame:
    """Rows of the particles `kept` of a micrograph but for their image names: centres (n, 2) px, shifts (n, 2) Å."""
    table = wanted.tables[index].iloc[kept].reset_index(drop=True).copy()
    text = {X: [f"{x:.6f}" for x in centre[:, 0]], Y: [f"{y:.6f}" for y in centre[:, 1]]}
    text |= {label: [f"{v + 0.0:.6f}" for v in shift[:, k]] for k, label in enumerate(ORIGINS)}
    text[NAME] = [micrographs.names[index]] * len(table)
    table = table.drop(columns=list(ORIGIN_PRIORS), errors="ignore")  # they were about the old centre
    source = micrographs.table
    if wanted.origin is None:
        text[GROUP] = [str(source[GROUP].iloc[index]) if GROUP in source else str(int(micrographs.group[index]) + 1)] * len(table)
    if not wanted.has_ctf and bool(micrographs.has_ctf[index]):
        text |= {label: [str(source[label].iloc[index])] * len(table) for label in CTF_COLUMNS if label in source}
        defaults = {"rlnDefocusAngle": "0.0", "rlnPhaseShift": "0.0", "rlnCtfBfactor": "0.0", "rlnCtfScalefactor": "1.0"}
        text |= {label: [value] * len(table) for label, value in defaults.items() if label not in text}
    if GROUP not in table and GROUP not in text:
        text[GROUP] = ["1"] * len(table)
    return table.assign(**{label: pd.Series(values, dtype="str") for label, values in text.items()})


def ctf_particles(micrographs: Micrographs, wanted: Wanted, index: int, kept: np.ndarray) -> tuple[Optics, Particles | None, Tensor]:
    """What premultiplying needs: optics, refined particles (None: the micrograph's own CTF), their rows."""
    if wanted.origin is None or not wanted.has_ctf:
        return micrographs.optics_of(index), None, torch.zeros(len(kept), dtype=torch.int64)
    rows = wanted.rows[index][torch.from_numpy(kept)]
    particles = wanted.origin.particles
    return particles.optics[int(particles.group[rows[0]])], particles, rows


def make_items(folder: Path, micrographs: Micrographs, wanted: Wanted, stack_size: int) -> list[Item]:
    """A stack for each micrograph with positions, or (stack_size > 0) one for several in a row of the same pixel size."""
    inside = folder.resolve().is_relative_to(Path.cwd())
    named = folder.resolve().relative_to(Path.cwd()) if inside else folder.resolve()
    bases = output_names(micrographs)
    chosen = [i for i in range(len(micrographs)) if i in wanted.places]
    if not stack_size:
        groups = [(bases[i], (i,)) for i in chosen]
    else:
        groups, current, held = [], [], 0
        for i in chosen:
            n, other = len(wanted.places[i]), current and micrographs.group[i] != micrographs.group[current[-1]]
            if current and (held + n > stack_size or other):
                groups.append((f"stacks/{len(groups) + 1:06d}", tuple(current)))
                current, held = [], 0
            current.append(i)
            held += n
        groups.append((f"stacks/{len(groups) + 1:06d}", tuple(current)))
    return [Item(b, members, folder / f"{b}.mrcs", folder / f"{b}_extract.star", str(named / f"{b}.mrcs")) for b, members in groups]


def positions_of(micrographs: Micrographs, wanted: Wanted, item: Item) -> str:
    """What tells whether an item is still to be extracted at the same positions, with the same columns: a checksum."""
    digest = hashlib.sha256()
    for i in item.indices:
        digest.update(micrographs.names[i].encode() + b"\0")
        digest.update(wanted.places[i].numpy().tobytes() + wanted.quality[i].double().numpy().tobytes())
        for label, column in wanted.tables[i].items():
            digest.update("\0".join(map(str, (label, *column.tolist()))).encode())
    return digest.hexdigest()[:32]


def finished_part(item: Item, positions: str) -> tuple[pd.DataFrame, dict[str, str]] | None:
    """(rows, data_extract) of an item that an earlier part of the run finished; None if it is not whole or of other positions."""
    try:
        star = read_whole_star(item.star, text=True)
    except BadInput:
        return None
    found, said = star.get("particles"), star.get("extract")
    if not isinstance(found, pd.DataFrame) or IMAGE not in found or stack_count(item.stack) != len(found):
        return None
    return (found, said) if isinstance(said, dict) and said.get(POSITIONS) == positions else None


def write_part(item: Item, optics: pd.DataFrame, table: pd.DataFrame, said: Mapping[str, str | int]) -> None:
    """The STAR file of one stack; said: what --resume needs to know of it, last, as it tells that the rest is there."""
    write_star(item.star, {"optics": optics, "particles": table, "extract": dict(said)})


def write_lists(folder: Path, optics: pd.DataFrame, parts: Sequence[pd.DataFrame], blocks: Mapping[str, Block]) -> None:
    """particles.star: all rows under one optics table. Columns that some parts lack are left out (they have none of their own)."""
    labels = [label for label in parts[0].columns if all(label in part for part in parts)]
    table = pd.concat([part.loc[:, labels] for part in parts], ignore_index=True)
    out: dict[str, Block] = {"optics": optics, "particles": table}
    write_star(folder / "particles.star", out | dict(blocks))
