"""sbatch's long options, as the `slurm` section of a job takes them, and those that dtrain sets itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dtrain.errors import nearest

# Of Slurm 21.08 to 25.05 (man sbatch), but for those that plugins add.
# fmt: off
FLAGS = frozenset(
    {
        "contiguous", "exclusive", "get-user-env", "hold", "kill-on-invalid-dep", "no-kill", "overcommit",
        "oversubscribe", "reboot", "resv-ports", "spread-job", "stepmgr", "use-min-nodes",
    }
)
_WITH_VALUE = frozenset(
    {
        "account", "acctg-freq", "batch", "bb", "bbf", "begin", "cluster-constraint", "clusters", "comment",
        "constraint", "core-spec", "cores-per-socket", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline",
        "delay-boot", "dependency", "distribution", "exclude", "exclusive", "export", "export-file", "extra",
        "extra-node-info", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gres", "gres-flags", "hint",
        "kill-on-invalid-dep", "licenses", "mail-type", "mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu",
        "mem-per-gpu", "mincpus", "network", "nice", "nodelist", "ntasks-per-core", "oom-kill-step", "partition",
        "power", "prefer", "priority", "profile", "propagate", "qos", "reservation", "resv-ports", "segment", "signal",
        "sockets-per-node", "switches", "thread-spec", "threads-per-core", "time", "time-min", "tmp", "tres-bind",
        "tres-per-task", "uid", "wait-all-nodes", "wckey",
    }
)
# fmt: on
# The Pyxis plugin's options: they go to srun, which runs dtrain in that container.
_PYXIS_FLAGS = frozenset({"container-mount-home", "no-container-mount-home", "container-writable"})
PYXIS = _PYXIS_FLAGS | {"container-image", "container-name", "container-mounts", "container-env"}
OPTIONS = FLAGS | _WITH_VALUE | PYXIS
CPUS = frozenset({"cpus-per-gpu", "cpus-per-task", "exclusive", "mincpus", "tres-per-task"})  # say how many CPUs

# How Slurm's versions differ in the options that a job may set: the first version that has an option, and the last
# one. What dtrain itself asks of Slurm is the same for all of them:
# - `--gres=gpu:N` and not `--gpus-per-node`, which select/cons_res (until 23.02) refuses;
# - srun gets `--cpus-per-task`: 22.05 to 23.02 don't take it from the job;
# - srun gets `--export=ALL`: a job that was submitted with `--export=NONE` passes that on to its steps;
# - a node's CPUs are CPUEfctv, where scontrol shows it (since 22.05), else CPUTot.
SINCE = {
    "prefer": "22.05",
    "extra": "23.02",
    "tres-per-task": "23.02",
    "tres-bind": "23.11",
    "resv-ports": "24.05",
    "segment": "24.05",
    "stepmgr": "24.05",
    "oom-kill-step": "24.11",
}
UNTIL = {"power": "23.11"}
_OUR_SIGNAL = re.compile(r"(?:R?B|BR):(?:SIG)?USR2@\d+")  # what the batch script listens to

_SIZE = "set it on the command line with --nodes and --gpus"
_OUTPUT = "all output goes to the run folder's logs"
# What dtrain sets itself, and why it can't be set here.
TAKEN = {
    **dict.fromkeys(("nodes", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"), _SIZE),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket"), "one task runs on each node"),
    **dict.fromkeys(("output", "error", "open-mode", "input"), _OUTPUT),
    **dict.fromkeys(("requeue", "no-requeue"), "a run is requeued, and continues, until it is done"),
    "array": "dtrain sweep makes arrays",
    **dict.fromkeys(("chdir", "container-workdir"), "the job runs in the folder it is submitted from"),
    "job-name": "it is the job's name",
    "nodefile": "use nodelist to name the nodes",
    "wrap": "dtrain writes the script",
    **dict.fromkeys(("parsable", "quiet", "verbose", "wait", "test-only", "ignore-pbs"), "it has no meaning for a job"),
}


def problem(name: str, value: object, ours: Iterable[str]) -> str | None:
    """What is wrong with the option, in words; None if it is right. `ours` are the section's other keys."""
    if name in TAKEN:
        return f"is set by dtrain: {TAKEN[name]}"
    if name not in OPTIONS:
        near = nearest(name.replace("_", "-"), OPTIONS) or nearest(name, ours)
        return "is not an sbatch option" + (f"; did you mean {near}?" if near else "")
    if isinstance(value, bool):
        return None if name in FLAGS | _PYXIS_FLAGS else f"{str(value).lower()} is not a value for it"
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str | int | float) and not isinstance(word, bool) for word in words):
        return "expected text or a number, or a list of them"
    if any("\0" in str(word) for word in words):
        return "holds a NUL character"
    if name == "signal" and not _OUR_SIGNAL.fullmatch(str(value)):
        return "expected B:USR2@ and a number of seconds before the time limit, such as B:USR2@300"
    if name == "gres" and any(re.match(r"(gres[:/])?gpu\b", word) for word in ",".join(map(str, words)).split(",")):
        return f"names GPUs, which dtrain requests itself: {_SIZE}"
    if name in FLAGS - _WITH_VALUE | _PYXIS_FLAGS:
        return "expected true or false"
    return None


def to_arguments(options: dict[str, object]) -> list[str]:
    """The section's options as arguments of sbatch; lists are joined by commas."""
    arguments = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            arguments.append(f"--{name}={to_text(value)}")
    return arguments


def to_text(value: object) -> str:
    """An option's value as sbatch takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def unknown_to(version: str, arguments: Iterable[str]) -> list[str]:
    """Which of sbatch's arguments this version of Slurm (22.05.8, say) lacks, in words."""
    names = [argument.removeprefix("--").partition("=")[0] for argument in arguments]
    here = _release(version)
    too_new = [name for name in names if here < _release(SINCE.get(name, "0"))]
    gone = [name for name in names if name in UNTIL and here > _release(UNTIL[name])]
    return [
        *(f"slurm.{name}: new in Slurm {SINCE[name]}, but this is {version}" for name in too_new),
        *(f"slurm.{name}: gone after Slurm {UNTIL[name]}, but this is {version}" for name in gone),
    ]


def _release(version: str) -> tuple[int, ...]:
    """Of 22.05.8 the first two numbers, by which options differ."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
