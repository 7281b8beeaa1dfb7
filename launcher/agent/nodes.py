"""The nodes of a run: how their agents find each other, and what they exchange while it runs.

Node 0 keeps torch's TCPStore, which the ranks of all nodes use for their own rendezvous too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore  # type: ignore[attr-defined]  # not in their __all__
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from dtrain.errors import UserError

from ..machine.network import interface_with, is_loopback
from .awake_clock import AwakeClock
from .node_store import GATHER_S, Endpoint, Wait, find_store, host_store, new_store, silenced

LEAVE_S = 5.0  # how long node 0 waits for the others in the end
LOST_S = 15.0  # an agent that has said nothing for so long is gone
_POLL_S = 0.1


class Nodes:
    """This node among all of them; exchanges information with the other agents.

    Args:
        hello: what must be the same on all nodes.

    Attributes:
        interface: the network interface through which the others reach this node; None if unknown.

    Raises:
        UserError: they can't find each other, or `hello` differs.
    """

    def __init__(self, endpoint: Endpoint, hello: Mapping[str, Any]) -> None:
        self.num_nodes, self.node_rank = endpoint.num_nodes, endpoint.node_rank
        self.is_alone = self.num_nodes == 1
        self.host = endpoint.host
        self.interface: str | None = None
        if self.node_rank == 0:
            self.store = host_store(endpoint)
        else:
            self.store, addresses = find_store(endpoint)
            self.store.set(f"addresses/{self.node_rank}", json.dumps(addresses))
        self._seen: dict[int, tuple[int, float]] = {}  # by node: its last heartbeat, and when it was noticed
        self._clock = AwakeClock()
        self._spoke = 0.0
        self._endpoint = endpoint
        if not self.is_alone:
            self._greet(endpoint, dict(hello))
            self.interface = interface_with(self._address())

    def _greet(self, endpoint: Endpoint, hello: dict[str, Any]) -> None:
        if self.store.add(f"taken/{self.node_rank}", 1) > 1:
            raise UserError(f"--node-rank {self.node_rank}: another node of {endpoint} already has that number")
        self.store.set(f"hello/{self.node_rank}", json.dumps(hello))
        print(f"node {self.node_rank} of {self.num_nodes} at {endpoint}: waiting for the others", file=sys.stderr)
        missing, wait = list(range(self.num_nodes)), Wait()
        while missing := [node for node in missing if not self._has(f"hello/{node}")]:
            if not wait.goes_on(endpoint.name(*missing)):
                raise UserError(
                    f"{endpoint.name(*missing)} did not reach {endpoint} within {GATHER_S:.0f} s; "
                    "start the same command there"
                )
        hellos = [json.loads(self.store.get(f"hello/{node}")) for node in range(self.num_nodes)]
        for node, other in enumerate(hellos):
            for key, value in hellos[0].items():
                if other.get(key) != value:
                    self.close()
                    raise UserError(f"{key} differs between node 0 and node {node}: {value} and {other.get(key)}")

    def _address(self) -> str:
        """This node's own, as it has met node 0, or been met.

        By its name it may find none but its loopback: Debian's /etc/hosts has 127.0.1.1 for it.
        """
        met = [json.loads(self.store.get(f"addresses/{node}")) for node in range(1, self.num_nodes)]
        own, _ = met[self.node_rank - 1] if self.node_rank > 0 else met[0][::-1]
        if not is_loopback(own):
            return str(own)
        # It is node 0's host, which those elsewhere, if any, have met by another address.
        return str(next((first for other, first in met if not is_loopback(other)), own))

    def from_first(self, key: str, value: str = "") -> str:
        """Node 0's value under that key, on all nodes."""
        if self.node_rank == 0:
            self.store.set(f"first/{key}", value)
            return value
        first = self._endpoint.name(0)
        wait = Wait()
        while not self._has(f"first/{key}"):
            if not wait.goes_on(f"{first} to start the run"):
                raise UserError(f"{first} did not start the run within {GATHER_S:.0f} s; check its output")
        return str(self.store.get(f"first/{key}"), "utf-8")

    def _has(self, key: str) -> bool:
        try:
            with silenced():
                return bool(self.store.check([key]))
        except (DistNetworkError, DistStoreError):
            raise UserError(f"{self._endpoint.name(0)} ended before the run began; check its output") from None

    # -- while it runs ---------------------------------------------------------------------------

    def report(self, attempt: int, end: Mapping[str, Any]) -> None:
        """How this node's ranks ended."""
        if not self.is_alone:
            self.store.set(f"{attempt}/end/{self.node_rank}", json.dumps(end))

    def reports(self, attempt: int) -> dict[int, dict[str, Any]]:
        """The other nodes' reports so far."""
        return dict(self._reports(attempt))

    def _reports(self, attempt: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for node in self._others():
            key = f"{attempt}/end/{node}"
            if self.store.check([key]):
                yield node, json.loads(self.store.get(key))

    def lost(self) -> int | None:
        """Another node whose agent does not respond; call it continuously: it also sends this one's heartbeat."""
        if self.is_alone:
            return None
        now = self._clock.now()
        if now - self._spoke > 1.0:
            self._spoke = now
            self.store.add(f"alive/{self.node_rank}", 1)
            for node in self._others():
                count = self.store.add(f"alive/{node}", 0)
                if node not in self._seen or count != self._seen[node][0]:
                    self._seen[node] = (count, now)
        # A node that has not begun may still be importing.
        limits = {node: LOST_S if count else GATHER_S for node, (count, _) in self._seen.items()}
        return next((node for node, (_, when) in self._seen.items() if now - when > limits[node]), None)

    def close(self) -> None:
        """Leave; node 0 waits for the others, which may still need to learn how it ended."""
        if self.is_alone:
            return
        with suppress(DistNetworkError, DistStoreError):
            self.store.set(f"left/{self.node_rank}", "")
            deadline = time.monotonic() + LEAVE_S
            others = [f"left/{node}" for node in self._others()]
            while self.node_rank == 0 and not self.store.check(others) and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    def _others(self) -> list[int]:
        return [node for node in range(self.num_nodes) if node != self.node_rank]


class Rendezvous(RendezvousHandler):
    """The rendezvous of torch's elastic agent for each attempt: the nodes are known and keep their numbers."""

    def __init__(self, nodes: Nodes, run_id: str) -> None:
        self._nodes = nodes
        self._run_id = run_id
        self._attempts = 0
        self._ranks_store: Any = None  # of the attempt, kept while it lasts

    def get_backend(self) -> str:
        return "static"

    @property
    def use_agent_store(self) -> bool:
        return True  # so that the ranks need no other port, which another process could take

    def next_rendezvous(self) -> RendezvousInfo:
        self._attempts += 1
        nodes = self._nodes
        port = nodes.store.port
        if self._attempts > 1:  # the ranks would find each other's addresses from the previous attempt
            if nodes.node_rank == 0:
                self._ranks_store = new_store(nodes.host, 0, is_local=nodes.is_alone)
                port = self._ranks_store.port
            port = int(nodes.from_first(f"port of attempt {self._attempts}", str(port)))
        store = PrefixStore(f"attempt-{self._attempts}", nodes.store)
        return RendezvousInfo(store, nodes.node_rank, nodes.num_nodes, RendezvousStoreInfo(nodes.host, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is no later one to keep anybody from."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
