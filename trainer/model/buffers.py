"""A model's buffers, which may grow, appear and vanish during training: copied, restored, and shared by all ranks.

So are the values of its `get_extra_state`, which torch's state_dict has under names of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..data.batch_tensors import map_tensors
from ..distributed.torch_private import own_buffers, remove_buffer
from ..distributed.world import World

EXTRA = "_extra_state"  # as torch calls it in a state_dict
Buffers = dict[str, Any]  # tensors by name, None where a place has no value yet; and any data, of an extra state


def buffers_of(net: nn.Module) -> Buffers:
    """All buffers, those that modules share under each of their names, and those of no value too; extra states."""
    buffers = {
        f"{path}.{name}" if path else name: buffer
        for path, module in net.named_modules(remove_duplicate=False)
        for name, buffer in own_buffers(module).items()
    }
    return {**buffers, **extra_states(net)}


def extra_states(net: nn.Module) -> dict[str, Any]:
    """What modules give beside parameters and buffers, under the names that they have in a state_dict."""
    return {
        f"{path}.{EXTRA}" if path else EXTRA: module.get_extra_state()
        for path, module in net.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def is_extra(name: object) -> bool:
    return str(name).rpartition(".")[2] == EXTRA


def shapes_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes in a state_dict, by which it is told from another model's; an extra state may be anything."""
    return {name: None if is_extra(name) else value.shape for name, value in state.items()}


def on_device(values: Mapping[str, Any], device: torch.device) -> Buffers:
    return {name: map_tensors(lambda tensor: tensor.to(device), value) for name, value in values.items()}


def copied(value: Any) -> Any:
    """The value of a buffer or an extra state as it is now."""
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(map_tensors(Tensor.detach, value))


def copies_of(net: nn.Module) -> Buffers:
    """What `put_back` takes."""
    return {name: copied(value) for name, value in buffers_of(net).items()}


@torch.no_grad()
def put_back(net: nn.Module, values: Mapping[str, Any]) -> None:
    """Restore these buffers and no others. An existing one with this shape and type stays the same tensor."""
    now = buffers_of(net)
    for name in now.keys() - values.keys():
        module, own = _place(net, name)
        remove_buffer(module, own)  # it may have two names
    for name, value in values.items():
        if is_extra(name):
            _place(net, name)[0].set_extra_state(value)
            continue
        buffer = now.get(name)
        if value is not None and buffer is not None and (buffer.shape, buffer.dtype) == (value.shape, value.dtype):
            if buffer is not value:
                buffer.copy_(value)
            continue
        module, own = _place(net, name)
        if name in now:
            setattr(module, own, value)
        else:
            module.register_buffer(own, value)


@torch.no_grad()
def make_room(net: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    """Give buffers the shapes that they have in a state_dict, which is then to be loaded."""
    for name, buffer in buffers_of(net).items():
        value = None if is_extra(name) or is_lazy(buffer) else state.get(name)
        if isinstance(value, Tensor) and (buffer is None or buffer.shape != value.shape):
            module, own = _place(net, name)
            setattr(module, own, torch.empty_like(value, device=device))


def share_buffers(net: nn.Module, world: World) -> None:
    """Give all ranks rank 0's buffers. All ranks take part, in a broadcast of what they are and one for each dtype.

    Extra states travel with the first.
    """
    if world.world_size == 1:
        return
    own = buffers_of(net)
    extra = on_device({name: value for name, value in own.items() if is_extra(name)}, torch.device("cpu"))
    own = {name: value for name, value in own.items() if name not in extra}
    kinds: dict[str, Any] = {n: b if b is None else (b.shape, b.dtype) for n, b in own.items()}
    kinds, extra = world.from_main((kinds, extra))
    values: Buffers = dict.fromkeys(kinds)
    for dtype in dict.fromkeys(kind[1] for kind in kinds.values() if kind is not None):
        names = [name for name, kind in kinds.items() if kind is not None and kind[1] == dtype]
        sizes = [kinds[name][0].numel() for name in names]
        if world.is_main:
            flat = torch.cat([own[name].detach().reshape(-1).to(world.device) for name in names])
        else:
            flat = torch.empty(sum(sizes), dtype=dtype, device=world.device)
        dist.broadcast(flat.view(torch.uint8), src=0)  # bytes: not every backend has every type
        for name, part in zip(names, flat.split(sizes), strict=True):
            values[name] = part.view(kinds[name][0]).clone()
    if not world.is_main:
        put_back(net, {**values, **on_device(extra, world.device)})


def renew_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Put copies in the places of the buffers, and return these: a graph that they are part of stays as it is."""
    before = {name: buffer for name, buffer in buffers_of(net).items() if not is_extra(name) and buffer is not None}
    copies: dict[int, Tensor] = {}  # those that modules share stay shared
    set_buffers(net, {name: copies.setdefault(id(each), each.clone()) for name, each in before.items()})
    return before


def set_buffers(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put these tensors themselves in the places of the buffers."""
    for name, tensor in tensors.items():
        module, own = _place(net, name)
        setattr(module, own, tensor)


def _place(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return net.get_submodule(path), own
