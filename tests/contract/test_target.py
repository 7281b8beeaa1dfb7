"""Names resolve to what they name, and what is wrong with a target is told before it is called."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.names import job_path, resolve
from dtrain.schema.instantiate import bind_function, check_job, check_target, instantiate
from dtrain.schema.loading import load_job
from dtrain.schema.targets import Target


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job's folder as the working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    job_path(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def target(name: object, **arguments: object) -> Target:
    return Target.model_validate({"_target_": name, **arguments})


def module(text: str, path: str = "net.py") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(name)
    return str(caught.value)


def told(name: object, positional: int = 0, **arguments: object) -> list[str]:
    return [str(problem) for problem in check_target(target(name, **arguments), positional, "here")]


def test_resolves_modules_attributes_nested_classes_and_class_methods():
    module("class A:\n  class B:\n    pass\n  @classmethod\n  def make(cls): return cls()\n", "pack/sub.py")
    module("", "pack/__init__.py")
    assert resolve("collections.abc.Mapping") is collections.abc.Mapping
    assert resolve("pack.sub.A.B").__name__ == "B"
    assert isinstance(instantiate(target("pack.sub.A.make")), resolve("pack.sub.A"))


def test_a_function_wins_over_the_module_of_its_name():
    module("from pack.accuracy import accuracy\n", "pack/__init__.py")
    module("def accuracy(): return 1\n", "pack/accuracy.py")
    assert instantiate(target("pack.accuracy")) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("colections.Counter", "there is no module colections; did you mean collections?"),
        ("collections.Countr", "collections has no Countr; did you mean Counter?"),
        ("pack.sbu.A", "pack has no sbu; did you mean sub?"),
        ("pack.sub.A.c", "pack.sub.A has no c"),
        ("collections.Counter.updat", "collections.Counter has no updat; did you mean update?"),
        ("", "'' is not an importable name such as net.DigitNet"),
        ("a..b", "'a..b' is not an importable name such as net.DigitNet"),
        (".a", "'.a' is not an importable name such as net.DigitNet"),
        ("a/b.py:C", "'a/b.py:C' is not an importable name such as net.DigitNet"),
    ],
)
def test_a_name_that_does_not_resolve(name: str, expected: str):
    module("", "pack/__init__.py")
    module("class A: pass\n", "pack/sub.py")
    assert refusal(name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n\nclass A(nn.Module): pass\n", "net.py:3: NameError: name 'nn' is not defined"),
        ("import xqzw\n", "net.py:1: ModuleNotFoundError: No module named 'xqzw'"),
        ("import json\njson.loads('{')\n", "net.py:2: JSONDecodeError: Expecting property name"),
        ("class A\n", "net.py:1: SyntaxError: expected ':'"),
        ("import sys\nsys.exit(3)\n", "net.py:2: SystemExit: 3"),
        ("assert False\n", "net.py:1: AssertionError"),
        ("raise ValueError('two\\nlines')\n", "net.py:1: ValueError: two lines"),
        ("def __getattr__(name):\n  raise RuntimeError(name)\n", "net.py:2: RuntimeError: A"),
    ],
)
def test_a_module_that_raises_is_told_by_the_users_own_line(text: str, expected: str):
    module(text)
    assert refusal("net.A").startswith(expected)
    assert "\n" not in refusal("net.A")


def test_the_job_folder_comes_first_once(folder: Path):
    sys.path[:] = ["/somewhere", str(folder), "/else"]
    job_path(folder)
    job_path(folder)
    assert sys.path == [str(folder), "/somewhere", "/else"]


FUNCTIONS = """
def plain(a, b=1): return (a, b)
def keywords(a, *, c, **others): return (a, c, others)
def positions(*args): return args
def only(a, /, b): return (a, b)
class Net:
    def __init__(self, width, depth=2): self.sizes = (width, depth)
