"""Which torchmetrics metrics guess, from the values of each update, whether they were given logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

# The one helper of torchmetrics that guesses; its format functions call it.
_GUESS = "normalize_logits_if_needed"


def guesses_logits(metric: object) -> bool:
    """Whether `update` of this metric, or of one that it wraps, can come to the helper that guesses.

    Read from the code rather than kept as a list of classes, so that it holds for the installed torchmetrics
    and for classes derived from its own. A call behind a condition counts.
    """
    modules = getattr(metric, "modules", None)  # torch.nn.Module's: the metric itself and all it wraps
    return any(_reaches_guess(each) for each in (modules() if callable(modules) else [metric]))


def _reaches_guess(metric: object) -> bool:
    # torchmetrics hides update behind a wrapper on each instance.
    pending = [inspect.unwrap(metric.update)] if hasattr(metric, "update") else []
    seen = set()
    while pending:
        function = pending.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        if code.co_name == _GUESS:
            return True
        for name in _names(code):
            pending += _callees(name, function.__globals__, type(metric))
    return False


def _names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that the code uses, its comprehensions and inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _callees(name: str, scope: dict[str, object], owner: type) -> list[FunctionType]:
    """The functions of torchmetrics that `name` can mean: a global one, or a method, super()'s included."""
    found = [scope.get(name), *(vars(base).get(name) for base in owner.__mro__)]
    return [each for each in found if isinstance(each, FunctionType) and _is_torchmetrics(each)]


def _is_torchmetrics(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] == "torchmetrics"
