"""The command line of `dtrain launch`: what it asks for, whether that fits together, and what continues the run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.errors import UserError
from dtrain.redact import hide_in_command
from dtrain.run.folder import RunDir

if TYPE_CHECKING:
    from dtrain.slurm.environment import Place

    from ..agent.node_store import Endpoint


@dataclass(frozen=True)
class Request:
    """The command line of `dtrain launch`."""

    target: str  # a job file, a script that ends in .py, or a module
    arguments: tuple[str, ...] = ()  # key=value overrides, or the script's arguments
    gpus: str = "auto"
    run_dir: str | None = None
    resume: bool = False
    dry_run: bool = False
    show_ranks: str = "0"  # "all", or some with commas between
    is_module: bool = False
    max_restarts: int | None = None  # after failures; None: as the job says
    preload: bool = True  # ranks forked from one server; else a fresh interpreter for each
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str | None = None  # host:port of node 0
    place: Place | None = None  # where Slurm says the nodes
    wait: bool = False  # with a cluster: follow the job to its end
    wait_mlflow: bool = False  # until it has all of the run

    @property
    def is_script(self) -> bool:
        return self.is_module or self.target.endswith(".py")

    @property
    def endpoint(self) -> Endpoint:
        """Where the nodes meet."""
        from ..agent.node_store import Endpoint

        place = self.place
        hosts = place.hosts if place is not None and len(place.hosts) == place.tasks else ()
        if place is not None and self.rendezvous is None:
            return Endpoint(self.nodes, self.node_rank, place.host, place.port, hosts)
        host, _, port = str(self.rendezvous).rpartition(":")
        return Endpoint(self.nodes, self.node_rank, host.strip("[]"), int(port), hosts)

    def continuation(self, run: RunDir) -> str:
        """The command that continues the run: the same request, overrides included, since the job must be the same."""
        words = ["dtrain", "launch", "--resume", "--run-dir", str(run)]
        if self.gpus != "auto":
            words += ["--gpus", str(int(self.gpus) * (1 if self.place is None else self.place.local_size))]
        if self.max_restarts is not None:
            words += ["--max-restarts", str(self.max_restarts)]
        words += ["--no-preload"] * (not self.preload) + ["--wait-mlflow"] * self.wait_mlflow
        words += ["-m"] * self.is_module
        if self.nodes > 1 and self.place is None:
            words += ["--nodes", str(self.nodes), "--node-rank", "0", "--rendezvous", str(self.rendezvous)]
        if self.show_ranks != "0":
            words += ["--show-ranks", self.show_ranks]
        dashes = ["--"] if self.is_script and self.arguments else []
        return shlex.join(hide_in_command([*words, self.target, *dashes, *self.arguments]))


def check_nodes(request: Request) -> None:
    """Raise UserError where the nodes can't find each other by what was said of them."""
    if request.nodes == 1:
        if request.node_rank or request.rendezvous:
            raise UserError("--node-rank and --rendezvous are for runs on several nodes: set --nodes")
        return
    if not 0 <= request.node_rank < request.nodes:
        raise UserError(
            f"--node-rank {request.node_rank}: with --nodes {request.nodes} it must be 0 to {request.nodes - 1}"
        )
    if request.rendezvous is None and request.place is not None:
        return
    if request.rendezvous is None:
        raise UserError(
            f"--nodes {request.nodes} needs --rendezvous HOST:PORT, a port of the node with "
            "--node-rank 0; run the same command on each node, with its own --node-rank"
        )
    host, _, port = request.rendezvous.rpartition(":")
    if not host or not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--rendezvous {request.rendezvous}: expected HOST:PORT, such as node1:29500")


def choose_ranks(asked: str, num_ranks: int) -> list[int]:
    """The ranks whose output is shown; raises UserError where there is no such rank."""
    if asked == "all":
        return list(range(num_ranks))
    words = [word.strip() for word in asked.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--show-ranks {asked}: expected ranks, such as 0,2, or all")
    ranks = sorted({int(word) for word in words})
    if ranks[-1] >= num_ranks:
        raise UserError(f"--show-ranks {asked}: there is no rank {ranks[-1]}; the last is {num_ranks - 1}")
    return ranks
