"""Fixtures for tests that run the command: a project of their own, and one MLflow store for all of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Project, make_store

# A shell starts what runs in the background with Ctrl-C and SIGQUIT ignored, and the commands would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with tests that run commands come first: they take longest, and nobody should wait for one at the end."""
    slow = {item.path for item in items if {"project", "new_project", "store"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in slow)


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
