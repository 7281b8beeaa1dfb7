"""docs/claims.md: what it quotes is in the pages, and what holds it exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CLAIMS = ROOT / "docs" / "claims.md"
ROWS = re.findall(r"^\| (?!promise )(.+) \| \[[^]]+\]\(([^)]+)\) \| (.+) \|$", CLAIMS.read_text(), re.MULTILINE)


def plain(text: str) -> str:
    return " ".join(text.split())


def test_each_promise_is_in_its_page():
    pages = {page: plain((CLAIMS.parent / page).read_text()) for _, page, _ in ROWS}
    assert [(page, promise) for promise, page, _ in ROWS if plain(promise) not in pages[page]] == []


def test_what_holds_a_promise_exists():
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    tests = {
        f"{name}::{node.name}"
        for name, path in files.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    known = tests | {f"bench/{path.name}" for path in (ROOT / "bench").glob("*.py")}
    named = [name for _, _, held_by in ROWS for name in held_by.split(", ")]
    assert [name for name in named if name.strip("`") not in known] == []


def test_no_row_is_passed_over():
    lines = [line for line in CLAIMS.read_text().splitlines() if line.startswith("| ")]
    headings = sum(line.startswith("| promise ") for line in lines)
    assert len(ROWS) == len(lines) - headings > 50
