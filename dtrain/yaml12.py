"""YAML 1.2 for job files and overrides: each value with its line, each mistake a Problem, no code run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import yaml

from dtrain.errors import Problem, UserError

Place = tuple[str, int | None]

_MAX_VALUES = 50_000  # aliases expanded: a few lines of YAML can otherwise stand for billions
_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"

# The core schema. PyYAML's own, YAML 1.1, reads 1e-3 as text, 01:00:00 as 3600 and `on` as true.
_SCALARS = {
    "null": re.compile(r"(?:null|Null|NULL|~|)$"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    # Bounded: Python refuses to print integers of more than 4300 digits.
    "int": re.compile(r"(?:[-+]?[0-9]{1,100}|0o[0-7]{1,100}|0x[0-9a-fA-F]{1,100})$"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    """Composes nodes; `Reader` decides what they mean."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML wants it on the class)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _MAX_DEPTH:  # before Python's own limit, which would be a RecursionError
            raise yaml.MarkedYAMLError(problem="nested too deep", problem_mark=parent.start_mark if parent else None)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _kind, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, None)
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, None)


def dump(value: object) -> str:
    """YAML that `Reader` reads back as an equal value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def split(text: str) -> list[str] | None:
    """`a, [b, c]` as `a` and `[b, c]`: the items of a list, as they are written; None where it is none."""
    text = f"[{text}\n]"
    try:
        node = _Loader(text).get_single_node()
    except (yaml.YAMLError, ValueError, OverflowError):
        return None
    if not isinstance(node, yaml.SequenceNode):
        return None
    return [text[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


class Reader:
    """Reads one text: fills `places` (dotted key to source and line) and `problems`."""

    def __init__(self, source: str, has_lines: bool = True) -> None:
        self.source = source
        self.has_lines = has_lines
        self.places: dict[str, Place] = {}
        self.problems: list[Problem] = []
        self._num_values = 0

    def read(self, text: str) -> object:
        """The value of the text; raises UserError where it cannot be read as a whole."""
        try:
            node = _Loader(text).get_single_node()
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            raise UserError(self._problem(f"character {chr(error.character)!r} is not allowed", line)) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            is_reference = mark is not None and text[max(0, mark.index - 1) :].startswith("${")
            hint = 'within {} and [] put a reference into quotes: "${...}"' if is_reference else None
            problem = self._problem(f"not valid YAML: {error.problem}", mark.line if mark else 0)
            raise UserError(replace(problem, hint=hint)) from None
        except (ValueError, OverflowError) as error:  # PyYAML's own, on escapes such as "\UFFFFFFFF"
            raise UserError(self._problem(f"not valid YAML: {error}", 0)) from None
        return None if node is None else self._value(node, "", 0)

    def _value(self, node: yaml.Node, path: str, depth: int) -> object:
        line = node.start_mark.line
        self._count(line, depth)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._child(item, item, f"{path}.{i}", depth) for i, item in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and (kind == "str" or _matches(kind, node.value)):
            return _scalar(kind, node.value)
        tag = node.tag.replace(_TAG, "!!")
        self.problems.append(self._problem(f"tag {tag} is not allowed here", line, path))
        return None

    def _count(self, line: int, depth: int) -> None:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise UserError(self._problem(f"more than {_MAX_VALUES} values, aliases expanded", line))
        if depth > _MAX_DEPTH:  # an alias inside its own anchor
            raise UserError(self._problem("nested too deep", line))

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[object, object]:
        mapping: dict[object, object] = {}
        lines: dict[object, int] = {}
        for is_own, (key_node, value_node) in self._pairs(node, path, depth):
            line = key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self._problem("a mapping or list cannot be a key", line, path))
                continue
            key = self._value(key_node, path, depth)
            dotted = _join(path, key_node.value)
            if key in mapping:
                if is_own:
                    message = f"given twice, first on line {lines[key] + 1}"
                    self.problems.append(self._problem(message, line, dotted))
                continue
            lines[key] = line
            mapping[key] = self._child(key_node, value_node, dotted, depth)
        return mapping

    def _pairs(
        self, node: yaml.MappingNode, path: str, depth: int, *, is_own: bool = True
    ) -> Iterator[tuple[bool, tuple[yaml.Node, yaml.Node]]]:
        """A mapping's own pairs, then those that `<<` merges into it; the first of two with the same key wins."""
        if not is_own:
            self._count(node.start_mark.line, depth)
        merges = [pair for pair in node.value if _is_merge(pair[0])]
        yield from ((is_own, pair) for pair in node.value if pair not in merges)
        for key, value in merges[:1]:
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(each, yaml.MappingNode):
                    yield from self._pairs(each, path, depth + 1, is_own=False)
                else:
                    message = "expected a mapping, or a list of mappings, such as *anchor"
                    self.problems.append(self._problem(message, key.start_mark.line, _join(path, "<<")))
        for key, _ in merges[1:]:
            message = "given twice; to merge several, list them, the first takes precedence: <<: [*a, *b]"
            self.problems.append(self._problem(message, key.start_mark.line, _join(path, "<<")))

    def _child(self, start: yaml.Node, node: yaml.Node, dotted: str, depth: int) -> object:
        self.places[dotted] = (self.source, start.start_mark.line + 1 if self.has_lines else None)
        return self._value(node, dotted, depth + 1)

    def _problem(self, message: str, line: int, path: str | None = None) -> Problem:
        return Problem(message, path or None, self.source, line + 1 if self.has_lines else None)


def _is_merge(key: yaml.Node) -> bool:
    """Whether the key is YAML 1.1's `<<`; in quotes it is a key like any other."""
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _matches(kind: str, text: str) -> bool:
    return kind in _SCALARS and _SCALARS[kind].match(text) is not None


def _scalar(kind: str, text: str) -> object:
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return text
