"""A facial-landmark network in 8 bits: what each way of quantizing it costs.

    python -m examples.landmarks [--picture FILE] [--images N] [--write]

One row a way: Huber's loss, the normalized mean error by the eyes' outer corners and by the pupils
(`fxquant.metrics.normalized_mean_error`), and the landmarks' SQNR against float, all on faces that
neither training nor calibration drew. Then the layers: their biases' SQNR, and the error that has
accumulated where each of them ends. `--picture` shows float and quantized landmarks side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from torchvision.utils import save_image

import fxquant
from benchmarks import results
from examples.landmarks.faces import OUTER_EYES, PUPILS, draw
from examples.landmarks.network import WEIGHTS, LandmarkNet
from examples.landmarks.train import EVALUATION_SEED
from fxquant.frontend.models import load_weights
from fxquant.metrics import Closeness, normalized_mean_error

CALIBRATION_SEED = 500_000
ZOOM = 3


def ways() -> dict[str, dict[str, Any]]:
    """What is changed in the recipe `w8a8`, by the name of the row."""
    found: dict[str, dict[str, Any]] = {"w8a8 as it is": {}}
    for scheme in ("affine", "symmetric"):
        for observer in ("min_max", "moving_average_min_max", "histogram", "percentile", "entropy"):
            for granularity in ("per_channel", "per_tensor"):
                found[f"{scheme}, {observer}, {granularity}"] = {
                    "activations.scheme": scheme,
                    "activations.observer": observer,
                    "weights.granularity": granularity,
                }
    return found


def reached(model: Any, reference: Tensor, images: Tensor, landmarks: Tensor) -> dict[str, Any]:
    """Loss and errors of a model, and its SQNR against the float landmarks."""
    with torch.inference_mode():
        outputs = torch.cat([model(part) for part in images.split(100)])
    closeness = Closeness()
    closeness.add(reference, outputs)
    eyes, pupils = (normalized_mean_error(*pair) for pair in (OUTER_EYES, PUPILS))
    return {
        "loss": float(F.smooth_l1_loss(outputs, landmarks, beta=0.05)),
        "error by eyes": float(eyes(outputs, landmarks).mean()),
        "error by pupils": float(pupils(outputs, landmarks).mean()),
        "sqnr_db": closeness.sqnr_db,
        "outputs": outputs,
    }


def trained(q: fxquant.CompiledModel) -> fxquant.CompiledModel:
    """Quantization-aware training on new faces, taught by the float network alone."""
    loader = [draw(64, seed=CALIBRATION_SEED + 1 + batch)[0] for batch in range(32)]
    return fxquant.finetune(q, loader, loss=None, epochs=4)


def side_by_side(images: Tensor, pairs: Mapping[str, Tensor], path: Path) -> None:
    """Faces in a row for each of `pairs`, with its landmarks as points."""
    rows = []
    for points in pairs.values():
        shown = F.interpolate((images * 0.25 + 0.5).clamp(0, 1), scale_factor=ZOOM)
        for face, places in zip(shown, points.view(len(points), -1, 2), strict=True):
            for x, y in ((places + 1) / 2 * face.shape[-1]).round().long().clamp(1, 189).tolist():
                face[:, y - 1 : y + 2, x - 1 : x + 2] = torch.tensor([1.0, 0.1, 0.1])[:, None, None]
        rows.append(shown)
    save_image(torch.cat(rows), path, nrow=len(images))


def layers(q: fxquant.CompiledModel, images: Tensor) -> str:
    """The layers of a compiled network with the errors of weight, bias and value."""
    found = fxquant.compare(q, images)
    names = dict.fromkeys(row.name for row in found.rows if row.what == "weight")
    errors = {(row.what, row.name.replace("_", ".")): row.sqnr_db for row in found.rows}
    rows = [
        (name, *(errors.get((what, name)) for what in ("weight", "bias", "activation")))
        for name in (name.replace("_", ".") for name in names)
    ]
    rows.append(("landmarks", None, None, errors["output", "output"]))
    return tabulate(
        rows, ("layer", "weight dB", "bias dB", "value, accumulated dB"), floatfmt=".1f"
    )


def main() -> None:
    """Compile every way, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a PNG")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="faces to measure on")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LandmarkNet().eval()
    load_weights(model, WEIGHTS)
    images, landmarks = draw(arguments.images, seed=EVALUATION_SEED)
    calibration = draw(256, seed=CALIBRATION_SEED)[0]
    with torch.inference_mode():
        reference = torch.cat([model(part) for part in images.split(100)])
    rows = {"float": reached(model, reference, images, landmarks)}
    compiled: dict[str, fxquant.CompiledModel] = {}
    for name, changes in ways().items():
        recipe = fxquant.Recipe.named("w8a8").replace(changes)
        compiled[name] = fxquant.compile(model, recipe, calibration=calibration)
        rows[name] = reached(compiled[name], reference, images, landmarks)
    first = next(iter(compiled))
    rows["w8a8, trained"] = reached(trained(compiled[first]), reference, images, landmarks)
    shown = [
        {"way": name} | {key: value for key, value in row.items() if key != "outputs"}
        for name, row in rows.items()
    ]
    print(tabulate(shown, headers="keys", floatfmt=(".4f", ".6f", ".4%", ".4%", ".1f")))
    print(layers(compiled[first], images[:32]))
    if arguments.picture:
        pairs = {name: rows[name]["outputs"][:8] for name in ("float", first)}
        side_by_side(images[:8], pairs, arguments.picture)
    if arguments.write:
        used = {"calibration": calibration, "faces": images}
        digests = {name: results.digest([(x, [-1] * len(x))]) for name, x in used.items()}
        results.write("landmarks", shown, images=digests)


if __name__ == "__main__":
    main()
