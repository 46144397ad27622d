"""Detectors: the convolutions are integers, what chooses boxes is float, in one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import boxes

import fxquant
from fxquant.frontend.detection import OPERATORS, whole_operators
from passes.infra.verify import flatten

SIZE = {"min_size": 64, "max_size": 64}


def backbone() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    layers.out_channels = 8  # type: ignore[assignment]
    return layers


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((16, 32),), ((0.5, 2.0),))


def detector(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 2, **SIZE}
    if kind == "retinanet":
        return detection.RetinaNet(
            backbone(), anchor_generator=anchors(), score_thresh=0.0, **options
        ).eval()
    kinds: dict[str, Any] = {
        "faster_rcnn": detection.FasterRCNN,
        "mask_rcnn": detection.MaskRCNN,
        "keypoint_rcnn": detection.KeypointRCNN,
    }
    more = {"rpn_anchor_generator": anchors(), "box_score_thresh": 0.0, "box_detections_per_img": 5}
    return kinds[kind](backbone(), **options, **more).eval()  # type: ignore[no-any-return]


def images(seed: int) -> Tensor:
    return torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet"])
def test_a_detector_compiles_as_a_whole_and_comes_back(kind: str, tmp_path: Path) -> None:
    model = detector(kind)
    q = fxquant.compile(model, "w8a8", calibration=[images(0), images(1)], target="reference")
    assert q.report.front_end == "torch.export"
    assert q.report.int8_share == 1
    found = q(images(2))
    assert found[0].keys() == model(images(2))[0].keys()
    assert len(found[0]["boxes"]) > 0
    q.save(tmp_path / "m.fxq")
    again = fxquant.load(tmp_path / "m.fxq", target="reference")(images(2))
    pairs = zip(flatten(found), flatten(again), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_float_graph_chooses_the_models_boxes() -> None:
    model = detector("faster_rcnn")
    q = fxquant.compile(model, "w8a8", calibration=[images(0)], target="reference")
    want, found = model(images(2))[0], q.stages["float"](images(2))[0]
    assert torch.equal(want["labels"], found["labels"])
    torch.testing.assert_close(want["boxes"], found["boxes"])


def test_an_operator_is_torchvisions_function_and_gives_it_back() -> None:
    corners = torch.rand(40, 2) * 50
    some = torch.cat([corners, corners + 10 + torch.rand(40, 2) * 20], 1)
    scores, classes = torch.rand(40), torch.randint(3, (40,))
    own = boxes.batched_nms
    want = own(some, scores, classes, 0.5)
    with whole_operators():
        assert boxes.batched_nms is not own
        assert torch.equal(boxes.batched_nms(some, scores, classes, 0.5), want)
    assert boxes.batched_nms is own
    assert torch.equal(OPERATORS["batched_nms"](some, scores, classes, 0.5), want)
