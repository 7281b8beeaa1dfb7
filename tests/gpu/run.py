"""What only a GPU shows, in one command of at most 9 minutes: `make gpu`, or without an installation

    python tests/gpu/run.py [--out FOLDER] [--device cpu] [--only 5 7 ...]

A checkout suffices, beside torch, torchmetrics and what else dtrain imports: the folders of the repository are put
together to the package `dtrain` in a temporary folder. No network is needed, nor mlflow or deepspeed. The page of
results is printed, and written to FOLDER/results.md; FOLDER/log.txt has all that the checks printed. Exit code 1 if
any failed. Without a GPU what can be simulated runs on the CPU, and the rest says why it was left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    **{name: name for name in ("click", "numpy", "pandas", "pydantic", "rich", "safetensors", "torch", "torchmetrics")},
    "yaml": "pyyaml",
}


def main() -> int:
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        print(
            f"{sys.executable} lacks {', '.join(missing)}. Without a network: fetch wheels for its Python elsewhere "
            "(pip download), install them here into a folder (pip install --no-index --target), and name the folder "
            "in PYTHONPATH.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="dtrain-gpu-") as folder:
        put_together(Path(folder))
        paths = [folder, str(ROOT / "tests/support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MLFLOW_TRACKING_URI": ""}
        suite = str(Path(__file__).with_name("suite.py"))
        return subprocess.run([sys.executable, suite, *sys.argv[1:]], env=environment).returncode


def put_together(folder: Path) -> None:
    """Make the package `dtrain` in the folder, as pyproject.toml has it, of copies of the repository's folders."""
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dtrain", folder / "dtrain", ignore=no_caches)
    for name in ("launcher", "slurm", "trainer"):
        shutil.copytree(ROOT / name, folder / "dtrain" / name, ignore=no_caches)


if __name__ == "__main__":
    sys.exit(main())
