"""What is looked at all the time lies on the node's own disk: a run folder on a shared one is left in peace."""

from __future__ import annotations

import os
import shutil

import pytest

from dtrain.errors import UserError
from dtrain.run import node_disk
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat

# In every process of the command: what it opens in the run folder, as lines "PID PATH".
NOTICE = """
import os
import sys

FOLDER, LOG = os.environ["WATCHED"], os.environ["OPENED"]


def note(text):
    descriptor = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{os.getpid()} {text}\\n".encode())
    os.close(descriptor)


def look(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(FOLDER + "/"):
            note(path)


sys.addaudithook(look)
"""

# The file system of the run folder may be slow: what matters is that nobody waits for it.
WATCHED_NET = """
import sitecustomize
from net import Net


class WatchedNet(Net):
    def forward(self, x):
        if self.training and self.calls in (5, 55):
            sitecustomize.note("begin" if self.calls == 5 else "end")
        return super().forward(x)
"""


def test_a_step_opens_nothing_in_the_run_folder(project):
    (project.folder / "notice").mkdir()
    project.write("notice/sitecustomize.py", NOTICE)
    project.write("watched.py", WATCHED_NET)
    project.job(model={"_target_": "watched.WatchedNet"}, fit={"epochs": 1})
    run, log = project.run_dir(), project.folder / "opened"
    environment = {"PYTHONPATH": f"{project.folder}/notice", "WATCHED": str(run.path), "OPENED": str(log)}
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    done = project.shell(f"{variables} dtrain launch --gpus 2 --run-dir run job.yaml data.train.size=480")
    assert done.code == 0, done.err
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    ranks = {pid for pid, what in lines if what == "begin"}
    assert len(ranks) == 2
    for rank in ranks:
        opened = [what for pid, what in lines if pid == rank]
        assert opened.index("end") == opened.index("begin") + 1, opened
    # Nor does the agent look there for how ranks are, which it does ten times a second: each is opened when it begins.
    looked_at = [what for _, what in lines if "heartbeat" in what or "error.json" in what]
    assert len(looked_at) <= 10, looked_at
    assert not run.heartbeats.exists()  # nothing is left on the node
    assert run.ranks() == [0, 1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(node_disk, "ROOT", tmp_path / "disk")
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_the_folder_is_the_nodes_own_and_goes_with_the_last_of_them(run):
    with node_disk.held(run.heartbeats) as folder:
        Heartbeat(run.heartbeat(0), create=True).stop = 15
        assert not folder.is_relative_to(run.path)
        assert folder.stat().st_mode & 0o777 == 0o700
        with node_disk.held(run.heartbeats):  # another agent of this run, on the same machine
            pass
        run.create()  # it is continued
        assert Heartbeat(run.heartbeat(0)).stop == 15
    assert not folder.exists()


def test_a_copied_run_has_a_folder_of_its_own(run):
    other = RunDir(run.path.with_name("copy"))
    shutil.copytree(run.path, other.path, symlinks=True)
    other.create()
    assert os.readlink(other.heartbeats) != os.readlink(run.heartbeats)


def test_a_folder_that_somebody_else_has_made_is_not_used(run, monkeypatch):
    node_disk.make(run.heartbeats)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user: move the run folder"):
        node_disk.make(run.heartbeats)


def test_where_there_are_no_links_it_lies_in_the_run_folder(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    run = RunDir(tmp_path / "run")
    run.create()
    with node_disk.held(run.heartbeats) as folder:
        Heartbeat(run.heartbeat(0), create=True)
        assert folder == run.heartbeats
    assert run.ranks() == [0]
