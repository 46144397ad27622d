"""The one function that finds the images and weights that measurements need."""

from __future__ import annotations

import os
from pathlib import Path

from fxquant.errors import DataError

VARIABLE = "FXQUANT_DATA"


def data_root() -> Path | None:
    """The folder that holds ``images/`` and ``weights/``, or None where there is none.

    ``$FXQUANT_DATA`` if it is set, else ``../shared/data`` beside the repository (seen from the
    package, or from the working directory where the package is installed elsewhere).

    Raises:
        DataError: ``$FXQUANT_DATA`` is set and is not a folder.
    """
    named = os.environ.get(VARIABLE)
    if named:
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise DataError(f"${VARIABLE} is {named!r}, which is not a folder")
        return folder
    for repository in (Path(__file__).resolve().parents[2], Path.cwd()):
        folder = repository.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None
