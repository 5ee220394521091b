"""STAR files as an ordered mapping of block name -> DataFrame (loops) or dict (lists).

    blocks = read_star("run_data.star");  blocks["optics"]["rlnVoltage"];  blocks["particles"]["rlnImageName"]

Labels are kept without their leading underscore, whatever they are, in the order of the file. A repeated block name gets
"#2", "#3" … appended (write_star takes the suffix off again); a second table inside one block counts as a repeated block.
Rows go through Arrow, not through Python objects one by one: 200,000 rows x 15 columns take a second or two either way.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute

from frazil.data import BadInput
from frazil.io.files import atomic_path, why

Block = pd.DataFrame | dict[str, Any]

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
TEXT = pa.large_string()
# Names stay text even where they look like numbers: micrograph "20170629" or group "007".
TEXT_LABEL = re.compile(r"(Name|File|Image|Label|Alias|Variable|JobOptionValue|StringVariableValue|StringVariableOriginalValue)$")
_TOKEN = re.compile(rb""""(?:[^"]|"(?!\s|$))*"(?=\s|$)|'(?:[^']|'(?!\s|$))*'(?=\s|$)|\S+""")
_QUOTED = re.compile(rb"(?:^|\s)[\"']")
_INTEGER = r"^-?(0|[1-9][0-9]{0,17})$"
_VERSION = re.compile(r"#\s*version\s+\d+\s*$")
_NEEDS_QUOTES = "^$|^[\"'#_]|^data_|^loop_$|[ \t\n\r\x0b\x0c]"
_WIDTH = 12  # columns are padded to this width, as RELION does


class Star(dict[str, Block]):
    """Blocks of a STAR file in order, with the comment lines from its top and the number of rows left out."""

    comment: str = ""  # lines before the first block, with their "#", without the version line
    skipped_rows: int = 0  # lines in or behind a loop that are no rows of it
    skipped_line: int = 0  # number of the first of them
    long_line: int = 0  # number of the first line with more values than labels (the surplus is dropped), 0 if there is none


def read_star(path: str | os.PathLike[str], text: bool = False) -> Star:
    """Every block of a STAR file: a DataFrame for a loop, a dict for a list.

    Columns are int64, float64 or str, by what they hold (names always str); with `text`, all are str, character by
    character as in the file. A row with too few values, or stray text behind a table, is left out, counted in
    `skipped_rows` and warned about. Raises BadInput naming the file and line: missing or unreadable file, no data_ block,
    text outside of any table.
    """
    star = _read(Path(path), text)
    if star.skipped_rows:
        warnings.warn(f"{path}: {star.skipped_rows} lines with too few values left out, first line {star.skipped_line}", stacklevel=2)
    if star.long_line:
        warnings.warn(f"{path}: line {star.long_line} and perhaps more hold more values than labels; surplus dropped", stacklevel=2)
    return star


def read_whole_star(path: str | os.PathLike[str], text: bool = False) -> Star:
    """As read_star, of a file that write_star wrote: raises BadInput also where it was cut off or lines are no rows; warns of nothing.

    Where it was cut exactly between two blocks cannot be seen here: look for the last block.
    """
    path = Path(path)
    star = _read(path, text)
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2))
        ended = file.read() == b"\n\n"  # write_star ends each block with an empty line
    if star.skipped_rows or star.long_line or not ended:
        raise BadInput(f"{path}: is not whole; it was cut off, or changed by hand")
    return star


def _read(path: Path, text: bool) -> Star:
    """read_star without its warnings."""
    lines = _lines(path)
    star = Star()
    comments: list[str] = []
    name: str | None = None
    items: dict[str, Any] | None = None
    i = 0
    while i < len(lines):
        line = lines[i].strip()
        i += 1
        if line.startswith(b"data_") and len(line.split(None, 1)) == 1:
            name, items = line[5:].decode(), None
        elif not line or line.startswith(b"#"):
            if name is None and line and not _VERSION.match(line.decode()):
                comments.append(line.decode())
        elif name is None:
            raise BadInput(f"{path}: line {i}: expected a data_ block, found {_shown(line)}; is this a STAR file?")
        elif line == b"loop_" or line.startswith(b"loop_ "):
            star[_free_name(star, name)], i = _read_loop(path, lines, i, text, star)
            items = None
        elif line.startswith(b"_"):
            if items is None:
                items = star[_free_name(star, name)] = {}
            label, value = _list_item(path, i, line)
            items[label] = value if text else _typed_value(label, value)
        else:
            raise BadInput(f"{path}: line {i}: {_shown(line)} belongs to no loop_; is this a STAR file?")
    if name is None:
        raise BadInput(f"{path}: no data_ block in it; is this a STAR file?")
    star.comment = "\n".join(comments)
    return star


def write_star(path: str | os.PathLike[str], blocks: Mapping[str, Block], comment: str = "", version: int = 30001) -> None:
    """Write blocks as RELION >= 3.1 reads them, atomically: DataFrames as loops, mappings as lists.

    Integers and booleans are written as integers, floats with all the digits they have (the shortest text that reads back
    the same), text quoted where it is empty or holds spaces. `comment` goes to the top. Raises BadInput naming the file if
    it cannot be written, ValueError for a value no STAR file can hold (a line break).
    """
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        for line in comment.splitlines():
            file.write((line if line.startswith("#") else f"# {line}").encode() + b"\n")
        for name, block in blocks.items():
            file.write(f"\n# version {version}\n\ndata_{re.sub(r'#[0-9]+$', '', name)}\n\n".encode())
            if isinstance(block, pd.DataFrame):
                _write_loop(file, block)
            else:
                for label, value in block.items():
                    file.write(f"_{label:<38} {_value_text(value):>18}\n".encode())
            file.write(b"\n")


def first_table(star: Mapping[str, Block], label: str) -> tuple[str, pd.DataFrame] | None:
    """(block name, table) of the first loop that has a column `label`, or None."""
    for name, block in star.items():
        if isinstance(block, pd.DataFrame) and label in block.columns:
            return name, block
    return None


def as_table(block: Block) -> pd.DataFrame:
    """A block as a table: one that is written as a list of labels has a single row."""
    return block if isinstance(block, pd.DataFrame) else pd.DataFrame({label: [value] for label, value in block.items()})


def _lines(path: Path) -> list[bytes]:
    """Lines of a text file, with \\n or \\r\\n endings taken off."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {'no such file' if isinstance(error, FileNotFoundError) else why(error)}") from error
    try:
        if b"\0" in raw:
            raise UnicodeError
        raw.decode()
    except UnicodeError:
        raise BadInput(f"{path}: is not a text file; expected a STAR file") from None
    return raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")


