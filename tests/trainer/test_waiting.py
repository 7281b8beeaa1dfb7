"""Nothing in a training step waits for its device. The meta device has no numbers that one could wait for.

What reads one back (`item`, `bool`, `nonzero`, a copy to the CPU) raises there by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from training import make_loop

from dtrain.errors import UserError
from dtrain.run.heartbeat import Phase
from dtrain.schema.sections import Fit
from dtrain.trainer import trainer
from dtrain.trainer.checkpoint.optimizer_state import to_parameters
from dtrain.trainer.distributed.world import World, require_cpu_backend
from dtrain.trainer.fit import loop
from dtrain.trainer.fit.cadence import Due
from dtrain.trainer.metrics.epoch_totals import Tally
from dtrain.trainer.metrics.metric_set import MetricSet
from dtrain.trainer.optimization.optimizer_step import Update
from dtrain.trainer.optimization.precision import Precision
from dtrain.trainer.ranks import Ranks
from dtrain.trainer.strategies.base import Parallel
from dtrain.trainer.strategies.deepspeed import DeepSpeedZero
from dtrain.trainer.strategies.deepspeed_private import ZeroOptimizer

META = torch.device("meta")
CLASSES, BATCH = 3, 4


class Copies(TorchDispatchMode):
    """Refuses copies to the device for which the process waits."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and torch.device(kwargs.get("device") or "cpu") == META:
            assert args[0].device == META or kwargs.get("non_blocking"), "a copy to the device is waited for"
        return function(*args, **kwargs)


@contextmanager
def without_waiting() -> Iterator[None]:
    def made(kind: Any) -> Any:
        def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
            assert torch.device(kwargs.get("device") or "cpu") != META, "a copy of a number is waited for"
            return kind(data, *args, **kwargs)

        return make

    with ExitStack() as stack:
        for name in ("tensor", "as_tensor"):  # which copy where no dispatch mode sees it
            stack.enter_context(patch.object(torch, name, made(getattr(torch, name))))
        stack.enter_context(Copies())
        yield


def weighted_step(net: nn.Module, batch: Any) -> dict[str, Any]:
    features, target = batch
    predictions = net(features)
    return {"loss": F.cross_entropy(predictions, target), "weight": 3.0, "predictions": predictions, "target": target}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, CLASSES)).to(META)


