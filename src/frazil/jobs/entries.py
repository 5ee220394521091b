"""What must be in a STAR file to go on from it: labels and columns, with one clear line where they are missing."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.star import Star, as_table


class Entries(dict[str, Any]):
    """The labels of a list block. `entries[label]` and `number` raise BadInput for one that is missing; `get` does not."""

    def __init__(self, path: Path, block: str, wanted: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.path, self._block, self._wanted = path, block, wanted

    def __missing__(self, label: str) -> Any:
        raise BadInput(f"{self.path}: data_{self._block} has no _{label}; expected {self._wanted}")

    def number(self, label: str, default: float | None = None) -> float:
        """The number at a label; default (if given) where there is none. Raises BadInput for text."""
        value = self[label] if default is None else self.get(label)
        if value in (None, ""):
            value = default
        try:
            return float(str(value))
        except ValueError as error:
            raise BadInput(f"{self.path}: _{label} of data_{self._block} is {value!r}; expected a number") from error

    def whole(self, label: str, default: int | None = None) -> int:
        """The number at a label, as an integer."""
        value = self.number(label, default)
        if not np.isfinite(value):
            raise BadInput(f"{self.path}: _{label} of data_{self._block} is {value}; expected a whole number")
        return int(value)


def entries(star: Star, path: Path, block: str, wanted: str) -> Entries:
    """The list block of a file; wanted: what the file should be, for the message. Raises BadInput where it has none."""
    if block not in star:
        raise BadInput(f"{path}: has no data_{block}; expected {wanted}")
    values = star[block]
    if isinstance(values, pd.DataFrame):
        raise BadInput(f"{path}: data_{block} is a table, not a list of labels; expected {wanted}")
    return Entries(path, block, wanted, dict(values))


def rows(star: Star, path: Path, block: str, wanted: str) -> pd.DataFrame:
    """The table of a file, one with a single row perhaps written as a list. Raises BadInput where it has none."""
    if block not in star:
        raise BadInput(f"{path}: has no data_{block}; expected {wanted}")
    return as_table(star[block])


def column(table: pd.DataFrame, path: Path, block: str, label: str) -> Tensor:
    """(rows,) float64 of a column. Raises BadInput where it is missing or holds text."""
    if label not in table:
        raise BadInput(f"{path}: data_{block} has no column _{label}, which is needed to go on from it")
    try:
        return torch.from_numpy(np.array(table[label], dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: column _{label} of data_{block} holds text; expected numbers") from error
