"""What the documentation says is so."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest
import yaml

from dtrain.schema.job import Job

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
STYLES = ROOT / "examples" / "styles"
TOP = ("dtrain", "launcher", "slurm", "trainer")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_shows_the_job_that_is_run():
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert yaml.safe_load(shown[1]) == yaml.safe_load((ROOT / "examples" / "digits" / "job.yaml").read_text())


def test_every_field_of_a_job_is_documented():
    text = (ROOT / "docs" / "job.md").read_text()
    sections = {name: field.annotation for name, field in Job.model_fields.items()}
    for name, kind in sections.items():
        assert f"`{name}" in text, name
        if name in ("data", "checkpoint", "launch"):
            for inner in kind.model_fields:
                assert f"{name}.{inner}" in text, f"{name}.{inner}"


def test_the_architecture_describes_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    described = re.findall(r"^\| ([a-z_/]+)/ \|", text, re.MULTILINE)
    packages = [path.parent for top in TOP for path in (ROOT / top).rglob("__init__.py")]
    assert sorted(described) == sorted(str(folder.relative_to(ROOT)) for folder in packages)


def diffs(page: str) -> list[list[str]]:
    """The diffs that a page and its translation show."""
    texts = [(ROOT / "docs" / folder / page).read_text() for folder in ("", "zh")]
    return [text.split("```diff\n")[1].split("\n```")[0].splitlines() for text in texts]


def test_the_diff_from_data_parallel_is_that_of_the_files():
    before, after = ((STYLES / f"{name}.py").read_text().splitlines() for name in ("data_parallel", "own_loop"))
    expected = list(difflib.unified_diff(before, after, n=1, lineterm=""))[2:]
    for shown in diffs("dataparallel.md"):
        assert shown == expected


def test_the_diff_to_a_loop_of_ones_own_is_that_of_the_files():
    before, after = ((STYLES / f"{name}_loop.py").read_text().splitlines() for name in ("plain", "own"))
    expected = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:] and line[2] != '"']
    for shown in diffs("own-loop.md"):
        assert sorted(line for line in shown if line[:1] in ("+", "-")) == sorted(
            line[0] + line[2:] for line in expected
        )


def test_every_test_that_the_tutorials_table_names_is_there():
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / "tutorials.md").read_text())
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)], f"{file}::{name}"
