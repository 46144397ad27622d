"""The networks with real weights and the images they are measured on: one list for all.

    python -m benchmarks.real [NAME ...]      top-1 of the float networks, beside what is expected

The data lie outside the repository; `fxquant.data.data_root` finds them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.names import one_of
from fxquant.data import ImageBatches, data_root, open_batches
from fxquant.errors import DataError
from fxquant.frontend.models import load_model
from fxquant.measure.evaluate import evaluate


@dataclass(frozen=True)
class Images:
    """Some images below ``images/`` and the preprocessing that a network wants of them."""

    source: str
    preprocessing: str

    def batches(self, images: int | None, batch_size: int) -> ImageBatches:
        return open_batches(
            root() / "images" / self.source,
            preprocessing=self.preprocessing,
            images=images,
            batch_size=batch_size,
        )


@dataclass(frozen=True)
class RealNetwork:
    """A network with real weights.

    Attributes:
        name: of its factory in `benchmarks.networks`.
        weights: its file below ``weights/``.
        calibration, validation: its images.
        classes: how many logits it has.
        float_top1: its share of right answers on all validation images, in float32.
    """

    name: str
    weights: str
    calibration: Images
    validation: Images
    classes: int
    float_top1: float

    @property
    def model(self) -> str:
        """How the command line spells the network."""
        return f"benchmarks.networks:{self.name}"

    @property
    def weights_path(self) -> Path:
        return root() / "weights" / f"{self.weights}.safetensors"

    def load(self) -> nn.Module:
        return load_model(self.model, self.weights_path)

    def calibration_batches(self, images: int | None = 250, batch_size: int = 25) -> ImageBatches:
        return self.calibration.batches(images, batch_size)

    def validation_batches(self, images: int | None = None, batch_size: int = 50) -> ImageBatches:
        return self.validation.batches(images, batch_size)


def root() -> Path:
    """The folder of the data.

    Raises:
        DataError: it is not on this machine.
    """
    found = data_root()
    if found is None:
        raise DataError("the real networks and images are not here; set $FXQUANT_DATA to them")
    return found


def available() -> bool:
    """Whether the data are on this machine."""
    return data_root() is not None


IMAGENET = (Images("imagenet_calib", "imagenet"), Images("imagenet_val", "imagenet_crop"))
IMAGENET_VIT = (
    Images("imagenet_calib", "vit"),
    Images("imagenet_val", "vit"),
)
IMAGENETTE = (
    Images("imagenette_calib", "imagenet_crop"),
    Images("imagenette_val", "imagenet_crop"),
)
IMAGENETTE_160 = (
    Images("imagenette_calib", "imagenet,resize=160,crop=160"),
    Images("imagenette_val", "imagenet,resize=160,crop=160"),
)
CIFAR10 = (
    Images("cifar10/calib.npz", "imagenet_normalize"),
    Images("cifar10/val.npz", "imagenet_normalize"),
)

NETWORKS = {
    network.name: network
    for network in (
        RealNetwork("mobilenet_v2", "mobilenet_v2", *IMAGENET, 1000, 0.7954),
        RealNetwork("squeezenet1_1", "squeezenet1_1", *IMAGENET, 1000, 0.7046),
        RealNetwork("resnet18_10", "resnet18_imagenette", *IMAGENETTE, 10, 0.9500),
        RealNetwork(
            "shufflenet_v2_10", "shufflenet_v2_x1_0_imagenette", *IMAGENETTE_160, 10, 0.8070
        ),
        RealNetwork("cifar_resnet20", "cifar_resnet20", *CIFAR10, 10, 0.8020),
        RealNetwork("cifar_resnet56", "cifar_resnet56", *CIFAR10, 10, 0.8298),
        RealNetwork("vit_tiny", "vit_tiny", *IMAGENET_VIT, 1000, 0.8262),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", type=one_of(NETWORKS), help=", ".join(NETWORKS)
    )
    for name in parser.parse_args().names or NETWORKS:
        network = NETWORKS[name]
        batches = network.validation_batches()
        reached = evaluate(network.load(), batches, classes=network.classes, progress=True).top1
        print(
            f"{name:18} top-1 {reached:.4f} on {len(batches.images)} images, "
            f"expected {network.float_top1:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
