"""Two kinds of text that ship with Python: code of its standard library, and what is written about such code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "doctest", "fractions", "inspect"),
    *("locale", "pdb", "pickle", "platform", "random", "shutil", "smtplib", "statistics", "string", "subprocess"),
    *("tarfile", "textwrap", "threading", "typing", "zipfile"),
)
Kind = Literal["code", "prose"]


class Texts(Dataset[dict[str, Tensor]]):
    """The first `context` bytes of each text, as transformers' models take them. A label of -100 counts for no loss."""

    def __init__(self, kind: Kind, split: Literal["train", "val"], context: int, modules: Sequence[str] = MODULES):
        texts = sorted({text for name in modules for text in _texts(name, kind)})
        self.texts = [text.encode()[:context] for i, text in enumerate(texts) if (i % 10 == 0) == (split == "val")]
        self.context = context

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = torch.tensor(list(self.texts[index]))
        room = (0, self.context - len(text))
        mask = F.pad(torch.ones_like(text), room)
        return {"input_ids": F.pad(text, room), "attention_mask": mask, "labels": F.pad(text, room, value=-100)}


def _texts(module: str, kind: Kind) -> Iterator[str]:
    """Functions that have no docstring, or the docstrings of those that have one."""
    source = inspect.getsource(import_module(module))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node)
            text = docstring if kind == "prose" else docstring is None and ast.get_source_segment(source, node)
            if text and len(text) > 20:
                yield text
