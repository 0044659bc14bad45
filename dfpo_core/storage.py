"""Writing to disk so that nothing half-written is ever seen, and so that a full disk is one clear line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dfpo_core.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_full_error(path: Path | str) -> UserError:
    return UserError(str(path), "no space left on the disk", "free some space or choose another home, and run again")


@contextlib.contextmanager
def atomic_directory(directory: str | Path) -> Iterator[Path]:
    """Yield a sibling to write into; on success it takes the place of `directory`, on any failure it is removed.

    Raises UserError naming the directory when the disk is full or the place cannot be written.
    """
    directory = Path(directory).absolute()
    partial = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        yield partial
        synchronise(partial)
        partial.chmod(0o777 & ~_umask())
        _replace(partial, directory)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full_error(directory) from None
        raise UserError(str(directory), f"cannot be written ({error.strerror or error})", "give a folder that can be written") from error
    except Exception as error:
        # safetensors reports a full disk as an exception type of its own.
        if "No space left" in str(error):
            raise disk_full_error(directory) from None
        raise
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def synchronise(folder: Path) -> None:
    """Wait until every file under `folder` is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    """The process's umask; mkdtemp ignores it, and other pods must be able to read the folder."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`, which may hold an earlier attempt."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
