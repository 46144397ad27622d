import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import DataError, InputError, ModelError, RecipeError
from fxquant.measure.evaluate import evaluate
from fxquant.qat.finetune import TrainingError, finetune
from fxquant.qat.trained_graph import to_simulated, to_trainable
from fxquant.simulate.quantizers import ActivationQuantizer, RoundedWeightQuantizer
from passes import FusedLayer
from tests.fxquant.small_networks import Residual, compiled, images

LOW_BITS = {"weights.bits": 3, "activations.bits": 3}


def low_bits(changes: dict[str, Any] | None = None, **options: Any) -> fxquant.CompiledModel:
    torch.manual_seed(0)
    return compiled(Residual(), LOW_BITS | (changes or {}), target="reference", **options)


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(images(8), torch.arange(8) % 4)] * count


def divergence(q: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        found, wanted = (model(images(8)).log_softmax(1) for model in (q, teacher))
    return float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))


def steps(q: fxquant.CompiledModel) -> list[Tensor]:
    return [
        module.qparams.scale
        for module in q.stages["simulated"].modules()
        if isinstance(module, ActivationQuantizer)
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- there and back ------------------------------------------------------------------------


@pytest.mark.parametrize("learn_steps", [True, False])
def test_the_way_there_and_back_changes_no_bit(learn_steps: bool) -> None:
    simulated = low_bits().stages["simulated"]

    back, notes = to_simulated(to_trainable(simulated, learn_steps=learn_steps))

    assert torch.equal(back(images()), simulated(images()))
    assert not notes


def test_a_rounded_weight_starts_inside_the_cells_of_its_codes() -> None:
    simulated = copy.deepcopy(low_bits().stages["simulated"])
    layer = next(m for m in simulated.modules() if isinstance(m, FusedLayer))
    qparams = layer.weight_quantizer.qparams
    codes = (qparams.quantize(layer.layer.weight.detach()) + 1).clamp(max=qparams.qmax)
    layer.weight_quantizer = RoundedWeightQuantizer(qparams, codes)

    back, _ = to_simulated(to_trainable(simulated, learn_steps=True))

    found = next(m for m in back.modules() if isinstance(m, FusedLayer))
    assert torch.equal(found.weight_quantizer.quantize(found.layer.weight), codes)


def test_modules_keep_their_hyper_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.BatchNorm2d(8, eps=0.01, momentum=0.3),
    ).eval()
    q = compiled(model, {"fold_batch_norm": False}, calibration=images(channels=4))

    graph = to_trainable(q.stages["simulated"], learn_steps=True)

    conv = next(m for m in graph.modules() if isinstance(m, nn.Conv2d))
    norm = next(m for m in graph.modules() if isinstance(m, nn.BatchNorm2d))
    assert (conv.stride, conv.padding, conv.dilation) == ((2, 2), (2, 2), (2, 2))
    assert conv.groups == 2
    assert (norm.eps, norm.momentum) == (0.01, 0.3)


def test_weights_that_the_target_refuses_lose_a_bit() -> None:
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    q = compiled(nn.Sequential(layer).eval(), calibration=torch.randn(8, 4), target="reference")
    graph = to_trainable(q.stages["simulated"], learn_steps=True)

    back, notes = to_simulated(
        graph, refusal=lambda codes: "127 is too large" if codes.max() > 63 else ""
    )

    found = next(m for m in back.modules() if isinstance(m, FusedLayer))
    codes = found.weight_quantizer.quantize(found.layer.weight)
    assert int(codes.max()) == 63
    assert notes == {"0": "0: weights in 7 bits after training, because 127 is too large"}


# -- training ------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_steps", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_training_lowers_the_loss_of_what_runs(learn_steps: bool, fold: bool) -> None:
    q = low_bits({"fold_batch_norm": fold})
    data = batches(4)

    trained = finetune(q, data, epochs=5, learning_rate=1e-2, teacher=None, learn_steps=learn_steps)

    assert evaluate(trained, data).loss < evaluate(q, data).loss - 0.1


def test_the_teacher_alone_brings_the_softmax_closer_to_its_own() -> None:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.head.weight.mul_(20)
    q = compiled(model, {"weights.bits": 2}, target="reference")
    teacher = q.stages["float"]

    trained = finetune(q, [images(8)] * 4, epochs=10, learning_rate=3e-3, loss=None)

    assert divergence(trained, teacher) < 0.5 * divergence(q, teacher)


def test_the_trained_model_has_the_same_integer_graph() -> None:
    q = low_bits()

    trained = finetune(q, batches(), epochs=1)

    def calls(graph: Any) -> list[tuple[str, str]]:
        return [(node.name, str(node.target)) for node in graph.graph.nodes]

    assert calls(trained.stages["integer"]) == calls(q.stages["integer"])
    assert "finetuned for 1 epochs" in trained.report.notes[-1]


def test_the_model_that_was_given_stays_as_it_is() -> None:
    q = low_bits()
    before = q(images()), copy.deepcopy(q.stages["simulated"].state_dict())

    finetune(q, batches(), epochs=1, learning_rate=0.1)

    after = q.stages["simulated"].state_dict()
    assert torch.equal(q(images()), before[0])
    assert all(torch.equal(after[k], v) for k, v in before[1].items() if isinstance(v, Tensor))


def test_a_trained_model_is_saved_and_loaded(tmp_path: Any) -> None:
    trained = finetune(low_bits(), batches(), epochs=1)

    trained.save(tmp_path / "m.fxq")

    loaded = fxquant.load(tmp_path / "m.fxq", target="reference")
    assert torch.equal(loaded(images()), trained(images()))


