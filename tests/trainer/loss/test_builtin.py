"""torch's own losses and optimizers, all that the tutorials name and the rest: in parts, and over ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import epoch_order, prepare

from dtrain import Trainer
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.schema.instantiate import check_target, instantiate
from dtrain.schema.targets import OptimizerTarget
from dtrain.trainer.data.indexed import MicroBatch, Source
from dtrain.trainer.loss.step import Outcome, Step, supervised_step
from dtrain.trainer.loss.user_step import user_step

SIZE, CLASSES = 7, 4
torch.manual_seed(0)
OUTPUTS = torch.randn(SIZE, CLASSES)
PROBABILITIES = torch.softmax(torch.randn(SIZE, CLASSES), dim=1)
SIGNS = torch.randint(2, (SIZE, CLASSES)).float() * 2 - 1
LABELS = torch.tensor([[1, 3, -1, 0], [0, -1, 1, 2], *[[2, 0, 3, -1]] * 5])  # up to the -1
NUMBERS = torch.randint(CLASSES, (SIZE,))

BY_PAIRS: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "MSELoss": (nn.MSELoss(), OUTPUTS, SIGNS),
    "L1Loss": (nn.L1Loss(), OUTPUTS, SIGNS),
    "SmoothL1Loss": (nn.SmoothL1Loss(), OUTPUTS, SIGNS),
    "HuberLoss": (nn.HuberLoss(), OUTPUTS, SIGNS),
    "BCELoss": (nn.BCELoss(), OUTPUTS.sigmoid(), PROBABILITIES),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 5.0)), OUTPUTS, PROBABILITIES),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0)), OUTPUTS, NUMBERS),
    "NLLLoss": (nn.NLLLoss(weight=torch.arange(1.0, 5.0)), OUTPUTS.log_softmax(1), NUMBERS),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), OUTPUTS.log_softmax(1), PROBABILITIES),
    "KLDivLoss by number": (nn.KLDivLoss(), OUTPUTS.log_softmax(1), PROBABILITIES),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), OUTPUTS, PROBABILITIES),
    "SoftMarginLoss": (nn.SoftMarginLoss(), OUTPUTS, SIGNS),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), OUTPUTS, SIGNS),
    "MultiMarginLoss": (nn.MultiMarginLoss(), OUTPUTS, NUMBERS),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), OUTPUTS, LABELS),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), OUTPUTS, (SIGNS + 1) / 2),
}


def parts_of(step: Step, *tensors: Tensor) -> float:
    """The loss put together from parts of three, three and one."""
    total, weight = 0.0, 0.0
    for begin, end in ((0, 3), (3, 6), (6, 7)):
        data = tuple(tensor[begin:end] for tensor in tensors)
        outcome: Outcome = step(nn.Identity(), MicroBatch(data, end - begin, SIZE, is_whole=False))
        total += outcome.total.item()
        weight += end - begin if outcome.weight is None else outcome.weight.item()
    return total / weight


@pytest.mark.parametrize("name", BY_PAIRS)
def test_a_loss_of_torchs_in_parts_is_that_of_the_whole(name):
    loss_fn, predictions, target = BY_PAIRS[name]
    assert parts_of(supervised_step(loss_fn), predictions, target) == pytest.approx(
        loss_fn(predictions, target).item(), rel=1e-5
    )


def cosine(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    return {"loss": F.cosine_embedding_loss(model(batch[0]), batch[1], batch[2][:, 0])}


def ranking(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    return {"loss": F.margin_ranking_loss(model(batch[0]), batch[1], batch[2], margin=0.5)}


def triplet(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    return {"loss": F.triplet_margin_loss(model(batch[0]), batch[1], batch[2])}


def ctc(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    log_p, target = batch  # (N, T, C), (N, S)
    samples = len(target)
    lengths = torch.full((samples,), log_p.shape[1]), torch.full((samples,), target.shape[1])
    return {"loss": F.ctc_loss(model(log_p).transpose(0, 1), target, *lengths)}


IN_A_STEP = {
    "CosineEmbeddingLoss": (cosine, (OUTPUTS, PROBABILITIES, SIGNS)),
    "MarginRankingLoss": (ranking, (OUTPUTS, PROBABILITIES, SIGNS)),
    "TripletMarginLoss": (triplet, (OUTPUTS, PROBABILITIES, SIGNS)),
    "CTCLoss": (ctc, (torch.randn(SIZE, 9, CLASSES).log_softmax(2), torch.randint(1, CLASSES, (SIZE, 3)))),
}


@pytest.mark.parametrize("name", IN_A_STEP)
def test_a_loss_of_three_in_a_step(name):
    function, tensors = IN_A_STEP[name]
    whole = function(nn.Identity(), tensors)["loss"].item()
    assert parts_of(user_step(function), *tensors) == pytest.approx(whole, rel=1e-5)


# -- optimizers ------------------------------------------------------------------------------------

OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)
EPOCHS, BATCH = 2, 5


def parts(name: str) -> tuple[nn.Module, Any, TensorDataset]:
    """A model that the optimizer can train, made by its name as in a job.yaml."""
    torch.manual_seed(1)
    embedding = nn.Embedding(6, 2, sparse=name == "SparseAdam")
    rest = [nn.Flatten(), nn.Linear(4, 2, bias=name != "Muon")]
    if name == "SparseAdam":
        rest = [nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()]
    data = TensorDataset(torch.randint(6, (17, 2)), torch.randint(2, (17,)))
    net = nn.Sequential(embedding, *rest).double()  # LBFGS follows rounding into other directions
    target = OptimizerTarget(**{"_target_": f"torch.optim.{name}", "lr": 0.05})
    assert check_target(target, 1, "optimizer") == []
    return net, instantiate(target, net.parameters()), data


def plain_loop(name: str) -> dict[str, Tensor]:
    net, optimizer, data = parts(name)
    features, target = data.tensors
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(len(target), 0, epoch).split(BATCH):

            def closure(chosen: Tensor = chosen) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(features[chosen]), target[chosen])
                loss.backward()
                return loss

            optimizer.step(closure)
    return net.state_dict()


def fit_all(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Tensor]]:
    weights = {}
    for name in OPTIMIZERS:
        os.environ[RUN_DIR_VARIABLE] = str(Path(folder) / name)
        net, optimizer, data = parts(name)
        trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, device="cpu")
        trainer.fit(Source(data, BATCH, shuffle=True), epochs=EPOCHS)
        weights[name] = {key: value.clone() for key, value in net.state_dict().items()}
    return weights


def test_every_optimizer_of_torchs_by_its_name(tmp_path):
    """LBFGS and its closure too. On two ranks, of which one gets the larger share."""
    for name in OPTIMIZERS:
        prepare(tmp_path / name, 2)
    for weights in run_ranks(2, fit_all, str(tmp_path)):
        for name, found in weights.items():
            expected = plain_loop(name)
            apart = max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())
            assert apart < (1e-2 if name == "Muon" else 1e-7), (name, apart)  # Muon computes in bfloat16