value = 3
"""


@pytest.mark.parametrize(
    ("name", "positional", "arguments", "expected"),
    [
        ("net.plain", 1, {}, []),
        ("net.plain", 0, {"a": 1, "b": 2}, []),
        ("net.plain", 0, {}, ["here: net.plain needs the argument a"]),
        ("net.plain", 1, {"a": 1}, ["here.a: a is passed to net.plain by dtrain; leave it out"]),
        ("net.plain", 3, {}, ["here: net.plain takes 2 positional arguments, but gets 3"]),
        ("net.keywords", 1, {"c": 1, "any": 2}, []),
        ("net.keywords", 1, {}, ["here: net.keywords needs the argument c"]),
        ("net.positions", 5, {}, []),
        ("net.only", 1, {"b": 1}, []),
        (
            "net.only",
            0,
            {"a": 1, "b": 1},
            ["here.a: net.only takes no argument a"],
        ),
        (
            "net.Net",
            0,
            {"widht": 3},
            [
                "here.widht: net.Net takes no argument widht; did you mean width?",
                "here: net.Net needs the argument width",
            ],
        ),
        ("net.value", 0, {}, ["here._target_: net.value cannot be called; it is of type int"]),
        ("net", 0, {}, ["here._target_: net cannot be called; it is of type module"]),
        ("builtins.dict", 1, {"x": 1}, []),
        ("net.Nte", 0, {}, ["here._target_: net has no Nte; did you mean Net?"]),
        (
            "net.Net",
            0,
            {"width": {"_target_": "net.plain", "z": 1}, "depth": [{"x": {"_target_": 3}}]},
            [
                "here.width.z: net.plain takes no argument z",
                "here.width: net.plain needs the argument a",
                "here.depth.0.x._target_: expected an importable name, found 3",
            ],
        ),
    ],
)
def test_arguments_against_the_signature(name: str, positional: int, arguments: dict[str, object], expected: list[str]):
    module(FUNCTIONS)
    assert told(name, positional, **arguments) == expected


def test_instantiate_builds_the_targets_inside_first():
    module(FUNCTIONS)
    inner = {"_target_": "net.plain", "a": 1}
    net = instantiate(target("net.Net", width=[inner, {"x": inner, 5: 6}], depth=inner))
    assert net.sizes == ([(1, 1), {"x": (1, 1), 5: 6}], (1, 1))
    assert instantiate(target("net.plain", b=5), "given") == ("given", 5)
    assert instantiate([1, "a", None]) == [1, "a", None]


def test_partial_names_a_function():
    module(FUNCTIONS)
    named = instantiate({"f": [{"_target_": "net.plain", "_partial_": True}], "not": {"_target_": "net.plain", "a": 1}})
    assert named == {"f": [resolve("net.plain")], "not": (1, 1)}
    half = instantiate(target("net.Net", _partial_=True, depth={"_target_": "builtins.list"}))
    assert half(5).sizes == (5, [])
    with pytest.raises(TypeError, match=r"not callable; to pass a function, write {_target_: .*, _partial_: true}"):
        instantiate(target("functools.reduce", **{}), "net.plain", [1, 2])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"_target_": "net.plain", "_partial_": True}, []),
        ({"_target_": "net.plain", "_partial_": True, "b": 2}, []),
        (
            {"_target_": "net.Net", "_partial_": True, "depht": 2},
            ["here.f.depht: net.Net takes no argument depht; did"],
        ),
        ({"_target_": "net.plain", "_partial_": 1}, ["here.f._partial_: expected true or false, found 1"]),
        ({"_target_": "net.positions", "_convert_": "all"}, ["here.f._convert_: is Hydra's; dtrain has only"]),
        (
            {"_target_": "net.positions", "_partal_": 1},
            ["here.f._partal_: net.positions takes no argument _partal_; did"],
        ),
        ({"_traget_": "net.plain"}, ["here.f._traget_: unknown key; did you mean _target_?"]),
        ("net.plain", ["here.f: net.caller takes a function here, and 'net.plain' is text; to pass a function, write"]),
        (["net.plain"], ["here.f: net.caller takes a function here, and 'net.plain' is text"]),
    ],
)
def test_a_function_as_an_argument(value: object, expected: list[str]):
    module(
        "from collections.abc import Callable\n"
        + FUNCTIONS
        + "def caller(f: Callable | list[Callable], g: Callable | str = ''): pass\n"
    )
    lines = told("net.caller", f=value, g="net.plain")
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_positional_arguments_come_after_those_that_dtrain_passes():
    module(FUNCTIONS + "def outer(first, optimizer, *rest, last=0): return (first, optimizer, rest, last)\n")
    inner = {"_target_": "net.plain", "_args_": [1, {"_target_": "net.plain", "_args_": [2]}]}
    assert instantiate(inner) == (1, (2, 1))
    assert instantiate(target("net.plain", _args_=[5]), "given") == ("given", 5)
    assert instantiate(target("net.positions", _args_=[2, 3]), 1) == (1, 2, 3)
    assert bind_function(target("net.only", _args_=[1]))(2) == (1, 2)
    named = {"given": {"optimizer": "it"}}
    assert instantiate(target("net.outer", _args_=[1, 2, 3]), "it", **named) == (1, "it", (2, 3), 0)
    assert instantiate(target("net.outer", _args_=[1], last=2), "it", **named) == (1, "it", (), 2)
    assert instantiate(target("net.outer", first=1), "it", **named) == (1, "it", (), 0)


@pytest.mark.parametrize(
    ("name", "positional", "arguments", "given", "expected"),
    [
        ("net.plain", 1, {"_args_": [1]}, [], []),
        ("net.outer", 1, {"_args_": [1, 2], "last": 3}, ["optimizer"], []),
        ("net.outer", 1, {"_args_": [1]}, ["optimizer"], []),
        ("net.only", 2, {"_args_": [1], "_partial_": True}, [], ["here: net.only takes 2 positional arguments, but"]),
        ("net.plain", 1, {"_args_": [1, 2]}, [], ["here: net.plain takes 2 positional arguments, but gets 3"]),
        ("net.plain", 0, {"_args_": [1], "a": 2}, [], ["here.a: a is passed to net.plain by _args_; leave it out"]),
        ("net.plain", 1, {"_args_": [1], "b": 2}, [], ["here.b: b is passed to net.plain by dtrain or _args_; leave"]),
        ("net.plain", 0, {"_args_": 3}, [], ["here: net.plain needs the argument a", "here._args_: expected a list"]),
        ("net.plain", 1, {"_agrs_": 1}, [], ["here._agrs_: net.plain takes no argument _agrs_; did you mean _args_?"]),
        (
            "net.plain",
            0,
            {"_args_": [{"_target_": "net.plain", "z": 1, "_args_": [2]}]},
            [],
            ["here._args_.0.z: net.plain takes no argument z"],
        ),
    ],
)
def test_positional_arguments_against_the_signature(name, positional, arguments, given, expected):
    module(FUNCTIONS + "def outer(first, optimizer, *rest, last=0): pass\n")
    lines = [str(each) for each in check_target(target(name, **arguments), positional, "here", given)]
    assert len(lines) == len(expected), lines
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


COLLATE = """
class Collate:
    def __init__(self, by): self.by = by
    def __call__(self, x): return self.by * x
