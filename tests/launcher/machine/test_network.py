"""Nodes that find each other: here two network namespaces, joined by a cable, whose own names mean their loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import DTRAIN, Command, Project

from dtrain.launcher.machine.network import interface_with

ADDRESSES = ("10.213.7.1", "10.213.7.2")


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """The names of two namespaces. Each has a `first` in its /etc/hosts, where the first one is to be found."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("needs root, and ip")
    names = [f"dtrain-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"dt{os.getpid() % 10**6}-{number}" for number in range(2)]
    with ExitStack() as undone:

        def ip(*arguments: str) -> None:
            subprocess.run(["ip", *arguments], check=True)

        for name, first in zip(names, ("127.0.1.1", ADDRESSES[0]), strict=True):
            folder = Path("/etc/netns", name)  # `ip netns exec` puts what is there in place of /etc's
            folder.mkdir(parents=True)
            undone.callback(os.removedirs, folder)
            undone.callback((folder / "hosts").unlink)
            hosts = f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n{first} first\n"
            (folder / "hosts").write_text(hosts)
            ip("netns", "add", name)
            undone.callback(ip, "netns", "del", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


def test_nodes_whose_names_mean_themselves_train_together(two_hosts, project: Project):
    arguments = ["--nodes", "2", "--gpus", "1", "--rendezvous", "first:29517", "--run-dir", "run", "job.yaml"]
    with ExitStack() as stack:
        agents = []
        for rank, name in enumerate(two_hosts):
            inside = ["ip", "netns", "exec", name, DTRAIN, "launch", "--node-rank", str(rank), *arguments]
            agents.append(Command(inside, project.folder, {**project.environment, "MLFLOW_TRACKING_URI": ""}))
            stack.callback(agents[-1].kill)
        for done in [agent.wait() for agent in agents]:
            assert done.code == 0, done.err
    assert project.status()["state"] == "finished"


def test_the_interface_that_has_an_address():
    assert interface_with("127.0.1.1") == "lo"
    assert interface_with("::1") == "lo"
    assert interface_with("192.0.2.255") is None
    assert interface_with("2001:db8::1") is None
    for version in ("-4", "-6") if shutil.which("ip") else ():
        shown = subprocess.run(["ip", version, "-brief", "address"], capture_output=True, text=True, check=True).stdout
        for line in shown.splitlines():
            name, _, first, *_ = line.split()
            assert interface_with(first.partition("/")[0]) == name.partition("@")[0]
