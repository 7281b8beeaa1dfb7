"""What a document's references stand for: `${fit.epochs}`, with OmegaConf's rules for names.

References are resolved but for `${run.steps}` and `${run.steps_per_epoch}`: only the ranks know these numbers, once
they have the training data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from dtrain.errors import Problem, did_you_mean
from dtrain.redact import hide_in_job

from .marks import (
    BUILT_BY_RANKS,
    MARK,
    SHELL,
    STEPS,
    STEPS_PER_EPOCH,
    bare,
    half,
    is_built_by_ranks,
    is_meant,
    is_within,
    join,
    joined,
    map_texts,
    spelled,
)

_IN_SHELL = re.compile(r"\$\{(\w+(?:\.[\w-]+)+)\}")  # the shell has no such names
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+|\[[^\[\]]+\])*")
_KEY = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")

# As for aliases: a few lines could otherwise stand for billions of values.
_MAX_VALUES = 50_000
_CHARACTERS = 20  # count as one more value
_MAX_DEPTH = 50
_MISSING = object()


class _Wrong(Exception):
    """A reference that can't be resolved, in the text at a path.

    Args:
        once: what several texts have in common that are wrong for the same reason, which is reported for the first.
    """

    def __init__(self, at: str, message: str, hint: str | None = None, once: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.problem = Problem(message, at, hint=hint)
        self.once = once


def resolve(document: Mapping[Any, Any], job: type[BaseModel]) -> tuple[dict[Any, Any], list[Problem]]:
    """The document with what its references stand for, and those that are wrong, which stay as they are.

    Args:
        job: has the defaults of what the document leaves out.
    """
    resolver = _Resolver(document, job)
    return resolver.resolved(), resolver.problems


class _Resolver:
    def __init__(self, document: Mapping[Any, Any], job: type[BaseModel]) -> None:
        self._document = document
        self._job = job
        self._left = _MAX_VALUES
        self._to = ""  # the text that is being resolved, in which all that it refers to will stand
        self._depth = 0
        self._reported: set[frozenset[str]] = set()
        self.problems: list[Problem] = []

    def resolved(self) -> dict[Any, Any]:
        found: dict[Any, Any] = map_texts(self._resolve, dict(self._document))
        return found

    def _resolve(self, text: str, path: str) -> Any:
        self._to, self._depth = path, path.count(".")
        try:
            return self._text(text, path, ())
        except _Wrong as wrong:
            # What is wrong with a value that this one refers to is reported there.
            if wrong.problem.path == path and wrong.once not in self._reported:
                self.problems.append(wrong.problem)
                self._reported |= {wrong.once} if wrong.once else set()
            return text

    def _value(self, value: Any, path: str, chain: tuple[str, ...]) -> Any:
        """A value that is referred to, with what it refers to itself."""
        self._count(1)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _too_much(self._to, "nested too deep")
        if isinstance(value, dict):
            value = {key: self._value(item, join(path, key), chain) for key, item in value.items()}
        elif isinstance(value, list):
            value = [self._value(item, join(path, i), chain) for i, item in enumerate(value)]
        elif isinstance(value, str):
            value = self._text(value, path, chain)
        self._depth -= 1
        return value

    def _text(self, text: str, path: str, chain: tuple[str, ...]) -> Any:
        """The value of a text that is written at this path; `chain`: the names that have led there."""
        if is_within(path, SHELL):
            if found := _IN_SHELL.search(text):
                raise _Wrong(path, f"is shell, where {found[0]} means nothing: nothing is replaced here")
            if not is_within(self._to, SHELL):
                raise _Wrong(self._to, f"{path} is shell, to which nothing can refer")
            return text
        whole = MARK.fullmatch(text)
        if whole and not whole["slashes"]:
            return self._reference(whole["name"], path, chain)
        text = MARK.sub(lambda mark: self._part(mark, path, chain), text)
        self._count(len(text) // _CHARACTERS)
        return text

    def _part(self, mark: re.Match[str], path: str, chain: tuple[str, ...]) -> str:
        """What stands for a reference within text."""
        keeps_form = is_built_by_ranks(self._to)
        if not is_meant(mark):
            return mark[0] if keeps_form else half(mark) + bare(mark)
        value = self._reference(mark["name"], path, chain)
        if isinstance(value, dict | list) or value is None:
            kind = "null" if value is None else "a mapping" if isinstance(value, dict) else "a list"
            raise _Wrong(path, f"${{{mark['name']}}} is {kind}, which can't be a part of text")
        text = spelled(value)
        return joined(mark, text) if keeps_form else half(mark) + text

    def _reference(self, written: str | None, path: str, chain: tuple[str, ...]) -> Any:
        keys = _keys(written, path)
        name = ".".join(keys)
        if name in (STEPS, STEPS_PER_EPOCH):
            return self._runs(name, path)
        if name in chain:
            raise _cycle(path, [*chain[chain.index(name) :], name])
        value, found_at = self._find(keys, path, ())
        if isinstance(value, str | dict | list) and hide_in_job(value, found_at) != value:
            raise _Wrong(path, f"{name} is or holds a secret, which a reference would copy to where it is shown")
        return self._value(value, found_at, (*chain, name))

    def _runs(self, name: str, path: str) -> str:
        at = self._to if is_built_by_ranks(path) else path
        if not is_built_by_ranks(at):
            where = f"{', '.join(BUILT_BY_RANKS[:-1])} and {BUILT_BY_RANKS[-1]}"
            message = f"{name} is known only when the training data is there: it can stand in the arguments of {where}"
            raise _Wrong(at, message)
        return f"${{{name}}}"

    def _find(self, keys: list[str], path: str, followed: tuple[str, ...]) -> tuple[Any, str]:
        """What is written at these keys, or the default, and its path. `followed`: references on the way there."""
        here: Any = self._document
        done: list[str] = []
        for key in keys:
            if isinstance(here, str) and (whole := MARK.fullmatch(here)) and not whole["slashes"]:
                at = ".".join(done)
                if at in followed:
                    raise _cycle(at, [*followed[followed.index(at) :], at])
                here, at = self._find(_keys(whole["name"], at), at, (*followed, at))
                done = at.split(".")
            if isinstance(here, list) and key in map(str, range(len(here))):
                here = here[int(key)]
            elif isinstance(here, dict) and key in map(str, here):
                here = next(item for each, item in here.items() if str(each) == key)
            else:
                here = self._default([*done, key]) if isinstance(here, dict) else _MISSING
            if here is _MISSING:
                name = ".".join(keys)
                hint = did_you_mean(name, self._names()) or rf"for the text itself write \${{{name}}}"
                raise _Wrong(path, f"there is no {name} in the job", hint)
            done.append(key)
        return here, ".".join(done)

    def _default(self, keys: list[str]) -> Any:
        """The default of what is not written."""
        fields = self._job.model_fields
        for key in keys[:-1]:
            fields = _fields(fields[key].annotation) if key in fields else {}
        field = fields.get(keys[-1])
        if field is None or field.alias is not None or field.is_required():
            return _MISSING
        value = field.get_default(call_default_factory=True)
        return value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value

    def _names(self) -> Iterator[str]:
        """All names that can be referred to."""
        yield from (STEPS, STEPS_PER_EPOCH)
        for name, field in self._job.model_fields.items():
            yield name
            yield from (f"{name}.{key}" for key, each in _fields(field.annotation).items() if each.alias is None)
        yield from _paths(self._document)

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise _too_much(self._to, f"more than {_MAX_VALUES} values")


def _keys(written: str | None, path: str) -> list[str]:
    """The keys that a reference in the text at this path names; `written`: what is between its braces."""
    name = "" if written is None else written.strip()
    if not _NAME.fullmatch(name):
        found = "${" if written is None else f"${{{written}}}"
        message = f"{found} is no reference: expected the name of one of the job's values, such as ${{fit.epochs}}"
        raise _Wrong(path, message, r"no arithmetic, no environment variables; for the text itself write \${")
    return [bracketed or plain for bracketed, plain in _KEY.findall(name)]


def _cycle(path: str, names: list[str]) -> _Wrong:
    return _Wrong(path, f"refers to itself: {' -> '.join(names)}", once=frozenset(names))


def _too_much(path: str, message: str) -> _Wrong:
    return _Wrong(path, f"{message}, with all that is referred to", once=frozenset([message]))


def _fields(annotation: Any) -> dict[str, Any]:
    """The fields of a section, by its type, which may be optional; none of anything else."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    section = next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return {} if section is None else dict(section.model_fields)


def _paths(value: Any, path: str = "") -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield join(path, key)
        yield from _paths(item, join(path, key))
