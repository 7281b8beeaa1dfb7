"""How many cores this process may use: in a container or a batch job, fewer than the machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

from dtrain.slurm.environment import cpus

_UNLIMITED = ("max", "-1")


def usable_cores(proc: Path = Path("/proc/self")) -> int:
    """Whole cores that the affinity, CPU quotas and Slurm allow this process; at least 1.

    Args:
        proc: this process's folder in /proc.
    """
    allowed = [len(os.sched_getaffinity(0)), *_quotas(proc)]
    if (given := cpus(os.environ)) is not None:
        allowed.append(given)
    return max(1, int(min(allowed)))


def openmp_threads(value: str) -> int | None:
    """The number in OMP_NUM_THREADS, the first of a list for nested regions; None if OpenMP ignores it."""
    words = [word.strip() for word in value.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) < 1 << 31 for word in words):
        return None
    return int(words[0])


def drop_openmp_mistake(environment: MutableMapping[str, str]) -> None:
    """Remove an OMP_NUM_THREADS that is not a number, with a warning: OpenMP would ignore it too."""
    value = environment.get("OMP_NUM_THREADS")
    if value is not None and openmp_threads(value) is None:
        del environment["OMP_NUM_THREADS"]
        if value.strip():
            print(f"warning: OMP_NUM_THREADS={value} is not a number of threads; ignored", file=sys.stderr)


def _quotas(proc: Path) -> Iterator[float]:
    """The CPU quotas of this process's control groups, in cores; for versions 1 and 2, see man 7 cgroups."""
    for folder, mount in _groups(proc):
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError):
                if (group / "cpu.max").exists():
                    quota, period = (group / "cpu.max").read_text().split()
                else:
                    quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
                if quota not in _UNLIMITED:
                    yield int(quota) / int(period)
            if group == mount:
                break


def _groups(proc: Path) -> Iterator[tuple[Path, Path]]:
    """The folder of each group that may limit this process's CPU time, and where its hierarchy is mounted."""
    try:
        lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {controller: path for _, controllers, path in lines for controller in controllers.split(",")}
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        root, mounted_at = before.split()[3:5]
        kind, _, options = after.split()
        controller = "" if kind == "cgroup2" else "cpu"
        if controller not in paths or not (kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))):
            continue
        path = paths[controller]
        # In a container the mount may begin at the container's own group.
        inside = path[len(root.rstrip("/")) :] if path.startswith(root) else ""
        yield Path(mounted_at) / inside.lstrip("/"), Path(mounted_at)
