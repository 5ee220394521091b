"""`frazil coordinates`: positions of particles from one program's files to another's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from frazil.data import BadInput
from frazil.io.coordinates import SCORE, X, Y, read_coordinates, root, write_coordinates, write_cs
from frazil.io.micrographs import micrograph_header, read_micrographs
from frazil.jobs.pick_files import write_lists
from frazil.jobs.run import Run

POSITIONAL = ("positions",)
HAS_RUN_DIRECTORY = False


class Params(BaseModel):
    """Read coordinates of any kind and write them as another: RELION's STAR, EMAN's .box, cryoSPARC's .cs, crYOLO's .cbox, CSV."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    positions: Path = Field(description="autopick.star, a coordinate file, or a folder of them")
    output: Path = Field(description="folder to write into")
    format: Literal["star", "box", "cbox", "csv", "cs"] = Field("star", description="what to write")
    box: int = Field(0, ge=0, description="side of the boxes of .box and .cbox files", json_schema_extra={"unit": "px"})
    micrographs: Path | None = Field(
        None, description="STAR file of the micrographs: positions outside of them are left out; needed for cs"
    )
    threshold: float | None = Field(None, description="write only positions with at least this score")


def rows_of(table: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    """The chosen rows (bool), numbered anew."""
    return table.iloc[np.flatnonzero(chosen)].reset_index(drop=True)


def run(params: Params, run: Run | None) -> None:
    """Write a file a micrograph (for cs one file), and autopick.star for STAR."""
    tables = read_coordinates(params.positions)
    shapes: dict[str, tuple[int, int]] = {}
    names: dict[str, str] = {}
    sizes: dict[str, float] = {}
    if params.micrographs is not None:
        known = read_micrographs(params.micrographs)
        for i, name in enumerate(known.names):
            names[root(name)] = name
            sizes[root(name)] = known.optics_of(i).pixel_size
            if root(name) in {root(key) for key in tables}:
                shapes[root(name)] = micrograph_header(known.file(i))[0]
    elif params.format == "cs":
        raise BadInput("--format cs: cryoSPARC keeps fractions of the micrograph's sides; give --micrographs")
    params.output.mkdir(parents=True, exist_ok=True)
    kept, outside = {}, 0
    for name, table in tables.items():
        key = root(name)
        if params.micrographs is not None and key not in names:
            raise BadInput(f"{params.positions}: {name} is not in {params.micrographs}; names must agree but for folder and ending")
        if params.threshold is not None:
            if SCORE not in table:
                raise BadInput(f"{params.positions}: {name} has no scores; leave out --threshold")
            table = rows_of(table, table[SCORE].to_numpy(float) >= params.threshold)
        if key in shapes:
            h, w = shapes[key]
            xy = table[[X, Y]].to_numpy(float)
            inside = ((xy >= 0) & (xy <= np.array([w - 1, h - 1]))).all(1)
            outside += int((~inside).sum())
            table = rows_of(table, np.asarray(inside))
        kept[names.get(key, name)] = table
    if outside:
        print(f"warning: {outside} positions lie outside of their micrographs and were left out")
    if params.format == "cs":
        write_cs(params.output / "particles.cs", kept, {name: shapes[root(name)] for name in kept})
    else:
        rows = []
        for name, table in kept.items():
            file = f"{root(name)}{'_autopick' if params.format == 'star' else ''}.{params.format}"
            write_coordinates(params.output / file, table, params.box)
            rows.append(
                (name, file, float(table[SCORE].mean()) if SCORE in table and len(table) else 0.0, len(table), sizes.get(root(name), 0.0))
            )
        if params.format == "star":
            write_lists(params.output, rows)
    print(f"{sum(map(len, kept.values()))} positions in {len(kept)} micrographs written to {params.output}")
