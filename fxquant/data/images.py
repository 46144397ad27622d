"""The images of a folder or an archive: names, labels and pixels, in a fixed order."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from fxquant.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp", ".tif", ".tiff"})
LABELS_FILE = "labels.csv"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Some images in a fixed order.

    Attributes:
        names: for each image its file, or its place in the archive (``val.npz[17]``).
        labels: for each image its class index, or None where the source has no labels.
        pixels: uint8[N,H,W,C] where the source is an archive; folders are read file by file.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...] | None
    pixels: numpy.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, count: int | None, select: str = "spread") -> ImageSet:
        """`count` images: ``"first"`` by name, or ``"spread"`` evenly over all of them.

        A count of None, or one beyond what there is, means all images.

        Raises:
            DataError: the count is not positive, or `select` is unknown.
        """
        if select not in ("first", "spread"):
            raise DataError(f"images are selected by 'first' or 'spread', not {select!r}")
        if count is not None and count < 1:
            raise DataError(f"cannot take {count} images; expected a positive number")
        if count is None or count >= len(self):
            return self
        step = len(self) if select == "spread" else count
        kept = [index * step // count for index in range(count)]
        return ImageSet(
            tuple(self.names[index] for index in kept),
            None if self.labels is None else tuple(self.labels[index] for index in kept),
            None if self.pixels is None else self.pixels[kept],
        )

    def check_labels(self, classes: int) -> None:
        """Raise a DataError for the first label that is not in ``range(classes)``."""
        for name, label in zip(self.names, self.labels or (), strict=False):
            if not 0 <= label < classes:
                raise DataError(
                    f"{name}: label {label} is out of range: the model has {classes} classes, "
                    f"0 to {classes - 1}"
                )

    def open(self, index: int) -> Image.Image:
        """The decoded image number `index`.

        Raises:
            DataError: the file is missing, damaged or no image.
        """
        if self.pixels is not None:
            pixels = self.pixels[index]
            return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        name = self.names[index]
        try:
            with Image.open(name) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            cause = str(error) or type(error).__name__
            raise DataError(f"{name}: cannot be read as an image ({cause}); remove it") from error


def open_images(source: str | Path) -> ImageSet:
    """The images of a folder or archive, sorted by name.

    - a folder with ``labels.csv`` (columns file, label): the files that it lists;
    - a folder of class folders (ImageNet layout): labels count the folders in sorted order;
    - a folder of images: no labels;
    - an ``.npz`` file: ``images`` uint8[N,H,W,C] and ``labels`` int[N] (optional).

    Hidden files are passed over; any other file that is no image is an error.

    Raises:
        DataError: nothing is there, or what is there cannot be read; names the file.
    """
    path = Path(source)
    if path.is_file():
        return _archive(path)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such folder or .npz file")
    if (path / LABELS_FILE).is_file():
        images = _labelled(path)
    else:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
        files = [entry for entry in entries if not entry.is_dir()]
        images = _class_folders(path, folders, files) if folders else _flat(files)
    if not images.names:
        raise DataError(
            f"{path}: the folder has no images; expected image files, "
            f"class folders, or {LABELS_FILE}"
        )
    return images


def _flat(files: list[Path]) -> ImageSet:
    for file in files:
        _check_suffix(file)
    return ImageSet(tuple(str(file) for file in files), None)


def _class_folders(path: Path, folders: list[Path], files: list[Path]) -> ImageSet:
    if files:
        raise DataError(
            f"{files[0]}: a file beside class folders; move it into its class folder or away, "
            f"or list the images in {path / LABELS_FILE}"
        )
    names: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(file for file in inside if not file.name.startswith(".")):
            _check_suffix(file)
            names.append(str(file))
            labels.append(label)
    return ImageSet(tuple(names), tuple(labels))


def _check_suffix(file: Path) -> None:
    if file.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{file}: not an image ({file.suffix or 'no suffix'} is none of "
            f"{', '.join(sorted(SUFFIXES))}); move it away"
        )


def _labelled(path: Path) -> ImageSet:
    table = path / LABELS_FILE
    rows: list[tuple[str, int]] = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = {"file", "label"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{table}: no column {' or '.join(sorted(missing))}; "
                    "the first line must be 'file,label' or 'file,label,wnid'"
                )
            rows.extend(_labelled_row(table, reader.line_num, row) for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read ({error})") from error
    rows.sort()
    return ImageSet(tuple(str(path / file) for file, _ in rows), tuple(label for _, label in rows))


def _labelled_row(table: Path, line: int, row: dict[str, str]) -> tuple[str, int]:
    file, label = row["file"] or "", row["label"] or ""
    if not file or not (table.parent / file).is_file():
        raise DataError(f"{table}, line {line}: there is no file {file!r} in {table.parent}")
    try:
        return file, int(label)
    except ValueError:
        raise DataError(
            f"{table}, line {line}: label {label!r} of {file} is no integer; "
            "expected a class index from 0"
        ) from None


def _archive(path: Path) -> ImageSet:
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: cannot be read as an .npz archive ({error}); expected a folder of images, "
            "or arrays images (uint8 NHWC) and labels"
        ) from error
    pixels, labels = arrays.get("images"), arrays.get("labels")
    if pixels is None:
        raise DataError(f"{path}: the archive has no array 'images'")
    if pixels.dtype != numpy.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
        raise DataError(
            f"{path}: 'images' is {pixels.dtype}{list(pixels.shape)}; "
            "expected uint8[images, height, width, 3 or 1]"
        )
    if not len(pixels):
        raise DataError(f"{path}: the archive has no images")
    if labels is not None and (
        labels.shape != (len(pixels),) or not numpy.issubdtype(labels.dtype, numpy.integer)
    ):
        raise DataError(
            f"{path}: 'labels' is {labels.dtype}{list(labels.shape)}; expected {len(pixels)} "
            "integers, one an image"
        )
    return ImageSet(
        tuple(f"{path}[{index}]" for index in range(len(pixels))),
        None if labels is None else tuple(int(label) for label in labels),
        pixels,
    )