def _shown(line: bytes) -> str:
    """The start of a line, for a message."""
    return repr(line[:40].decode(errors="replace"))


def _free_name(star: Star, name: str) -> str:
    """`name`, or name#2, name#3 … if it is taken."""
    k, free = 1, name
    while free in star:
        k += 1
        free = f"{name}#{k}"
    return free


def _has_quotes(text: bytes) -> bool:
    """Whether a quote opens anywhere."""
    return (b'"' in text or b"'" in text) and _QUOTED.search(text) is not None


def _tokens(line: bytes) -> list[bytes]:
    """Values of one line, quotes taken off; a quote opens only at the start of a value and closes before a blank."""
    if not _has_quotes(line):
        return line.split()
    quoted = _TOKEN.findall(line)
    return [t[1:-1] if len(t) > 1 and t[:1] in b"\"'" and t[-1:] == t[:1] else t for t in quoted]


def _list_item(path: Path, number: int, line: bytes) -> tuple[str, str]:
    """(label, text) of a line `_label value`; a comment after the value is dropped, unquoted words are kept together."""
    values = _tokens(line)
    end = next((k for k, v in enumerate(values) if k > 1 and v.startswith(b"#")), len(values))
    if end < 2:
        raise BadInput(f"{path}: line {number}: label {line.decode()} has no value")
    return values[0][1:].decode(), b" ".join(values[1:end]).decode()


def _read_loop(path: Path, lines: Sequence[bytes], i: int, text: bool, star: Star) -> tuple[pd.DataFrame, int]:
    """The table whose labels start at line index i (or a little later), and the index of the first line after it."""
    labels: list[str] = []
    while i < len(lines) and (not (line := lines[i].strip()) or line[:1] in b"_#"):
        if line.startswith(b"_"):
            labels.append(line.split()[0][1:].decode())
        elif not line and labels:
            break
        i += 1
    if not labels:
        raise BadInput(f"{path}: line {i + 1}: loop_ without labels")
    if len(set(labels)) < len(labels):
        twice = next(label for k, label in enumerate(labels) if label in labels[:k])
        raise BadInput(f"{path}: line {i + 1}: label _{twice} is listed twice in one loop_")
    start = i
    while i < len(lines) and not _ends_loop(lines[i]):
        i += 1
    columns = _columns(lines, start, i, labels, star)
    if not text:
        columns = [_typed_column(label, column) for label, column in zip(labels, columns, strict=True)]
    return pa.table(columns, names=labels).to_pandas(), i


def _ends_loop(line: bytes) -> bool:
    """Whether a line opens the next block, loop or list."""
    line = line.lstrip()
    if line[:1] == b"_":
        return True
    return line[:5] in (b"data_", b"loop_") and len(line.split(None, 1)) == 1


