"""Pages of real size in headless Chromium: they are drawn without a message on the console."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import fxquant

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LARGEST = 5e6
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


def resnet18() -> nn.Module:
    return torchvision.models.resnet18().eval()


def vit_tiny() -> nn.Module:
    model = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768).eval()
    # It comes with zeros, which leave no error to look at.
    nn.init.normal_(model.heads.head.weight, std=0.05)
    return model


@pytest.mark.parametrize(("make", "recipe"), [(resnet18, "w8a8"), (vit_tiny, "vit_w8a8_integer")])
def test_a_page_is_small_and_draws_without_errors(
    make: Callable[[], nn.Module], recipe: str, tmp_path: Path
) -> None:
    q = fxquant.compile(make(), recipe, calibration=torch.randn(4, 3, 224, 224))
    q.report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < LARGEST
    for width in (1280, 400):
        for scheme in (0, 1):  # dark, light
            picture, messages = screenshot(tmp_path, width, scheme)
            assert not messages
            assert len(picture.convert("L").resize((64, 256)).getcolors()) > 20


def screenshot(folder: Path, width: int, scheme: int) -> tuple[Image.Image, list[str]]:
    """The page in a frame of that width, which may be less than a window's least."""
    frame = f'<body style="margin:0"><iframe src="page.html" width="{width}" height="2400">'
    (folder / "frame.html").write_text(frame)
    assert CHROMIUM is not None
    run = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},2400",
            f"--screenshot={folder / 'shot.png'}",
            f"file://{folder / 'frame.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Image.open(folder / "shot.png"), re.findall(r".*CONSOLE.*", run.stderr)
