"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import InputError

__all__ = ["new_folder"]


@contextmanager
def new_folder(folder: Path, overwrite: bool, marks: tuple[str, ...]) -> Iterator[Path]:
    """A temporary folder beside `folder`, which becomes `folder` where the block succeeds.

    Raises InputError where something is in `folder` already; with `overwrite`, where that is not
    what an earlier call has written (`marks` are files that are then in it), or where nothing can
    be written.
    """
    folder = folder.absolute()
    _check(folder, overwrite, marks)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        room = temporary / "new"
        room.mkdir()
        yield room
        if folder.exists():
            folder.rename(temporary / "old")
        try:
            room.rename(folder)
        except OSError:
            if (temporary / "old").exists():
                (temporary / "old").rename(folder)
            raise
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: Path, overwrite: bool, marks: tuple[str, ...]) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    ours = all((folder / mark).is_file() for mark in marks)
    if not overwrite:
        hint = "allow to overwrite it, or name another" if ours else "name another"
        raise InputError(f"{folder} is not empty: {hint}")
    if not ours:
        raise InputError(
            f"{folder} holds other things than an exported network, which are not overwritten; "
            "name another folder"
        )