def _columns(lines: Sequence[bytes], start: int, stop: int, labels: list[str], star: Star) -> list[pa.Array]:
    """Text columns of the rows in lines[start:stop]."""
    n = len(labels)
    body = b"\n".join(lines[start:stop]).strip()
    if not body:
        return [pa.array([], TEXT)] * n
    if b"#" not in body and not _has_quotes(body):
        # A marker in place of each line end shows that every row has n values, without looking at rows one by one.
        tokens = body.replace(b"\n", b" \0 ").split()
        tokens.append(b"\0")
        if len(tokens) % (n + 1) == 0 and tokens.count(b"\0") * (n + 1) == len(tokens) and set(tokens[n :: n + 1]) == {b"\0"}:
            return [_text_array(tokens[k :: n + 1]) for k in range(n)]
    rows = []
    after_blank = False
    for k in range(start, stop):
        row = _tokens(lines[k])
        if not row or lines[k].lstrip().startswith(b"#"):
            after_blank |= bool(rows) and not row
            continue
        surplus = len(row) > n and not row[n].startswith(b"#")
        if len(row) < n or (surplus and after_blank):  # free text, as RELION's local resolution leaves behind its tables
            star.skipped_rows += 1
            star.skipped_line = star.skipped_line or k + 1
            continue
        if surplus:
            star.long_line = star.long_line or k + 1
        rows.append(row[:n])
    return [_text_array([row[k] for row in rows]) for k in range(n)]


def _scalar(text: str) -> pa.Scalar:
    return pa.scalar(text, TEXT)


def _text_array(values: list[bytes]) -> pa.Array:
    return pa.array(values, pa.large_binary()).cast(TEXT)


def _typed_column(label: str, column: pa.Array) -> pa.Array:
    """Text as int64 if every value is a plain integer, as float64 if every value is a number, else as it is."""
    if TEXT_LABEL.search(label) or not len(column):
        return column
    if pc.all(pc.match_substring_regex(column, _INTEGER)).as_py():
        return column.cast(pa.int64())
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return column


def _typed_value(label: str, value: str) -> int | float | str:
    return _typed_column(label, pa.array([value], TEXT))[0].as_py()


def _write_loop(file: Any, table: pd.DataFrame) -> None:
    """Labels and rows of a table, values padded to RELION's column width."""
    file.write(b"loop_ \n" + b"".join(f"_{label} #{k} \n".encode() for k, label in enumerate(table.columns, 1)))
    if not len(table):
        return
    padded = [pc.utf8_lpad(column_text(table.iloc[:, k]), _WIDTH) for k in range(table.shape[1])]
    rows = pc.binary_join_element_wise(*padded, _scalar("\n"), _scalar(" "))
    # The text buffer of the joined column is the body of the loop as it stands.
    for chunk in rows.chunks if isinstance(rows, pa.ChunkedArray) else [rows]:
        ends = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        file.write(memoryview(chunk.buffers()[2])[int(ends[0]) : int(ends[-1])])


def column_text(column: pd.Series) -> pa.Array:
    """Arrow strings of a table column as they stand in a STAR file (quoted where needed)."""
    if column.dtype.kind == "b":
        return pa.array(column.to_numpy(np.int64)).cast(TEXT)
    if column.dtype.kind in "iu":
        return pa.array(column.to_numpy()).cast(TEXT)
    if column.dtype.kind == "f":
        out = pa.array(column.to_numpy(), from_pandas=False).cast(TEXT)
        # A float stays recognisable as one: 1 would be read back as an integer.
        return pc.if_else(pc.match_substring_regex(out, "[.ein]"), out, pc.binary_join_element_wise(out, *map(_scalar, (".0", ""))))
    if isinstance(column.dtype, pd.StringDtype):
        array = pa.array(column, TEXT, from_pandas=True)
    else:
        array = pa.array([None if v is None else str(v) for v in column], TEXT)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if array.null_count:
        raise ValueError(f"column {column.name} has missing values; give them a value before writing")
    special = pc.match_substring_regex(array, _NEEDS_QUOTES)
    if pc.any(special).as_py():
        array = pa.array([_quote(v) if s else v for v, s in zip(array.to_pylist(), special.to_pylist(), strict=True)], TEXT)
    return array


def _value_text(value: Any) -> str:
    """Text of one value of a list block."""
    if value is None:
        return '""'
    return column_text(pd.Series([value])).to_pylist()[0]


def _quote(value: str) -> str:
    """A value in quotes; double ones unless it holds a double quote that would end it early."""
    if "\n" in value or "\r" in value:
        raise ValueError(f"a STAR file cannot hold a line break: {value!r}")
    for mark in "\"'":
        if not re.search(rf"{mark}\s", value):
            return f"{mark}{value}{mark}"
    raise ValueError(f"a STAR file cannot hold both kinds of quotes before a blank: {value!r}")
