"""How long others are waited for, by a clock that the tests move: those that save, and those who looked away."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from test_nodes import free_port

from dtrain.heartbeat import Beat, Heartbeat, Phase
from dtrain.launcher.agent import GRACE_S, StopRequests
from dtrain.launcher.nodes import LOST_S, Endpoint, Nodes
from dtrain.launcher.watchdog import Watchdog

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
