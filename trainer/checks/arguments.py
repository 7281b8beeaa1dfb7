"""Checks a Trainer's arguments before they are used: is each of the right kind?

The problems' paths are job.yaml's keys, which a script's arguments resemble.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError, among
from dtrain.schema.contradictions import contradictions_of
from dtrain.schema.sections import Checkpoint, Fit, Fsdp, InitFrom, Launch
from dtrain.schema.strategies import name_of
from dtrain.schema.targets import OPTIMIZER_NAME, SchedulerTarget, Section, Seed
from dtrain.schema.validation import problems_in

from ..checkpoint.codec import flatten
from ..model.buffers import extra_states
from ..model.call_proxy import bare_of
from ..model.optimizers import Optimizers
from ..model.weights import without_shape
from .optimizer_kinds import needs_closure

# By name: to import all of them takes time.
_WRAPPERS = (
    *("torch.DataParallel", "torch.DistributedDataParallel", "torch.FullyShardedDataParallel", "torch.FSDPModule"),
    "deepspeed.DeepSpeedEngine",
)


# The keys of job.yaml's `fit` that Trainer.fit or the launcher takes; the others are Trainer's arguments by name.
OF_THE_RUN = {"epochs", "steps", "early_stopping", "restarts"}


class Settings(Section):
    """Those of job.yaml's settings that a Trainer has."""

    fit: Fit
    checkpoint: Checkpoint
    launch: Launch
    seed: Seed
    init_from: InitFrom | None

    def of_fit(
        self, *, epochs: int | None, steps: int | None, early_stopping: Mapping[str, Any], seed: int
    ) -> Settings:
        """These, with what is said when it fits.

        Raises:
            UserError: what job.yaml would refuse, in its words.
        """
        length = {"epochs": epochs, "steps": steps}
        fit = {**self.fit.model_dump(), **length, "early_stopping": dict(early_stopping)}
        return _checked({**self.model_dump(), "fit": fit, "seed": seed})


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """A Trainer's keyword arguments as the sections of job.yaml that have them by these names.

    Raises:
        UserError: what job.yaml would refuse, in its words.
    """
    fit = {name: arguments[name] for name in Fit.model_fields.keys() & arguments.keys()}
    if not isinstance(fit["activation_checkpointing"], str):
        fit["activation_checkpointing"] = list(fit["activation_checkpointing"])
    fit["strategy"] = name_of(fit["strategy"]) or fit["strategy"]
    values = {
        "fit": {"epochs": 1, **fit},
        "checkpoint": {
            "every": arguments["checkpoint_every"],
            "keep": arguments["keep"],
            "keep_every": arguments["keep_every"],
        },
        "launch": {"device": arguments["device"]},
        "seed": arguments["seed"],
        "init_from": arguments["init_from"],
    }
    given = arguments["scheduler_interval"]
    intervals = list(given.values()) if isinstance(given, Mapping) else [given]
    schedulers = [{"_target_": "scheduler", "interval": interval} for interval in intervals]
    return _checked(values, [each for scheduler in schedulers for each in problems_in(SchedulerTarget, scheduler)])


def settings_of_loop(
    epochs: int, early_stopping: Mapping[str, Any], checkpoint: Mapping[str, Any], seed: int
) -> Settings:
    """Those of a loop of the user's own; raises UserError as `settings_of` does."""
    fit = {"epochs": epochs, "early_stopping": early_stopping}
    return _checked({"fit": fit, "checkpoint": checkpoint, "launch": {}, "seed": seed, "init_from": None})


def fit_of_loop(strategy: Any) -> Fit:
    """Those by which such a loop's model is shared; raises UserError for what it can't have."""
    name = name_of(strategy) or strategy
    if name not in ("ddp", "fsdp"):
        raise UserError(f"Ranks.wrap: strategy is {name!r}, expected 'ddp', 'fsdp' or Fsdp(...); Trainer has deepspeed")
    if isinstance(strategy, Fsdp) and not strategy.reshard_after_forward:
        raise UserError("Ranks.wrap: a loop of your own can't keep what fsdp gathers: leave out reshard_after_forward")
    return Fit.model_validate({"epochs": 1, "strategy": name})


