"""Whether all ranks were given the same: data, model, loss, optimizer. Checked before the first step, never in one.

Differences would silently train on something that nobody meant: some samples twice and others never, or gradients of
several losses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.stderr import say

from ..data.indexed import Source
from ..distributed.world import World
from .fingerprint import Traits, plain, tensor_digest, tensor_trait, traits_of


def require_same_data(world: World, data: Any) -> None:
    """Raise UserError, on all ranks, if datasets with indices differ. All ranks take part.

    A stream, and a loader of the user's own, may be each rank's own.
    """
    hint = (
        "each rank takes its share of the same dataset: seed random splits, sort listed files (os.listdir, "
        "glob), and leave the splitting to dtrain"
    )
    _require_same(world, "the dataset", lambda: _of_data(data), hint)


def _of_data(data: Any) -> Traits:
    if not isinstance(data, Source):
        return {"loader": ("a loader of its own", "")}
    # Each rank may have as many loading processes as it likes.
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    traits = {name: plain(value) for name, value in fields.items() if isinstance(value, bool | int | str)}
    if data.is_stream:
        return traits | {"dataset": (type(data.dataset).__name__, type(data.dataset).__qualname__)}
    return {"samples": plain(data.num_samples), **traits, **traits_of(data.dataset)}


def require_same_settings(world: World, settings: Mapping[str, Any]) -> None:
    """Raise UserError, on all ranks, if a part of the run differs. All ranks take part.

    Args:
        settings: by name plain values, functions, modules and optimizers.
    """

    def traits() -> Traits:
        found: Traits = {}
        for name, value in settings.items():
            if isinstance(value, Optimizer):
                found |= _of_optimizer(name, value)
            elif isinstance(value, nn.Module):
                found |= _of_module(name, value)
            else:
                found[name] = plain(_named(value))
        return found

    _require_same(world, "what the ranks were given", traits, "all ranks take part in one run")


def require_same_model(world: World, net: nn.Module) -> None:
    """Raise UserError, on all ranks, if their models are built differently; warn if only weights differ.

    All ranks take part. Rank 0's weights will be used, as by torch's DistributedDataParallel.
    """
    if world.world_size == 1:
        return
    weights = {name: _digest_of(parameter) for name, parameter in net.named_parameters()}
    gathered = world.gather((_built(net), weights))
    _refuse_differences("the model", [built for built, _ in gathered], "build it the same way on all ranks")
    for rank, (_, found) in enumerate(gathered):
        for name, digest in found.items():
            if digest and (first := gathered[0][1][name]) and digest != first:
                if world.is_main:
                    say(
                        f"warning: the model's weights differ between the ranks (first {name}, on rank {rank}): rank "
                        "0's are used; call torch.manual_seed(...) before building the model to make runs repeatable"
                    )
                return


def _digest_of(parameter: Tensor) -> str:
    """A digest of some of its values; empty if it has none."""
    if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
        return ""
    return tensor_digest(parameter, 1 << 8)


def _built(net: nn.Module) -> Traits:
    traits: Traits = {}
    for name, module in net.named_modules():
        of_torch = type(module).__module__.startswith("torch.nn.")
        traits[name or "the whole"] = plain(f"{type(module).__name__}({module.extra_repr() if of_torch else ''})")
    for name, parameter in net.named_parameters(remove_duplicate=False):
        shape = None if isinstance(parameter, UninitializedParameter) else list(parameter.shape)
        traits[name] = plain(f"{shape} {parameter.dtype}" + ("" if parameter.requires_grad else " frozen"))
    return traits


def _of_optimizer(path: str, optimizer: Optimizer) -> Traits:
    traits = {path: plain(type(optimizer).__name__)}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            shown = len(value) if key == "params" else float(value) if isinstance(value, Tensor) else value
            traits[f"{path}.{key}" if len(optimizer.param_groups) == 1 else f"{path}.groups.{i}.{key}"] = plain(shown)
    return traits


def _of_module(path: str, module: nn.Module) -> Traits:
    traits = {f"{path} {name}".strip(): trait for name, trait in _built(module).items()}
    for name, value in vars(module).items():
        if isinstance(value, bool | int | float | str) and not any(word in name for word in ("rank", "device")):
            traits[f"{path}.{name}"] = plain(value)
    return traits | {f"{path}.{name}": tensor_trait(value) for name, value in module.named_buffers()}


def _named(value: Any) -> Any:
    """Code by its name, everything else as it is."""
    if isinstance(value, functools.partial):
        return [_named(value.func), list(value.args), dict(value.keywords)]
    return getattr(value, "__qualname__", value)


def _require_same(world: World, what: str, traits: Callable[[], Traits], hint: str) -> None:
    if world.world_size > 1:
        _refuse_differences(what, world.gather(traits()), hint)


def _refuse_differences(what: str, gathered: list[Traits], hint: str) -> None:
    for name in dict.fromkeys(name for traits in gathered for name in traits):
        found = [traits.get(name, ("missing", "")) for traits in gathered]
        others = [rank for rank, (_, compared) in enumerate(found) if compared != found[0][1]]
        if others:
            here, there = found[0][0], found[others[0]][0]
            there = there if there != here else "another one with the same beginning"
            values = f"{name} is {here} on rank 0, {there} on rank {others[0]}"
            raise UserError(f"{what} differs between ranks: {values}; {hint}")
