"""Who may import whom, and what each command has loaded: the contract's layers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import get_args

import pytest

from dtrain.schema.job import Job
from dtrain.schema.sections import Fit
from dtrain.schema.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
TOP = ("dtrain", "launcher", "slurm", "trainer")

MOST_FILES = 15
MOST_LINES = 400
MOST_PARAMETERS = 8

# For each folder, the folders that it may import; from the lowest level to the highest.
CONTRACT = (
    *("dtrain", "dtrain/references", "dtrain/run", "dtrain/schema/metrics", "dtrain/schema"),
    *("dtrain/clusters", "dtrain/monitoring"),
)
BASE = ("trainer/distributed", "trainer/data", "trainer/model", "trainer/checkpoint", "trainer/checks")
PARTS = (*BASE, "trainer/loss", "trainer/metrics", "trainer/strategies", "trainer/optimization")
MAY_IMPORT = {
    "dtrain": (),
    "dtrain/references": ("dtrain",),
    "dtrain/run": ("dtrain",),
    "dtrain/schema/metrics": ("dtrain",),
    "dtrain/schema": ("dtrain", "dtrain/references", "dtrain/run", "dtrain/schema/metrics"),
    "dtrain/clusters": ("dtrain", "dtrain/run", "dtrain/schema"),
    "dtrain/monitoring": ("dtrain", "dtrain/run", "dtrain/schema"),
    "slurm": CONTRACT,
    "launcher/machine": (*CONTRACT, "slurm"),
    "launcher/rank": (*CONTRACT, "launcher/machine"),
    "launcher/call": CONTRACT,
    "launcher/agent": (*CONTRACT, "launcher/machine", "launcher/rank"),
    "launcher/commands": (*CONTRACT, "slurm", "launcher/machine", "launcher/rank", "launcher/agent"),
    "launcher": (
        *CONTRACT,
        *("launcher/machine", "launcher/rank", "launcher/call", "launcher/agent", "launcher/commands"),
    ),
    "trainer/distributed": CONTRACT,
    "trainer/data": (*CONTRACT, "trainer/distributed"),
    "trainer/streams": (*CONTRACT, "trainer/distributed", "trainer/data"),
    "trainer/model": (*CONTRACT, "trainer/distributed", "trainer/data"),
    "trainer/checkpoint": (*CONTRACT, "trainer/distributed", "trainer/data", "trainer/model"),
    "trainer/checks": (*CONTRACT, "trainer/distributed", "trainer/data", "trainer/model", "trainer/checkpoint"),
    "trainer/loss": (*CONTRACT, "trainer/distributed", "trainer/data", "trainer/checkpoint"),
    "trainer/metrics": (*CONTRACT, "trainer/distributed", "trainer/data", "trainer/loss"),
    "trainer/strategies": (*CONTRACT, *BASE, "trainer/loss"),
    "trainer/optimization": (*CONTRACT, *BASE, "trainer/loss", "trainer/strategies"),
    "trainer/fit": (*CONTRACT, *PARTS),
    "trainer/callbacks": (*CONTRACT, *PARTS, "trainer/fit"),
    "trainer/own_loop": (*CONTRACT, *PARTS),
    "trainer": (*CONTRACT, *PARTS, "trainer/streams", "trainer/fit", "trainer/own_loop"),
    "trainer/tracking": CONTRACT,
    "trainer/entrypoints": (*CONTRACT, *PARTS, "trainer/fit", "trainer/callbacks", "trainer"),
}
# The package's front, which hands on what lies above it.
HANDS_ON = {
    "dtrain/__init__.py": ("dtrain/schema", "launcher", "trainer", "trainer/loss", "trainer/fit", "trainer/callbacks"),
    "dtrain/__main__.py": ("launcher",),
}

LIGHT = {"yaml", "pydantic", "pydantic_core", "dtrain"}
HEAVY = ("torch", "numpy", "mlflow", "pandas", "torchvision", "torchmetrics")

# Runs one command in this process, as the console script does, and says what it has loaded.
RUN_COMMAND = f"""
import sys
from dtrain.launcher.cli import main
sys.argv = ["dtrain", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("code", end.code, file=sys.stderr)
print("loaded", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""


def imports(path: Path, root: Path = ROOT) -> list[tuple[str, bool]]:
    """Each imported module by its full name, and whether it is imported together with the file."""
    tree = ast.parse(path.read_text())
    package = package_of(path.relative_to(root).parent).split(".")
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(outer)
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from dtrain import launcher` imports a package as well.
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        found += [(name, id(node) not in lazy) for name in names]
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def package_of(folder: PurePath) -> str:
    """The package that a folder of the repository is."""
    return ".".join(folder.parts if folder.parts[0] == "dtrain" else ("dtrain", *folder.parts))


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def folders() -> dict[str, str]:
    """Every folder that is a package, by the package's name."""
    found = [path.parent.relative_to(ROOT) for top in TOP for path in files(top) if path.name == "__init__.py"]
    return {package_of(folder): str(folder) for folder in found}


def folder_of(name: str, known: dict[str, str]) -> str | None:
    """The folder that has what is imported by that name; None: it is not dtrain's."""
    package, _, rest = name, "", ""
    while package and package not in known:
        package, _, rest = package.rpartition(".")
    handed_on = package == "dtrain" and rest and rest != "__version__" and not (ROOT / f"dtrain/{rest}.py").exists()
    return "trainer" if handed_on and "." not in name.removeprefix("dtrain.") else known.get(package)


def test_the_check_sees_every_form_of_import(tmp_path):
    package = tmp_path / "launcher" / "rank"
    package.mkdir(parents=True)
    lines = ["import dtrain.trainer.ranks", "from dtrain import trainer", "from dtrain.trainer import Trainer"]
    lines += ["from ...trainer.ranks import Ranks", "from ... import trainer", "def f():\n    import dtrain.trainer.x"]
    for line in [*lines, "from dtrain import Trainer"]:
        file = package / "x.py"
        file.write_text(line)
        assert "trainer" in [folder_of(name, folders()) for name, _ in imports(file, tmp_path)], line
    file.write_text(lines[-1])
    assert [at_start for _, at_start in imports(file, tmp_path)] == [False]


def test_a_folder_imports_only_what_it_may():
    """At the start of a file, in a function, for types: all of it counts."""
    known = folders()
    assert sorted(known.values()) == sorted(MAY_IMPORT)
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for top in TOP
        for path in files(top)
        if (own := str(path.parent.relative_to(ROOT))) in MAY_IMPORT
        for name, _ in imports(path)
        if (folder := folder_of(name, known)) not in {None, own, *MAY_IMPORT[own]}
        if folder not in HANDS_ON.get(str(path.relative_to(ROOT)), ())
    ]
    assert not wrong


def test_every_strategy_is_in_the_table():
    """Those that job.yaml may name, as modules that make one; each but ddp has its section by its name."""
    named = get_args(Fit.model_fields["strategy"].annotation)
    assert tuple(STRATEGIES) == named
    for name, strategy in STRATEGIES.items():
        assert (strategy.settings is not None) == (name in Job.model_fields)
        assert "def parallel(" in Path(str(find_spec(strategy.module).origin)).read_text()


def test_commands_know_a_cluster_by_its_interface():
    """But for launch's own in an allocation of Slurm's, where srun has started it."""
    known = folders()
    paths = [path for folder in ("launcher/commands", "dtrain") for path in files(folder)]
    users = {path.name for path in paths for name, _ in imports(path) if folder_of(name, known) == "slurm"}
    assert users == {"allocation.py", "request.py"}


def test_no_two_folders_import_each_other():
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_no_folder_has_too_many_files():
    counts = {folder: len(list((ROOT / folder).glob("*.py"))) for folder in folders().values()}
    assert not {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for top in TOP for path in files(top)}
    assert not {path: length for path, length in lengths.items() if length > MOST_LINES}


def parameters(node: ast.AST) -> list[str]:
    """Of a function, or of a class whose fields are its constructor's parameters."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return [each.arg for each in found if each.arg not in ("self", "cls")]
    if isinstance(node, ast.ClassDef) and {"dataclass", "NamedTuple"} & set(
        re.findall(r"\w+", " ".join(map(ast.unparse, [*node.decorator_list, *node.bases])))
    ):
        return [ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
    return []


def test_nothing_takes_too_many_parameters():
    """But what others name them for: the schema, the command line, the bytes that ranks share with their agent."""
    wide = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for top in TOP
        for path in files(top)
        for node in ast.walk(ast.parse(path.read_text()))
        if len(parameters(node)) > MOST_PARAMETERS
    }
    of_trainer = {"trainer/trainer.py: __init__", "trainer/trainer.py: fit", "trainer/ranks.py: epochs"}
    assert wide == {*of_trainer, "launcher/cli.py: launch", "launcher/cli.py: sweep", "dtrain/run/heartbeat.py: Beat"}


def test_trainer_is_handed_on_lazily():
    assert not [name for name, at_start in imports(ROOT / "dtrain/__init__.py") if at_start and "trainer" in name]


def test_the_contract_is_light():
    """dtrain/ imports the standard library, pyyaml and pydantic at start, and nothing else."""
    heavy = [
        f"{path.name}: {name}"
        for path in files("dtrain")
        for name, at_start in imports(path)
        if at_start and name.partition(".")[0] not in LIGHT | sys.stdlib_module_names
    ]
    assert not heavy


def run_command(*arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """The exit code of a command, and what it has loaded of HEAVY."""
    command = [sys.executable, "-c", RUN_COMMAND, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True)
    lines = result.stderr.splitlines()
    [code] = [line for line in lines if line.startswith("code ")]
    return int(code.split()[1]), lines[-1].split()[1:]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["launch", "--help"], 0),
        (["--version"], 0),
        (["schema"], 0),
        (["status", "run"], 0),
        (["status", "none"], 2),
        (["runs", "."], 0),
        (["logs", "run"], 0),
        (["cancel", "run"], 0),
        (["check", "broken.yaml"], 2),
        (["launch", "broken.yaml"], 2),
        (["launch", "missing.yaml"], 2),
        (["launch", "--gpus", "many", "job.yaml"], 2),
        (["launch", "--no-such-option"], 2),
    ],
    ids=str,
)
def test_loads_no_torch(arguments, code, tmp_path):
    (tmp_path / "run" / "heartbeat").mkdir(parents=True)
    (tmp_path / "run" / "heartbeat" / "rank-0").touch()
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "logs" / "rank-0.log").touch()
    (tmp_path / "run" / "status.json").write_text('{"state": "finished", "exit_code": 0, "epoch": 1, "step": 5}')
    (tmp_path / "broken.yaml").write_text("name: [")
    assert run_command(*arguments, cwd=tmp_path) == (code, [])
