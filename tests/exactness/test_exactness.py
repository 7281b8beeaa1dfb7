"""N ranks give what a plain PyTorch loop in one process gives: its losses, accuracies, metrics and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import campaign
from ranks import run_ranks
from torch import nn
from torchmetrics import Accuracy, MeanSquaredError
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix, MulticlassF1Score
from training import Job, Samples, epoch_order, train

from dtrain.trainer.data.indexed import Source
from dtrain.trainer.trainer import Trainer

SEED, EPOCHS, BATCH = 3, 3, 11  # 2, 3 and 4 do not divide the batch
NUM_TRAIN, NUM_VAL = 34, 25  # last batches of 1 and of 3: shares are empty at 2 ranks and more
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


def parts(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer, Samples, Samples]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    made = OPTIMIZERS[optimizer](net.parameters())
    # A line search on batches enlarges what the rounding of float32 leaves.
    dtype = torch.float64 if optimizer == "lbfgs" else torch.float32
    net.to(dtype)
    train_set, val_set = (Samples(torch.randn(n, 6).to(dtype), torch.randint(4, (n,))) for n in (NUM_TRAIN, NUM_VAL))
    return net, made, train_set, val_set


def job(optimizer: str, micro_batch_size: int | None) -> Job:
    net, made, train_set, val_set = parts(optimizer)
    metrics = {"acc": Accuracy(task="multiclass", num_classes=4)}
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": made, "metrics_dict": metrics}
    trainer |= {"seed": SEED, "micro_batch_size": micro_batch_size}
    return {"trainer": trainer, "train": train_set, "val": val_set, "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def plain_loop(optimizer: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The same training as everybody would write it, in one process."""
    net, made, train_set, val_set = parts(optimizer)
    loss_fn = nn.CrossEntropyLoss()
    rows = []
    for epoch in range(1, EPOCHS + 1):
        loss_sum, correct = 0.0, 0
        for chosen in epoch_order(NUM_TRAIN, SEED, epoch).split(BATCH):
            features, target = train_set.features[chosen], train_set.target[chosen]

            def closure(features=features, target=target) -> torch.Tensor:
                made.zero_grad()
                loss = loss_fn(net(features), target)
                loss.backward()
                return loss

            with torch.no_grad():
                predictions = net(features)
            loss_sum += made.step(closure).item() * len(chosen)  # that of the first evaluation
            correct += int((predictions.argmax(1) == target).sum())
        with torch.no_grad():
            predictions = net(val_set.features)
        val_loss = loss_fn(predictions, val_set.target).item()
        val_correct = int((predictions.argmax(1) == val_set.target).sum())
        rows.append({"train_loss": loss_sum / NUM_TRAIN, "correct": correct, "val_loss": val_loss})
        rows[-1] |= {"val_correct": val_correct}
    return rows, net.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("world_size", "micro_batches"),
    [(1, 2), (2, 1), (3, 2), (4, 1), campaign(1, 1), campaign(2, 2), campaign(3, 1), campaign(4, 2)],
)
def test_any_number_of_ranks_trains_as_a_plain_loop_does(world_size, micro_batches, optimizer, tmp_path):
    largest_share = -(-BATCH // world_size)
    results = train(world_size, tmp_path, job, optimizer, -(-largest_share // micro_batches))
    expected_rows, expected_weights = plain_loop(optimizer)
    for rows, weights in results:  # each rank has the history and the weights
        assert len(rows) == EPOCHS
        for epoch, (row, expected) in enumerate(zip(rows, expected_rows, strict=True), start=1):
            assert (row["epoch"], row["step"]) == (epoch, epoch * 4)
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
            assert row["train_acc"] * NUM_TRAIN == pytest.approx(expected["correct"], abs=1e-4)
            assert row["val_acc"] * NUM_VAL == pytest.approx(expected["val_correct"], abs=1e-4)
        for name, value in expected_weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


# -- evaluation ----------------------------------------------------------------------------------

NUM_SAMPLES = 10_007


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).softmax(1)


def classification() -> tuple[Samples, dict[str, Any]]:
    torch.manual_seed(SEED)
    data = Samples(torch.randn(NUM_SAMPLES, 5), torch.randint(3, (NUM_SAMPLES,)))
    metrics = {
        "acc": Accuracy(task="multiclass", num_classes=3),
        "f1": MulticlassF1Score(3, average="macro"),
        "auroc": MulticlassAUROC(3, thresholds=None),
        "confusion": MulticlassConfusionMatrix(3),
    }
    return data, metrics


def regression() -> tuple[Samples, dict[str, Any]]:
    torch.manual_seed(SEED)
    return Samples(torch.randn(NUM_SAMPLES, 5), torch.randn(NUM_SAMPLES, 3)), {"mse": MeanSquaredError()}


def evaluate(rank: int, world_size: int) -> list[dict[str, Any]]:
    results = []
    for loss, (data, metrics) in ((nn.NLLLoss(), classification()), (nn.MSELoss(), regression())):
        trainer = Trainer(
            Softmax(), loss, metrics_dict=metrics, device="cpu", activations=dict.fromkeys(metrics, "none")
        )
        results.append(trainer.evaluate(Source(data, 1000, shuffle=False)))
    return results


def test_evaluation_counts_every_sample_once_on_three_ranks():
    for classified, regressed in run_ranks(3, evaluate):
        data, metrics = classification()
        with torch.no_grad():
            predictions = Softmax()(data.features)
        assert sum(map(sum, classified["val_confusion"])) == NUM_SAMPLES
        for name, metric in metrics.items():
            expected = metric(predictions, data.target).double()
            torch.testing.assert_close(torch.tensor(classified[f"val_{name}"]).double(), expected, rtol=1e-6, atol=0)
        expected_loss = nn.functional.nll_loss(predictions, data.target).item()
        assert classified["val_loss"] == pytest.approx(expected_loss, rel=1e-5)

        expected_mse = (predictions - regression()[0].target).double().square().mean().item()
        assert regressed["val_mse"] == pytest.approx(expected_mse, rel=1e-6)
        assert regressed["val_loss"] == pytest.approx(expected_mse, rel=1e-5)


# -- batch norm's buffers ------------------------------------------------------------------------


def batch_norm_parts() -> tuple[nn.Module, Samples, Samples]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return net, *(Samples(torch.randn(n, 6) * 3 + 1, torch.randint(4, (n,))) for n in (40, 23))


def batch_norm_job(folder: str) -> Job:
    net, train_set, val_set = batch_norm_parts()
    made = torch.optim.SGD(net.parameters(), lr=0.1)

    def keep(*_: Any) -> None:  # what this rank's own data made of the buffers, before any sharing
        torch.save(net[1].running_mean.clone(), f"{folder}/mean-{torch.distributed.get_rank()}.pt")

    made.register_step_post_hook(keep)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": made, "seed": SEED}
    return {"trainer": trainer, "train": train_set, "val": val_set, "batch_size": 10, "fit": {"epochs": 1}}


def test_batch_norm_buffers_are_those_of_rank_0_in_evaluation_and_in_the_weights(tmp_path):
    results = train(2, tmp_path / "run", batch_norm_job, str(tmp_path))
    means = [torch.load(tmp_path / f"mean-{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(*means)
    net, _, val_set = batch_norm_parts()
    for name in ("best", "last"):
        weights = torch.load(tmp_path / f"run/weights/{name}.pt", weights_only=True)
        assert torch.equal(weights["1.running_mean"], means[0])
        assert weights["1.num_batches_tracked"] == 4
    net.load_state_dict(weights)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(net.eval()(val_set.features), val_set.target).item()
    for rows, state in results:
        assert torch.equal(state["1.running_mean"], means[0])
        assert rows[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
