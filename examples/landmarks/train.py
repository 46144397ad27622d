"""Train the landmark network and write its weights, stored as float16.

    python -m examples.landmarks.train

Seeded, on one thread: the same torch on the same kind of machine gives the same file. Every epoch
draws new faces, so there is nothing to overfit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from examples.landmarks.faces import OUTER_EYES, draw
from examples.landmarks.network import WEIGHTS, LandmarkNet
from fxquant.frontend.models import load_weights
from fxquant.metrics import normalized_mean_error

EPOCHS, IMAGES, BATCH = 30, 4000, 64
EVALUATION_SEED = 1_000_000
"""Of the faces that tables are measured on; training takes 0 and up, calibration 500,000."""


def train() -> LandmarkNet:
    """AdamW with a one-cycle rate on Huber's loss; returns the network in eval mode."""
    # The order of the sums, and so the weights, would depend on the number of threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LandmarkNet().to(memory_format=torch.channels_last)
    steps = EPOCHS * -(-IMAGES // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for epoch in tqdm(range(EPOCHS), "train"):
        images, landmarks = draw(IMAGES, seed=epoch)
        images = images.contiguous(memory_format=torch.channels_last)
        for part in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            loss = F.smooth_l1_loss(model(images[part]), landmarks[part], beta=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train, write, measure."""
    state = train().state_dict()
    half = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in state.items()
    }
    unfinished = WEIGHTS.with_suffix(".tmp")
    save_file(half, unfinished)
    unfinished.replace(WEIGHTS)
    model = LandmarkNet().eval()
    load_weights(model, WEIGHTS)
    images, landmarks = draw(1000, seed=EVALUATION_SEED)
    with torch.inference_mode():
        errors = normalized_mean_error(*OUTER_EYES)(model(images), landmarks)
    size = WEIGHTS.stat().st_size
    print(f"normalized mean error {errors.mean():.2%}; {WEIGHTS.name}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
