"""What --resume asks of a run's directory: whether a list of items has only grown, and which outputs of a finished run are gone.

Jobs of ITEMWISE do one item of a list after another, each with files of its own. Resumed, also when finished, they look at all of these and
redo what is missing or not whole; rows may have been added to their list. The run keeps a copy of the list to compare with.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from frazil.data import BadInput
from frazil.io.files import write_bytes
from frazil.io.mrc import read_header
from frazil.io.star import as_table, first_table, read_star

ITEMWISE = {"motion": "movies", "ctf": "micrographs", "pick": "micrographs", "extract": "micrographs"}  # job → its list
NAMES = {"movies": "rlnMicrographMovieName", "micrographs": "rlnMicrographName"}
COPY = "list.copy"  # of the list, in the run directory; not .star: a folder of coordinates is read by that ending
OUTPUTS = "outputs.json"  # files of a finished run
PNG_END = b"IEND\xaeB`\x82"
GROUP = "rlnOpticsGroup"  # a number that may change as groups are added: what the group says is compared
PASSING = re.compile(r"_it[0-9]{3}|^checkpoint")  # files that nobody misses when a run is finished: of single iterations, to go on from


def are_whole(files: Iterable[Path], read: Callable[[Path], object]) -> bool:
    """Whether the files of an item are there and whole: read, not only looked for. STAR files by `read`, which raises BadInput."""
    try:
        for path in files:
            if path.suffix == ".star":
                read(path)
            elif path.suffix == ".png":
                with open(path, "rb") as file:
                    file.seek(-len(PNG_END), os.SEEK_END)
                    if file.read() != PNG_END:
                        return False
            else:
                read_header(path)
    except (BadInput, OSError):
        return False
    return True


def keep_list(run_dir: Path, job: str, inputs: Mapping[str, Mapping[str, str]]) -> None:
    """Copy the list that the run works on into its directory, where it has one that is a STAR file."""
    path = Path(inputs.get(ITEMWISE.get(job, ""), {}).get("path", ""))
    if path.suffix == ".star":
        write_bytes(run_dir / COPY, path.read_bytes())


def list_difference(run_dir: Path, job: str, new: Path) -> str:
    """What differs between a run's list and `new` other than rows added, in words; "" if nothing does."""
    old, label = run_dir / COPY, NAMES[ITEMWISE[job]]
    if not old.is_file():
        return "there is no copy of the old one to compare rows with"
    before, now = _rows(old, label), _rows(new, label)
    gone = [name for name in before if name not in now]
    if gone:
        return f"{len(gone)} of the {len(before)} rows that it had are gone (first: {gone[0]}); rows may only be added"
    for number, name in enumerate(now, 1):
        if name in before and (changed := _changed(before[name], now[name])):
            return f"row {number}, {name}: {changed}; rows may only be added"
    stems = [Path(name).stem for name in now]
    if list(now)[: len(before)] != list(before) and len(set(stems)) < len(stems):
        return "new rows stand among the old ones, and some files have one name in several folders; add rows at the end"
    return ""


def _rows(path: Path, label: str) -> dict[str, dict[str, str]]:
    """Name → what the row and its optics group say, text by label."""
    star = read_star(path, text=True)
    found, optics = first_table(star, label), star.get("optics")
    if found is None:
        raise BadInput(f"{path}: has no table with _{label}")
    groups: dict[str, dict[str, str]] = {}
    if optics is not None:
        for number, group in enumerate(as_table(optics).to_dict("records"), 1):
            said = {f"data_optics {key}": str(value) for key, value in group.items() if key != GROUP}
            groups[str(group.get(GROUP, number))] = said
    first = next(iter(groups.values()), {})
    return {str(row[label]): {**{str(k): str(v) for k, v in row.items() if k != GROUP}, **groups.get(str(row.get(GROUP)), first)}
            for row in found[1].to_dict("records")}  # fmt: skip


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first value that is not the same, in words."""
    for label in dict.fromkeys([*before, *now]):
        a, b = before.get(label), now.get(label)
        if a != b and not (a is not None and b is not None and _same_number(a, b)):
            block, _, plain = label.rpartition(" ")
            return f"{block + ' ' if block else ''}_{plain} was {a or 'not there'} and is {b or 'not there'}"
    return ""


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def outputs(run_dir: Path, others: Collection[str]) -> dict[str, Any]:
    """Sizes by name, below the run, of all files of a run but `others`."""
    found: dict[str, int] = {}
    for folder, _, names in os.walk(run_dir):
        for name in names:
            path = Path(folder, name)
            short = str(path.relative_to(run_dir))
            if short not in others and not name.endswith(".tmp") and not PASSING.search(name) and path.is_file():
                found[short] = path.stat().st_size
    return {"files": found}


def lost(run_dir: Path, recorded: Mapping[str, Any] | None) -> list[str]:
    """What has happened to files that `outputs` recorded: "NAME is missing", "NAME is not whole"; sorted."""
    said = []
    for name, size in sorted((recorded or {}).get("files", {}).items()):
        try:
            now = (run_dir / name).stat().st_size
        except OSError:
            said.append(f"{name} is missing")
            continue
        if now < size:
            said.append(f"{name} is not whole ({now} of {size} bytes)")
    return said