"""


def test_functions_of_a_job_may_be_objects_of_a_class(folder: Path):
    module(FUNCTIONS + COLLATE)
    assert bind_function(target("net.Collate", by=3))(2) == 6
    assert bind_function(target("net.Collate", _partial_=True)) is resolve("net.Collate")
    wrong = JOB.replace("step: {_target_: net.only, b: 3}", "step: {_target_: net.Collate, by: 3}")
    for collate, says in {
        "net.Collate, by: 3": None,
        "net.Collate, by: 3, c: 3": "data.collate.c: net.Collate takes no argument c",
        "net.Net, width: 3": "data.collate: net.Net is a class whose objects cannot be called: it has no __call__",
        "net.Net, _partial_: true": None,
    }.items():
        Path("job.yaml").write_text(wrong.replace("net.plain, c: 3", collate))
        lines = [str(each) for each in check_job(load_job("job.yaml"), folder)]
        assert "job.yaml:7: step: net.Collate.__call__ takes 2 positional arguments, but gets 3" in lines
        assert [line.split(": ", 1)[1] for line in lines if "collate" in line] == [says] * bool(says)


@pytest.mark.parametrize("name", ["queue", "types", "random", "yaml", "torch"])
def test_a_module_called_as_another_is_refused_by_both_names(name: str, folder: Path):
    module("class Net: pass\n", f"{name}.py")
    theirs = sys.modules[name].__file__ if name in sys.modules else name
    whose = "Python's own" if name in sys.stdlib_module_names else "a package that dtrain needs"
    told = refusal(f"{name}.Net")
    assert told.startswith(f"{name} is {whose}")
    assert str(theirs) in told
    assert told.endswith(
        f"so {name}.py cannot be imported under that name; rename yours, such as {name}.py to my_{name}.py"
    )
    module(f"from {name} import Net\n", "other.py")
    assert f"rename yours, such as {name}.py to my_{name}.py" in refusal("other.Net")
    module(FUNCTIONS)
    Path("job.yaml").write_text(JOB)
    hides = any("rename yours" in str(each) for each in check_job(load_job("job.yaml"), folder))
    assert hides == (name == "torch")  # beside which nothing works


def test_a_module_called_as_one_of_pythons_that_nobody_has_loaded_is_the_users():
    module("class Net: pass\n", "antigravity.py")
    assert resolve("antigravity.Net").__module__ == "antigravity"


def test_where_a_module_is_looked_for(folder: Path):
    module("", "configs/__init__.py")
    module("class A: pass\n", "src/pkg/net.py")
    sys.path.remove(str(folder))
    job_path(folder / "configs")
    assert refusal("src.pkg.net.A") == (
        f"there is no module src; not in {folder}/configs, but in {folder}: "
        f"set PYTHONPATH=., or install its project: pip install -e"
    )
    assert refusal("pkg.net.A").endswith("set PYTHONPATH=src, or install its project: pip install -e")
    assert refusal("net.A").endswith(  # nothing is near: not Windows' nt
        f"no module net; looked in {folder}/configs and on Python's path; "
        "for code elsewhere set PYTHONPATH, or install it: pip install -e"
    )
    assert refusal("torch.optim.Sgd") == "torch.optim has no Sgd; did you mean SGD?"


def test_bind_function_returns_the_function_itself():
    module(FUNCTIONS)
    assert bind_function(target("net.plain")) is resolve("net.plain")
    assert bind_function(target("net.plain", b={"_target_": "builtins.list"}))(7) == (7, [])


JOB = """\
name: x
model: {_target_: net.Net, widht: 3}
data:
  train: {_target_: data2.digits}
  batch_size: 4
  collate: {_target_: net.plain, c: 3}
