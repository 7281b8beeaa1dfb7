"""What a fit trains, and what trains it: everything with a state in checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dtrain.run.folder import RunDir

from ..checkpoint.codec import require_data
from ..distributed.world import World
from ..loss.step import Step
from ..model.buffers import shapes_of
from ..model.learned_loss import beside
from ..model.optimizers import kind_of
from ..model.weights import mismatches
from ..optimization.ema import Ema
from ..optimization.freezing import Freezing
from ..optimization.optimizer_step import Update
from ..optimization.precision import Precision
from ..optimization.scheduling import Scheduling
from ..strategies.base import Parallel, matches

# In the paths of a checkpoint's tensors, the section and the name of the parameter.
_OF_PARAMETER = re.compile(r"(model|ema|optimizer)(?:/held/[^/]+)*(?:/state)?/([^/]+)(?:/[^/]+)?")


@dataclass
class Trained:
    """The model with its loss, and what changes its weights.

    Attributes:
        step: what a micro-batch does with the model.
        update: from a batch's gradient to the optimizer's step.
        freezing: which of the model's parameters are not trained, or not yet.
        ema: the moving average of the weights, where there is one.
    """

    model: Parallel
    step: Step
    precision: Precision
    optimizer: Optimizer
    update: Update
    scheduling: Scheduling
    freezing: Freezing
    ema: Ema | None = None

    @property
    def world(self) -> World:
        """The ranks that the model is on."""
        return self.model.world

    @property
    def is_coarse(self) -> bool:
        """Whether numbers that should be equal may differ by the rounding of 16 bits, or of TF32."""
        return self.world.device.type != "cpu" or self.precision.name != "fp32"

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks, but for the model's buffers, of which rank 0's count. All ranks take part."""
        return {
            "kinds": self.kinds(),
            "model": self.model.state_dict(),
            "loss": self.model.loss.state_dict(),
            "optimizer": self.model.optimizer_state(self.optimizer),
            "scheduler": self.scheduling.state_dict(),
            "schedule_began": self.scheduling.beginning_state(),
            "scaler": self.precision.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` gave, on any number of ranks. All ranks take part."""
        self.model.load_state_dict(state["model"])
        self.model.loss.load_state_dict(state.get("loss", {}))
        self.model.load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduling.load_state_dict(state["scheduler"], state.get("schedule_began"))
        self.precision.load_state_dict(state.get("scaler"))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def misfit(self, state: dict[str, Any]) -> str | None:
        """Why a state is not one of these parts, if it is not. No collective."""
        shapes = shapes_of(state["model"])
        grown = {name: shapes[name] for name in self.model.own_buffers() if name in shapes}
        if problems := mismatches(shapes, self.model.shapes() | grown):
            return f"a checkpoint of another model: {'; '.join(problems)}"
        if problem := self.model.loss.misfit(state.get("loss", {})):
            return f"a checkpoint with {problem}"
        for part, kind in self.kinds().items():
            if state["kinds"][part] != kind:
                return f"a checkpoint with {part} {state['kinds'][part]}, this run has {kind}"
        if self.ema is not None and not state.get("ema"):
            return "a checkpoint without an average of the weights, this run has one (ema)"
        groups = [group["params"] for group in state["optimizer"]["param_groups"]]
        if groups != self.model.parameter_groups(self.optimizer):
            return "a checkpoint whose optimizer has other parameters, or other groups of them"
        return None

    def kinds(self) -> dict[str, str | None]:
        """The classes of parts whose state no other class can load."""
        return {"optimizer": kind_of(self.optimizer), "scheduler": self.scheduling.kind}

    def room(self, path: str, like: Tensor) -> Tensor | None:
        """Room to read this rank's part of a tensor of `state_dict` into; None where the CPU's will do."""
        if (of_parameter := _OF_PARAMETER.fullmatch(path)) is None:
            return None
        section, name, *_ = of_parameter.groups()
        if section == "ema" and self.ema is not None:
            average = self.ema.state_dict().get(name)
            return average if average is not None and matches(average, like) else None
        return self.model.room(section, name, like)

    def require_savable(self) -> None:
        """Raise UserError if a checkpoint can't hold the state of optimizer or scheduler. No collective."""
        self.scheduling.require_savable()
        require_data("optimizer", self.optimizer, self.model.own_optimizer_state(self.optimizer))

    def weights(self, run: RunDir, *, is_best: bool, is_best_of_average: bool) -> dict[Path, dict[str, Any]]:
        """Whole state_dicts, by the files for them. All ranks take part, rank 0 has what it needs."""
        weights = {run.last_weights: self.model.weights()}
        if self.ema is not None:
            weights[run.ema_weights] = self.model.weights(self.ema.by_parameter())
        if loss := self.model.loss.state_dict():
            weights |= {beside(path): loss for path in weights}
        if is_best:
            if loss:
                weights[beside(run.best_weights)] = loss
            weights[run.best_weights] = weights[run.ema_weights if is_best_of_average else run.last_weights]
        return weights
