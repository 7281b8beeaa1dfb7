"""Who may import whom, and what each command has loaded: the contract's layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


def imports(path: Path) -> list[tuple[str, bool]]:
    """Each imported module by its full name, and whether it is imported together with the file."""
    tree = ast.parse(path.read_text())
    package = ["dtrain", *(() if path.parent.name == "dtrain" else (path.parent.name,))]
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


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_check_sees_every_form_of_import(tmp_path):
    package = tmp_path / "launcher"
    package.mkdir()
    lines = ["import dtrain.trainer.loop", "from dtrain import trainer", "from dtrain.trainer import Trainer"]
    lines += ["from ..trainer.loop import Loop", "from .. import trainer", "def f():\n    import dtrain.trainer.x"]
    for line in lines:
        file = package / "x.py"
        file.write_text(line)
        assert any(name.startswith("dtrain.trainer") for name, _ in imports(file)), line
    assert [at_start for _, at_start in imports(file)] == [False]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("launcher", ["dtrain.trainer", "dtrain.Trainer"]),
        ("trainer", ["dtrain.launcher", "dtrain.slurm"]),
        ("slurm", ["dtrain.trainer", "dtrain.launcher", "dtrain.Trainer"]),
        ("dtrain", ["dtrain.trainer", "dtrain.launcher", "dtrain.slurm"]),
    ],
)
def test_layers(folder, forbidden):
    hands_on = {"dtrain/__init__.py": "dtrain.trainer", "dtrain/__main__.py": "dtrain.launcher"}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(folder)
        for name, _ in imports(path)
        for layer in forbidden
        if (name == layer or name.startswith(f"{layer}.")) and hands_on.get(str(path.relative_to(ROOT))) != layer
    ]
    assert not wrong


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
