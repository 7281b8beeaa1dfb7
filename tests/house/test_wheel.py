"""The wheel has every module, and each can be imported from it, away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("dtrain", "launcher", "slurm", "trainer")
ARE_RUN = ("dtrain.__main__", "dtrain.trainer.tracking.__main__", "dtrain.launcher.rank.fresh")  # and not imported

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip does
IMPORT_ALL = """
import importlib, sys
from pathlib import Path

for name in sys.stdin.read().split():
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
"""


def modules() -> list[str]:
    """The dotted names of the repository's modules."""
    found = [path.relative_to(ROOT).with_suffix("").parts for top in TOP for path in sorted((ROOT / top).rglob("*.py"))]
    names = [".".join(parts if parts[0] == "dtrain" else ("dtrain", *parts)) for parts in found]
    return [name.removesuffix(".__init__") for name in names if ".devcluster." not in name]


def test_every_module_can_be_imported_from_the_wheel(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()  # setuptools writes beside what it reads
    for name in TOP:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for name in ("dtrain/py.typed", "dtrain/slurm/batch.sh"):
        assert (installed / name).is_file()
    names = [name for name in modules() if name not in ARE_RUN]
    environment = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", IMPORT_ALL, str(installed)]
    subprocess.run(command, input=" ".join(names), text=True, cwd=tmp_path, env=environment, check=True)
