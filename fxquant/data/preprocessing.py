"""From a decoded image to the tensor that a network expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy
import torch
from PIL import Image

from fxquant.errors import DataError, nearest

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop, normalize: the same pixels as torchvision's transforms.

    Attributes:
        resize: the length in pixels that the shorter side gets, or None to leave the size.
        crop: the side of the square that is cut from the center, or None to cut nothing.
        interpolation: of the resize; one of nearest, bilinear, bicubic, lanczos.
        mean, std: for each RGB channel, of values in [0, 1].

    Raises:
        DataError: a value is out of its range.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name, side in (("resize", self.resize), ("crop", self.crop)):
            if side is not None and side < 1:
                raise DataError(f"preprocessing: {name} is {side}; expected a length in pixels")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise DataError(
                f"preprocessing: a crop of {self.crop} does not fit into images resized to "
                f"{self.resize}; make resize at least {self.crop}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(
                f"preprocessing: interpolation {self.interpolation!r} is not one of "
                f"{', '.join(INTERPOLATIONS)}{nearest(self.interpolation, INTERPOLATIONS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise DataError("preprocessing: mean and std are three numbers each, one a channel")
        if not all(deviation > 0 for deviation in self.std):
            raise DataError(f"preprocessing: std is {self.std}; expected positive numbers")

    @classmethod
    def parse(cls, text: str) -> Preprocessing:
        """A named preprocessing, with changes: ``imagenet,resize=160,crop=160,mean=0.5``.

        ``none`` turns resize or crop off; mean and std are one number or three, as in
        ``std=0.229:0.224:0.225``.

        Raises:
            DataError: the name or a key is unknown, or a value cannot be read.
        """
        name, *changes = (part.strip() for part in text.split(","))
        if name not in PREPROCESSINGS:
            raise DataError(
                f"no preprocessing is called {name!r}; there are {', '.join(PREPROCESSINGS)}"
                f"{nearest(name, PREPROCESSINGS)}"
            )
        pairs = [change.partition("=") for change in changes]
        return PREPROCESSINGS[name].replace({key.strip(): value for key, _, value in pairs})

    def replace(self, changes: Mapping[str, str]) -> Preprocessing:
        """A copy with the given fields read from their text, as `parse` spells them."""
        values: dict[str, object] = {}
        for key, text in changes.items():
            if key not in FIELD_READERS:
                raise DataError(
                    f"preprocessing has no {key!r}; there are {', '.join(FIELD_READERS)}"
                    f"{nearest(key, FIELD_READERS)}"
                )
            try:
                values[key] = FIELD_READERS[key](text.strip())
            except ValueError:
                raise DataError(f"preprocessing: cannot read {key}={text}") from None
        return dataclasses.replace(self, **values)  # type: ignore[arg-type]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """f32[3,H,W] of one image of any mode and size.

        Raises:
            DataError: the image is smaller than the crop.
        """
        image = image.convert("RGB")
        if self.resize is not None:
            image = image.resize(
                _scaled(image.size, self.resize), INTERPOLATIONS[self.interpolation]
            )
        if self.crop is not None:
            image = _center_crop(image, self.crop)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).to(torch.float32).div_(255)
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def __str__(self) -> str:
        return ", ".join(
            f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self)
        )


def _side(text: str) -> int | None:
    return None if text == "none" else int(text)


def _channels(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(":"))
    return values * 3 if len(values) == 1 else values


FIELD_READERS: dict[str, Callable[[str], object]] = {
    "resize": _side,
    "crop": _side,
    "interpolation": str,
    "mean": _channels,
    "std": _channels,
}

PREPROCESSINGS = {
    "imagenet": Preprocessing(256, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "imagenet_crop": Preprocessing(None, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "imagenet_normalize": Preprocessing(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "vit": Preprocessing(248, 224, "bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "none": Preprocessing(),
}
"""The named preprocessings: torchvision's for ImageNet; the same without the resize, and with the
normalization alone; the one of the original vision transformers; and values in [0, 1]."""


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """The (width, height) at which the shorter side is `shorter`, rounded as torchvision does."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _center_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    if width < side or height < side:
        raise DataError(
            f"the image is {width} x {height} pixels, smaller than the crop of {side}; "
            f"set resize to at least {side}"
        )
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
