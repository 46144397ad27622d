"""The C++ compiler of the machine, and a cache of what it has built."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.backends.native.params import KERNELS_FOLDER
from fxquant.errors import TargetError

__all__ = [
    "CODE_FLAGS",
    "build",
    "cache_folder",
    "compiler",
    "kept",
    "stored",
    "why_unavailable",
]

# What the kernels' bits depend on, and their speed.
CODE_FLAGS = ("-O2", "-ffp-contract=off", "-fno-math-errno")
FLAGS = (
    *CODE_FLAGS,
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-w",
)
_COMPILERS = ("c++", "g++", "clang++")
_LAST_LINES = 15
_PACKAGES = (
    "install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: "
    "xcode-select --install), or name yours in the environment variable CXX"
)


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of c++, g++ and clang++ that there is."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ((named,) if named else _COMPILERS) if (found := shutil.which(name))),
        None,
    )


def why_unavailable() -> str | None:
    """None where this machine can build, else what is missing and how to get it."""
    if compiler() is not None:
        return None
    named = os.environ.get("CXX")
    missing = f"$CXX is {named}, which is not there" if named else "there is no C++ compiler"
    return f"{missing}: {_PACKAGES}"


def cache_folder() -> Path:
    """``$FXQUANT_CACHE``, else a folder of the user's cache; only its owner may look into it.

    Raises TargetError where it belongs to somebody else.
    """
    named = os.environ.get("FXQUANT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(base) / "fxquant"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise TargetError(
                f"the cache {folder} belongs to another user, who could change what is loaded "
                "from it; set FXQUANT_CACHE to a folder of your own"
            )
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise TargetError(
            f"the cache {folder} cannot be used: {error}; set FXQUANT_CACHE to a folder that can"
        ) from error
    return folder


def stored(name: str, data: bytes) -> Path:
    """A file of the cache with this content: written beside its name, then renamed."""
    path = cache_folder() / name
    if _is_whole(path):
        return path
    _write(path, data)
    return path


def kept(name: str) -> bytes | None:
    """What `stored` wrote under this name; None where it is missing or damaged."""
    path = cache_folder() / name
    return path.read_bytes() if _is_whole(path) else None


def build(text: str) -> Path:
    """The shared library of a translation unit, from the cache or from the compiler.

    Raises TargetError without a compiler, and with the compiler's last lines where it fails.
    """
    found = compiler()
    if found is None:
        raise TargetError(f"the native target needs a C++ compiler, and {why_unavailable()}")
    key = hashlib.sha256()
    for part in (text, *FLAGS, _version(found), *(path.read_text() for path in _headers())):
        key.update(part.encode())
        key.update(b"\0")
    path = cache_folder() / f"{key.hexdigest()[:40]}.so"
    if _is_whole(path):
        return path
    with _room() as folder:
        source, library = folder / "unit.cpp", folder / "unit.so"
        _replace(source, text.encode())
        command = [found, *FLAGS, f"-I{KERNELS_FOLDER}", str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise TargetError(f"the C++ compiler {found} does not run: {error}") from error
        if done.returncode or not library.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()[-_LAST_LINES:]
            raise TargetError(
                f"the C++ compiler failed ({' '.join(command[:1])}, exit {done.returncode}); its "
                "last lines:\n" + "\n".join(lines)
            )
        _write(path, library.read_bytes())
    return path


@contextmanager
def _room() -> Iterator[Path]:
    """A folder of the cache for one build. Raises TargetError where nothing can be written."""
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache_folder()) as folder:
            yield Path(folder)
    except OSError as error:
        raise _cannot_write(cache_folder(), error) from error


def _cannot_write(path: Path, error: OSError) -> TargetError:
    return TargetError(
        f"cannot write {path}: {error}; make room, or set FXQUANT_CACHE to another folder"
    )


def _headers() -> list[Path]:
    return sorted(KERNELS_FOLDER.glob("*.h"))


def _version(found: str) -> str:
    status = Path(found).resolve()
    try:
        facts = status.stat()
        return f"{status} {facts.st_size} {facts.st_mtime_ns}"
    except OSError:
        return str(status)


def _write(path: Path, data: bytes) -> None:
    """The file and a file of its hash beside it; whoever comes second writes the same again."""
    try:
        _replace(path, data)
        _replace(_hash_file(path), hashlib.sha256(data).hexdigest().encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache is there and is what was written."""
    try:
        wanted = _hash_file(path).read_bytes().decode()
        return hashlib.sha256(path.read_bytes()).hexdigest() == wanted
    except (OSError, UnicodeDecodeError):
        return False
