"""The real torchrun beside `dtrain launch`: the same script under each, for tests to compare what it saw and did."""

from __future__ import annotations

import sys
from pathlib import Path

from command import DTRAIN, Command, Done, Project

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = [DTRAIN, "launch", "--gpus", "2", "--run-dir", "run"]
# By name: what comes before the script, and before its arguments.
LAUNCHERS: dict[str, tuple[list[str], list[str]]] = {
    "torchrun": (TORCHRUN, []),
    "forked": (LAUNCH, ["--"]),
    "fresh": ([*LAUNCH, "--no-preload"], ["--"]),
}


def start(launcher: str, project: Project, script: list[str], arguments: list[str], **environment: str) -> Command:
    """The script on two ranks, in the project's folder, with the file `stdin` where there is one."""
    before, between = LAUNCHERS[launcher]
    command = [*before, *script, *(between if arguments else []), *arguments]
    if Path(project.folder, "stdin").exists():
        command = ["bash", "-c", 'exec "$@" < stdin', "bash", *command]
    inherited = {name: value for name, value in project.environment.items() if name != "PYTHONUNBUFFERED"}
    return Command(command, project.folder, {**inherited, **environment})


def run(launcher: str, project: Project, script: list[str], *arguments: str, **environment: str) -> Done:
    """`start`, to the end of all its processes."""
    return start(launcher, project, script, list(arguments), **environment).wait()
