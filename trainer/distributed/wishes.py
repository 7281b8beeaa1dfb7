"""What one rank wishes and all must do at the same step: they agree on it at little cost."""

from __future__ import annotations

import time
from collections.abc import Collection
from enum import IntEnum

import torch
import torch.distributed as dist

from dtrain.run.heartbeat import Heartbeat

from .world import World


class Wish(IntEnum):
    """What a rank may wish for."""

    STOP = 0  # with a checkpoint, to continue another time
    JUDGE = 1  # whether the weights are still finite
    SAVE = 2  # a checkpoint
    VALIDATE = 3
    END = 4  # of the fit, as finished


NONE: frozenset[Wish] = frozenset()


class Agreement:
    """All ranks learn, at the same turns, what any of them wishes.

    A turn is a step, or a batch evaluated. The question is sent before a turn's work and answered after it, so that the
    few bytes travel meanwhile. Each answer says alike on all ranks when they ask again: after the turns that the
    slowest of them does in INTERVAL_S, by the longest of its last ones, but after no more than a sixteenth of all so
    far, which may have been short by chance.

    Args:
        heartbeat: of this rank, where its agent asks it to stop.
        each_turn: whether they ask at each turn: what is wished for then happens at the same turn in each run.
    """

    INTERVAL_S = 0.25

    def __init__(self, world: World, heartbeat: Heartbeat, *, each_turn: bool = False) -> None:
        self._each_turn = each_turn
        self._heartbeat = heartbeat
        self._group = world.control
        self._message = torch.zeros(len(Wish) + 1, dtype=torch.int64)  # the wishes, and the longest turn in ns
        self._asked: dist.Work | None = None
        self._wishes: set[Wish] = set()
        self._own = NONE  # of a rank that is alone, as it asked them
        self._turns = self._asks_at = self._longest = 0
        self._began: int | None = None

    def wish(self, wish: Wish) -> None:
        """Wish for it when the ranks ask next."""
        self._wishes.add(wish)

    def ask(self, wishes: Collection[Wish] = ()) -> None:
        """Before a turn. All ranks take part (without waiting), each with its own wishes, or none."""
        self._wishes.update(wishes)
        if self._group is None:
            self._own = frozenset(self._wishes) if self._wishes else NONE
            self._wishes.clear()
            return
        now = time.perf_counter_ns()
        self._longest = max(self._longest, now - (self._began or now))
        self._began = now
        if self._turns < self._asks_at and not self._each_turn:
            return
        own = self._take_wishes()
        self._message.copy_(torch.tensor([*(wish in own for wish in Wish), self._longest]))
        self._longest = 0
        self._asked = dist.all_reduce(self._message, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> frozenset[Wish]:
        """After the turn: what any rank had wished, the same on all ranks."""
        self._turns += 1
        if self._group is None:
            return self._own | {Wish.STOP} if self._heartbeat.stop else self._own
        if self._asked is None:
            return NONE
        self._asked.wait()
        self._asked = None
        *wishes, longest = self._message.tolist()
        self._asks_at = self._turns + min(self._turns // 16, int(self.INTERVAL_S * 1e9) // max(longest, 1))
        return frozenset(wish for wish in Wish if wishes[wish])

    def at_once(self, kinds: Collection[Wish]) -> frozenset[Wish]:
        """Which of these any rank wishes for, between two turns. All ranks take part, and wait."""
        own = self._wishes & set(kinds)
        self._wishes -= own
        if self._group is None:
            return frozenset(own)
        message = torch.tensor([wish in own for wish in kinds], dtype=torch.int64)
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        return frozenset(wish for wish, is_wished in zip(kinds, message.tolist(), strict=True) if is_wished)

    def state_dict(self) -> list[int]:
        """What this rank wishes for and has not asked yet."""
        return sorted(int(wish) for wish in self._wishes - {Wish.STOP, Wish.JUDGE})

    def load_state_dict(self, wishes: Collection[int]) -> None:
        self._wishes = {Wish(each) for each in wishes}

    def _take_wishes(self) -> frozenset[Wish]:
        if self._heartbeat.stop:
            self._wishes.add(Wish.STOP)
        if not self._wishes:
            return NONE
        taken, self._wishes = frozenset(self._wishes), set()
        return taken