def _checked(values: Mapping[str, Any], others: Sequence[Problem] = ()) -> Settings:
    """The settings; raises UserError with all that is wrong with them, and the other problems."""
    values = _plain(values)
    problems = [*problems_in(Settings, values), *others]
    if not problems:
        settings = Settings.model_validate(values)
        problems = contradictions_of(settings.fit)
    if problems:
        raise UserError(problems)
    return settings


def _plain(value: Any) -> Any:
    """The value with numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def require_model(net: Any, *, may_be_lazy: bool = False) -> None:
    """Raise UserError unless it is a torch.nn.Module that can be trained and saved."""
    _require_instance(net, "model", "pass an object of that class")
    if not isinstance(net, nn.Module):
        raise UserError(Problem(f"{_name(net)} is not a model: it is not a torch.nn.Module", "model"))
    if wrapped := next((_name(module) for module in unwrapped(net).modules() if _is_wrapper(module)), None):
        message = f"{wrapped} already wraps it, or a part of it: pass the bare model"
        raise UserError(Problem(message, "model"))
    if not may_be_lazy:
        _require_shapes(net, "model", "call the model once with a batch before making the optimizer")
    for name, value in extra_states(net).items():
        _require_savable(name, value, net.get_submodule(name.rpartition(".")[0]))


def _require_shapes(module: nn.Module, path: str, mend: str) -> None:
    if lazy := without_shape(module):
        message = (
            f"{lazy[0]} has no shape before the first batch: specify it (Linear(in_features, ...) for LazyLinear), or"
        )
        raise UserError(Problem(f"{message} {mend}", path))


def _require_savable(name: str, value: Any, module: nn.Module) -> None:
    """Raise UserError for extra state that a checkpoint or a weights file can't hold."""
    kind = _name(module)
    if type(module).set_extra_state is nn.Module.set_extra_state:
        raise UserError(Problem(f"{kind} has get_extra_state but no set_extra_state to load what it returns", "model"))
    hint = f"{kind}.get_extra_state may return numbers, strings, lists, dicts and tensors"
    try:
        flatten(value, f"{name}/")
        with io.BytesIO() as file:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
    except UserError as error:
        raise UserError(Problem(str(error), "model", hint=hint)) from None
    except Exception:  # torch.load raises whatever its parser met
        message = f"{name} is not plain data: loading a weights file with it would have to execute code"
        raise UserError(Problem(message, "model", hint=hint)) from None


def unwrapped(net: nn.Module) -> nn.Module:
    """The model in a DataParallel, a DistributedDataParallel or what Ranks has returned; others as they are."""
    while isinstance(net, (DataParallel, DistributedDataParallel)):
        net = net.module
    return bare_of(net)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it computes on several devices by itself."""
    return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in _WRAPPERS for kind in type(module).__mro__)


def require_loss(loss_fn: Any) -> None:
    """Raise UserError unless it can be called as loss(predictions, target)."""
    if loss_fn is None:
        return
    _require_instance(loss_fn, "loss", f"give it an object, such as {getattr(loss_fn, '__name__', '')}()")
    if not callable(loss_fn):
        message = f"{_name(loss_fn)} is not a loss: it can't be called as loss(predictions, target)"
        raise UserError(Problem(message, "loss"))
    if isinstance(loss_fn, nn.Module):
        _require_shapes(loss_fn, "loss", "call the loss once before making the optimizer")


def require_metrics(metrics: Any) -> None:
    """Raise UserError for metrics without names. A MetricCollection is a ModuleDict."""
    if metrics is not None and not isinstance(metrics, Mapping | nn.ModuleDict):
        message = f"a {_name(metrics)} of metrics has no names to report them under: pass a dict, " + "{'acc': metric}"
        raise UserError(Problem(message, "metrics"))


def optimizer_of(given: Any, net: nn.Module, loss_fn: Any) -> Any:
    """The optimizer that was given, or several by their names as one; None where none was.

    Raises:
        UserError: one that can't train this model or its loss; or two that train the same parameters.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        _require_optimizer(given, net, loss_fn, "optimizer")
        return given
    if unnamed := [name for name in given if not re.fullmatch(OPTIMIZER_NAME, str(name))] or ([] if given else [""]):
        message = f"{unnamed[0]!r} can't be an optimizer's name: letters, digits and '_', after a letter"
        raise UserError(Problem(message, "optimizer"))
    owners: dict[int, str] = {}
    for name, each in given.items():
        path = f"optimizer.{name}"
        _require_optimizer(each, net, loss_fn, path)
        if needs_closure(each):
            message = f"{_name(each)} computes the gradient several times a step, so it can't be one of several"
            raise UserError(Problem(message, path))
        for parameter in (parameter for group in each.param_groups for parameter in group["params"]):
            if owners.setdefault(id(parameter), name) != name:
                message = f"trains parameters that {owners[id(parameter)]} trains too: give each parameter to one"
                raise UserError(Problem(message, path))
    return Optimizers(given)


