"""What is written down of a run: its parameters, its inputs with checksums, where and with what it ran (job.json)."""
from __future__ import annotations

import hashlib
import json
import math
import platform
import socket
import subprocess
import sys
from collections.abc import Container
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import frazil
from frazil.data import BadInput
from frazil.io.files import write_text
from frazil.jobs.resuming import ITEMWISE, list_difference

WHOLE_FILE = 256 * 2**20  # bytes: larger inputs are known by size, time and their two ends
END = 2**20


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays as lists, paths as text, infinities and NaN as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int)) or value is None:
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` at once (never half a file)."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: is not JSON (line {error.lineno}); the run cannot be continued, choose another --output") from error


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl of a run directory, oldest first; a line torn by a kill is left out."""
    path = run_dir / "events.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def checksum(path: Path) -> str:
    """What tells whether a file has changed: "sha256:…" of its content, of a huge one "ends:…" of size, time, first and last MB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE_FILE:
            while block := file.read(END):
                digest.update(block)
            return f"sha256:{digest.hexdigest()}"
        digest.update(f"{size} {path.stat().st_mtime_ns} ".encode())
        digest.update(file.read(END))
        file.seek(size - END)
        digest.update(file.read(END))
    return f"ends:{digest.hexdigest()}"


def option_name(field: str) -> str:
    """How a parameter is written on the command line: initial_lowpass → --initial-lowpass, continue_ → --continue."""
    return "--" + field.strip("_").replace("_", "-")


def input_files(params: BaseModel) -> dict[str, Path]:
    """Field → path of the parameters that name files; raises BadInput where one is missing."""
    found = {}
    for name in type(params).model_fields:
        value = getattr(params, name)
        if isinstance(value, Path):
            if not value.is_file():
                raise BadInput(f"{value}: no such file ({option_name(name)}); give the path of an existing file")
            found[name] = value
    return found


def source_commit() -> str | None:
    """The git commit of frazil's source tree, "-dirty" where it was edited, if it runs from a checkout; else None."""
    root = Path(frazil.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def input_record(params: BaseModel, known: Container[str] = ()) -> dict[str, dict[str, str]]:
    """Field → path and checksum of the parameters that name files, but those `known`; raises BadInput where one is missing."""
    found = {name: path for name, path in input_files(params).items() if name not in known}
    return {name: {"path": str(path.resolve()), "checksum": checksum(path)} for name, path in found.items()}


def job_record(job: str, params: BaseModel, seed: int, device: str) -> dict[str, Any]:
    """The content of job.json: enough to run the same job again and to know whether its inputs are still the same.

    "parameters" and "seed" become what the run used once it knows (Run.settle); "asked" stays what was given.
    """
    parameters = params.model_dump(mode="json")
    return {
        "job": job,
        "parameters": parameters,
        "asked": {**parameters, "seed": seed},
        "may_change": may_change(params),
        "inputs": input_record(params),
        "seed": seed,
        "device": device,
        "version": frazil.__version__,
        "commit": source_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "created": now(),
    }


def may_change(params: BaseModel) -> list[str]:
    """Fields marked json_schema_extra={"may_change": True}: a run may be continued with another value, such as more iterations."""
    fields = type(params).model_fields.items()
    return [name for name, field in fields if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("may_change")]


def check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Raise BadInput, naming the parameter, where a run to be continued was started with other parameters or input files.

    The list that a job does item by item may have grown. Returns whether a parameter that may change has changed.
    """
    for name, was in old["inputs"].items():
        if name not in new["inputs"] or new["inputs"][name]["checksum"] == was["checksum"]:
            continue
        now, differs = new["inputs"][name]["path"], ""
        if ITEMWISE.get(old["job"]) == name and now.endswith(".star"):
            differs = list_difference(path, old["job"], Path(now))
            if not differs:
                continue
        if differs or now == was["path"]:
            said = f"{now}, has changed since the run was started" + f": {differs}" * bool(differs)
            raise BadInput(f"{path}: the file of {option_name(name)}, {said}; restore it or give another --output")
        raise BadInput(f"{path}: the file of {option_name(name)}, {now}, is not the one the run was started with, {was['path']}; "
                       "give that one or another --output")  # fmt: skip
    old_values = old.get("asked") or {**old["parameters"], "seed": old["seed"]}
    for name, value in new["asked"].items():
        same_file = name in old["inputs"] and name in new["inputs"]  # compared by content above
        if name in old_values and value != old_values[name] and not same_file and name not in new["may_change"]:
            raise BadInput(f"{path}: {option_name(name)} is {value} but the run was started with {old_values[name]}; "
                           f"give the same value or another --output")  # fmt: skip
    return any(new["asked"][name] != old_values.get(name) for name in new["may_change"])
