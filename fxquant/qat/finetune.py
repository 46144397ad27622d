"""Quantization-aware training of a compiled model: the last resort where reconstruction fails."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.arguments import checked
from fxquant.compilation import check_device
from fxquant.compiled import CompiledModel
from fxquant.errors import DataError, ModelError, RecipeError, TrainingError
from fxquant.frontend.prepare import drops_or_learns
from fxquant.qat.trained_graph import to_trainable
from fxquant.qat.training_loop import Loss, Trainer

__all__ = ["TrainingError", "finetune"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]


@checked(but=("teacher",), train_loader=DataError)
def finetune(
    q: CompiledModel,
    train_loader: Iterable[Any],
    *,
    epochs: int = 10,
    learning_rate: float = 1e-4,
    optimizer: MakeOptimizer | None = None,
    loss: Loss | None = F.cross_entropy,
    teacher: nn.Module | Literal["float"] | None = "float",
    distillation: float = 1.0,
    learn_steps: bool = True,
    freeze_observers_at: int | None = None,
    freeze_batch_norm_at: int | None = None,
    validation: Iterable[Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> CompiledModel:
    """Train the simulated graph of a compile and lower it again; `q` stays as it is.

    Every weight, bias and affine parameter trains through its quantizer (straight-through
    estimator); modules, and with them strides, paddings, groups, eps, momentum, stay what they
    are. Batch norms that the recipe folded are part of their layer and train as such; the others
    train with the statistics of each batch until `freeze_batch_norm_at`, and from then on with
    the running ones, as they run later. Dropout was removed at the compile and stays away.

    Args:
        q: a compiled model (not one that was loaded from a file).
        train_loader: ``(inputs..., labels)`` batches, iterable once for each epoch. Shuffling and
            augmentation are the loader's.
        epochs: how often the data are seen.
        learning_rate: its peak; it falls to 0 along half a cosine.
        optimizer: called as ``optimizer(groups, lr=learning_rate)``; the last group are the
            logarithms of the steps. None: Adam.
        loss: from the model's output and the labels to a scalar; None: only the teacher teaches,
            and labels are not needed.
        teacher: ``"float"``: the float network that `q` was made from; a module; or None. The
            Kullback-Leibler divergence of its softmax (dimension 1) from the model's is added to
            the loss, times `distillation`.
        learn_steps: learn the steps of weights and activations (LSQ). Without it, the steps of
            weights follow the weights, and activations are observed while they are quantized:
            each epoch ends with new grids from what it saw.
        freeze_observers_at: the epoch from which on steps or grids stay; None: with learned steps
            never, else after half of the epochs.
        freeze_batch_norm_at: see above; None: after half of the epochs.
        validation: ``(inputs, labels)`` batches; the epoch with the best top-1 on them is what
            is returned, epoch 0 being `q`. Without it the last epoch is returned.
        device: where the training runs, as ``"cuda"``.
        seed: the same one gives the same bits on the same machine, shuffling by torch included.
        progress: show a bar with the loss.

    Raises:
        ModelError: `q` was loaded from a file, or its output does not suit the teacher.
        DataError: batches without labels, of the wrong length, or none at all.
        RecipeError: a number makes no sense.
        InputError: there is no such device.
        TrainingError: the loss became NaN or infinite; its `best` is the best state before that.
    """
    if "simulated" not in q.stages:
        raise ModelError(
            "a loaded artefact holds no simulated graph to train: compile the float model again, "
            "finetune what compile returns, and save that"
        )
    _check_numbers(epochs, learning_rate, distillation)
    check_device(device)
    if loss is None and teacher is None:
        raise RecipeError("there is nothing to learn from: give a loss, a teacher or both")
    if iter(train_loader) is train_loader and epochs > 1:
        raise DataError(
            f"the training data is an iterator, which can be read once and not {epochs} times: "
            "give a list or a DataLoader"
        )
    half = math.ceil(epochs / 2)
    trainer = Trainer(
        q,
        to_trainable(q.stages["simulated"], learn_steps=learn_steps).to(device),
        loss,
        _open_teacher(q, teacher, device),
        distillation,
        device,
        learn_steps,
        (epochs if learn_steps else half) if freeze_observers_at is None else freeze_observers_at,
        half if freeze_batch_norm_at is None else freeze_batch_norm_at,
        validation,
    )
    cuda = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        make = optimizer or torch.optim.Adam
        return trainer.run(train_loader, epochs, make(trainer.groups(), lr=learning_rate), progress)


def _open_teacher(
    q: CompiledModel, teacher: nn.Module | Literal["float"] | None, device: str
) -> nn.Module | None:
    if teacher is None:
        return None
    if isinstance(teacher, str) and teacher != "float":
        raise RecipeError(f"unknown teacher {teacher!r}: give 'float', a module or None")
    module: nn.Module = q.stages["float"] if isinstance(teacher, str) else teacher
    if any(map(drops_or_learns, module.modules())):
        raise ModelError("the teacher is in training mode: call teacher.eval() before finetuning")
    return module if device == "cpu" else copy.deepcopy(module).to(device)


def _check_numbers(epochs: int, learning_rate: float, distillation: float) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise RecipeError(f"epochs must be a positive integer, got {epochs!r}")
    if not learning_rate > 0 or math.isinf(learning_rate):
        raise RecipeError(f"learning_rate must be a positive number, got {learning_rate!r}")
    if distillation < 0:
        raise RecipeError(f"distillation must not be negative, got {distillation!r}")
