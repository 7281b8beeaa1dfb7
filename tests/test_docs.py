"""What the documentation says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dtrain.job import Job

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


def test_every_source_file_has_its_place_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("dtrain", "launcher", "trainer"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in text, path.name
