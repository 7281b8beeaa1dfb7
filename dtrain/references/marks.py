r"""References as they are written, with OmegaConf's escapes, and the run's numbers among them.

The text of what the ranks build keeps its written form until they `fill` it in; all other text of a loaded job is as it
is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

STEPS, STEPS_PER_EPOCH = "run.steps", "run.steps_per_epoch"
BUILT_BY_RANKS = ("model", "loss", "step", "optimizer", "scheduler", "callbacks")
SHELL = "slurm.setup"

MARK = re.compile(r"(?P<slashes>\\*)\$\{(?:(?P<name>[^${}]*)\})?")


def escape(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """A job's values as they are written in a file."""

    def written(text: str, path: str) -> str:
        if is_built_by_ranks(path) or is_within(path, SHELL):
            return text
        return MARK.sub(lambda mark: mark["slashes"] * 2 + "\\" + mark[0][len(mark["slashes"]) :], text)

    found: dict[Any, Any] = map_texts(written, dict(values))
    return found


def about_the_run(values: Mapping[Any, Any]) -> dict[str, list[str]]:
    """The names of the run's numbers that a job's values refer to, by their paths."""
    found: dict[str, list[str]] = {}

    def look(text: str, path: str) -> str:
        if is_built_by_ranks(path) and (names := [mark["name"] for mark in MARK.finditer(text) if is_meant(mark)]):
            found[path] = names
        return text

    map_texts(look, dict(values))
    return found


def fill(values: Mapping[Any, Any], numbers: Mapping[str, int]) -> dict[Any, Any]:
    """A job's values with the run's numbers, and with all text as it is meant: to be done once."""

    def filled(text: str, path: str) -> Any:
        if not is_built_by_ranks(path):
            return text
        if (whole := MARK.fullmatch(text)) and not whole["slashes"]:
            return numbers[whole["name"]]
        return MARK.sub(lambda mark: half(mark) + (str(numbers[mark["name"]]) if is_meant(mark) else bare(mark)), text)

    found: dict[Any, Any] = map_texts(filled, dict(values))
    return found


def map_texts(function: Callable[[str, str], Any], value: Any, path: str = "") -> Any:
    """The value with `function(text, path)` in place of each text that could hold a reference."""
    if isinstance(value, dict):
        return {key: map_texts(function, item, join(path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [map_texts(function, item, join(path, i)) for i, item in enumerate(value)]
    return function(value, path) if isinstance(value, str) and "${" in value else value


def is_meant(mark: re.Match[str]) -> bool:
    """Whether it is a reference: it is not escaped."""
    return len(mark["slashes"]) % 2 == 0


def bare(mark: re.Match[str]) -> str:
    return mark[0][len(mark["slashes"]) :]


def joined(mark: re.Match[str], text: str) -> str:
    """The text in place of a mark, where backslashes count: they are doubled before another mark."""
    is_before_mark = MARK.match(mark.string, mark.end()) is not None
    end = text[len(text.rstrip("\\")) :] if is_before_mark else ""
    doubles = MARK.match(text) or (is_before_mark and end == text)
    return (mark["slashes"] if doubles else half(mark)) + text + end


def half(mark: re.Match[str]) -> str:
    """The backslashes that are meant by those before a mark."""
    return "\\" * (len(mark["slashes"]) // 2)


def spelled(value: Any) -> str:
    """A value as YAML spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_built_by_ranks(path: str) -> bool:
    return path.partition(".")[0] in BUILT_BY_RANKS


def is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
