"""Fixtures for tests that run the command: a project of their own, and one MLflow store for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command import Project, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The uri of an MLflow store. Making one takes seconds, so that all commands share it."""
    return make_store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory, store: str) -> Callable[[str], Project]:
    """Makes a project, for fixtures that several tests share."""
    return lambda name: Project(tmp_path_factory.mktemp(name), store)


@pytest.fixture
def project(tmp_path: Path, store: str) -> Project:
    return Project(tmp_path, store)
