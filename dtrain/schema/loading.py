"""From job.yaml and its overrides to a checked Job, and back to text."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dtrain import yaml12
from dtrain.errors import Problem, UserError, did_you_mean
from dtrain.redact import hide_password
from dtrain.references.marks import about_the_run, escape
from dtrain.references.resolve import resolve
from dtrain.schema.contradictions import contradictions, wrong_slurm_options
from dtrain.schema.job import Job, Loaded, LoadedJob, LoadedScript, ScriptJob
from dtrain.schema.validation import dotted, shown, translated
from dtrain.yaml12 import Place, Reader

__all__ = ["LoadedJob", "LoadedScript", "changes", "differences", "dump_job", "load", "load_job"]

_MAX_BYTES = 1 << 20

# Stand where a required value is wrong or missing, so that the rest of the job can be checked all the same.
_ANY_TARGET = {"_target_": "builtins.dict"}
_STAND_INS: dict[str, Any] = {
    "name": "job",
    "model": _ANY_TARGET,
    "data": {"train": _ANY_TARGET, "batch_size": 1},
    "optimizer": _ANY_TARGET,
    "fit": {"epochs": 1},
}
# How much is dropped around a mistake: a whole target (in the sections not listed, everything at the second level).
_SALVAGE_DEPTHS = {"model": 1, "init_from": 1, "loss": 1, "step": 1, "optimizer": 1, "scheduler": 1, "fit": 3}

# A contradiction is not reported if one of the values that it compares is itself wrong.
_DRAWN_FROM = {
    "loss": ("loss", "step"),
    "step": ("loss", "step"),
    "data.val": ("metrics", "data.val"),
    "data.test": ("metrics", "data.test"),
    "fit.early_stopping.monitor": ("metrics", "data.val", "fit.early_stopping"),
    "scheduler.monitor": ("metrics", "data.val", "fit.early_stopping", "scheduler"),
    "scheduler": ("metrics", "data.val", "fit.early_stopping", "scheduler"),
}

_MAY_DIFFER = re.compile(
    r"restarts|fit\.(epochs|steps|restarts|strategy|validate_every|report_every|max_time)|data\.workers"
    r"|(fsdp|deepspeed|checkpoint|mlflow|launch|slurm)(\..*)?",
    re.DOTALL,
)


def load(path: str | Path, overrides: Iterable[str] = ()) -> LoadedJob | LoadedScript:
    """The job in a file, with `key=value` overrides; raises UserError with all that is wrong.

    Only where something is wrong are the job's targets imported and checked too, for the user to see all
    mistakes at once. For a job that loads, use `dtrain.schema.instantiate.check_job`.
    """
    reader = Reader(str(path))
    document = reader.read(_read_text(Path(path)))
    if not isinstance(document, dict):
        message = f"expected a mapping with name, model, data and so on, found {shown(document)}"
        raise UserError([*reader.problems, Problem(message, file=str(path), line=1)])
    problems = reader.problems
    for override in overrides:
        problems += _apply(override, document, reader.places)
    file = Loaded(Path(path), reader.places, document)
    values, wrong = _values(document, file)
    if "script" in document:
        return _load_script(values, file, [*problems, *wrong])
    loaded, found = _validate(values, file)
    if problems or wrong or found:
        from dtrain.schema.instantiate import check_job  # imports the user's code

        found += check_job(loaded, loaded.folder)
        # What a wrong reference stands for is unknown: it can't be wrong too.
        unknown = [problem.path for problem in wrong if problem.path]
        found = [each for each in found if not any(_is_within(each.path or "", path) for path in unknown)]
        raise _all([*problems, *wrong, *found])
    return loaded


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> LoadedJob:
    """`load` of a job with a model, as a run's own job.yaml is; raises UserError for one with a script."""
    loaded = load(path, overrides)
    if isinstance(loaded, LoadedScript):
        raise UserError(loaded.at(Problem("expected a job with a model", "script")))
    return loaded


