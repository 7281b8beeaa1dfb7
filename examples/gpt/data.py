"""Text that ships with Python: the functions of its standard library, as bytes."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "doctest", "fractions", "inspect"),
    *("locale", "pathlib", "pdb", "pickle", "platform", "random", "shutil", "smtplib", "statistics", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "typing", "zipfile"),
)


class Texts(Dataset[dict[str, Tensor]]):
    """Each text's bytes, `inputs` and the bytes that follow them, `target`: both of `context` numbers.

    A longer text is cut; after the end of a shorter one, inputs are 0 and targets -100, which no loss counts.
    """

    def __init__(self, texts: list[bytes], context: int) -> None:
        self.texts = texts
        self.context = context

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        values = torch.tensor(list(self.texts[index][: self.context + 1]))
        inputs = torch.zeros(self.context, dtype=torch.long)
        target = torch.full((self.context,), -100)
        inputs[: len(values) - 1] = values[:-1]
        target[: len(values) - 1] = values[1:]
        return {"inputs": inputs, "target": target}


def functions(split: Literal["train", "val"], context: int, modules: Sequence[str] = MODULES) -> Texts:
    """One of two parts; each text's content decides which one it belongs to, so that they share none."""
    found = sorted({text for name in modules for text in _functions(name)})
    is_val = [hashlib.sha256(text).digest()[0] < 26 for text in found]  # a tenth
    return Texts([text for text, val in zip(found, is_val, strict=True) if val == (split == "val")], context)


def _functions(module: str) -> list[bytes]:
    folder = Path(sysconfig.get_path("stdlib"))
    path = folder / module / "__init__.py" if (folder / module).is_dir() else folder / f"{module}.py"
    source = path.read_text(encoding="utf-8")
    parts = (ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source)) if _is_function(node))
    return [part.encode() for part in parts if part and len(part) > 20]


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
