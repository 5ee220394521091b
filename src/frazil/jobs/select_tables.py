"""Tables that `frazil select` works on: particles or micrographs of one file or several, every column as text, and back."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.coordinates import NAME, SCORE, X, Y
from frazil.io.images import usable_names
from frazil.io.particles import ORIGINS, read_particles
from frazil.io.star import Block, read_star, write_star
from frazil.steps.select import join_optics

IMAGE, GROUP = "rlnImageName", "rlnOpticsGroup"
KINDS = {"particles": IMAGE, "micrographs": NAME, "movies": "rlnMicrographMovieName"}
QUALITY = ("rlnMaxValueProbDistribution", SCORE)
PIXELS = ("rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize", "rlnImagePixelSize")


@dataclass(frozen=True)
class Table:
    """Rows of one kind with their optics."""

    path: Path
    kind: str  # particles, micrographs or movies
    rows: pd.DataFrame  # text
    optics: pd.DataFrame  # text; empty where the file has none
    blocks: dict[str, Block] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, index: Tensor) -> Table:
        """The rows at `index` (bool, or int64)."""
        return replace(self, rows=self.rows.iloc[torch.as_tensor(index).numpy()].reset_index(drop=True))

    def numbers(self, label: str) -> Tensor:
        """(n,) float64 of a column, of the rows or of their optics groups; NaN where the text is no number. BadInput for no such label."""
        if label in self.rows:
            column = self.rows[label]
        elif label in self.optics and GROUP in self.rows:
            of_group = dict(zip(self.optics[GROUP], self.optics[label], strict=True))
            column = pd.Series([of_group[g] for g in self.rows[GROUP]])
        else:
            near = [c for c in (*self.rows.columns, *self.optics.columns) if label.lower().removeprefix("rln") in c.lower()][:3]
            also = f"; did you mean {', '.join(near)}?" if near else ""
            raise BadInput(f"{self.path}: has no label _{label}{also}")
        return torch.from_numpy(np.asarray(pd.to_numeric(column, errors="coerce"), dtype=float).copy())

    @property
    def name(self) -> str:
        """Label that names a row."""
        return KINDS[self.kind]


def read_table(path: Path) -> Table:
    """Particles (any version of RELION), micrographs or movies of a STAR file. Raises BadInput for anything else."""
    star = read_star(path, text=True)
    for kind, label in KINDS.items():
        for block, rows in star.items():
            if not isinstance(rows, pd.DataFrame) or label not in rows or block == "optics":
                continue
            if not len(rows):
                raise BadInput(f"{path}: data_{block} is empty: nothing to select from")
            optics = star.get("optics")
            if isinstance(optics, dict):
                optics = pd.DataFrame({k: [v] for k, v in optics.items()}, dtype="str")
            if kind == "particles" and optics is None:  # of RELION 3.0 or before: converted
                found = read_particles(path)
                return Table(path, kind, found.table, found.optics_table, found.blocks)
            others = {key: value for key, value in star.items() if key not in (block, "optics")}
            table = Table(path, kind, rows, pd.DataFrame() if optics is None else optics, others)
            check_groups(table)
            return table
    raise BadInput(f"{path}: holds no particles, micrographs or movies (no column {', '.join('_' + label for label in KINDS.values())})")


def check_groups(table: Table) -> None:
    """Raise BadInput where a row's optics group is not there."""
    if GROUP not in table.optics or GROUP not in table.rows:
        if len(table.optics) > 1:
            raise BadInput(f"{table.path}: {len(table.optics)} optics groups, but no column _{GROUP} says which row is of which")
        return
    known = set(table.optics[GROUP])
    if len(known) < len(table.optics):
        raise BadInput(f"{table.path}: data_optics: _{GROUP} must differ in every row")
    bad = np.array([i for i, g in enumerate(table.rows[GROUP]) if g not in known], dtype=np.int64)
    if len(bad):
        raise BadInput(f"{table.path}: row {bad[0] + 1}: optics group {table.rows[GROUP].iloc[bad[0]]} is not in data_optics "
                       f"({len(bad)} such rows); add it there")  # fmt: skip


@dataclass(frozen=True)
class Joined:
    """Several tables as one, and what is to be said of it."""

    table: Table
    notes: list[str]  # harmless
    warnings: list[str]
    renumbered: pd.DataFrame | None  # file, old number, new number, name; None where every number stayed