class Centres(nn.Module):
    """A loss with something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=META))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predictions * self.scale, target)


WEIGHT = torch.tensor([1.0, 2.0, 0.5])
STEPS: dict[str, dict[str, Any]] = {
    "class weights": {"loss_fn": nn.CrossEntropyLoss(weight=WEIGHT), "micro_batch_size": 3, "clip_norm": 1.0},
    "bound weights": {"loss_fn": functools.partial(F.cross_entropy, weight=WEIGHT)},
    "a step's weight": {"step": weighted_step, "micro_batch_size": 2, "ema": 0.9, "clip_value": 0.1},
    "a loss that learns": {"loss_fn": Centres(), "l1": 1e-3, "l2": 1e-3},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing(name, tmp_path):
    model, options = net(), STEPS[name]
    learned = options.get("loss_fn")
    parameters = [*model.parameters(), *(learned.parameters() if isinstance(learned, nn.Module) else ())]
    metrics = {"acc": MulticlassAccuracy(CLASSES, average="micro", validate_args=False)}
    given = {**options, "net": model, "optimizer": torch.optim.Adam(parameters), "metrics_dict": metrics}
    data = TensorDataset(torch.randn(12, 5), torch.arange(12) % CLASSES)
    with patch.object(trainer, "join_world", lambda device: World(0, 1, META)):
        training = make_loop(str(tmp_path), {"trainer": given, "train": data, "batch_size": BATCH})
    for batch in training.data.train.epoch(1):
        with without_waiting():
            training.train_step(batch.micro_batches)
    assert training.data.train_tally.samples == len(data)


def test_the_test_sees_a_wait():
    for wait in (lambda: torch.as_tensor(3.0, device=META), lambda: torch.ones(2).to(META)):
        with pytest.raises(AssertionError, match="waited for"), without_waiting():
            wait()
    for read in (lambda: float(torch.ones((), device=META)), lambda: torch.ones(2, device=META).cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


def test_own_units_are_weighed_without_waiting():
    ranks = Ranks(device="cpu")
    loss = torch.ones((), device=META, requires_grad=True)
    with without_waiting():
        ranks.scale_loss(loss, 3).backward()


def test_metrics_look_at_their_arguments_in_the_first_epoch_alone():
    """torchmetrics would read numbers back in each update, to see whether they are what they should be."""
    for device in (torch.device("cpu"), META):
        tally = Tally("val", device, MetricSet({"acc": BinaryAccuracy()}, {}, device))
        assert tally.metrics is not None
        wrong = torch.ones(4, device=device), torch.full((4,), 7, device=device)
        for tally.samples in (0, 4):  # of the epoch that ends
            with pytest.raises(UserError, match="does not fit"):
                tally.metrics.update(*wrong)
            tally.reset()
        with pytest.raises(UserError) if device.type == "cpu" else without_waiting():  # where looking is cheap
            tally.metrics.update(*wrong)


def test_offloaded_gradients_are_clipped_where_they_are():
    """Their norm is of all ranks, and so on the GPU. Tensors without numbers, as if there were one."""
    with FakeTensorMode():
        gradients, norm = [torch.ones(3), torch.ones(2)], torch.ones((), device="cuda")
        model = Parallel(nn.Linear(1, 1), World(0, 1, torch.device("cpu")))
        places = []
        with (
            patch.object(model, "gradients", lambda optimizer: gradients),
            patch.object(model, "norm", lambda gradients: norm),
            patch.object(torch, "_foreach_mul_", lambda tensors, scale: places.append(scale.device)),
        ):
            optimizer = torch.optim.SGD(model.bare.parameters(), lr=0.1)
            Update(model, optimizer, Precision("fp32", torch.device("cpu")), Fit(epochs=1, clip_norm=1.0)).apply(1)
        assert places == [torch.device("cpu")]


def test_what_an_optimizer_has_goes_where_the_parameters_went():
    """Adagrad has its sums from the start. On tensors without numbers, as if there were a GPU."""
    with FakeTensorMode():
        layer = nn.Linear(3, 2, device="cuda")
        optimizer = torch.optim.Adagrad(layer.parameters(), lr=0.1)
        for state in optimizer.state.values():
            state["sum"] = state["sum"].cpu()
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(Exception, match="device"):
            optimizer.step()
        to_parameters(optimizer)
        optimizer.step()
        assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


def test_the_speed_is_that_of_the_device(tmp_path):
    """Not that at which it is asked for steps: at an epoch's end it may have most of them still to do."""
    layer, now = nn.Linear(5, CLASSES), [0.0]
    given = {"net": layer, "loss_fn": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(layer.parameters(), lr=0.1)}
    data = TensorDataset(torch.randn(12, 5), torch.arange(12) % CLASSES)
    training = make_loop(str(tmp_path), {"trainer": given, "train": data, "batch_size": BATCH})

    def wait(world: World) -> None:
        assert training.progress.heartbeat.read().phase == Phase.WAITING  # which is said where it does not come back
        now[0] += 8.0

    with patch.object(World, "await_device", wait), patch.object(loop.time, "perf_counter", lambda: now[0]):
        training.progress.speed.start()
        training.train_epoch()
        row, _ = training.report(Due(report=True, validation=False, checkpoint=False), epoch_ends=True)
    assert row["samples_per_s"] == 12 / 8


def test_gradients_that_are_on_their_way_to_the_cpu_are_waited_for():
    """DeepSpeed copies them there, and its stages 1 and 2 look only in their own step whether they have come."""
    has_come: list[bool] = []

    class Flat:
        @property
        def grad(self) -> Tensor:
            assert has_come
            return torch.ones(1)

    zero: Any = object.__new__(DeepSpeedZero)
    zero._zero = ZeroOptimizer(SimpleNamespace(optimizer=SimpleNamespace(cpu_offload=True)), 2)
    zero._fragments = {0: SimpleNamespace(flat=Flat())}
    zero.world = SimpleNamespace(await_device=lambda: has_come.append(True))
    assert len(zero.gradients(None)) == 1


def test_a_group_of_nccl_alone_is_refused_where_it_is_not_enough():
    says = r"fsdp.offload exchanges .* \(cuda:nccl\) can't: init_process_group"
    with patch.object(dist, "get_backend_config", return_value="cuda:nccl"), pytest.raises(UserError, match=says):
        require_cpu_backend("fsdp.offload")
    with patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        require_cpu_backend("fsdp.offload")
