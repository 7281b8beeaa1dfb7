"""`_target_`s: calls what they name, after checking all arguments."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.errors import Problem, UserError, did_you_mean, nearest
from dtrain.names import collisions, format_error, job_path, load_what_ranks_have, resolve
from dtrain.references.marks import about_the_run, fill
from dtrain.schema.job import Job, LoadedJob
from dtrain.schema.metrics.logits import guesses_logits
from dtrain.schema.metrics.monitor import monitor_problem
from dtrain.schema.metrics.sets import value_of
from dtrain.schema.metrics.unfit import why_unfit
from dtrain.schema.metrics.values import values_of_no_sample
from dtrain.schema.targets import MetricTarget, Target

_ARGS, _PARTIAL = "_args_", "_partial_"
_HYDRAS = ("_convert_", "_recursive_")  # keys that Hydra knows besides


def instantiate(value: object, *args: object, given: Mapping[str, object] | None = None) -> Any:
    """Calls a target with `args`, then its own arguments, those that are targets built first.

    What is no target is returned as it is, rebuilt where it holds targets.

    A target with `_partial_: true` is not called: it is a function with some arguments bound.

    Args:
        given: what the target, instead of `args`, and each target within it gets by name, if it takes that.
    """
    if isinstance(value, Target):
        value = {"_target_": value.target, **value.arguments}
    if isinstance(value, list):
        return [instantiate(item, given=given) for item in value]
    if not isinstance(value, dict):
        return value
    built = {key: instantiate(item, given=given) for key, item in value.items() if key != "_target_"}
    if "_target_" not in value:
        return built
    function = _resolve_callable(value["_target_"])
    own = built.pop(_ARGS, [])
    if built.pop(_PARTIAL, False):
        return functools.partial(function, *own, **built) if own or built else function
    positional = [*args, *own]
    if given and (names := _taken_by_name(signature := _signature(function), given, built)):
        positional, named = _placed(signature, own, {name: given[name] for name in names})
        built |= named
    try:
        return function(*positional, **built)
    except TypeError as error:
        if str(error) == "'str' object is not callable":
            error.args = (f"{error}; {_how_to_name_a_function('module.function')}",)
        raise


def bind_function(target: Target) -> Callable[..., Any]:
    """The target as a function, for `step` and `data.collate`: an object of its class, or it with its arguments."""
    arguments = target.arguments
    if not inspect.isclass(_resolve_callable(target.target)):
        arguments[_PARTIAL] = True
    function: Callable[..., Any] = instantiate({"_target_": target.target, **arguments})
    return function


def _how_to_name_a_function(name: str) -> str:
    return f"to pass a function, write {{_target_: {name}, {_PARTIAL}: true}}"


def _resolve_callable(name: object) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise UserError(f"expected an importable name, found {name!r}")
    found = resolve(name)
    if not callable(found):
        raise UserError(f"{name} cannot be called; it is of type {type(found).__name__}")
    return found


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Its signature; None if it is written in C without one."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _taken_by_name(
    signature: inspect.Signature | None, given: Collection[str], arguments: Collection[Any]
) -> list[str]:
    """Those of the given names that a callable has as a parameter, and that its own arguments leave free."""
    parameters = () if signature is None else signature.parameters
    return [name for name in given if name in parameters and name not in arguments]


def _placed(
    signature: inspect.Signature | None, own: Sequence[object], given: Mapping[str, object]
) -> tuple[list[object], dict[str, object]]:
    """A callable's positional arguments and those by name: what is given stands among its own where its place is."""
    positional, named = [*own], {}
    for place, name in enumerate(() if signature is None else signature.parameters):
        if name in given and place < len(positional):
            positional.insert(place, given[name])
        elif name in given:
            named[name] = given[name]
    return positional, named


def check_target(target: Target, positional: int, where: str, given: Collection[str] = ()) -> list[Problem]:
    """What is wrong with calling the target with so many positional arguments and its own by name.

    `where` is the target's dotted key, from which the problems' paths start. `given`: see `instantiate`.
    """
    return _check_call(target.target, target.arguments, positional, where, given)


def _check_object(target: Target, positional: int, where: str, given: Collection[str] = ()) -> list[Problem]:
    """`check_target`, where it is to be called."""
    problems = check_target(target, positional, where, given)
    if target.arguments.get(_PARTIAL):
        message = "passes the function itself where its result is needed; leave it out"
        problems.append(Problem(message, f"{where}.{_PARTIAL}"))
    return problems