def _values(document: dict[Any, Any], file: Loaded) -> tuple[dict[Any, Any], list[Problem]]:
    """The document's values, with those that its references and DeepSpeed's file stand for; what is wrong with them."""
    values, problems = resolve(document, ScriptJob if "script" in document else Job)
    problems += _read_deepspeed(values)
    return values, [file.at(problem) for problem in problems]


def _load_script(values: dict[Any, Any], file: Loaded, problems: list[Problem]) -> LoadedScript:
    errors: list[ErrorDetails] = []
    try:
        loaded = LoadedScript(file.path, file.places, file.document, ScriptJob.model_validate(values))
    except ValidationError as error:
        errors = error.errors()
    problems += [file.at(translated(error, ScriptJob)) for error in errors]
    if not errors:
        problems += map(file.at, wrong_slurm_options(loaded.job))
    if problems:
        raise _all(problems)
    return loaded


def _all(problems: Iterable[Problem]) -> UserError:
    """Problems in the order of the file, those of the command line last."""
    return UserError(sorted(problems, key=lambda problem: problem.line or float("inf")))


def dump_job(job: Job | ScriptJob) -> str:
    """The job as YAML: defaults and overrides included, references resolved, but for `${run.steps}` and its like.

    It loads back to an equal job.

    A password in mlflow.tracking_uri is left out: only the store needs it, see `dtrain.monitoring.tracking_uri`.
    """
    values = job.model_dump(by_alias=True)
    if job.mlflow.tracking_uri is not None:
        values["mlflow"]["tracking_uri"] = hide_password(job.mlflow.tracking_uri)
    return yaml12.dump(escape(values))


def differences(old: Job | ScriptJob, new: Job | ScriptJob) -> list[str]:
    """The differences that keep `new` from continuing a run of `old`, one line per value."""
    before, now = dict(_leaves(old.model_dump(by_alias=True))), dict(_leaves(new.model_dump(by_alias=True)))
    return [
        f"{path}: {before.get(path, 'absent')} before, {now.get(path, 'absent')} now"
        for path in dict.fromkeys([*before, *now])
        if before.get(path) != now.get(path) and not _MAY_DIFFER.fullmatch(path)
    ]


def changes(old: Job | ScriptJob, new: LoadedJob | LoadedScript) -> list[str]:
    """`differences`, where a value may differ that refers to one that may: it is as before if that one is as before.

    But for the optimizer's: they are state, so a run that goes on has those of its checkpoint.
    """
    as_before, now = _as_before(old, new), new.job
    if not isinstance(old, Job) or not isinstance(now, Job):
        return differences(old, as_before)
    found = differences(old, as_before.model_copy(update={"optimizer": now.optimizer}))
    if (old.fit.epochs, old.fit.steps) != (now.fit.epochs, now.fit.steps):
        mentions = about_the_run({"optimizer": now.model_dump(by_alias=True)["optimizer"]})
        found += [f"{path}: {', '.join(names)} of another length before" for path, names in mentions.items()]
    return found


def _as_before(old: Job | ScriptJob, new: LoadedJob | LoadedScript) -> Job | ScriptJob:
    """The new job with what may differ as it was, so that what refers to it is too; as it is where that can't be."""
    document = copy.deepcopy(dict(new.document))
    _put_back(escape(old.model_dump(by_alias=True)), document)
    values, problems = _values(document, new)
    try:
        return new.job if problems else type(new.job).model_validate(values)
    except ValidationError:
        return new.job


