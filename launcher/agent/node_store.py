"""The store on node 0: where it is, how it is opened, and how the other nodes find it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]  # not in their __all__

from dtrain.errors import UserError

GATHER_S = 600.0  # how long the nodes wait for each other: imports on a cold file system differ by minutes
SAY_EVERY_S = 30.0  # which of them is awaited
ANSWER_S = 10.0  # how long a connection to node 0 may take
_POLL_S = 0.1
_silence = threading.Lock()


@dataclass(frozen=True)
class Endpoint:
    """Which node this is, and where node 0 is to be found."""

    num_nodes: int = 1
    node_rank: int = 0
    host: str = "localhost"
    port: int = 0  # 0: any that is free
    hosts: tuple[str, ...] = ()  # of the nodes, by number, where they are known

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def name(self, *nodes: int) -> str:
        """`node 1 (gpu07), 2 (gpu08)`."""
        return "node " + ", ".join(f"{node} ({self.hosts[node]})" if self.hosts else str(node) for node in nodes)


def host_store(endpoint: Endpoint) -> TCPStore:
    try:
        with socket.socket(socket.getaddrinfo(endpoint.host, None)[0][0]) as probe:
            probe.bind((endpoint.host, 0))
    except OSError as error:
        raise UserError(
            f"--rendezvous {endpoint}: node 0 must run on that host, but this is another one ({error.strerror})"
        ) from None
    try:
        return new_store(endpoint.host, endpoint.port, is_local=endpoint.num_nodes == 1)
    except (DistNetworkError, DistStoreError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(f"--rendezvous {endpoint}: the port is in use on this machine; choose another") from None
        raise UserError(f"--rendezvous {endpoint}: node 0 can't listen there: {str(error).splitlines()[0]}") from None


def new_store(host: str, port: int, *, is_local: bool) -> TCPStore:
    """A store of this process. It obeys whoever reaches it, and torch would have it listen to all: one on several
    nodes must, a local one listens at the host's own address.
    """
    if not is_local:
        return TCPStore(host, port, is_master=True, wait_for_workers=False)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family, backlog=1024) as listening:
        port = listening.getsockname()[1]
        return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def find_store(endpoint: Endpoint) -> tuple[TCPStore, tuple[str, str]]:
    """Node 0's store, and the addresses of this node and of node 0 between which it was found."""
    print(f"node {endpoint.node_rank} of {endpoint.num_nodes}: looking for node 0 at {endpoint}", file=sys.stderr)
    wait = Wait()
    while True:
        try:
            with socket.create_connection((endpoint.host, endpoint.port), timeout=5.0) as connection:
                addresses = connection.getsockname()[0], connection.getpeername()[0]
            break
        except socket.gaierror:
            raise UserError(f"--rendezvous {endpoint}: this machine can't resolve that host name") from None
        except OSError as error:
            why = error.strerror or error
            if not wait.goes_on(f"{endpoint.name(0)} at {endpoint} ({why})"):
                raise UserError(
                    f"--rendezvous {endpoint}: no answer ({why}) for {GATHER_S:.0f} s: is dtrain running on "
                    f"{endpoint.name(0)} with --node-rank 0, and can this node reach that port?"
                ) from None
    found: list[TCPStore] = []

    def connect() -> None:
        with suppress(DistNetworkError, DistStoreError):
            timeout = timedelta(seconds=ANSWER_S)
            found.append(TCPStore(endpoint.host, endpoint.port, is_master=False, timeout=timeout))

    # A thread, since torch waits for ever where somebody listens and says nothing.
    connecting = threading.Thread(target=connect, daemon=True)
    with silenced():
        connecting.start()
        connecting.join(ANSWER_S)
    if not found:
        raise UserError(f"--rendezvous {endpoint}: what answers there is not dtrain's node 0")
    found[0].set_timeout(timedelta(minutes=5))
    return found[0], addresses


class Wait:
    """For the other nodes, as long as they may take; it says now and then which."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def goes_on(self, awaited: str) -> bool:
        """Wait a moment; False where that was long enough."""
        now = time.monotonic()
        waited = now - self._began
        if now - self._said > SAY_EVERY_S:
            self._said = now
            patience = f"after {waited:.0f} s; giving up at {GATHER_S:.0f} s"
            print(f"still waiting for {awaited} {patience}", file=sys.stderr)
        time.sleep(_POLL_S)
        return waited < GATHER_S


@contextmanager
def silenced() -> Iterator[None]:
    """Without what torch logs by itself: each failure with its native stack."""
    with _silence:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)
