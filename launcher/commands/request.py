"""The command line of `dtrain launch`: its options, whether they fit together, and what continues the run."""

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
class RankOptions:
    """How the ranks are started, and whose output is shown."""

    gpus: str = "auto"
    preload: bool = True  # ranks forked from one server; else a fresh interpreter for each
    max_restarts: int | None = None  # after failures; None: as the job says
    show: str = "0"  # "all", or ranks with commas between them


@dataclass(frozen=True)
class NodeOptions:
    """Which of how many nodes this one is, and where they meet."""

    count: int = 1
    rank: int = 0
    rendezvous: str | None = None  # host:port of node 0
    place: Place | None = None  # where Slurm has started this node

    def check(self) -> None:
        """Raise UserError if the options do not tell the nodes how to find each other."""
        if self.count == 1:
            if self.rank or self.rendezvous:
                raise UserError("--node-rank and --rendezvous are for runs on several nodes: set --nodes")
            return
        if not 0 <= self.rank < self.count:
            raise UserError(f"--node-rank {self.rank}: with --nodes {self.count} it must be 0 to {self.count - 1}")
        if self.rendezvous is None and self.place is not None:
            return
        if self.rendezvous is None:
            raise UserError(
                f"--nodes {self.count} needs --rendezvous HOST:PORT, a port of the node with "
                "--node-rank 0; run the same command on each node, with its own --node-rank"
            )
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not (port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--rendezvous {self.rendezvous}: expected HOST:PORT, such as node1:29500")

    @property
    def endpoint(self) -> Endpoint:
        """Where the nodes meet."""
        from ..agent.node_store import Endpoint

        place = self.place
        hosts = place.hosts if place is not None and len(place.hosts) == place.tasks else ()
        if place is not None and self.rendezvous is None:
            return Endpoint(self.count, self.rank, place.host, place.port, hosts)
        host, _, port = str(self.rendezvous).rpartition(":")
        return Endpoint(self.count, self.rank, host.strip("[]"), int(port), hosts)


@dataclass(frozen=True)
class Request:
    """The command line of `dtrain launch`.

    Attributes:
        words: a job file or a script that ends in .py, or -m and a module; and key=value overrides, or the script's
            arguments.
    """

    words: tuple[str, ...]
    ranks: RankOptions = RankOptions()
    nodes: NodeOptions = NodeOptions()
    run_dir: str | None = None
    resume: bool = False
    dry_run: bool = False
    wait_mlflow: bool = False  # return only when it has all of the run
    profile: str | None = None  # steps, and on which ranks: see `Profiling`

    @property
    def is_module(self) -> bool:
        return self.words[0] == "-m"

    @property
    def target(self) -> str:
        """The job file, the script, or the module."""
        return self.words[1 if self.is_module else 0]

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.words[2 if self.is_module else 1 :]

    @property
    def is_script(self) -> bool:
        return self.is_module or self.target.endswith(".py")

    def require_no_profile(self) -> None:
        """Raise UserError where a script is to be profiled, whose steps nobody knows but itself."""
        if self.profile is not None:
            raise UserError(
                f"--profile {self.profile} is for a job with a model; a script's Trainer takes "
                "callbacks=[dtrain.Profiler(first, last)]; if it is the script's own option, write -- before it"
            )

    def continuation(self, run: RunDir) -> str:
        """The command that continues the run: the same request, overrides included, since the job must be the same."""
        ranks, nodes = self.ranks, self.nodes
        words = ["dtrain", "launch", "--resume", "--run-dir", str(run)]
        if ranks.gpus != "auto":
            words += ["--gpus", str(int(ranks.gpus) * (1 if nodes.place is None else nodes.place.local_size))]
        if ranks.max_restarts is not None:
            words += ["--max-restarts", str(ranks.max_restarts)]
        words += ["--no-preload"] * (not ranks.preload) + ["--wait-mlflow"] * self.wait_mlflow
        words += ["-m"] * self.is_module
        if nodes.count > 1 and nodes.place is None:
            words += ["--nodes", str(nodes.count), "--node-rank", "0", "--rendezvous", str(nodes.rendezvous)]
        if ranks.show != "0":
            words += ["--show-ranks", ranks.show]
        dashes = ["--"] if self.is_script and self.arguments else []
        return shlex.join(hide_in_command([*words, self.target, *dashes, *self.arguments]))


def choose_ranks(asked: str, num_ranks: int) -> list[int]:
    """The ranks whose output is shown; raises UserError if there is no such rank."""
    if asked == "all":
        return list(range(num_ranks))
    words = [word.strip() for word in asked.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--show-ranks {asked}: expected ranks, such as 0,2, or all")
    ranks = sorted({int(word) for word in words})
    if ranks[-1] >= num_ranks:
        raise UserError(f"--show-ranks {asked}: there is no rank {ranks[-1]}; the last is {num_ranks - 1}")
    return ranks
