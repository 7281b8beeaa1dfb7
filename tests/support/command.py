"""The real command line for tests: a `Project` is a folder with a tiny job, and the `dtrain` that a user would type."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import warm
import yaml
from warm import DTRAIN, MARK

from dtrain.files import read_json
from dtrain.run.folder import RunDir

PATIENCE_S = 300  # for a machine under load: nothing here is a measurement
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DTRAIN_RUN_DIR"}

JOB: dict[str, Any] = {
    "name": "tiny",
    "model": {"_target_": "net.Net"},
    "data": {
        "train": {"_target_": "data.points", "size": 40},
        "val": {"_target_": "data.points", "size": 12},
        "batch_size": 8,
    },
    "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    "fit": {"epochs": 2},
}
STEPS = 5  # of an epoch of this job

NET = """
import os
import time

import torch
from torch import nn

torch.cuda.is_available()  # as many modules do on import: what is forked afterwards could not use CUDA


class Net(nn.Module):
    '''With a gate, it waits in that forward pass of training until a file called `go` is there.'''

    def __init__(self, width=4, gate=0):
        super().__init__()
        assert 'TORCHELASTIC_RUN_ID' not in os.environ or not torch.cuda._is_in_bad_fork()  # of a command's rank
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
        self.gate = gate
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == self.gate:
            open("waiting", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.02)
        return self.layers(x)
"""

DATA = """
import torch
from torch.utils.data import TensorDataset


def points(size):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    return TensorDataset(x, (x[:, 0] > 0).long())
"""

MAKE_STORE = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).create_experiment("tiny", artifact_location=sys.argv[2])
"""


def make_store(folder: Path) -> str:
    """The uri of a new MLflow store in that folder."""
    uri = f"sqlite:///{folder}/mlflow.db"
    subprocess.run([sys.executable, "-c", MAKE_STORE, uri, (folder / "artifacts").as_uri()], check=True)
    return uri


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_lines(self) -> str:
        return "\n".join(self.err.splitlines()[-15:])


class Command:
    """A command that runs, in a session of its own. Not to be left running: `wait` or `kill`.

    Args:
        is_warm: it is `dtrain` with these arguments, forked from a process that has imported torch.
    """

    def __init__(
        self, arguments: list[str], folder: Path, environment: dict[str, str], *, is_warm: bool = False
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this is)
        environment = {**environment, MARK: self._mark}
        out, err = (file.fileno() for file in self._files)
        self._process = (
            warm.start(arguments, folder, environment, out, err)
            if is_warm
            else subprocess.Popen(
                arguments,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        """What it has printed to stdout so far."""
        return os.pread(self._files[0].fileno(), 1 << 20, 0).decode()

    @property
    def err(self) -> str:
        """What it has printed to stderr so far."""
        return os.pread(self._files[1].fileno(), 1 << 20, 0).decode()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that this command brings about."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._process.poll() is None, f"ended early, with {self._process.returncode}:\n{self.err}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.err}"
            time.sleep(0.02)

    def signal(self, number: int, *, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.pid, number)

    def signal_all(self, number: int) -> None:
        """To each process that this command has started, too."""
        for pid in processes(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> int:
        """Its exit code, whatever goes on behind it."""
        return self._process.wait(PATIENCE_S)

    def wait(self) -> Done:
        """Its end, and that of all that it has started: nothing may stay. So MLflow has its run by then."""
        try:
            code = self.end()
            deadline = time.monotonic() + 60
            while left := processes(self._mark):
                assert time.monotonic() < deadline, f"still running: {left}\n{self.err}"
                time.sleep(0.02)
            return Done(code, self.out, self.err)
        finally:
            self.kill()

    def kill(self) -> None:
        """End all of its processes."""
        for pid in processes(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def _no_longer_than(command: Command) -> Iterator[Command]:
    try:
        yield command
    finally:
        command.kill()


def processes(mark: str, variable: str = MARK) -> dict[int, str]:
    """The command lines, by pid, of the processes whose environment holds the mark; no zombies."""
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if f"{variable}={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


class Project:
    """A folder with a job that trains in no time, and what to run there.

    Args:
        is_fresh: each command is the executable in an interpreter of its own, as a user's; see warm.py.
    """

    def __init__(self, folder: Path, store: str, *, is_fresh: bool = False) -> None:
        self.folder = folder
        self.is_fresh = is_fresh
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if key not in RANK_VARIABLES and not key.startswith("SLURM")  # else a run would be on all nodes of its job
        }
        self.environment["MLFLOW_TRACKING_URI"] = store
        self.write("net.py", NET)
        self.write("data.py", DATA)
        self.job()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def job(self, **changed: Any) -> None:
        """Write job.yaml, with some of its sections as given."""
        self.write("job.yaml", yaml.safe_dump({**JOB, **changed}, sort_keys=False))

    def start(self, *arguments: str, **environment: str) -> Command:
        together = {**self.environment, **environment}
        if not self.is_fresh and warm.suits(arguments, together):
            return Command(list(arguments), self.folder, together, is_warm=True)
        return Command([DTRAIN, *arguments], self.folder, together)

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Command]:
        """`start`, and nothing of it stays if the test fails."""
        with _no_longer_than(self.start(*arguments)) as command:
            yield command

    @contextlib.contextmanager
    def shell_running(self, line: str) -> Iterator[Command]:
        """`shell`, while it runs."""
        with _no_longer_than(self._start_shell(line)) as command:
            yield command

    def run(self, *arguments: str, **environment: str) -> Done:
        return self.start(*arguments, **environment).wait()

    def shell(self, line: str) -> Done:
        """The end of what a user typed into a shell: pipes, and files that output goes to."""
        return self._start_shell(line).wait()

    def _start_shell(self, line: str) -> Command:
        folder = shlex.quote(str(Path(DTRAIN).parent))
        return Command(["bash", "-c", f"PATH={folder}:$PATH; {line}"], self.folder, self.environment)

    def runs(self) -> list[Path]:
        """The run folders under runs/."""
        return sorted(self.folder.glob("runs/*"))

    def run_dir(self, name: str = "run") -> RunDir:
        return RunDir(self.folder / name)

    def status(self, name: str = "run") -> dict[str, Any]:
        """status.json as it stands there."""
        return read_json(self.run_dir(name).status_file) or {}
