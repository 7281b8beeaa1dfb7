"""The commands that tests fork (tests/support/warm.py) have what a user's have, who starts an interpreter for each."""

from __future__ import annotations

import json
import signal

import pytest

LOOK = """
import json, os, random, signal, sys
import multiprocessing.spawn
import numpy

with open("seen.json", "w") as file:
    json.dump({
        "argv": sys.argv,
        "orig_argv": sys.orig_argv[1:],
        "executable": sys.executable,
        "path": sys.path,
        "main": [vars(sys.modules["__main__"]).get(name) for name in ("__name__", "__file__", "__spec__")],
        "environment": {name: value for name, value in os.environ.items() if name != "DTRAIN_TEST_COMMAND"},
        "mark": f"DTRAIN_TEST_COMMAND={os.environ['DTRAIN_TEST_COMMAND']}" in open("/proc/self/environ").read(),
        "folder": os.getcwd(),
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "handlers": {number: str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "umask": os.umask(0o022),
        "streams": [[stream.encoding, stream.errors, stream.line_buffering] for stream in (sys.stdout, sys.stderr)],
        "helpers": [name for name in ("warm", "command", "pytest", "mlflow") if name in sys.modules],
    }, file)
with open("numbers.json", "w") as file:
    json.dump([random.random(), numpy.random.random()], file)
"""


def seen(project, *, is_fresh):
    project.is_fresh = is_fresh
    done = project.run("check", "job.yaml")
    assert done.code == 2, done.err
    assert "no such thing" in done.err
    return json.loads((project.folder / "seen.json").read_text())


@pytest.fixture
def looking(project):
    """With a model that writes down what its process has, and can't be imported."""
    project.write("net.py", LOOK + "raise RuntimeError('no such thing')\n")
    return project


def test_a_forked_command_has_what_a_users_has(looking):
    numbers = looking.folder / "numbers.json"
    warm = seen(looking, is_fresh=False)
    assert warm["mark"]
    assert warm["leads"] == [True, True]
    before = json.loads(numbers.read_text())
    assert warm == seen(looking, is_fresh=False)
    assert not set(before) & set(json.loads(numbers.read_text()))
    assert warm == seen(looking, is_fresh=True)


def test_how_a_forked_command_ends_is_told(looking):
    looking.write("net.py", "import time\nopen('here', 'w').close()\ntime.sleep(600)\n")
    with looking.running("check", "job.yaml") as command:
        command.until((looking.folder / "here").exists)
        command.signal(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL


def test_what_reads_its_environment_on_import_is_not_forked(looking):
    looking.run("check", "job.yaml", OMP_NUM_THREADS="3")
    seen = json.loads((looking.folder / "seen.json").read_text())
    assert seen["environment"]["OMP_NUM_THREADS"] == "3"
    assert seen["orig_argv"][0].endswith("dtrain")