def _check_function(target: Target, positional: int, where: str) -> list[Problem]:
    """What is wrong with `bind_function` for a function that is called with this many arguments."""
    try:
        found = _resolve_callable(target.target)
    except UserError:  # a wrong name, reported below
        found = None
    if not inspect.isclass(found) or target.arguments.get(_PARTIAL):
        return check_target(target, positional, where)
    problems = check_target(target, 0, where)
    call = next((vars(each)["__call__"] for each in found.__mro__ if "__call__" in vars(each)), None)
    if call is None:
        message = f"{target.target} is a class whose objects cannot be called: it has no __call__"
        return [*problems, Problem(message, where)]
    if signature := _signature(call):
        name = f"{target.target}.__call__"
        problems += _check_arguments(name, signature, {}, positional + 1, where)  # the first is self
    return problems


def _check_call(
    name: object, arguments: Mapping[Any, object], positional: int, where: str, given: Collection[str]
) -> list[Problem]:
    nested = [problem for key, value in arguments.items() for problem in _check_value(value, f"{where}.{key}", given)]
    arguments = dict(arguments)
    is_partial = arguments.pop(_PARTIAL, False)
    if not isinstance(is_partial, bool):
        nested.append(Problem(f"expected true or false, found {is_partial!r}", f"{where}.{_PARTIAL}"))
    own = arguments.pop(_ARGS, [])
    if not isinstance(own, list):
        nested.append(Problem(f"expected a list of positional arguments, found {own!r}", f"{where}.{_ARGS}"))
        own = []
    for key in _HYDRAS:
        if key in arguments:
            del arguments[key]
            message = f"is Hydra's; dtrain has only _target_, {_ARGS} and {_PARTIAL}"
            nested.append(Problem(message, f"{where}.{key}"))
    try:
        signature = _signature(_resolve_callable(name))
    except UserError as error:
        return [replace(problem, path=f"{where}._target_") for problem in error.problems] + nested
    if signature is None:
        return nested
    by = " or ".join(["dtrain"] * bool(positional or not own) + [_ARGS] * bool(own))
    positional += len(own)
    if not is_partial and (names := _taken_by_name(signature, given, arguments)):
        placed, named = _placed(signature, own, dict.fromkeys(names))
        arguments, positional = {**arguments, **named}, len(placed)
    problems = _check_arguments(str(name), signature, arguments, positional, where, by, is_partial=bool(is_partial))
    return [*problems, *nested]


