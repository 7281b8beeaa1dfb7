"""A model that does more when called, and is otherwise the same: its class, attributes, methods, items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_bare: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def called_as(net: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """A module that is `net`, except that calling it calls this, which calls `net` in turn."""
    kind: Any = type(net)

    class Called(kind):  # type: ignore[misc]  # which only is known now
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Others of this class may be made of it, as a Sequential's slices are.
            return call(*args, **kwargs) if self in _bare else super().__call__(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is a model by itself
            return net.__reduce_ex__(protocol) if self in _bare else super().__reduce_ex__(protocol)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Called, name, getattr(kind, name))
    called: nn.Module = Called.__new__(Called)
    object.__setattr__(called, "__dict__", vars(net))  # the same, not as much
    _bare[called] = net
    return called


def bare_of(net: nn.Module) -> nn.Module:
    """The model of which `called_as` has made this one; any other as it is."""
    return _bare.get(net, net)
