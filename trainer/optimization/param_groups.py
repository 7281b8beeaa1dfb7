"""Parameter groups by pattern, each with its own settings: weight decay for weights only, say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError

from ..model.patterns import match, require_matches


def group_parameters(net: nn.Module, groups: Sequence[Mapping[str, Any]], loss: Any = None) -> list[dict[str, Any]]:
    """What an optimizer takes as its first argument: the groups in their order, then those in no group.

    A pattern (`*` and `?` as in file names) is matched with a parameter's name, `blocks.0.norm.weight`, and with the
    class of its module in place of the path, `LayerNorm.weight`. The first group that has a match takes it.

    Args:
        loss: has parameters too where it is a module that learns, called `loss.centres`.
        groups: `params`, a pattern or several, beside what the optimizer takes for a group, such as weight_decay.

    Raises:
        UserError: a pattern that matches nothing.
    """
    modules = [*net.named_modules(), *(loss.named_modules(prefix="loss") if isinstance(loss, nn.Module) else ())]
    names, parameters = [], []
    for path, module in modules:
        for own, parameter in module.named_parameters(recurse=False):
            names.append({f"{path}.{own}" if path else own, f"{type(module).__name__}.{own}"})
            parameters.append(parameter)
    patterns = [[each["params"]] if isinstance(each["params"], str) else list(each["params"]) for each in groups]
    require_matches(
        [pattern for each in patterns for pattern in each],
        [name for each in names for name in each],
        "optimizer.groups",
    )
    members: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
    seen: set[int] = set()
    for parameter, own_names in zip(parameters, names, strict=True):
        if id(parameter) in seen:  # shared by two modules
            continue
        seen.add(id(parameter))
        matching = (number for number, each in enumerate(patterns) if match(own_names, each))
        members[next(matching, len(groups))].append(parameter)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    made = [{**setting, "params": each} for setting, each in zip([*settings, {}], members, strict=True)]
    return [group for group in made if group["params"]]


@contextlib.contextmanager
def rates_apart(optimizer: Optimizer, path: str) -> Iterator[None]:
    """Around making a scheduler: groups that have learning rates of their own keep them apart.

    Raises:
        UserError: the scheduler gives all of them one, as OneCycleLR does with its max_lr.
    """
    before = {float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None}
    yield
    after = {float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None}
    if len(before) > 1 and len(after) == 1 and after != {0.0}:  # a warm-up may begin with 0
        message = f"gives all parameter groups one learning rate ({after.pop():.4g}) in place of their own"
        raise UserError(Problem(message, path, hint="give it a list, one rate for each group"))