def _require_optimizer(optimizer: Any, net: nn.Module, loss_fn: Any, path: str) -> None:
    """Raise UserError unless it is an optimizer of this model's or its loss's parameters, some of them trainable."""
    example = f"{getattr(optimizer, '__name__', '')}(net.parameters(), lr=...)"
    _require_instance(optimizer, path, f"give it an object, such as {example}")
    methods = ("step", "zero_grad", "state_dict", "load_state_dict", "param_groups")
    _require_methods(optimizer, "optimizer", methods, path)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [*net.parameters(), *(loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ())]
    if not {id(parameter) for parameter in held} & {id(parameter) for parameter in own}:
        raise UserError(
            Problem(
                f"none of the {len(held)} parameters of this {_name(optimizer)} belongs to the {_name(net)} "
                "to train: create the optimizer with its parameters, after the last change to the model",
                path,
            )
        )
    if not any(parameter.requires_grad for parameter in held):
        message = f"all parameters of this {_name(optimizer)} are frozen (requires_grad is False): nothing is trained"
        raise UserError(Problem(message, path))


def require_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Raise UserError unless it is a scheduler of this optimizer, or several of these by their names."""
    if not isinstance(scheduler, Mapping):
        if scheduler is not None:
            _require_scheduler(scheduler, optimizer, "scheduler")
        return
    members = optimizer.members if isinstance(optimizer, Optimizers) else {}
    for name, each in scheduler.items():
        if name not in members:
            hint = among(str(name), sorted(members)) if members else "name the optimizers too: optimizer={...}"
            raise UserError(Problem(f"no optimizer is called {name}", f"scheduler.{name}", hint=hint))
        _require_scheduler(each, members[name], f"scheduler.{name}")


def _require_scheduler(scheduler: Any, optimizer: Any, path: str) -> None:
    _require_instance(scheduler, path, "pass an object, created with the optimizer")
    if isinstance(scheduler, Optimizer):
        raise UserError(Problem(f"{_name(scheduler)} is an optimizer, not a scheduler", path))
    _require_methods(scheduler, "scheduler", ("step", "state_dict", "load_state_dict"), path)
    if optimizer is None:
        raise UserError(Problem(f"missing; {_name(scheduler)} needs one, whose learning rates it changes", "optimizer"))
    own = getattr(scheduler, "optimizer", optimizer)
    # By its groups, which an optimizer that wraps another one shares with it.
    if {id(group) for group in own.param_groups}.isdisjoint(id(group) for group in optimizer.param_groups):
        message = f"this {_name(scheduler)} changes the learning rates of an optimizer other than the one that trains"
        raise UserError(Problem(f"{message} ({_name(optimizer)}): create it with that one", path))


def _require_instance(value: Any, path: str, instead: str) -> None:
    if isinstance(value, type):
        raise UserError(Problem(f"{value.__name__} is a class: {instead}", path))


def _require_methods(value: Any, kind: str, names: tuple[str, ...], path: str) -> None:
    if lacking := [name for name in names if not hasattr(value, name)]:
        raise UserError(Problem(f"{_name(value)} is no {kind}: it lacks {', '.join(lacking)}", path))


def _name(value: Any) -> str:
    return type(value).__name__
