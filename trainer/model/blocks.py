"""Which modules of a model are its blocks: by the names of their classes, or found automatically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from dtrain.errors import UserError, did_you_mean

_LISTS = (nn.ModuleList, nn.ModuleDict)


def of_classes(net: nn.Module, classes: Sequence[str], setting: str) -> list[nn.Module]:
    """The modules within the model whose class has one of these names, outer ones first.

    Args:
        setting: that names the classes, for messages.

    Raises:
        UserError: there is no module of a class, or a class is only a list of modules.
    """
    known = {type(module).__name__ for module in net.modules() if module is not net}
    for name in classes:
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(sorted(known))}"
            raise UserError(f"{setting}: the model has no module of class {name}; {hint}")
    chosen = [module for module in net.modules() if module is not net and type(module).__name__ in classes]
    if lists := [type(module).__name__ for module in chosen if isinstance(module, _LISTS)]:
        raise UserError(f"{setting}: {lists[0]} is only a list of modules; name the class of its elements")
    return chosen


def repeated(net: nn.Module) -> list[nn.Module]:
    """In a ModuleList, ModuleDict or Sequential, the modules of a class that occurs more than once in it.

    Those alone that consist of layers; of blocks within blocks the outermost.
    """
    members, blocks = list(net.children()), []
    if isinstance(net, (*_LISTS, nn.Sequential)):
        counts = Counter(type(member) for member in members if any(member.children()))
        blocks = [each for each in members if counts[type(each)] > 1 and not isinstance(each, _LISTS)]
    others = [member for member in members if not any(member is block for block in blocks)]
    return blocks + [block for each in others for block in repeated(each)]