step: {_target_: net.only, b: 3}
optimizer: {_target_: torch.optim.Adam, lrr: 0.1}
scheduler: {_target_: torch.optim.lr_scheduler.StepLR, interval: step}
fit: {epochs: 1}
metrics:
  acc: {_target_: torchmetrics.Accuracy, task: multiclass, num_classes: 3, train: false}
  bad: {_target_: torchmetrics.Accuracy, task: multiclass}
  auc: {_target_: torchmetrics.AUROC, task: binary}
  fine: {_target_: torchmetrics.AUROC, task: binary, activation: sigmoid}
  net: {_target_: torch.nn.Flatten}
  function: {_target_: operator.sub}
  other: {_target_: net.only, x: 1}
"""


def test_every_target_of_a_job_is_checked_and_placed(folder: Path):
    module(FUNCTIONS)
    Path("job.yaml").write_text(JOB)
    # Not torchmetrics' own wording, which may change.
    lines = [str(problem).split(" Got ")[0].split("; looked")[0] for problem in check_job(load_job("job.yaml"), folder)]
    assert lines == [
        "job.yaml:2: model.widht: net.Net takes no argument widht; did you mean width?",
        "job.yaml:2: model: net.Net needs the argument width",
        "job.yaml:4: data.train._target_: there is no module data2",
        "job.yaml:6: data.collate.c: net.plain takes no argument c",
        "job.yaml:7: step.b: b is passed to net.only by dtrain; leave it out",
        "job.yaml:8: optimizer.lrr: torch.optim.Adam takes no argument lrr; did you mean lr?",
        "job.yaml:9: scheduler: torch.optim.lr_scheduler.StepLR needs the argument step_size",
        "job.yaml:13: metrics.bad: torchmetrics.Accuracy: ValueError: Optional arg `num_classes` must be "
        "type `int` when task is ClassificationTask.MULTICLASS.",
        "job.yaml:14: metrics.auc: BinaryAUROC guesses from each batch whether it was given logits or "
        "probabilities; set activation: sigmoid or softmax (logits), or none (probabilities)",
        "job.yaml:16: metrics.net: Flatten is not a metric: it lacks update, compute or reset",
        "job.yaml:18: metrics.other.x: net.only takes no argument x",
    ]


def test_a_loss_that_cannot_be_built_is_told(folder: Path):
    text = JOB.replace("step: {_target_: net.only, b: 3}", "loss: {_target_: net.Loss, power: 0}")
    Path("job.yaml").write_text(text)
    module(FUNCTIONS + "class Loss:\n  def __init__(self, power):\n    self.power = 1 / power\n")
    lines = [str(problem) for problem in check_job(load_job("job.yaml"), folder)]
    assert "job.yaml:7: loss: net.Loss: net.py:11: ZeroDivisionError: division by zero" in lines


def test_what_is_given_by_name_reaches_the_targets_within():
    module(
        "def outer(optimizer, parts, milestones): return optimizer, parts, milestones\n"
        "def inner(optimizer, factor=1): return optimizer, factor\n"
        "def chained(parts, optimizer=None): return parts, optimizer\n"
        "def other(opt, scale): return opt, scale\n"
    )
    parts = [{"_target_": "net.inner", "factor": 2}, {"_target_": "net.inner"}]
    made = instantiate(target("net.outer", parts=parts, milestones=[5]), "it", given={"optimizer": "it"})
    assert made == ("it", [("it", 2), ("it", 1)], [5])
    assert instantiate(target("net.chained", parts=parts[1:]), "it", given={"optimizer": "it"}) == ([("it", 1)], "it")
    assert instantiate(target("net.other", scale=3), "it", given={"optimizer": "it"}) == ("it", 3)

    def wrong(name: str, **arguments: object) -> list[str]:
        return [str(each) for each in check_target(target(name, **arguments), 1, "scheduler", ["optimizer"])]

    assert wrong("net.outer", parts=parts, milestones=[5]) == wrong("net.chained", parts=parts) == []
    assert wrong("net.other", scale=3) == []
    assert wrong("net.outer", parts=[{"_target_": "net.inner", "factr": 2}], milestones=[]) == [
        "scheduler.parts.0.factr: net.inner takes no argument factr; did you mean factor?"
    ]
    assert wrong("net.other") == ["scheduler: net.other needs the argument scale"]
