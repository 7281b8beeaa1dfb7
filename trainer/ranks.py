"""Ranks: what a script with its own training loop needs on several processes, one line each.

The loop stays the user's. With `epochs` it continues where it was stopped.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dtrain.errors import UserError
from dtrain.schema.sections import Fsdp

from .batches import batches_of
from .checks.agreement import require_same_settings
from .checks.arguments import fit_of_loop, require_model, settings_of_loop, unwrapped
from .data.indexed import Data
from .distributed.world import join_world
from .fit.description import full_name, job_of
from .fit_folder import fit_folder
from .loss.logs import read_logs
from .loss.step import as_units, require_rows
from .model.call_proxy import bare_of
from .model.weights import save_weights
from .optimization.scheduling import Scheduling
from .own_loop.epochs import Epochs
from .own_loop.parts import Parts
from .own_loop.sharded import Hand, Sharded
from .own_loop.synchronised import Synchronised
from .own_loop.tracked import Tracked
from .strategies.base import Parallel
from .strategies.by_name import parallel

if TYPE_CHECKING:  # torchmetrics takes a second or two to import, and a loop may have no metrics
    from .metrics.given_metrics import Given


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
        self._models: list[Parallel] = []
        self._tracked = Tracked(self.world, seed)
        self._hand = Hand(self._tracked, self._models)
        self._kept: set[int] = set()  # models that a loop was given, by their ids

    @property
    def has_samples(self) -> bool:
        """Whether the current batch counts. If a short batch leaves this rank no samples, it gets two that don't."""
        return self._hand.has_samples

    @property
    def ends_batch(self) -> bool:
        """Whether the current micro-batch is its batch's last one, after which the optimizer steps."""
        self._hand.is_end_seen = True
        return self._hand.part is None or self._hand.part.is_last

    def shard(self, data: Data, *, micro_batch_size: int | None = None) -> Sharded:
        """The batches of a DataLoader, whose batch_size is that of all ranks together: each rank gets its share.

        They arrive on the device. A rank's share of a short batch may be empty; it then computes with two samples that
        count for nothing, since the others wait for its part in the gradient.

        Args:
            micro_batch_size: most samples at once: a rank's share comes in parts, with `ends_batch` at the last one.
        """
        if self._hand.running is not None:
            raise UserError("Ranks.shard: make the loaders before the loop over Ranks.epochs, which continues in them")
        batches = batches_of(data, self.world, self._seed, micro_batch_size, fill_empty=True)
        return Sharded(self._hand, self._tracked.add_loader(batches, micro_batch_size))

    def wrap(self, net: nn.Module, *, strategy: Literal["ddp", "fsdp"] | Fsdp = "ddp") -> nn.Module:
        """The model on this rank's device with rank 0's weights; its gradients are averaged over the ranks.

        What is returned has the model's class and shares all that the model has, and to call it is to call torch's DDP
        or FSDP2; with ddp on one process it is the model itself. All ranks take part.

        Args:
            strategy: "fsdp", or its settings: each rank keeps a part of each parameter, of which the optimizer is to
                be made. It computes in calls of the model alone, not in methods of it.
        """
        fit = fit_of_loop(strategy)
        require_model(net)
        net = unwrapped(net)
        taken = {id(parameter) for model in self._models for parameter in model.bare.parameters()}
        if any(id(parameter) in taken for parameter in net.parameters()):
            raise UserError("Ranks.wrap: the model, or a part of it, is already wrapped; wrap the whole model once")
        model = parallel(net, self.world, strategy, fit, dtype=None)
        model.share_buffers()
        called = model.called()
        self._models.append(model)
        return called

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
        if self._hand.part is not None:
            self._hand.scaled.append(loss)
            if self._hand.running is not None:
                self._hand.running.count_step(self._hand.part.batch_samples)
        if self._hand.is_cut and (units is not None or not (self._hand.part is None or self._hand.part.is_regular)):
            raise UserError(
                "Ranks.scale_loss: a batch that comes in micro-batches is scaled by its samples; its `units` are not "
                "known before its last part: leave out micro_batch_size"
            )
        if units is None:
            if (part := self._hand.part) is None:
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
        own = {name: self._tracked.add_metric(MetricSet({name: made[name]}, {}, self.device)) for name in made}
        return {name: Synchronised(self.world, self._hand, self._tracked, name, each) for name, each in own.items()}

    def epochs(
        self,
        count: int,
        *,
        net: nn.Module,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int | None = None,
        min_delta: float = 0.0,
        threshold: float | None = None,
        stop_on_nan: bool = False,
        checkpoint_every: int | str = "epoch",
        keep: int = 2,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **states: Any,
    ) -> Epochs:
        """The numbers 1 to `count`, for a loop that continues where it was stopped, with what it is given here.

        A stop is answered between two batches of `shard`, with a checkpoint and exit code 75. All ranks take part.

        Args:
            net: as `wrap` returned it; its weights are the run's last.pt and best.pt.
            monitor, mode: what a row of `report` must have to be the best; by default the lowest val_loss.
            patience, min_delta, threshold, stop_on_nan: as Trainer.fit's; the loop ends with the epoch whose row says
                so.
            checkpoint_every: "epoch", a number of batches trained on, or text such as "5 epochs" or "30 min".
            keep: how many of the newest checkpoints are kept.
            run_dir, resume: as Trainer's.
            states: the optimizer, and whatever else has a state_dict that is the same on all ranks: a scheduler,
                another model, a GradScaler.
        """
        best = {"monitor": monitor or "val_loss", "mode": mode, "patience": patience, "min_delta": min_delta}
        best |= {"threshold": threshold, "stop_on_nan": stop_on_nan}
        settings = settings_of_loop(count, best, {"every": checkpoint_every, "keep": keep}, self._seed)
        models = {"net": self._wrapped("epochs", "net", net)}
        wrapped = {id(model.bare): model for model in self._models}
        for name, each in states.items():
            if isinstance(each, nn.Module) and (model := wrapped.get(id(bare_of(each)))) is not None:
                models[name] = model
        self._kept |= {id(model) for model in models.values()}
        for model in self._models:
            if id(model) not in self._kept:
                kind = type(model.bare).__name__
                raise UserError(f"Ranks.epochs was not given the {kind} that Ranks.wrap returned: NAME=it, to save it")
        parts = Parts(models, {name: each for name, each in states.items() if name not in models})
        require_same_settings(self.world, {**settings.model_dump(), **parts.kinds()})
        if (left := self._hand.running) is not None:  # by `break`
            left.leave(None)
        optimizer = next(iter(parts.optimizers.values()))
        kind = full_name(bare_of(net))

        def text(name: str) -> str:
            return job_of(name, self._seed, kind, optimizer, Scheduling(), {})

        folder = fit_folder(self.world, run_dir, resume=resume, job_text=text)
        is_chosen = monitor is not None or patience is not None or threshold is not None or stop_on_nan
        self._hand.loop = Epochs(self.world, folder, parts, self._tracked, settings, is_chosen=is_chosen)
        return self._hand.loop

    def log(self, **values: Any) -> None:
        """Add values to the means that the next `report` has by these names, over all batches and ranks. No collective.

        Args:
            values: each a number or a tensor of one, which counts as its samples do; or (value, weight).
        """
        self._require_loop("log")
        samples = 1 if self._hand.part is None else self._hand.part.samples
        weight = torch.full((), float(samples), dtype=torch.float64, device=self.device)
        self._tracked.logged.add(read_logs(values, weight))

    def report(self, **values: Any) -> dict[str, Any]:
        """Add a row to the run's metrics.jsonl, of these values and of what was logged, and return it.

        Names that begin with train_ or val_ are drawn together. Rank 0's values count; all ranks take part.

        Args:
            values: numbers, or what `compute` returned.
        """
        loop = self._require_loop("report")
        return loop.state.once(lambda: loop.report(values))

    def _require_loop(self, name: str) -> Epochs:
        if (loop := self._hand.running) is None:
            raise UserError(f"Ranks.{name} is for the lines in a loop over Ranks.epochs")
        return loop

    def _wrapped(self, method: str, name: str, net: nn.Module) -> Parallel:
        for model in self._models:
            if bare_of(net) is model.bare:
                return model
        raise UserError(f"Ranks.{method}: {name}, a {type(net).__name__}, was not returned by Ranks.wrap")

    def save(self, net: nn.Module, path: str | os.PathLike[str]) -> None:
        """Write the bare module's state_dict, on rank 0; when it returns, the file exists. All ranks take part."""
        model = self._wrapped("save", "its model", net)
        model.share_buffers()
        weights, refused = model.weights(), ""
        if self.world.is_main:
            try:
                save_weights(weights, Path(path))
            except OSError as error:
                refused = f"{path} can't be written: {error.strerror}"
        if refused := self.world.from_main(refused):
            raise UserError(refused)
