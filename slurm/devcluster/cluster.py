"""A real Slurm cluster of two nodes on this machine, for trying things out and for tests.

    python slurm/devcluster/cluster.py up|down|kill-node NODE|start-node NODE [--folder .devcluster]

Brings up munge, slurmctld and two slurmd, `node0` and `node1`, each with 4 CPUs and 2 GPUs. Slurm counts the GPUs and
binds them (CUDA_VISIBLE_DEVICES), but they are only /dev/null under another name. Partitions: `gpu` (default, at most
an hour), `short` (2 minutes) and `preemptable` (its jobs are requeued when another partition needs the nodes).
Everything lies in one folder, and the ports are free ones, so several clusters can run side by side. After `up`,

    source .devcluster/env.sh

makes sbatch, squeue and the other commands talk to this cluster. It has no accounting, so sacct fails.

Needs root (for device files, and to install what is missing) and Debian's packages slurm-wlm and munge, or Ubuntu's.
Exit codes: 0 done, 1 failed, 2 bad request, 3 this machine lacks what is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

NODES = ("node0", "node1")
CPUS, GPUS = 4, 2  # of each node
PATIENCE_S = 60
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PORTS = range(20000, 30000)  # below those that the system uses for outgoing connections
NULL_DEVICE = os.makedev(1, 3)
# Slurm's longest socket path is FOLDER/node0/spool/node0_JOB.4294967291, and Linux allows 107 bytes.
LONGEST_FOLDER = 107 - len("/node0/spool/node0_1234567.4294967291")


class ClusterError(Exception):
    """What went wrong, in one line or more."""

    exit_code = 1


class BadRequest(ClusterError):
    exit_code = 2


class Unavailable(ClusterError):
    """Slurm can't run here."""

    exit_code = 3


