"""The copy of the code that a run begins with: the job's folder, and the user's modules found elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.names import holds, is_users
from dtrain.redact import hide_password, is_secret_file
from dtrain.run.folder import RunDir

MAX_FILE = 1 << 20  # bytes
MAX_TOTAL = 20 << 20
MAX_FILES = 2_000
SKIPPED = {"__pycache__", "runs", "mlruns", "mlartifacts", "node_modules", "venv", "build", "dist"}
SKIPPED |= {"mlflow.db", "mlflow.db.lock"}

TOO_LARGE = "too large"


class CodeSnapshot:
    """Fills a folder with copies of others, within limits on its size.

    Attributes:
        left_out: what was not copied, or not unchanged, and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_out: dict[str, str] = {}
        self._bytes = self._files = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, folder: Path, name: str = "") -> None:
        """Copy a folder's Python files and small data, under that name.

        Left out are hidden files, tools' output (SKIPPED), run folders, keys and credentials, links that lead out of
        the folder, files above 1 MiB, and what goes beyond 2,000 files or 20 MiB in all. Python files come first, so
        that they are the last to be left out.
        """
        for path in sorted(_files(folder), key=lambda path: (path.suffix != ".py", path)):
            relative = name / path.relative_to(folder)
            if reason := self._why_not(path, folder):
                self.left_out[str(relative)] = reason
            else:
                self._copy(path, relative)

    def add_modules(self) -> None:
        """Copy the user's modules that this process has loaded from elsewhere; each package completely or not at all.

        A part of one would hide the rest, once the run goes on with this copy.
        """
        for name, place in _users_modules():
            if holds(self.folder, name):
                continue
            files = set(_files(place)) if place.is_dir() else {place}
            if not (self._has_room([path.stat().st_size for path in files]) and _loaded_files(name) <= files):
                self.left_out[name] = f"too large to copy; the run uses the original in {place}"
                continue
            self.left_out.pop(place.name, None)  # a link to it
            if place.is_dir():
                self.add(place, name)
            else:
                self._copy(place, Path(place.name))

    def _why_not(self, path: Path, folder: Path) -> str | None:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "a link out of the folder"
        if not self._has_room([path.stat().st_size]):
            return TOO_LARGE
        return "secret, judging by its name or content" if is_secret_file(path) else None

    def _has_room(self, sizes: Sequence[int]) -> bool:
        is_small = max(sizes, default=0) <= MAX_FILE and self._bytes + sum(sizes) <= MAX_TOTAL
        return is_small and self._files + len(sizes) <= MAX_FILES

    def _copy(self, path: Path, relative: Path) -> None:
        copy = self.folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        self._bytes += copy.stat().st_size
        self._files += 1
        if path.suffix in (".yaml", ".yml"):  # a job's mlflow.tracking_uri
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            if (hidden := hide_password(text)) != text:
                copy.write_text(hidden, encoding="utf-8", errors="surrogateescape")
                self.left_out[f"{relative}'s passwords"] = "in addresses"


def _files(folder: Path) -> Iterator[Path]:
    seen = 0
    for parent, folders, names in os.walk(folder):
        links = [each for each in folders if not Path(parent, each).resolve().is_relative_to(folder.resolve())]
        folders[:] = sorted(name for name in folders if _is_wanted(name) and not _is_run(Path(parent, name)))
        for name in sorted([*names, *links]):
            path = Path(parent, name)
            if _is_wanted(name) and (path.is_file() or name in links):
                yield path
                seen += 1
        if seen > 10 * MAX_FILES:  # a data folder: what is deeper is not the job's code
            return


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name not in SKIPPED


def _is_run(folder: Path) -> bool:
    run = RunDir(folder)  # --run-dir may be anywhere, beside the job file too
    return run.lock_file.exists() and run.checkpoints.exists()


def _loaded_files(package: str) -> set[Path]:
    """Of the modules in a package that this process has loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    return {Path(file) for module in modules if (file := getattr(module, "__file__", None))}


def _users_modules() -> Iterator[tuple[str, Path]]:
    """Loaded modules of the user's, without those within packages: the file of each, or the package's folder."""
    for name, module in list(sys.modules.items()):
        if "." in name or name in ("dtrain", "__main__", "__mp_main__"):
            continue
        places = [*(getattr(module, "__path__", None) or [getattr(module, "__file__", None)])]
        for place in places:
            if isinstance(place, str) and is_users(place) and Path(place).exists():
                yield name, Path(place)
                break