def _put_back(old: dict[str, Any], document: Any, path: str = "") -> None:
    """Set what may differ in the document to what it was."""
    for key, value in old.items():
        here = f"{path}.{key}" if path else key
        if _MAY_DIFFER.fullmatch(here):
            document[key] = value
        elif isinstance(value, dict) and isinstance(document.get(key), dict):
            _put_back(value, document[key], here)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Each value by its dotted key, as text: 1 and 1.0 differ, and NaN equals itself."""
    if value and isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=repr)


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise UserError(Problem("is a folder; name the job file in it", file=str(path)))
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        beside = [each.name for each in path.parent.glob("*.y*ml")]
        hint = did_you_mean(path.name, beside)
        raise UserError(Problem("no such file", file=str(path), hint=hint)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(Problem(f"cannot be read: {reason}", file=str(path))) from None
    if len(content) > _MAX_BYTES:
        raise UserError(Problem("larger than 1 MiB: this is not a job file", file=str(path)))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(Problem("not text in UTF-8", file=str(path), line=line)) from None


def _apply(override: str, document: dict[Any, Any], places: dict[str, Place]) -> list[Problem]:
    """Set one `key=value` in the document; what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    source = f"override {override}"
    if not equals or not all([*parents, last]):
        return [Problem("expected key=value, with a dotted key such as fit.epochs", file=source)]
    reader = Reader(source, has_lines=False)
    try:
        value = reader.read(text)
    except UserError as error:
        return error.problems
    here: Any = document
    for depth, part in enumerate([*parents, last]):
        if isinstance(here, list) and part in map(str, range(len(here))):
            index: str | int = int(part)
        elif isinstance(here, dict):
            index = part
        else:
            path = ".".join(parents[:depth])
            return [Problem(f"{path} is {shown(here)}, which has no {part}", file=source)]
        if depth == len(parents):
            here[index] = value
        elif isinstance(here, dict) and here.get(index) is None:
            here[index] = {}
            places[".".join(parents[: depth + 1])] = (source, None)
        here = here[index]
    for old in [old for old in places if _is_within(old, key)]:
        del places[old]
    places[key] = (source, None)
    return reader.problems


def _read_deepspeed(values: dict[Any, Any]) -> list[Problem]:
    """Replace the path of DeepSpeed's JSON file among the values by its content; what is wrong with it."""
    name = values.get("deepspeed")
    if not isinstance(name, str):
        return []
    try:
        values["deepspeed"] = json.loads(_read_text(Path(name)))
    except UserError as error:
        found = error.problems[0]
    except json.JSONDecodeError as error:
        found = Problem(f"not valid JSON: {error.msg}", file=name, line=error.lineno)
    else:
        return []
    del values["deepspeed"]
    return [Problem(str(found), "deepspeed")]


def _validate(values: dict[Any, Any], file: Loaded) -> tuple[LoadedJob, list[Problem]]:
    """The job, as far as it is valid, and what is wrong with it."""
    errors: list[ErrorDetails] = []
    try:
        job = Job.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        job = _salvage(values, errors)
    wrong = [dotted(error) for error in errors if error["type"] != "extra_forbidden"]
    problems = [translated(error) for error in errors]
    for problem in contradictions(job):
        roots = _DRAWN_FROM.get(problem.path or "", ())
        if not any(_is_within(each, root) or _is_within(root, each) for each in wrong for root in roots):
            problems.append(problem)
    loaded = LoadedJob(file.path, file.places, file.document, job)
    return loaded, [loaded.at(problem) for problem in problems]


def _salvage(values: dict[Any, Any], errors: Sequence[ErrorDetails]) -> Job:
    """The job without what is wrong with it."""
    rest = copy.deepcopy(values)
    for error in errors:
        last, *following = error["loc"][: _SALVAGE_DEPTHS.get(str(error["loc"][0]), 2)]
        here, stand_in = rest, _STAND_INS
        for part in following:
            within = here.get(last, {})
            if isinstance(part, int) and not (isinstance(within, dict) and part in within):
                break  # a list, or what stands for one, is dropped whole
            here, stand_in, last = within, stand_in.get(str(last), {}), part
        for key in [key for key in here if key == last or not isinstance(key, str)]:
            del here[key]
        if last in stand_in:
            here[last] = copy.deepcopy(stand_in[str(last)])
    return Job.model_validate(rest)


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root + ".")
