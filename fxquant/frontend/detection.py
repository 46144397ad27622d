"""What of torchvision's detectors branches or loops over the boxes found, as single operators.

A graph has no branches: what chooses boxes by their scores, pools from a pyramid's level by their
size, pastes masks and reads key points off maps is one operator each, which calls torchvision's
own function. All of it stays float. Their schemas are in a file of a compiled model, no code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "OPERATORS", "whole_operators"]

NAMESPACE = "fxquant_detection"
_DETECTION = "torchvision.models.detection"


@torch.library.custom_op(f"{NAMESPACE}::batched_nms", mutates_args=())
def _batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    found: Tensor = _original("torchvision.ops.boxes", "batched_nms")(
        boxes, scores, classes, iou_threshold
    )
    return found.clone()


@_batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::pool_regions", mutates_args=())
def _pool_regions(
    features: list[Tensor],
    boxes: list[Tensor],
    size: list[int],
    sampling_ratio: int,
    scales: list[float],
    levels: list[int],
    canonical: list[int],
    eps: float,
) -> Tensor:
    poolers = import_module("torchvision.ops.poolers")
    mapper = poolers.LevelMapper(*levels, *canonical, eps)
    pool = _original("torchvision.ops.poolers", "_multiscale_roi_align")
    found: Tensor = pool(features, boxes, tuple(size), sampling_ratio, scales, mapper)
    return found.clone()


@_pool_regions.register_fake
def _(
    features: list[Tensor],
    boxes: list[Tensor],
    size: list[int],
    sampling_ratio: int,
    scales: list[float],
    levels: list[int],
    canonical: list[int],
    eps: float,
) -> Tensor:
    regions = sum(part.shape[0] for part in boxes)
    return features[0].new_empty(regions, features[0].shape[1], *size)


@torch.library.custom_op(f"{NAMESPACE}::paste_masks", mutates_args=())
def _paste_masks(masks: Tensor, boxes: Tensor, size: list[int], padding: int) -> Tensor:
    paste = _original(f"{_DETECTION}.transform", "paste_masks_in_image")
    found: Tensor = paste(masks, boxes, tuple(size), padding)
    return found.clone()


@_paste_masks.register_fake
def _(masks: Tensor, boxes: Tensor, size: list[int], padding: int) -> Tensor:
    return masks.new_empty(masks.shape[0], 1, *size)


@torch.library.custom_op(f"{NAMESPACE}::key_points", mutates_args=())
def _key_points(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    points, scores = _original(f"{_DETECTION}.roi_heads", "heatmaps_to_keypoints")(maps, boxes)
    return points.clone(), scores.clone()


@_key_points.register_fake
def _(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    found = maps.shape[:2]
    return maps.new_empty(*found, 3), maps.new_empty(found)


def _pool(
    features: list[Tensor],
    boxes: list[Tensor],
    output_size: Sequence[int],
    sampling_ratio: int,
    scales: list[float],
    mapper: Any,
) -> Any:
    levels, canonical = [mapper.k_min, mapper.k_max], [mapper.s0, mapper.lvl0]
    return _pool_regions(
        features, boxes, list(output_size), sampling_ratio, scales, levels, canonical, mapper.eps
    )


def _paste(masks: Tensor, boxes: Tensor, img_shape: Sequence[Any], padding: int = 1) -> Any:
    return _paste_masks(masks, boxes, [int(size) for size in img_shape], padding)


def _decode(self: Any, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
    # torchvision's asks whether there are boxes, because of a -1 in a shape.
    found: Tensor = self.decode_single(rel_codes, torch.cat(boxes)).unflatten(1, (-1, 4))
    return found


OPERATORS = {
    name: getattr(getattr(torch.ops, NAMESPACE), name).default
    for name in ("batched_nms", "pool_regions", "paste_masks", "key_points")
}
"""By their names in a file."""

_INSTEAD: dict[tuple[str, str], Callable[..., Any]] = {
    ("torchvision.ops.boxes", "batched_nms"): _batched_nms,
    ("torchvision.ops.poolers", "_multiscale_roi_align"): _pool,
    (f"{_DETECTION}.transform", "paste_masks_in_image"): _paste,
    (f"{_DETECTION}.roi_heads", "heatmaps_to_keypoints"): _key_points,
    (f"{_DETECTION}._utils", "BoxCoder.decode"): _decode,
}
_kept: dict[tuple[str, str], Callable[..., Any]] = {}


def _original(module: str, name: str) -> Callable[..., Any]:
    """torchvision's function, also while an operator stands in its place."""
    found: Callable[..., Any] = _kept.get((module, name)) or getattr(import_module(module), name)
    return found


@contextmanager
def whole_operators() -> Iterator[None]:
    """While this lasts, torchvision's detectors call the operators."""
    if _DETECTION not in sys.modules:
        yield  # then the model is none
        return
    with ExitStack() as stack:
        for (module, name), instead in _INSTEAD.items():
            owner = import_module(module)
            *outer, attribute = name.split(".")
            for part in outer:
                owner = getattr(owner, part)
            _kept[module, name] = getattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, instead))
        try:
            yield
        finally:
            _kept.clear()
