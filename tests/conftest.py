"""Fixtures: a project to run the command in, one MLflow store for all of them, and a Slurm cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import warm
from cluster import Cluster, Unavailable, running
from command import Project, make_store

# A shell starts what runs in the background with Ctrl-C and SIGQUIT ignored, and the commands would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files with tests that run commands come first: they take longest, and nobody should wait for one at the end."""
    slow = {item.path for item in items if {"project", "new_project", "store", "cluster"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What this version of torch lacks is refused in words, and is no failure of what needs it."""
    report = yield
    lacking = "fsdp on several ranks needs a newer torch"
    if report.failed and lacking in str(report.longrepr) and version("torch") < "2.15":
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {lacking}")
    return report


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The uri of an MLflow store. Making one takes seconds, so that all commands share it."""
    return make_store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Project]:
    """Makes a project without MLflow, for fixtures that several tests share."""
    warm.server()  # from the main thread, where commands may be started from others

    def new(name: str, *, is_fresh: bool = False) -> Project:
        return Project(tmp_path_factory.mktemp(name), "", is_fresh=is_fresh)

    return new


@pytest.fixture
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Project:
    """With MLflow, which takes seconds a run, only where the test is marked for it."""
    uses_mlflow, is_fresh = (request.node.get_closest_marker(name) is not None for name in ("mlflow", "fresh"))
    return Project(tmp_path, request.getfixturevalue("store") if uses_mlflow else "", is_fresh=is_fresh)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster. Without one the tests are skipped, except where DTRAIN_NEED_SLURM says that they must not be."""
    try:
        with running() as started:
            yield started
    except Unavailable as why:
        if os.environ.get("DTRAIN_NEED_SLURM"):
            pytest.fail(f"no Slurm, which DTRAIN_NEED_SLURM demands: {why}")
        pytest.skip(f"no Slurm: {why}")
