"""The same text without an end: windows at random places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from data import MODULES, functions
from torch import Tensor
from torch.utils.data import IterableDataset


class Windows(IterableDataset[dict[str, Tensor]]):
    """`context` bytes after each other and those that follow them, from all functions in a row, for ever."""

    def __init__(self, context: int, modules: Sequence[str] = MODULES) -> None:
        text = b"\n\n".join(functions("train", context, modules).texts)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.context = context

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            start = int(torch.randint(len(self.text) - self.context, ()))  # dtrain seeds it anew for each sample
            window = self.text[start : start + self.context + 1]
            yield {"inputs": window[:-1], "target": window[1:]}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: with it, a run that continues need not read what it has read."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
