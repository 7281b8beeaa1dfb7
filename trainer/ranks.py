"""Ranks: what a script with its own training loop needs on several processes, one line each.

The loop stays the user's, and so do its checkpoints: `Trainer` has a loop that continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dtrain.errors import UserError

from .batches import batches_of
from .checks.arguments import require_model, unwrapped
from .data.indexed import Batches, Data, MicroBatch
from .distributed.seeds import derive_seed, seed_everything
from .distributed.world import join_world
from .loss.step import as_units, require_rows
from .metrics.reduce import reduce_states
from .model.call_proxy import bare_of, called_as
from .model.weights import bare_state_dict, save_weights
from .strategies.ddp import DataParallel

if TYPE_CHECKING:  # torchmetrics takes a second or two to import, and a loop may have no metrics
    from dtrain.schema.metrics.values import Result

    from .metrics.given_metrics import Given
    from .metrics.metric_set import MetricSet


class Ranks:
    """The processes that the script was started with: by `dtrain launch --gpus 4 train.py`, torchrun, or one by python.

    Each process runs the whole script. What is computed does not depend on how many there are.

    Args:
        seed: the order of the samples follows from it and the epoch, and what a rank draws (dropout) from it and the
            rank: before its first batch, each is seeded.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(self, *, seed: int = 0, device: str = "auto") -> None:
        self.world = join_world(device)
        self.rank, self.world_size = self.world.rank, self.world.world_size
        self.device = self.world.device
        self._seed = seed
        self._models: list[DataParallel] = []
        self._part: MicroBatch | None = None  # the loop's current batch
        self._is_seeded = False
        self._num_batches = 0  # that the loop has had in hand, as many on all ranks

    @property
    def has_samples(self) -> bool:
        """Whether the current batch counts. If a short batch leaves this rank no samples, it gets two that don't."""
        return self._part is None or self._part.samples > 0

    def shard(self, data: Data) -> Sharded:
        """The batches of a DataLoader, whose batch_size is that of all ranks together: each rank gets its share.

        They arrive on the device. A rank's share of a short batch may be empty; it then computes with two samples that
        count for nothing, since the others wait for its part in the gradient.
        """
        return Sharded(self, batches_of(data, self.world, self._seed, fill_empty=True))

    def wrap(self, net: nn.Module) -> nn.Module:
        """The model on this rank's device with rank 0's weights; its gradients are averaged over the ranks.

        On one process it is the model itself. On several it has the model's class and shares all that the model has,
        and to call it is to call torch's DDP. All ranks take part.
        """
        require_model(net)
        net = unwrapped(net)
        taken = {id(parameter) for model in self._models for parameter in model.bare.parameters()}
        if any(id(parameter) in taken for parameter in net.parameters()):
            raise UserError("Ranks.wrap: the model, or a part of it, is already wrapped; wrap the whole model once")
        model = DataParallel(net, self.world)
        model.share_buffers()
        self._models.append(model)
        return model.bare if model.module is model.bare else called_as(model.bare, model.module)

    def scale_loss(self, loss: Tensor, units: float | Tensor | None = None) -> Tensor:
        """This rank's part of the whole batch's mean loss: call `backward` on it.

        Ranks have shares of different sizes, whose mean losses must not count alike. What the gradient is of may be
        computed by calling the model, or by methods of it.

        Args:
            units: of how many the loss is the mean on this rank, where that is not its number of samples in a batch of
                `shard`: tokens, say, or the sum of class weights. All ranks take part then, in a sum; so they do where
                a collate function of the user's own has made the batch.

        Raises:
            UserError: no batch of `shard` is in hand, or none of which the samples can be counted; or no model's
                gradients are averaged.
        """
        if self.world_size > 1 and not self._models:
            raise UserError("Ranks.scale_loss is for a model whose gradients are averaged: net = ranks.wrap(net)")
        for model in self._models:
            model.expect_backward(loss)
        if units is None:
            if (part := self._part) is None:
                raise UserError("Ranks.scale_loss: iterate over the batches of ranks.shard(loader), or give `units`")
            if part.is_regular:
                return loss * (part.samples * self.world_size / part.batch_samples)
            if self.world_size > 1:
                require_rows(part, "pass Ranks.scale_loss the `units` that the loss is the mean over")
            units = part.samples
        own = as_units(units, loss.device) * float(self.has_samples)
        total = self.world.sum(own)
        share = own * self.world_size / total.where(total != 0, 1.0)
        return loss.where(own != 0, 0.0) * share.to(loss.dtype)  # the mean of no units is nan

    def weigh(self, loss: Tensor, units: float | Tensor | None = None) -> Tensor:
        """`scale_loss` by the name that it had; to go with the next release."""
        warnings.warn("Ranks.weigh is called scale_loss now", DeprecationWarning, stacklevel=2)
        return self.scale_loss(loss, units)

    def synchronise(self, metrics: Given) -> dict[str, Synchronised]:
        """Metrics whose `compute` is of all ranks' samples, each counted once.

        Args:
            metrics: torchmetrics' own, or functions of all samples' arguments; a MetricCollection, or one among them.
        """
        from .metrics.given_metrics import as_metrics
        from .metrics.metric_set import MetricSet

        made = as_metrics(metrics)
        return {name: Synchronised(self, name, MetricSet({name: made[name]}, {}, self.device)) for name in made}

    def save(self, net: nn.Module, path: str | os.PathLike[str]) -> None:
        """Write the bare module's state_dict, on rank 0; when it returns, the file exists. All ranks take part."""
        model = next((each for each in self._models if bare_of(net) is each.bare), None)
        if model is None:
            raise UserError(f"Ranks.save: this {type(net).__name__} was not returned by Ranks.wrap")
        model.share_buffers()
        refused = ""
        if self.world.is_main:
            try:
                save_weights(bare_state_dict(model.bare), Path(path))
            except OSError as error:
                refused = f"{path} can't be written: {error.strerror}"
        if refused := self.world.from_main(refused):
            raise UserError(refused)

    def _update(self, metrics: MetricSet, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from .metrics.metric_set import Arguments

        samples = None if self._part is None else self._part.samples
        metrics.update(None, None, {name: Arguments(args, kwargs)}, batch=self._num_batches, samples=samples)

    def _epoch(self, batches: Batches, epoch: int) -> Iterator[Any]:
        if not self._is_seeded:  # the model is made, alike everywhere; from here on ranks draw masks of their own
            seed_everything(derive_seed("rank", self._seed, self.rank))
            self._is_seeded = True
        for model in self._models:
            if not model.bare.training:  # about to be evaluated, alike on all ranks
                model.share_buffers()
        outer = self._part  # of a loop around this one
        try:
            for batch in batches.epoch(epoch):
                self._num_batches += 1
                for part in batch.micro_batches:
                    self._part = part
                    with contextlib.ExitStack() as undone:
                        for model in self._models if not part.samples else ():
                            undone.enter_context(model.preserving_state())
                        yield part.data
        finally:
            self._part = outer


class Sharded:
    """A rank's shares of a loader's batches. To iterate over it is an epoch; equally many batches on all ranks."""

    def __init__(self, ranks: Ranks, batches: Batches) -> None:
        self._ranks = ranks
        self._batches = batches
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration this epoch (from 1), for a loop that resumes."""
        self._epoch = epoch - 1

    def __len__(self) -> int:
        if (steps := self._batches.num_steps) is None:
            raise TypeError("the number of batches is not known before an epoch ends")
        return steps

    def __iter__(self) -> Iterator[Any]:
        self._epoch += 1
        return self._ranks._epoch(self._batches, self._epoch)


class Synchronised:
    """A metric over all ranks.

    Args:
        own: of this rank's samples, with the metric of that name alone.
    """

    def __init__(self, ranks: Ranks, name: str, own: MetricSet) -> None:
        self._ranks = ranks
        self._name = name
        self._own = own

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch of this rank, by the metric's own arguments: predictions and target mostly. No collective."""
        if self._ranks.has_samples:
            self._ranks._update(self._own, self._name, args, kwargs)

    def compute(self) -> Result | dict[str, Result]:
        """The value, on all ranks: a number, lists of numbers, or such by name. All ranks take part."""
        kept = self._own.state_dict()
        reduced = reduce_states(self._own.states())
        values = {} if reduced is None else self._own.finish(reduced)
        self._own.load_state_dict(kept)  # more may be added
        values = self._ranks.world.from_main(values)
        return values.get(self._name, values)

    def reset(self) -> None:
        """Forget all samples."""
        self._own.reset()
