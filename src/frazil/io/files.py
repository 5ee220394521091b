"""Writing files so that a name either holds a complete file or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frazil.data import BadInput

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and start again",
    errno.EDQUOT: "the disk quota is used up; free some space and start again",
    errno.EFBIG: "the file is larger than this system allows",
    errno.ENOENT: "its folder does not exist",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "it is a folder",
}


def why(error: OSError) -> str:
    """What an operating-system error means to a user, in a few words."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to the path it yields (`path` + ".tmp", in the same folder); on leaving, that file takes its final name.

    The bytes reach the disk before the rename, so after a crash `path` is the old file or the whole new one. If the block
    fails, the temporary file is removed and `path` stays as it was. Raises BadInput naming the file where the operating
    system refuses (disk full, no permission, no such folder).
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        _flush(tmp)
        os.replace(tmp, path)
        _flush(path.parent)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written: {why(error)}") from error
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def below_here(path: Path) -> Path:
    """A path as RELION writes it: from the current folder where it is below that, else in full."""
    full = path.resolve()
    return full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a whole file atomically; BadInput as in atomic_path."""
    with atomic_path(path) as tmp, open(tmp, "wb") as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file (UTF-8) atomically; BadInput as in atomic_path."""
    write_bytes(path, text.encode())


def _flush(path: Path) -> None:
    """fsync of a file or a folder (the rename itself is data of the folder)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
