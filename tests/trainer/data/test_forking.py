"""Loading processes are not forked amid what another thread of their rank does for the first time."""

from __future__ import annotations

import time
from typing import Any

import torch

from dtrain.trainer.checkpoint.background import Background
from dtrain.trainer.data.workers import Loader, Processes, Reading
from dtrain.trainer.distributed.world import World

done: list[str] = []  # as a process that is forked has it from then on


class Done(Reading):
    def answer(self, request: Any) -> Any:
        return list(done)


def test_loading_processes_start_when_the_first_write_is_done():
    done.clear()
    loader = Loader(Done(None, None), Processes(1), World(0, 1, torch.device("cpu")), seed=0)
    background = Background()
    background.start([lambda: time.sleep(0.5), lambda: done.append("the first")])
    assert list(loader.read([0], 1)) == [["the first"]]
    background.start([lambda: time.sleep(2.5), lambda: done.append("the second")])
    assert list(loader.read([0], 2)) == [["the first"]]  # a later one is not waited for
    background.wait()
