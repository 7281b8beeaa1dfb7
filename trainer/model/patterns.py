"""Patterns for the names of parameters and buffers: `*` and `?` as in file names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from dtrain.errors import Problem, UserError, did_you_mean


def called(net: nn.Module, name: str) -> set[str]:
    """What a parameter or buffer may be called in a pattern: its name, `blocks.0.norm.weight`, and its module's class
    in place of the path, `LayerNorm.weight`.
    """
    path, _, own = name.rpartition(".")
    return {name, f"{type(net.get_submodule(path)).__name__}.{own}"}


def match(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether one of the names matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def require_matches(patterns: Iterable[str], names: Sequence[str], path: str, kind: str = "parameter") -> None:
    """Raise UserError for a pattern that matches none of the names.

    Args:
        path: the key of job.yaml that holds the patterns.
        kind: what has the names.
    """
    for pattern in patterns:
        if not match(names, [pattern]):
            known = sorted(set(names))
            hint = did_you_mean(pattern, known) or f"there are {', '.join(known[:8])}" + ", ..." * (len(known) > 8)
            raise UserError(Problem(f"no {kind} is called {pattern}", path, hint=hint))
