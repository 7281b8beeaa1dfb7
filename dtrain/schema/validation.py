"""What is wrong with a section's values, in words: expected ..., found ..."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dtrain.errors import Problem, did_you_mean, nearest
from dtrain.schema.job import Job, ScriptJob
from dtrain.schema.targets import Section

# pydantic's kinds of error in plain words: "expected ..., found ...".
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "invalid_key": "a name as the key",
    "less_than": "a number below {lt}",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_pattern_mismatch": "letters, digits, '_', '-' and '.' (the last two not first)",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "text",
    "string_type": "text",
}


def translated(error: ErrorDetails, job: type[Section] = Job) -> Problem:
    """pydantic's error in our words, with the key it is about."""
    path, kind, context = dotted(error), error["type"], error.get("ctx", {})
    if kind == "missing":
        return Problem("missing", path, hint=_hint_at_target(error))
    if kind == "extra_forbidden":
        *parents, key = map(str, error["loc"])
        if job is ScriptJob and path in Job.model_fields:
            hint = (
                "with script, write restarts beside it" if path == "fit" and "restarts" in str(error["input"]) else None
            )
            return Problem("has no effect with script, which decides that itself; leave it out", path, hint=hint)
        known = _fields(job, parents)
        hint = did_you_mean(key, known) or f"known keys: {', '.join(known)}"
        return Problem("unknown key", path, hint=hint)
    found = f"found {shown(error['input'])}"
    if kind == "literal_error":
        choices = re.findall(r"'(\w+)'", context["expected"])
        expected = context["expected"].replace("'", "")
        return Problem(f"expected {expected}, {found}", path, hint=did_you_mean(str(error["input"]), choices))
    if kind == "value_error":
        return Problem(f"{context['error']}, {found}", path)
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**context)
        return Problem(f"expected {expected}, {found}", path, hint=_hint_at_target(error))
    return Problem(f"{error['msg']}, {found}", path)


def problems_in(section: type[Section], values: Mapping[str, Any]) -> list[Problem]:
    """What a section of job.yaml would refuse of these values; for whoever gets them from elsewhere."""
    try:
        section.model_validate(values)
    except ValidationError as error:
        return [translated(each, section) for each in error.errors()]
    return []


def _hint_at_target(error: ErrorDetails) -> str | None:
    """How a target is written, where it is written as something else: `model: net.Net`, or `{target: net.Net}`."""
    value = error["input"]
    if isinstance(value, str) and error.get("ctx", {}).get("class_name", "").endswith("Target"):
        return f"write {{_target_: {value}}}"
    if isinstance(value, dict) and error["loc"][-1] == "_target_":
        key = nearest("_target_", [str(key) for key in value])
        return f"write _target_ for {key}" if key else None
    return None


def _fields(job: type[Section], path: Sequence[str]) -> list[str]:
    """The keys that the section at this path may have."""
    section: type[BaseModel] = job
    for part in path:
        if part.isdecimal():  # a list's item, whose type is already found
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel))
    return [*section.model_fields, *(["script"] if section is Job else [])]


def dotted(error: ErrorDetails) -> str:
    """The key it is about; what pydantic and our unions add to it is in brackets."""
    return ".".join(str(part) for part in error["loc"] if not str(part).startswith("["))


def shown(value: object) -> str:
    """The value, or what kind of thing it is."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return json.dumps(value, default=repr)
