"""Train the network of `fxquant quickstart` and write its weights, stored as float16.

    python -m benchmarks.train_quickstart

Seeded: the same torch on the same kind of machine gives the same file. Every epoch draws new
images, so there is nothing to overfit. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from fxquant.cli.quickstart.data import draw
from fxquant.cli.quickstart.network import WEIGHTS, SmallResNet
from fxquant.frontend.models import load_weights

EPOCHS = 24
IMAGES = 4000
BATCH = 64
EVALUATION_SEED = 1_000_000


def train() -> SmallResNet:
    """SGD with momentum and a one-cycle rate; returns the network in eval mode."""
    # The order of the sums, and so the weights, would depend on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SmallResNet().to(memory_format=torch.channels_last)
    steps = EPOCHS * -(-IMAGES // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in tqdm(range(EPOCHS), "train"):
        images, labels = draw(IMAGES, seed=epoch)
        images = images.contiguous(memory_format=torch.channels_last)
        for part in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[part]), labels[part])
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def accuracy(model: SmallResNet) -> float:
    """Top-1 on 2,000 images that were not trained on."""
    images, labels = draw(2000, seed=EVALUATION_SEED)
    with torch.inference_mode():
        found = torch.cat([model(part) for part in images.split(250)]).argmax(1)
    return float((found == labels).float().mean())


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    start = time.perf_counter()
    model = train()
    seconds = time.perf_counter() - start
    print(f"top-1 {accuracy(model):.4f} in float32, trained in {seconds:.0f} s")
    state = {
        key: tensor.contiguous().half() if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    save_file(state, WEIGHTS)
    load_weights(model, WEIGHTS)
    size = WEIGHTS.stat().st_size
    print(f"top-1 {accuracy(model):.4f} as stored in {WEIGHTS.name}, {size:,} bytes")


if __name__ == "__main__":
    main()
