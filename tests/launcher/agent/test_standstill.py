"""How long others are waited for, by a clock that the tests move: those that save, and those who looked away."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from test_nodes import free_port

from dtrain.launcher.agent.awake_clock import AwakeClock
from dtrain.launcher.agent.node_store import Endpoint
from dtrain.launcher.agent.nodes import LOST_S, Nodes
from dtrain.launcher.agent.slow_start import FIRST_S, Beginning
from dtrain.launcher.agent.stop_requests import GRACE_S, StopRequests
from dtrain.launcher.agent.watchdog import Watchdog
from dtrain.monitoring.rank_output import RankOutput, Tail
from dtrain.run.heartbeat import Beat, Heartbeat, Phase

LOOK_S = 0.5


class Clock:
    """In the place of time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self._now)
        monkeypatch.setattr(time, "monotonic_ns", lambda: int(self._now * 1e9))

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def heartbeat(tmp_path):
    heartbeat = Heartbeat(tmp_path / "rank-0", create=True)
    heartbeat.beat(Beat(epoch=1, epochs=2))
    return heartbeat


def lasts(clock: Clock, seconds: float, holds) -> bool:
    """Whether that holds so long, at each look of an agent."""
    for _ in range(int(seconds / LOOK_S)):
        clock.sleep(LOOK_S)
        if not holds():
            return False
    return True


def asked(heartbeat: Heartbeat, number: int) -> StopRequests:
    requests = StopRequests({0: heartbeat}, is_job=True)
    requests._handle(number, None)
    return requests


def test_a_first_checkpoint_of_ten_minutes_is_not_cut_off(clock, heartbeat):
    requests = asked(heartbeat, signal.SIGTERM)
    assert lasts(clock, 20, lambda: not requests.is_overdue())
    heartbeat.enter(Phase.SAVING)
    assert lasts(clock, 600, lambda: not requests.is_overdue())
    heartbeat.enter(Phase.LOADING)
    assert lasts(clock, GRACE_S - 1, lambda: not requests.is_overdue())
    assert not lasts(clock, 2, lambda: not requests.is_overdue())


def test_what_slurm_sends_ahead_of_a_limit_has_no_other_limit(clock, heartbeat):
    requests = asked(heartbeat, signal.SIGUSR2)
    assert lasts(clock, 3600, lambda: not requests.is_overdue())


def test_who_stood_still_himself_takes_nobody_for_lost_or_hung(clock, heartbeat):
    endpoint = {"num_nodes": 2, "host": "127.0.0.1", "port": free_port()}
    found: list[Nodes] = []
    other = threading.Thread(target=lambda: found.append(Nodes(Endpoint(node_rank=1, **endpoint), {})))
    other.start()
    first = Nodes(Endpoint(node_rank=0, **endpoint), {})
    other.join()
    watchdog, requests = Watchdog({0: heartbeat}, timeout_s=60), asked(heartbeat, signal.SIGTERM)

    def is_well() -> bool:
        return first.lost() is None and not watchdog.sees_hang() and not requests.is_overdue()

    assert lasts(clock, 4, lambda: is_well() and found[0].lost() is None)
    for _ in range(3):
        clock.sleep(600)  # both nodes are suspended
        assert is_well()
        assert lasts(clock, 3, is_well)  # the other one goes on a little later
        assert lasts(clock, 2, lambda: is_well() and found[0].lost() is None)
    # What has not happened while it looked, counts.
    assert lasts(clock, LOST_S - 1, lambda: first.lost() is None)
    assert not lasts(clock, 4, lambda: first.lost() is None)
    assert not lasts(clock, 60, lambda: not watchdog.sees_hang())


STANDS = """
import sys
import time

from dtrain.launcher.rank import stacks

stacks.write_on_request()


def stand():
    print("half a line", end="", flush=True)
    open(sys.argv[1], "w").close()
    while True:
        time.sleep(0.01)


stand()
"""


@pytest.fixture
def standing(tmp_path):
    """A process that prints to a log, and stands in a function."""
    log, is_there = tmp_path / "logs" / "rank-1.log", tmp_path / "there"
    log.parent.mkdir()
    (tmp_path / "stands.py").write_text(STANDS)
    with log.open("ab") as file:
        command = [sys.executable, str(tmp_path / "stands.py"), str(is_there)]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while not is_there.exists():
        time.sleep(0.01)
    yield process, log
    process.kill()
    process.wait()


def test_who_has_not_begun_is_said_at_growing_intervals(tmp_path, standing, monkeypatch):
    process, log = standing
    heartbeats = {rank: Heartbeat(tmp_path / str(rank), create=True) for rank in range(2)}
    heartbeats[0].enter(Phase.JOINING)
    now, said = [0.0], []
    monkeypatch.setattr(AwakeClock, "now", lambda self: now[0])
    pids, logs = dict.fromkeys(heartbeats, process.pid), {0: tmp_path / "rank-0.log", 1: log}
    logs[0].touch()
    output = RankOutput(1, tmp_path / "later")
    output._tail = Tail(log)
    beginning = Beginning(heartbeats, said.append, is_job=False)

    def said_at(second: float) -> str:
        now[0] = second
        beginning.look(pids, logs)
        text = "\n".join(said)
        said.clear()
        return text

    assert said_at(FIRST_S - 1) == ""
    text = said_at(FIRST_S)
    assert text.startswith(
        f"no step has completed after {FIRST_S:.0f} s: rank 1: starting; rank 1 stands here (all stacks"
    )
    assert "in stand" in text
    assert "in stand" in log.read_text()
    assert said_at(2 * FIRST_S - 1) == ""
    assert "rank 1: starting" in said_at(2 * FIRST_S)
    # The screen goes on with what the rank prints.
    with log.open("a") as file:
        file.write("and on\n")
    assert output.new_lines() == [b"half a line", b"and on"]
    # A script may have no training, or none for a while; a job has one.
    heartbeats[1].enter(Phase.JOINING)
    assert said_at(4 * FIRST_S) == ""
    beginning = Beginning(heartbeats, said.append, is_job=True)
    assert "rank 0, 1: joining the other ranks" in said_at(5 * FIRST_S)
    for heartbeat in heartbeats.values():
        heartbeat.beat(Beat(epoch=1, epochs=2, samples=8))
    assert said_at(9 * FIRST_S) == ""