def _check_value(value: object, where: str, given: Collection[str]) -> Iterator[Problem]:
    """Checks the targets inside an argument."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _check_value(item, f"{where}.{i}", given)
    elif isinstance(value, dict) and "_target_" in value:
        arguments = {key: item for key, item in value.items() if key != "_target_"}
        yield from _check_call(value["_target_"], arguments, 0, where, given)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str) and re.fullmatch("_.*_", key) and nearest(key, ["_target_"]):
                yield Problem("unknown key", f"{where}.{key}", hint="did you mean _target_?")
            yield from _check_value(item, f"{where}.{key}", given)


def _check_arguments(
    name: str,
    signature: inspect.Signature,
    arguments: Mapping[Any, object],
    positional: int,
    where: str,
    by: str = "dtrain",
    *,
    is_partial: bool = False,
) -> Iterator[Problem]:
    """What is wrong with arguments by name beside so many positional ones, which are given `by` somebody."""
    parameters = list(signature.parameters.values())
    kinds = {p.kind for p in parameters}
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:positional]
    if len(taken) < positional and inspect.Parameter.VAR_POSITIONAL not in kinds:
        yield Problem(f"{name} takes {len(taken)} positional arguments, but gets {positional}", where)
    rest = [p for p in parameters if p not in taken]
    known = [p.name for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    for key in arguments:
        if key in {p.name for p in taken}:
            yield Problem(f"{key} is passed to {name} by {by}; leave it out", f"{where}.{key}")
        elif not isinstance(key, str) or not (takes_any or key in known):
            hint = did_you_mean(str(key), [*known, _ARGS, _PARTIAL])
            yield Problem(f"{name} takes no argument {key}", f"{where}.{key}", hint=hint)
    for p in rest:
        if text := _text_for_a_function(p, arguments.get(p.name)):
            hint = _how_to_name_a_function(text)
            yield Problem(f"{name} takes a function here, and {text!r} is text", f"{where}.{p.name}", hint=hint)
        optional = is_partial or p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not optional and p.name not in arguments:
            yield Problem(f"{name} needs the argument {p.name}", where)


def _text_for_a_function(parameter: inspect.Parameter, value: object) -> str | None:
    """The text, or the first of a list, that a parameter is given which by its annotation takes functions, no text."""
    words = set(re.findall(r"\w+", inspect.formatannotation(parameter.annotation)))
    if "Callable" not in words or words & {"str", "Any"}:
        return None
    return next((each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)), None)


def check_job(loaded: LoadedJob, folder: Path, *, begins: bool = True) -> list[Problem]:
    """What is wrong with the job's targets, each with its place. Builds the loss and the metrics alone.

    Args:
        folder: holds the job's own modules.
        begins: whether a run is to begin, which needs the weights that it begins with.
    """
    if problems := collisions(folder):  # nothing can be imported with these in place
        return problems
    load_what_ranks_have(folder)
    job_path(folder)
    job, data = loaded.job, loaded.job.data
    if begins and job.init_from and not job.init_from.file.is_file():
        problems.append(Problem(f"no such file: {job.init_from.file}", "init_from.weights"))
    calls = [
        ("model", job.model, 0),
        *((f"data.{name}", target, 0) for name, target in data.sets.items()),
        ("data.sampler", data.sampler, 1),
        ("data.collate", data.collate, 1),
        ("step", job.step, 2),
        *((place, target, 1) for place, target in job.optimizers.items()),
        *((f"callbacks.{i}", callback, 0) for i, callback in enumerate(job.callbacks)),
    ]
    for path, target, n in calls:
        if target:
            check = _check_function if path in ("data.collate", "step") else _check_object
            problems += check(target, n, path)
    for place, scheduler in job.schedulers.items():  # those within it get the optimizer too
        problems += _check_object(scheduler, 1, place, ["optimizer"])
    if job.loss:
        problems += _build(job.loss, "loss")[1]
    for name, target in job.metrics.items():
        metric, found = _check_metric(target, f"metrics.{name}")
        problems += found or _check_monitors(job, name, metric)
    return [loaded.at(problem) for problem in problems]


def _build(target: Target, where: str) -> tuple[object, list[Problem]]:
    """The target's object, or why there is none; none either where it needs the run's numbers."""
    problems = check_target(target, 0, where)
    values = {where: {"_target_": target.target, **target.arguments}}
    if problems or about_the_run(values):
        return None, problems
    try:
        return instantiate(fill(values, {})[where]), []
    except (Exception, SystemExit) as error:  # a constructor's own checks; it may be the user's code
        return None, [Problem(f"{target.target}: {format_error(error)}", where)]


def build_metric(target: MetricTarget) -> Any:
    """A metric; or, of a function of (predictions, target), the function, with its arguments bound."""
    return bind_function(target) if _num_missing(target) > 1 else instantiate(target)


def _num_missing(target: MetricTarget) -> int:
    """How many arguments a function still wants beside its own: two or more, if it is one of samples; 0 of a class."""
    function = _resolve_callable(target.target)
    signature = None if inspect.isclass(function) else _signature(function)
    own = target.arguments.get(_ARGS)
    first = len(own) if isinstance(own, list) else 0
    parameters = [] if signature is None else [*signature.parameters.values()][first:]
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len([p for p in needed if p.name not in target.arguments])


def _check_metric(target: MetricTarget, where: str) -> tuple[object, list[Problem]]:
    """The metric, None for a function of samples, and what is wrong with it."""
    try:
        missing = _num_missing(target)
    except UserError:  # a wrong name, reported below
        missing = 0
    if missing > 1:
        return None, check_target(target, missing, where)
    metric, problems = _build(target, where)
    return metric, problems or _unfit(metric, target, where)


def _unfit(metric: object, target: MetricTarget, where: str) -> list[Problem]:
    kind = type(metric).__name__
    if not all(hasattr(metric, each) for each in ("update", "compute", "reset")):
        return [Problem(f"{kind} is not a metric: it lacks update, compute or reset", where)]
    if reason := why_unfit(metric):
        return [Problem(reason, where)]
    if target.activation is None and guesses_logits(metric):
        message = f"{kind} guesses from each batch whether it was given logits or probabilities"
        hint = "set activation: sigmoid or softmax (logits), or none (probabilities)"
        return [Problem(message, where, hint=hint)]
    return []


def _check_monitors(job: Job, name: str, metric: object) -> list[Problem]:
    """What is wrong with a monitor that means this metric, by the names of its values."""
    problems = []
    for path, monitor in job.monitors.items():
        value = value_of(monitor, job.phases)
        if value == name or value.startswith(f"{name}_"):
            reported = monitor.removesuffix(value) + name
            known = {**job.reported, reported: values_of_no_sample(reported, metric)}
            if problem := monitor_problem(monitor, known):
                problems.append(Problem(problem, path))
    return problems
