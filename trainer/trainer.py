"""Trainer: the engine as a Python class, the same for a job.yaml and for a user's own script."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtrain.errors import UserError, first_line
from dtrain.schema.packages import require
from dtrain.schema.sections import Fsdp
from dtrain.schema.strategies import STRATEGIES
from dtrain.stderr import say

from .batches import Sets, batches_of, by_phase
from .checks.agreement import require_same_settings
from .checks.arguments import (
    optimizer_of,
    require_loss,
    require_metrics,
    require_model,
    require_scheduler,
    settings_of,
    unwrapped,
)
from .checks.optimizer_kinds import require_a_rate, require_rates
from .data.indexed import Batches, Data
from .data.transfer import bound_on
from .distributed.seeds import be_deterministic, derive_seed, rng_kept
from .distributed.world import join_world
from .fit.cadence import Cadence
from .fit.callbacks import Callbacks
from .fit.data import FitData, ValidationSet
from .fit.description import alike, full_name, job_of
from .fit.evaluation import evaluate_all, gather_values
from .fit.loop import Loop
from .fit.sample_mixing import look_for_mixing
from .fit.scheduling import scheduling_of_fit
from .fit.trained import Trained
from .fit_folder import continues, fit_folder
from .fit_pictures import draw_fit
from .loss.step import Step, supervised_step
from .loss.user_step import UserStep, user_step
from .metric_trial import require_reported, try_validation
from .metrics.early_stopping import Best
from .metrics.phases import PhaseMetrics, monitor_of, require_monitor
from .model.activation_checkpointing import recompute_activations
from .model.learned_loss import LearnedLoss
from .model.loading import begin_from
from .optimization import precision as precisions
from .optimization.ema import Ema
from .optimization.freezing import Freezing
from .optimization.optimizer_step import Update
from .optimization.run_length import Interval, RunLength
from .optimization.scheduling import Scheduling
from .predict import predict_features, predict_shares
from .strategies.base import require_uncut
from .strategies.by_name import parallel
from .summary import summary

if TYPE_CHECKING:
    import pandas
    import torchinfo

    from .metrics.given_metrics import Given

Strategy = Literal["ddp", "fsdp", "deepspeed"] | Fsdp | Mapping[str, Any]


class Trainer:
    """Trains a model on as many processes as the script was started with; the result does not depend on how many.

    Start the script with `dtrain launch --gpus 4 train.py`, with torchrun, or plainly with python.

    Args:
        net: the model, the same on all ranks (they get rank 0's weights).
        loss_fn: `loss_fn(predictions, target)`, a mean over samples; `None` when `step` makes the loss.
        optimizer: made of `net.parameters()`; or several by their names, each made of some of them.
        metrics_dict: by name torchmetrics metrics, updated with `(predictions, target)`, or functions of the two,
            called with those of all samples at an epoch's end; a MetricCollection is such a dict, or a metric in one.
        step: `step(model, batch) -> {loss, predictions, target, weight, metrics}`, for anything but
            `(features, target)`; may be given to `fit` instead.
        init_from: a file of weights that the model begins with, or a dict with it and more: see job.yaml's.
        scheduler: steps after each epoch, or after each optimizer step (`scheduler_interval="step"`); of several
            optimizers, those by name.
        scheduler_monitor: what one such as ReduceLROnPlateau looks at; by default what `fit` monitors.
        activations: by metric, "softmax", "sigmoid" or "none": what turns predictions into probabilities.
        train_metrics: names of the metrics of the training predictions; by default all that do not keep samples.
        seed: the order of samples, and each rank's random numbers, follow from it.
        device: "auto", "cpu" or "cuda".
        micro_batch_size: most samples in one forward pass of one rank.
        freeze: patterns of parameters that are not trained, or dicts with `patterns` and `until` (500, "3 epochs").
        unused_parameters: "allow": a batch may leave out some of the model's parameters, each batch others; with "ddp".
        strategy: "ddp", the whole model on each rank; "fsdp", or `Fsdp(...)` with its settings, a part of it on each;
            "deepspeed", or its configuration as a dict.
        activation_checkpointing: classes of modules whose activations are computed again in the backward pass.
        precision: "fp32", "tf32", "bf16" or "fp16", see `Precision`.
        clip_norm, clip_value: limits of the batch's gradient, by its norm or each of its numbers.
        l1, l2: factors of sum |w| and sum w^2 / 2 over the weights, without biases and norms; see `Penalty`.
        on_nonfinite: "stop" or "skip": what to do with gradients that hold inf or nan.
        ema: decay of a moving average of the weights, see `Ema`; evaluated as ema_loss, ema_*, kept in weights/ema.pt.
        validate_every, report_every: "epoch", a number of optimizer steps, or text such as "5 epochs": how often the
            model is validated, and how often what training has added up since the last time is reported.
        max_time: such as "12 h": how long to train before stopping with a checkpoint and exit code 75.
        callbacks: objects with any of on_start, on_step_end, on_validation_end, on_epoch_end, on_save, on_stop, on_end.
        checkpoint_every: as `validate_every`, or a time such as "30 min".
        keep, keep_every: how many of the newest checkpoints are kept, and the first after each such interval as well.
        run_dir: the run's folder; by default that of `dtrain launch`, else a new one under runs/.
        resume: continue the run in `run_dir` from its last checkpoint.

    Raises:
        UserError: what is asked for can't be done; the message says what to change.
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        metrics_dict: Given | None = None,
        *,
        step: UserStep | None = None,
        init_from: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        scheduler: LRScheduler | Mapping[str, LRScheduler] | None = None,
        scheduler_interval: Interval | Mapping[str, Interval] = "epoch",
        scheduler_monitor: str | Mapping[str, str | None] | None = None,
        activations: Mapping[str, str | None] | None = None,
        train_metrics: list[str] | None = None,
        seed: int = 0,
        device: str = "auto",
        micro_batch_size: int | None = None,
        deterministic: bool = False,
        freeze: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
        sync_batchnorm: bool = False,
        unused_parameters: Literal["refuse", "allow"] = "refuse",
        strategy: Strategy = "ddp",
        activation_checkpointing: Sequence[str] = (),
        precision: precisions.Name = "fp32",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        l1: float | None = None,
        l2: float | None = None,
        on_nonfinite: Literal["stop", "skip"] | None = None,
        ema: float | None = None,
        validate_every: int | str = "epoch",
        report_every: int | str = "epoch",
        max_time: str | None = None,
        callbacks: Sequence[Any] = (),
        checkpoint_every: int | str = "epoch",
        keep: int = 2,
        keep_every: int | str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        arguments = dict(locals())  # by their names, which are job.yaml's
        if step is not None and loss_fn is not None:
            raise UserError("step makes its own loss: give Trainer either loss_fn or step")
        self.settings = settings_of(arguments)
        require_model(net)
        net = unwrapped(net)
        require_loss(loss_fn)
        require_metrics(metrics_dict)
        require_uncut(net)  # whose optimizer has other parameters now
        self.optimizer: Optimizer | None = optimizer_of(optimizer, net, loss_fn)
        self.freezing = Freezing(net, self.settings.fit.freeze, self.optimizer)
        require_scheduler(scheduler, self.optimizer)
        self.scheduling = Scheduling.of(scheduler, scheduler_interval, scheduler_monitor)
        if deterministic:
            be_deterministic()
        self.world = join_world(device)
        if sync_batchnorm and self.world.device.type == "cpu" and self.world.world_size > 1:
            raise UserError("sync_batchnorm needs CUDA: torch has no SyncBatchNorm on the CPU")
        gradients_on = torch.device("cpu") if getattr(strategy, "offload", False) else None
        self.precision = precisions.Precision(precision, self.world.device, gradients_on=gradients_on)
        if precision == "fp32" and precisions.is_tf32_asked_for():
            self._warn("this script allows TF32, which precision fp32 overrides; to keep it: precision='tf32'")
        loss_fn = bound_on(loss_fn, self.world.device)
        self._class = full_name(net)
        begin_from(net, self.settings.init_from, self._say, is_needed=not continues(run_dir))
        recompute_activations(net, activation_checkpointing)
        self.ema = ema
        self.micro_batch_size = micro_batch_size
        loss = LearnedLoss(loss_fn, net, self.world)
        if self.optimizer is not None:
            loss.adopt(self.optimizer, self._say, is_whole=STRATEGIES[self.settings.fit.strategy].is_plain)
        self.model = parallel(net, self.world, strategy, self.settings.fit, self.precision.dtype)
        self.model.loss = loss
        self.net = self.model.bare
        self._step: Step | None = None
        self._has_own_step = False
        self.predict_step = self.precision.of(predict_features)
        self._made_by: Any = loss_fn  # what makes the loss
        if loss_fn is not None:
            self._step = self.precision.of(supervised_step(loss_fn))
        elif step is not None:
            self._take(step)
        self.model.adopt(self.optimizer)
        self.metrics = PhaseMetrics(metrics_dict, self.world.device, activations, train_metrics)
        self.seed = seed
        self._callbacks = Callbacks(callbacks)
        self._run_dir = run_dir
        self._resume = resume

    def _take(self, step: UserStep) -> None:
        self._made_by, self._has_own_step = step, True
        self._step = self.predict_step = self.precision.of(user_step(bound_on(step, self.world.device)))

    @property
    def step(self) -> Step:
        """What a micro-batch does, with this precision.

        Raises:
            UserError: nobody has said.
        """
        if self._step is None:
            raise UserError("Trainer needs a loss: pass loss_fn, or a step that returns one")
        return self._step

    def fit(
        self,
        train_data: Data,
        val_data: Sets | None = None,
        epochs: int | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        patience: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        *,
        steps: int | None = None,
        min_delta: float = 0.0,
        threshold: float | None = None,
        stop_on_nan: bool = False,
        step: UserStep | None = None,
        run_dir: str | os.PathLike[str] | None = None,
    ) -> pandas.DataFrame:
        """Train, and return the history: the rows of metrics.jsonl, by default one an epoch. All ranks take part.

        A DataLoader's batch_size is the whole batch, over all ranks. Anything else that can be iterated over is a
        loader of your own: it yields this rank's batches, other samples on each rank. Afterwards the model is as the
        last step left it; the best epoch's weights are in the run folder, and in `ckpt_path` where one is given.

        Args:
            val_data: what to validate on, or a dict of several sets by their names: val_NAME_loss, val_NAME_acc.
            epochs, steps: passes over the data, and optimizer steps: what ends first; by default 10 epochs.
            patience: how many times in succession `monitor` is reported without being better before training ends.
            monitor: by default val_loss, else train_loss; to be given with several sets to validate on.
            min_delta: the least improvement that counts for `patience`.
            threshold: training ends as soon as `monitor` is as good as this.
            stop_on_nan: training ends as soon as `monitor` is nan or infinite.
            step: what a batch does, in place of what Trainer was made with; `evaluate` and `predict` keep it.
            run_dir: the fit's folder, in place of Trainer's.
        """
        require("Trainer.fit returns a pandas.DataFrame, and", "pandas")  # before hours of training
        if step is not None:
            self._take(step)
        stopping = {"monitor": monitor, "mode": mode, "patience": patience, "min_delta": min_delta}
        stopping |= {"threshold": threshold, "stop_on_nan": stop_on_nan}
        epochs = 10 if epochs is None and steps is None else epochs
        loop = self.train(train_data, val_data, epochs=epochs, steps=steps, early_stopping=stopping, run_dir=run_dir)
        if ckpt_path is not None and self.world.is_main:
            shutil.copyfile(loop.saver.run.best_weights, ckpt_path)
        self.draw(loop)
        import pandas

        return pandas.DataFrame(loop.progress.rows)

    def train(
        self,
        train_data: Data,
        val_data: Sets | None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        early_stopping: Mapping[str, Any] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
    ) -> Loop:
        """`fit` for a job, whose history is read from the run folder; the loop that has run. All ranks take part.

        Args:
            early_stopping: as in job.yaml.
        """
        if self.optimizer is None:
            raise UserError("Trainer needs an optimizer to fit")
        stopping = dict(early_stopping or {})
        stopping["monitor"] = monitor_of(stopping.get("monitor"), [*by_phase(val_data, "val")])
        settings = self.settings.of_fit(epochs=epochs, steps=steps, early_stopping=stopping, seed=self.seed)
        assert settings.fit.early_stopping is not None
        require_rates(self.optimizer)
        require_a_rate(self.optimizer, scheduled=bool(self.scheduling.schedules))
        best = Best(settings.fit.early_stopping)
        data = self._data(train_data, val_data)
        require_monitor(best.monitor, data.tallies, may_log=self._has_own_step)
        self.metrics.require_mode(best, data.tallies)
        cadence = Cadence(settings, validates=bool(data.val), num_steps=data.train.num_steps)
        scheduling = scheduling_of_fit(
            self.scheduling, best, data, settings.fit, self.metrics, self._warn, may_log=self._has_own_step
        )
        parts = alike(settings, self._made_by, self.optimizer, scheduling, data, self.metrics.by_name)
        require_same_settings(self.world, parts)
        update = Update(self.model, self.optimizer, self.precision, settings.fit, self._say)
        self.freezing.begin_fit(self.model, RunLength.of(settings.fit, data.train.num_steps), self._warn)
        given = self._run_dir if run_dir is None else run_dir
        folder = fit_folder(self.world, given, resume=self._resume, job_text=self._job_text)
        with rng_kept(self.world.device), self.precision.in_force(), folder as run:
            ema = None if self.ema is None else Ema(self.net, self.ema)
            trained = Trained(
                self.model, self.step, self.precision, self.optimizer, update, scheduling, self.freezing, ema
            )
            loop = Loop(run, trained, data, settings, best, cadence, self._callbacks)
            if self.metrics.by_name or self._has_own_step:
                tried = try_validation(self.model, self.step, data, self._warn)
                for name in dict.fromkeys((best.monitor, *scheduling.monitors)):
                    require_reported(name, tried, data, self.metrics.by_name, self._warn)
            if self.world.world_size > 1 or self.micro_batch_size is not None:
                is_coarse = trained.is_coarse
                look_for_mixing(self.model, self.step, train_data, self.seed, self._warn, is_coarse=is_coarse)
            loop.run()
        self.seed = derive_seed("fit", self.seed)  # another fit goes on with this model, in another order
        return loop

    def _data(self, train_data: Data, val_data: Sets | None) -> FitData:
        """What a fit reads and adds up. All ranks take part, to see that they were given the same."""
        train, tally = self._batches(train_data, training=True), self.metrics.tally
        val = []
        for phase, each in by_phase(val_data, "val", self.metrics.by_name).items():
            tallies = [tally(phase)] + [tally(phase.replace("val", "ema", 1))] * (self.ema is not None)
            val.append(ValidationSet(each, self._batches(each, training=False), tallies))
        return FitData(train, tally("train", training=True), val)

    def draw(self, loop: Loop) -> None:
        """Pictures of a run that is over, in its folder. Rank 0 alone does it."""
        if self.world.is_main:
            draw_fit(loop.saver.run, loop.progress, loop.data.tallies, self.metrics.by_name)

    def evaluate(self, data: Sets, name: str = "val") -> dict[str, Any]:
        """Loss and metrics of the model as it is (NAME_loss, NAME_*), each sample counted once. All ranks take part."""
        sets = [(each, self.metrics.tally(phase)) for phase, each in by_phase(data, name, self.metrics.by_name).items()]
        self.model.share_buffers()
        with self.precision.in_force():
            for each, tally in sets:
                evaluate_all(self.model, self.step, self._batches(each, training=False), tally)
        return self.world.from_main(gather_values(self.world, [tally for _, tally in sets]))

    def predict(self, data: Data) -> Tensor:
        """The model's predictions for each sample once, in the order of the dataset's indices: [N, ...], on the CPU.

        Samples may be `(features, target)` or features alone. All ranks take part, and get all of it; for more than
        fits in memory there is `dtrain predict`.
        """
        own = list(self.predict_shares(data))
        pieces = sorted((piece for pieces in self.world.gather(own) for piece in pieces), key=lambda piece: piece[0])
        try:
            return torch.cat([rows for _, rows in pieces])
        except RuntimeError as error:
            raise UserError(f"the predictions cannot be concatenated into one tensor: {first_line(error)}") from None

    def predict_shares(self, data: Data) -> Iterator[tuple[int, Tensor]]:
        """This rank's part of `predict`: rows of predictions, with the index of the first. All ranks take part."""
        with self.precision.in_force():
            yield from predict_shares(self.model, self.predict_step, data, self.world, self.micro_batch_size)

    def summary(self, input_shape: Sequence[int] | None = None, *, features: Any = None) -> torchinfo.ModelStatistics:
        """The model's layers with their output shapes and parameters, and the memory that they take; to be printed.

        Args:
            input_shape: of one sample, without the batch's dimension; or else
            features: a batch as the model takes it.
        """
        if self.model.forwards_together:
            raise UserError(
                "a sharded model can't be summarized on one rank: call dtrain.summary(net, ...) before Trainer"
            )
        return summary(self.net, input_shape, features=features)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            say(line)

    def _warn(self, line: str) -> None:
        self._say(f"warning: {line}")

    def _batches(self, data: Data, *, training: bool) -> Batches:
        fill_empty = training or self.model.forwards_together
        return batches_of(data, self.world, self.seed, self.micro_batch_size, fill_empty=fill_empty)

    def _job_text(self, name: str) -> str:
        return job_of(name, self.seed, self._class, self.optimizer, self.scheduling, self.metrics.by_name)
