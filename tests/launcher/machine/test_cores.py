"""How many cores a process may use: affinity and control groups, with the kernel's own files."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dtrain.launcher.machine.cores import drop_openmp_mistake, openmp_threads, usable_cores

CORES = len(os.sched_getaffinity(0))
ASK = "from dtrain.launcher.machine.cores import usable_cores; print(usable_cores())"
# The mount and the group as /proc shows them, the group's files below the mount, and the cores that they allow.
LAYOUTS = {
    "v2": (
        "/ {0} - cgroup2 cgroup rw",
        "0::/job/step",
        {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 1"},
        1,
    ),
    "v2-none": ("/ {0} - cgroup2 cgroup rw", "0::/job", {"job/cpu.max": "max 100000"}, CORES),
    "v2-many": ("/ {0} - cgroup2 cgroup rw", "0::/", {"cpu.max": "1000000 1000"}, CORES),
    "v2-little": ("/ {0} - cgroup2 cgroup rw", "0::/", {"cpu.max": "20000 100000"}, 1),
    "v1-container": (
        "/docker/ab {0} - cgroup cgroup rw,cpu,cpuacct",
        "3:cpu,cpuacct:/docker/ab/in",
        {"in/cpu.cfs_quota_us": "-1", "cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"},
        1,
    ),
    "another-controller": ("/ {0} - cgroup cgroup rw,memory", "3:memory:/", {"cpu.max": "1000 1000"}, CORES),
    "unreadable": ("/ {0} - cgroup2 cgroup rw", "0::/", {"cpu.max": "what"}, CORES),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_quota_of_a_group(name, tmp_path):
    mount, group, files, cores = LAYOUTS[name]
    mounted_at = tmp_path / "mounted"
    for file, text in files.items():
        (mounted_at / file).parent.mkdir(parents=True, exist_ok=True)
        (mounted_at / file).write_text(f"{text}\n")
    (tmp_path / "cgroup").write_text(f"{group}\n")
    (tmp_path / "mountinfo").write_text(f"31 23 0:27 {mount.format(mounted_at)}\n")
    assert usable_cores(tmp_path) == cores


def test_without_control_groups(tmp_path):
    assert usable_cores(tmp_path) == CORES


def test_the_affinity_of_this_process():
    pinned = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {ASK}"
    assert subprocess.check_output([sys.executable, "-c", pinned], text=True) == "1\n"


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu", os.W_OK), reason="no CPU control group may be made here")
def test_a_real_quota():
    group = Path("/sys/fs/cgroup/cpu") / f"dtrain-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        enter = f"open('{group}/cgroup.procs', 'w').write('0'); {ASK}"
        assert subprocess.check_output([sys.executable, "-c", enter], text=True) == "1\n"
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("value", "threads"),
    [("3", 3), (" 3 , 2", 3), ("", None), ("abc", None), ("2,", None), ("0", None), ("-1", None), ("9" * 20, None)],
)
def test_openmps_variable(value, threads, capsys):
    assert openmp_threads(value) == threads
    environment = {"OMP_NUM_THREADS": value}
    drop_openmp_mistake(environment)
    assert environment == ({} if threads is None else {"OMP_NUM_THREADS": value})
    assert (f"OMP_NUM_THREADS={value} " in capsys.readouterr().err) == (threads is None and value != "")
