"""Several nodes, each with its own agent, here on one machine: they train as one, and end as one."""

from __future__ import annotations

import gc
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from command import Command, Done, Project

from dtrain.errors import UserError
from dtrain.launcher.agent import node_store, nodes

MODEL = """
import os
import time
from pathlib import Path

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, fault=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)
        self.fault, self.calls = fault, 0

    def forward(self, x):
        self.calls += 1
        if self.fault and self.calls == 4 and os.environ["RANK"] == "2":
            getattr(self, self.fault)()
        return self.layer(x)

    def boom(self):
        raise ValueError("only here")

    def boom_once(self):
        if not Path("boomed").exists():
            Path("boomed").touch()
            self.boom()

    def wait(self):
        Path("waiting").touch()
        while not Path("go").exists():
            time.sleep(0.01)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(project: Project, stack: ExitStack, *overrides: str, port: int | None = None) -> list[Command]:
    """The agents of two nodes of two ranks, node 1 first."""
    rendezvous = f"127.0.0.1:{port or free_port()}"
    size = ["--gpus", "2", "--nodes", "2", "--rendezvous", rendezvous]
    return [
        stack.enter_context(
            project.running("launch", *size, "--node-rank", rank, "--run-dir", "run", "job.yaml", *overrides)
        )
        for rank in ("1", "0")
    ][::-1]


def run(project: Project, *overrides: str) -> list[Done]:
    with ExitStack() as stack:
        return [agent.wait() for agent in start(project, stack, *overrides)]


@pytest.fixture
def job(project: Project) -> Project:
    project.write("two.py", MODEL)
    project.job(model={"_target_": "two.Net"})
    return project


def test_two_nodes_train_as_one_node_does(job):
    for done in run(job):
        assert done.code == 0, done.err
    assert {path.name for path in job.run_dir().logs.glob("rank-*.log")} == {f"rank-{rank}.log" for rank in range(4)}
    assert {path.name for path in job.run_dir().logs.glob("agent-*.log")} == {"agent-0.log", "agent-1.log"}
    assert job.status()["state"] == "finished"
    assert job.run("launch", "--gpus", "4", "--run-dir", "alone", "job.yaml").code == 0
    for row, alone in zip(job.run_dir().rows(), job.run_dir("alone").rows(), strict=True):
        assert row["train_loss"] == alone["train_loss"]  # to the bit: as many ranks


def test_a_rank_that_fails_on_one_node_is_named_on_both(job):
    for done in run(job, "model.fault=boom"):
        assert done.code == 1
        assert "rank 2 failed: ValueError: only here" in done.last_lines, done.err
        assert "rank-2.log" in done.last_lines
        assert "gloo" not in done.err
    assert job.status()["error"]["rank"] == 2


@pytest.mark.campaign
def test_both_nodes_start_again_from_the_checkpoint(job):
    ends = run(job, "model.fault=boom_once", "fit.restarts=1", "checkpoint.every=1")
    for done in ends:
        assert done.code == 0, "".join(each.err for each in ends)
        assert "rank 2 failed: ValueError: only here" in done.err
        assert "restarting the ranks" in done.err
    assert (job.status()["state"], job.status()["restarts"]) == ("finished", 1)


def test_a_signal_to_one_node_stops_all_at_the_same_step(job):
    with ExitStack() as stack:
        first, second = start(job, stack, "model.fault=wait")
        first.until((job.folder / "waiting").exists)
        second.signal(signal.SIGTERM)
        second.until(lambda: "stopping at the next step" in second.err)
        (job.folder / "go").touch()
        assert [agent.wait().code for agent in (first, second)] == [75, 75]
    assert job.status()["state"] == "stopped"
    assert job.status()["step"] in (4, 5)  # the question of a step is sent before its work


def test_a_node_that_is_gone_ends_the_others(job):
    with ExitStack() as stack:
        first, second = start(job, stack, "model.fault=wait")
        first.until((job.folder / "waiting").exists)
        second.signal(signal.SIGKILL)
        second.wait()
        done = first.wait()
    assert done.code == 1
    assert "node 1 is gone" in done.last_lines or "rank" in done.last_lines
    assert job.status()["state"] == "failed"


def refuse(project: Project, *arguments: str) -> str:
    done = project.run("launch", *arguments, "job.yaml")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert not project.runs()
    return done.err


def test_what_a_user_gets_wrong(job):
    assert "needs --rendezvous HOST:PORT" in refuse(job, "--nodes", "2")
    assert "--node-rank 2: with --nodes 2 it must be 0 to 1" in refuse(
        job, "--nodes", "2", "--node-rank", "2", "--rendezvous", "localhost:29500"
    )
    assert "expected HOST:PORT" in refuse(job, "--nodes", "2", "--rendezvous", "localhost")
    assert "are for runs on several nodes" in refuse(job, "--rendezvous", "localhost:29500")
    assert "can't resolve that host name" in refuse(
        job, "--nodes", "2", "--node-rank", "1", "--rendezvous", "nowhere.invalid:29500"
    )
    assert "but this is another one" in refuse(job, "--nodes", "2", "--rendezvous", "192.0.2.1:29500")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "the port is in use" in refuse(job, "--nodes", "2", "--rendezvous", f"127.0.0.1:{port}")


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(node_store, "GATHER_S", 0.5)
    with pytest.raises(UserError, match=r"no answer \(Connection refused\) for 0 s: is dtrain running on node 0"):
        nodes.Nodes(node_store.Endpoint(2, 1, "127.0.0.1", free_port()), {})


def test_the_others_do_not_come(monkeypatch):
    monkeypatch.setattr(node_store, "GATHER_S", 0.5)
    monkeypatch.setattr(nodes, "GATHER_S", 0.5)
    with pytest.raises(
        UserError, match=r"node 1, 2 did not reach 127.0.0.1:\d+ within 0 s; start the same command there"
    ):
        nodes.Nodes(node_store.Endpoint(3, 0, "127.0.0.1", free_port()), {})


def test_a_slow_node_is_awaited_and_named(monkeypatch, capsys):
    monkeypatch.setattr(node_store, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr(nodes, "LOST_S", -1.0)
    said = ""

    def until(words: str) -> None:
        nonlocal said
        while words not in said:
            said += capsys.readouterr().err

    port, hosts = free_port(), ("gpu1", "gpu2")
    with ThreadPoolExecutor() as beside:
        waiting = beside.submit(nodes.Nodes, node_store.Endpoint(2, 0, "127.0.0.1", port, hosts), {})
        until("still waiting for node 1 (gpu2) after 0 s; giving up at 600 s")
        second = nodes.Nodes(node_store.Endpoint(2, 1, "127.0.0.1", port, hosts), {})
        first = waiting.result()
        assert first.lost() is None  # it has met the others, and may still be importing
        asking = beside.submit(second.from_first, "run")
        until("still waiting for node 0 (gpu1) to start the run")
        first.from_first("run", "here")
        assert asking.result() == "here"
        del first, waiting
    gc.collect()
    with pytest.raises(UserError, match=r"node 0 \(gpu1\) ended before the run began; check its output"):
        second.from_first("code")


def test_something_else_answers(monkeypatch):
    monkeypatch.setattr(node_store, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match="what answers there is not dtrain's node 0"):
            nodes.Nodes(node_store.Endpoint(2, 1, "127.0.0.1", port), {})


def test_nodes_with_different_jobs_don_t_start(job):
    rendezvous = f"127.0.0.1:{free_port()}"
    size = ["--gpus", "1", "--nodes", "2", "--rendezvous", rendezvous, "--run-dir", "run", "job.yaml"]
    with (
        job.running("launch", "--node-rank", "1", *size, "seed=5") as second,
        job.running("launch", "--node-rank", "0", *size) as first,
    ):
        for done in (first.wait(), second.wait()):
            assert done.code == 2
            assert "differs between node 0 and node 1" in done.err
    assert not (job.folder / "run").exists()