def join_tables(tables: Sequence[Table]) -> Joined:
    """All rows of tables of one kind: union of their optics groups, columns that all have, rows named twice once. See join_optics."""
    first = tables[0]
    for other in tables[1:]:
        if other.kind != first.kind:
            raise BadInput(f"{other.path}: holds {other.kind}, but {first.path} holds {first.kind}; join files of one kind")
        if bool(len(other.optics)) != bool(len(first.optics)):
            raise BadInput(f"{other.path if len(first.optics) else first.path}: has no data_optics, the other file has; convert it first")
    notes, warnings, renumbered = [], [], None
    rows = [table.rows for table in tables]
    optics = first.optics
    if len(first.optics):
        files = [with_names(table) for table in tables]
        join = join_optics(files, [str(table.path) for table in tables])
        optics, lacking = common_columns(join.rows, notes)
        warnings += join.differing + join.renamed + lacking
        rows = [r.assign(**{GROUP: pd.Series([numbers[g] for g in group_of(t, r)], dtype="str", index=r.index)})
                for t, r, numbers in zip(tables, rows, join.numbers, strict=True)]  # fmt: skip
        pairs = zip(tables, join.numbers, strict=True)
        changes = [{"file": str(t.path), "old": old, "new": new} for t, n in pairs for old, new in n.items()]
        if any(c["old"] != c["new"] for c in changes):
            renumbered = pd.DataFrame(changes, dtype="str")
    labels = [label for label in rows[0].columns if all(label in r for r in rows)]
    if dropped := sorted({label for r in rows for label in r.columns} - set(labels)):
        warnings.append(f"columns that not all files have are left out: {', '.join(dropped)}")
    if first.kind == "particles":
        rows = [r.assign(**{IMAGE: usable_names(r[IMAGE], t.path)}) for t, r in zip(tables, rows, strict=True)]
    table = pd.concat([r.loc[:, labels] for r in rows], ignore_index=True)
    copies = table.duplicated(KINDS[first.kind])
    if bool(copies.any()):
        names = table[KINDS[first.kind]].tolist()
        warnings.append(f"{int(copies.sum())} rows name an image of an earlier row again and are left out "
                        f"(first: {names[int(np.flatnonzero(copies)[0])]})")  # fmt: skip
        table = table.iloc[np.flatnonzero(~copies)].reset_index(drop=True)
    lost = sorted({b for t in tables[1:] for b in t.blocks} - set(first.blocks))
    if lost:
        notes.append(f"further tables of the later files are left out: {', '.join(lost)}")
    return Joined(Table(first.path, first.kind, table, optics, first.blocks), notes, warnings, renumbered)


def with_names(table: Table) -> list[dict[str, str]]:
    """Optics rows that have a number and a name."""
    out = []
    for k, row in enumerate(table.optics.to_dict("records"), 1):
        number = str(row.get(GROUP, k))
        out.append({**{str(a): str(b) for a, b in row.items()}, GROUP: number,
                    "rlnOpticsGroupName": str(row.get("rlnOpticsGroupName", f"opticsGroup{number}"))})  # fmt: skip
    return out


def group_of(table: Table, rows: pd.DataFrame) -> list[str]:
    """Optics number of every row."""
    return rows[GROUP].tolist() if GROUP in rows else [with_names(table)[0][GROUP]] * len(rows)


def common_columns(rows: list[dict[str, str]], notes: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """(optics table of the labels that all groups have, warnings about the others)."""
    labels = [label for label in rows[0] if all(label in row for row in rows)]
    dropped = sorted({label for row in rows for label in row} - set(labels))
    lines = [f"settings that not all optics groups have are left out: {', '.join(dropped)}"] if dropped else []
    return pd.DataFrame([{label: row[label] for label in labels} for row in rows], dtype="str"), lines


def write_table(path: Path, table: Table) -> None:
    """The table as STAR; image names are such that they are found from the current folder."""
    rows = table.rows
    if table.kind == "particles":
        rows = rows.assign(**{IMAGE: usable_names(rows[IMAGE], table.path)})
    blocks: dict[str, Block] = {"optics": table.optics} if len(table.optics) else {}
    write_star(path, blocks | {table.kind: rows} | table.blocks)


def pixel_label(table: Table) -> str:
    """The label that gives the pixel size of the micrographs."""
    found = next((label for label in PIXELS if label in table.optics or label in table.rows), None)
    if found is None:
        raise BadInput(f"{table.path}: no pixel size of the micrographs (_{PIXELS[0]}) in data_optics; add it")
    return found


def places(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """((n, 2) Å where the particles are in their micrographs, (n,) index of these, (n,) quality). Raises BadInput for labels missing."""
    if NAME not in table.rows:
        raise BadInput(f"{table.path}: label _{NAME} is missing: copies are looked for micrograph by micrograph")
    coordinate = torch.stack([table.numbers(X), table.numbers(Y)], -1)
    pixel = table.numbers(pixel_label(table))
    none = torch.zeros(len(table), dtype=torch.float64)
    shift = torch.stack([table.numbers(label) if label in table.rows else none for label in ORIGINS], -1)
    where = coordinate * pixel[:, None] - torch.nan_to_num(shift)
    bad = torch.nonzero(~torch.isfinite(where).all(-1))[:, 0]
    if len(bad):
        raise BadInput(f"{table.path}: row {int(bad[0]) + 1}: coordinates or pixel size are no numbers")
    label = next((label for label in QUALITY if label in table.rows), None)
    quality = torch.zeros(len(table)) if label is None else torch.nan_to_num(table.numbers(label), nan=-1e30)
    return where, torch.from_numpy(pd.factorize(table.rows[NAME])[0].astype(np.int64)), quality