def test_the_same_seed_gives_the_same_bits() -> None:
    q = low_bits()
    data = torch.utils.data.TensorDataset(images(8), torch.arange(8) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)

    first, second = (finetune(q, loader, epochs=2, learning_rate=1e-2, seed=3) for _ in "ab")

    assert torch.equal(first(images()), second(images()))


def test_frozen_steps_stay() -> None:
    q = low_bits()

    frozen = finetune(q, batches(), epochs=1, learning_rate=1e-2, freeze_observers_at=0)
    learned = finetune(q, batches(), epochs=1, learning_rate=1e-2)

    assert same(steps(frozen), steps(q))
    assert not same(steps(learned), steps(q))


def test_observers_follow_the_values_until_they_are_frozen() -> None:
    q = low_bits()
    options: dict[str, Any] = {"epochs": 1, "learn_steps": False}

    frozen = finetune(q, batches(), freeze_observers_at=0, **options)
    moved = finetune(q, batches(), freeze_observers_at=1, **options)

    assert same(steps(frozen), steps(q))
    assert not same(steps(moved), steps(q))


def test_batch_norm_statistics_move_until_they_are_frozen() -> None:
    q = low_bits({"fold_batch_norm": False})

    def mean(model: fxquant.CompiledModel) -> Tensor:
        return model.stages["simulated"].get_submodule("norm").running_mean

    frozen = finetune(q, batches(), epochs=1, freeze_batch_norm_at=0)
    moved = finetune(q, batches(), epochs=1, freeze_batch_norm_at=1)

    assert torch.equal(mean(frozen), mean(q))
    assert not torch.equal(mean(moved), mean(q))


def test_a_recurrent_network_trains() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0].mean(1))

    x = torch.randn(4, 5, 4)
    q = fxquant.compile(Recurrent().eval(), "dynamic_w8a8", calibration=x, target="reference")

    trained = finetune(q, [(x, torch.arange(4) % 3)], epochs=1, learning_rate=1e-2)

    assert not torch.equal(trained(x), q(x))


def test_an_optimizer_of_the_caller_is_used() -> None:
    made = []

    def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(groups, lr=lr, momentum=0.9))
        return made[0]

    finetune(low_bits(), batches(), epochs=1, optimizer=sgd)

    assert len(made[0].param_groups) == 2
    assert made[0].param_groups[1]["weight_decay"] == 0.0


def test_validation_picks_the_best_epoch() -> None:
    q = low_bits()
    # The labels are what q says: no training can make it better.
    x = images(8)
    validation = [(x, q(x).argmax(1))]

    kept = finetune(q, batches(), epochs=2, learning_rate=1.0, validation=validation)

    assert kept is q


# -- what goes wrong -----------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_and_keeps_the_best_state() -> None:
    calls = []

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(output, labels) * (math.nan if len(calls) > 3 else 1.0)

    q = low_bits()

    with pytest.raises(TrainingError, match="epoch 2, batch 1: the loss is nan") as caught:
        finetune(q, batches(), epochs=3, learning_rate=1e-2, loss=loss)

    assert not torch.equal(caught.value.best(images()), q(images()))
    assert caught.value.best(images()).isfinite().all()


def test_a_loss_that_is_nan_at_once_gives_the_model_back() -> None:
    q = low_bits()

    with pytest.raises(TrainingError, match="before the training") as caught:
        finetune(q, batches(), loss=lambda output, labels: output.sum() * math.nan)

    assert caught.value.best is q


def test_a_loaded_artefact_cannot_be_trained(tmp_path: Any) -> None:
    low_bits().save(tmp_path / "m.fxq")

    with pytest.raises(ModelError, match="compile the float model again"):
        finetune(fxquant.load(tmp_path / "m.fxq"), batches())


@pytest.mark.parametrize("data", [[(images(4),)], [images(4)], [(images(4), torch.full((4,), -1))]])
def test_batches_without_labels_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match="batch 0 has no labels"):
        finetune(low_bits(), data, epochs=1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"epochs": 0}, RecipeError, "epochs must be a positive integer"),
        ({"learning_rate": math.nan}, RecipeError, "learning_rate must be"),
        ({"device": "gpu"}, InputError, "give cpu, cuda or cuda:N"),
        ({"loss": None, "teacher": None}, RecipeError, "nothing to learn from"),
        ({"teacher": nn.BatchNorm2d(3)}, ModelError, "teacher is in training mode"),
        ({"teacher": "resnet"}, RecipeError, "unknown teacher 'resnet'"),
        ({"train_loader": []}, DataError, "no training batches"),
        ({"train_loader": iter(batches())}, DataError, "read once and not 2 times"),
        ({"train_loader": [(torch.randn(4, 5, 8, 8), torch.zeros(4))]}, DataError, "batch 0 does"),
        ({"train_loader": [(images(4), torch.full((4,), 9))]}, DataError, "loss does not take"),
        ({"validation": [images(4)]}, DataError, "validation batches have no labels"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: Any, kind: Any, message: str) -> None:
    given = {"train_loader": batches(), "epochs": 2} | options

    with pytest.raises(kind, match=message):
        finetune(low_bits(), **given)


def test_a_partial_optimizer_keeps_its_options() -> None:
    finetune(
        low_bits(), batches(), epochs=1, optimizer=partial(torch.optim.AdamW, betas=(0.8, 0.9))
    )
