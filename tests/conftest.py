"""Fixtures for tests that run the command: a project of their own, and one MLflow store for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Project

MAKE_STORE = """
import sys
from mlflow import MlflowClient
MlflowClient(sys.argv[1]).create_experiment("tiny", artifact_location=sys.argv[2])
"""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The uri of an MLflow store. Making one takes seconds, so that all commands share it."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    subprocess.run([sys.executable, "-c", MAKE_STORE, uri, (folder / "artifacts").as_uri()], check=True)
    return uri


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory, store: str) -> Callable[[str], Project]:
    """Makes a project, for fixtures that several tests share."""
    return lambda name: Project(tmp_path_factory.mktemp(name), store)


@pytest.fixture
def project(tmp_path: Path, store: str) -> Project:
    return Project(tmp_path, store)