class Cluster:
    """The cluster in a folder, whether it is running or not.

    Each daemon has a folder of its own there, with its own slurm.conf (a link). Slurm passes the path that a daemon was
    started with on to everything that the daemon starts: slurmstepd, batch scripts, tasks and their children. So a
    process with such a path as its SLURM_CONF belongs to the cluster, and the path tells to which node. Processes that
    only use the cluster have the path in env.sh.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Start what is not running. The cluster starts empty unless its controller was running."""
        require_slurm()
        if not self._processes("controller"):
            self._lay_out()
            self._start("munge", ["munged", "--foreground", "--force", *self._munge_options()])
            self._wait(lambda: (self.folder / "munge" / "socket").exists(), "munge")
            self._start("controller", ["slurmctld", "-D", "-f", str(self._conf("controller"))])
        for node in NODES:
            self._start_slurmd(node)
        for node in NODES:
            self._wait_for_node(node)

    def down(self) -> None:
        """Kill everything that is running, jobs included. The logs remain."""
        for name in ("controller", *NODES, "munge"):
            self._kill(name)

    def kill_node(self, node: str) -> None:
        """Kill the node with all that its jobs run there, and tell Slurm, which would otherwise wait for it a while."""
        self._kill(node)
        down = ["scontrol", "update", f"nodename={node}", "state=down", "reason=killed"]
        done = self._ask(down)
        if done.returncode != 0:
            raise ClusterError(f"`{shlex.join(down)}` failed: {done.stderr.strip()}")

    def start_node(self, node: str) -> None:
        """Start its slurmd if it is not running, and wait until the node accepts jobs."""
        if not self._processes("controller"):
            raise BadRequest(f"no cluster runs in {self.folder}: start it with `up`")
        self._start_slurmd(node)
        self._wait_for_node(node)

    def _start_slurmd(self, node: str) -> None:
        if not any(comm == "slurmd" for _, comm in self._processes(node)):
            self._kill(node)  # the jobs of a slurmd that has died alone
            self._start(node, ["slurmd", "-D", "-f", str(self._conf(node)), "-N", node])

    def _wait_for_node(self, node: str) -> None:
        self._wait(lambda: self._is_up(node), node)

    def _conf(self, name: str) -> Path:
        return self.folder / name / "slurm.conf"

    def _lay_out(self) -> None:
        """Create the folder, in place of what an earlier cluster left there."""
        folder = str(self.folder)
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / "controller").is_dir():
            raise BadRequest(f"{folder} holds something else than a cluster: choose another --folder")
        if not re.fullmatch(r"[\w./+-]+", folder, re.ASCII):
            raise BadRequest(f"{folder}: slurm.conf can't hold this path; use letters, digits and . / + - _ only")
        if len(folder) > LONGEST_FOLDER:
            raise BadRequest(f"{folder}: too long for Slurm's sockets, at most {LONGEST_FOLDER} characters")
        if self.folder.exists():
            self.down()
            shutil.rmtree(self.folder)
        for name in ("munge", "controller/state", *(f"{node}/spool" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        ports = free_ports(1 + len(NODES))
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port}"
            f" CPUs={CPUS} Gres=gpu:{GPUS}"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        template = string.Template((Path(__file__).parent / "slurm.conf").read_text())
        conf = self.folder / "slurm.conf"
        conf.write_text(
            template.substitute(folder=folder, host=socket.gethostname(), port=ports[0], nodes="\n".join(lines))
        )
        for name in ("munge", "controller", *NODES):
            self._conf(name).symlink_to(conf)
        for node in NODES:
            for gpu in range(GPUS):
                os.mknod(self.folder / node / f"gpu{gpu}", stat.S_IFCHR | 0o666, NULL_DEVICE)
            (self.folder / node / "gres.conf").write_text(f"Name=gpu File={folder}/{node}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "env.sh").write_text(f"export SLURM_CONF={shlex.quote(str(conf))}\n")

    def _munge_options(self) -> list[str]:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]

    def _start(self, name: str, command: list[str]) -> None:
        """Start a daemon that outlives this process."""
        with (self.folder / name / "output").open("ab") as output:
            self._started[name] = subprocess.Popen(
                command,
                cwd=self.folder / name,
                env={**os.environ, "SLURM_CONF": str(self._conf(name))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _wait(self, condition: Callable[[], bool], name: str) -> None:
        """Wait until a daemon answers."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            has_ended = name in self._started and self._started[name].poll() is not None
            if has_ended or time.monotonic() > deadline:
                what = "has ended" if has_ended else f"does not answer for {PATIENCE_S} s"
                raise ClusterError(f"{name} {what}; the end of its log:\n{self._last_lines(name)}")
            time.sleep(0.05)

    def _last_lines(self, name: str) -> str:
        """The end of a daemon's log, and what it printed before it had one."""
        files = [self.folder / name / file for file in ("output", "log")]
        return "\n".join(line for file in files if file.exists() for line in file.read_text().splitlines()[-10:])

    def _is_up(self, node: str) -> bool:
        answer = self._ask(["sinfo", "--noheader", "--nodes", node, "--format", "%T"]).stdout
        return bool(answer) and set(answer.split()) <= {"idle", "mixed", "allocated", "completing"}

    def _ask(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def _processes(self, name: str) -> list[tuple[int, str]]:
        """The ids and names of a daemon's processes, those that it started included."""
        return [(pid, comm) for pid, comm in running() if self._owns(name, pid)]

    def _owns(self, name: str, pid: int) -> bool:
        with suppress(OSError):  # it has ended in the meantime
            return f"SLURM_CONF={self._conf(name)}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def _kill(self, name: str) -> None:
        """Send SIGKILL to all processes of a daemon until none is left."""
        deadline = time.monotonic() + PATIENCE_S
        while found := self._processes(name):
            if time.monotonic() > deadline:
                raise ClusterError(f"{name}: processes that can't be killed: {found}")
            for pid, _ in found:
                with suppress(ProcessLookupError):
                    handle = os.pidfd_open(pid)
                    try:
                        if self._owns(name, pid):  # still: its id may have been reused
                            signal.pidfd_send_signal(handle, signal.SIGKILL)
                    finally:
                        os.close(handle)
            time.sleep(0.01)


def running() -> Iterator[tuple[int, str]]:
    """The ids and names of all processes."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                yield int(folder.name), (folder / "comm").read_text().strip()


def free_ports(count: int) -> list[int]:
    """Ports that nobody is listening on."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no free ports from {PORTS.start} to {PORTS.stop - 1}")


def require_slurm() -> None:
    """Install what is missing.

    Raises:
        Unavailable: that can't be done here.
    """
    if not missing():
        return
    apt_get = shutil.which("apt-get")
    if not apt_get:
        raise Unavailable(f"{', '.join(missing())} missing, and no apt-get to install slurm-wlm and munge with")
    with Path(apt_get).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one installation at a time
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
            if missing():
                # RUNLEVEL=1 keeps the packages from starting their services.
                environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
                command = [apt_get, "-o", "DPkg::Lock::Timeout=300", *arguments]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode != 0:
                    raise Unavailable(f"`{shlex.join(command)}` failed:\n{done.stderr.strip()}")


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if not shutil.which(program)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "kill-node", "start-node"])
    parser.add_argument("node", nargs="?", choices=NODES)
    parser.add_argument("--folder", type=Path, default=Path(".devcluster"))
    options = parser.parse_args()
    if options.action.endswith("-node") != (options.node is not None):
        parser.error(f"{options.action} takes {'a node' if options.node is None else 'no node'}")
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where the daemons are
    cluster = Cluster(options.folder)
    try:
        if os.geteuid() != 0:
            raise Unavailable("the cluster's GPUs are device files, which only root can make: run this as root")
        if options.action == "up":
            cluster.up()
            print(f"source {options.folder}/env.sh")
        elif options.action == "down":
            cluster.down()
        elif options.action == "kill-node":
            cluster.kill_node(options.node)
        else:
            cluster.start_node(options.node)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
