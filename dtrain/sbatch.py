"""sbatch's long options, as the `slurm` section of a job takes them, and those that dtrain sets itself."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dtrain.errors import nearest

# Of Slurm 22.05 to 25.05 (man sbatch), but for those that Slurm's own plugins add.
# fmt: off
FLAGS = frozenset(
    {
        "contiguous", "exclusive", "hold", "kill-on-invalid-dep", "no-kill", "overcommit", "oversubscribe", "reboot",
        "spread-job", "stepmgr", "use-min-nodes",
    }
)
_WITH_VALUE = frozenset(
    {
        "account", "acctg-freq", "batch", "bb", "bbf", "begin", "cluster-constraint", "clusters", "comment",
        "constraint", "core-spec", "cores-per-socket", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline",
        "delay-boot", "dependency", "distribution", "exclude", "exclusive", "export", "export-file", "extra",
        "extra-node-info", "get-user-env", "gid", "gpu-bind", "gpu-freq", "gres-flags", "hint", "kill-on-invalid-dep",
        "licenses", "mail-type", "mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus",
        "network", "nice", "nodelist", "ntasks-per-core", "oom-kill-step", "partition", "power", "prefer", "priority",
        "profile", "propagate", "qos", "reservation", "segment", "signal", "sockets-per-node", "switches",
        "thread-spec", "threads-per-core", "time", "time-min", "tmp", "tres-bind", "tres-per-task", "uid",
        "wait-all-nodes", "wckey",
    }
)
# fmt: on
OPTIONS = FLAGS | _WITH_VALUE
_OUR_SIGNAL = re.compile(r"(?:R?B|BR):(?:SIG)?USR2@\d+")  # what the batch script listens to

_SIZE = "the command line says how many: --nodes and --gpus"
_OUTPUT = "all output goes to the run folder's logs"
# What dtrain sets itself, and why it can't be set here.
TAKEN = {
    **dict.fromkeys(("nodes", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"), _SIZE),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket"), "one task runs on each node"),
    **dict.fromkeys(("output", "error", "open-mode", "input"), _OUTPUT),
    **dict.fromkeys(("requeue", "no-requeue"), "a run is requeued, and continues, until it is done"),
    "array": "dtrain sweep makes arrays",
    "chdir": "the job runs in the folder from which it is submitted",
    "job-name": "it is the job's name",
    "nodefile": "name the nodes: nodelist",
    "wrap": "dtrain writes the script",
    **dict.fromkeys(("parsable", "quiet", "verbose", "wait", "test-only", "ignore-pbs"), "it is not for a job"),
}


def problem(name: str, value: object, ours: Iterable[str]) -> str | None:
    """What is wrong with the option, in words; None where nothing is. `ours` are the section's other keys."""
    if name in TAKEN:
        return f"is dtrain's own: {TAKEN[name]}"
    if name not in OPTIONS:
        near = nearest(name.replace("_", "-"), OPTIONS) or nearest(name, ours)
        return "is no option of sbatch" + (f"; did you mean {near}?" if near else "")
    if isinstance(value, bool):
        return None if name in FLAGS else f"{str(value).lower()} is no value for it"
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str | int | float) and not isinstance(word, bool) for word in words):
        return "expected text or a number, or a list of them"
    if any("\0" in str(word) for word in words):
        return "holds a NUL character"
    if name == "signal" and not _OUR_SIGNAL.fullmatch(str(value)):
        return "expected B:USR2@ and the seconds ahead of the time limit, such as B:USR2@300"
    if name in FLAGS - _WITH_VALUE:
        return "expected true or false"
    return None


def to_arguments(options: dict[str, object]) -> list[str]:
    """The section's options as arguments of sbatch; lists are joined by commas."""
    arguments = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not False:
            words = value if isinstance(value, list) else [value]
            arguments.append(f"--{name}={','.join(map(str, words))}")
    return arguments
