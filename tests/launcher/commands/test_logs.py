"""What ranks print: `dtrain logs`, and what `dtrain launch` shows of it."""

from __future__ import annotations

import random
import signal
import time

import pytest
from marks import campaign

import dtrain.monitoring.rank_output
from dtrain.files import write_json
from dtrain.monitoring.rank_output import CHUNK, RankOutput
from dtrain.run.folder import END_OF_OUTPUT
from dtrain.run.heartbeat import Heartbeat

# -- lines for the screen -------------------------------------------------------------------------

FAILED = END_OF_OUTPUT.encode() + b"\nTraceback\n"
# By name: what a rank prints, and the lines that are shown of it.
PRINTED = {
    "lines": (b"one\n\ntwo\n", [b"one", b"", b"two"]),
    "no-end": (b"one\ntwo", [b"one", b"two"]),
    "no-text": (b"\xff\xfe\n\xe2\x96", [b"\xff\xfe", b"\xe2\x96"]),
    "windows": (b"one\r\n\r\ntwo\r\n", [b"one", b"", b"two"]),
    "bar": (b"before\n\r 0%\r 50%\r 100%\nafter\n", [b"before", b" 100%", b"after"]),
    "bar-that-ends-in-return": (b" 50%\r 100%\r\nafter\n", [b" 100%", b"after"]),
    "bar-without-end": (b"\r 0%\r 50%", [b" 50%"]),
    "failure": (b"one\n" + FAILED, [b"one"]),
    "failure-in-a-line": (b"one" + FAILED, [b"one"]),
    "failure-in-a-bar": (b"\r 0%\r 50%" + FAILED, [b" 50%"]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", PRINTED)
def test_the_lines_of_a_rank(name, piece, tmp_path):
    """They do not depend on the pieces in which they come."""
    text, expected = PRINTED[name]
    log = tmp_path / "log"
    output = RankOutput(0, log)  # before the file is there
    assert output.new_lines() is None
    shown = []
    with log.open("wb", buffering=0) as file:
        for start in range(0, len(text), piece):
            file.write(text[start : start + piece])
            shown += output.new_lines() or []
    assert output.new_lines() is None
    assert [*shown, *output.unfinished()] == expected
    assert output.unfinished() == []


def test_what_was_there_before_is_not_new(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"an earlier start\n")
    output = RankOutput(0, log)
    with log.open("ab") as file:
        file.write(b"now\n")
    assert output.new_lines() == [b"now"]


def test_much_output_is_taken_in_parts(tmp_path):
    """Whatever is printed, the agent holds a chunk of it at most; a line has no end that would be waited for."""
    lines = [random.Random(0).randbytes(size).hex().encode() for size in (10, 1000, CHUNK, CHUNK, 10)]
    log = tmp_path / "log"
    output = RankOutput(0, log)
    log.write_bytes(b"\n".join(lines))
    parts = []
    while (part := output.new_lines()) is not None:
        assert sum(map(len, part)) <= CHUNK + dtrain.monitoring.rank_output.MAX_LINE
        assert len(output._rest) <= dtrain.monitoring.rank_output.MAX_LINE
        parts += part
    parts += output.unfinished()
    assert parts[:2] == lines[:2]
    assert len(parts) > len(lines)
    assert b"".join(parts) == b"".join(lines)


def test_a_line_that_does_not_end_is_shown_in_time(tmp_path, monkeypatch):
    log = tmp_path / "log"
    output = RankOutput(0, log)
    with log.open("wb", buffering=0) as file:
        file.write(b"loading ...")
        assert output.new_lines() == []
        monkeypatch.setattr(dtrain.monitoring.rank_output, "UNFINISHED_S", -1)
        assert output.new_lines() == [b"loading ..."]
        assert output.new_lines() is None
        file.write(b"\n\nnext\n")
        assert output.new_lines() == [b"", b"next"]
        file.write(b"\r 1%")
        assert output.new_lines() == [b" 1%"]
        file.write(b"\r 2%")
        assert output.new_lines() == [b" 2%"]
        file.write(b"\r 3%\n")
        assert output.new_lines() == [b" 3%"]


# -- dtrain launch --------------------------------------------------------------------------------

PRINT = """
import os
import signal
import time

rank = os.environ["RANK"].encode()
os.write(1, b"a line of %s\\n" % rank * 1000)
open("printed-" + os.environ["RANK"], "w").close()
if rank == b"2":
    while not (os.path.exists("printed-0") and os.path.exists("printed-1")):
        time.sleep(0.02)
    os.write(2, b"\\xff the end, without one")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def killed(new_project):
    """A project with a run of 3 ranks whose last one was killed, and what was on the screen."""
    project = new_project("killed")
    project.write("train.py", PRINT)
    done = project.shell("dtrain launch --gpus 3 --show-ranks 2,0 --run-dir run train.py > screen")
    assert "rank 2 failed: killed by signal SIGKILL" in done.last_lines, done.err
    return project


def test_the_ranks_asked_for_are_shown(killed):
    """All of what they printed, up to the last byte of the one that was killed."""
    lines = (killed.folder / "screen").read_bytes().splitlines()
    by_rank = {rank: [line for line in lines if line.startswith(b"[rank %d] " % rank)] for rank in (0, 2)}
    assert by_rank[0] == [b"[rank 0] a line of 0"] * 1000
    assert by_rank[2] == [b"[rank 2] a line of 2"] * 1000 + [b"[rank 2] \xff the end, without one"]
    assert len(lines) == 2001


def test_logs_prints_what_the_rank_printed(killed):
    expected = b"a line of 2\n" * 1000 + b"\xff the end, without one"
    done = killed.shell("dtrain logs run --rank 2 > bytes")
    assert (done.code, done.err) == (0, "")
    assert (killed.folder / "bytes").read_bytes() == expected


def test_logs_names_the_rank_that_failed(killed):
    done = killed.run("logs", "-f", "run")
    assert (done.code, done.out) == (0, "a line of 0\n" * 1000)
    assert done.err == "rank 2 failed first: dtrain logs run --rank 2\n"


def test_logs_of_a_rank_that_is_not_there(killed):
    done = killed.run("logs", "run", "--rank", "3")
    assert (done.code, done.out, done.err) == (2, "", "run has no rank 3; it has 0, 1, 2\n")


def test_a_traceback_is_for_the_log(project):
    """On the screen it would hide the cause; a line that was begun before it is shown."""
    project.write("train.py", "print('almost', end='')\nraise ValueError('boom')")
    done = project.run("launch", "--run-dir", "run", "train.py")
    assert (done.code, done.out) == (1, "[rank 0] almost\n")
    assert "rank 0 failed: ValueError: boom" in done.last_lines
    assert "Traceback" not in done.err
    log = project.run("logs", "run").out
    assert log.startswith(f"almost{END_OF_OUTPUT}\nTraceback (most recent call last):\n")
    assert log.endswith("ValueError: boom\n")


MUCH = """
import os
import time

print("ready")
while not os.path.exists("go"):
    time.sleep(0.02)
for i in range(30_000):
    print("x" * 100)
open("printed", "w").close()
while not os.path.exists("end"):
    time.sleep(0.02)
"""


# By name: what goes the way of the ranks' lines, how the run is brought to its end, its exit code and state.
ENDS = {
    "lines": ("", "touch end", 0, "finished"),
    "all": ("2>&1", "dtrain cancel run > /dev/null", 143, "killed"),
}


@pytest.mark.parametrize("name", ["lines", *(campaign(name) for name in ENDS if name != "lines")])
def test_a_reader_that_goes_changes_nothing(name, project):
    """With nobody there to print to, the run goes on, and ends as it would have."""
    errors, end, code, state = ENDS[name]
    project.write("train.py", MUCH)
    launch = f"dtrain launch --run-dir run train.py {errors}"
    reader = f"grep -m 1 ready; exec < /dev/null; touch go; until [ -e printed ]; do sleep 0.1; done; {end}"
    done = project.shell(f"({launch}; echo $? > code) | ({reader})")
    assert done.out == "[rank 0] ready\n"
    assert (project.folder / "code").read_text() == f"{code}\n", done.err
    assert "Traceback" not in done.err
    assert project.status()["state"] == state
    assert project.run_dir().rank_log(0).read_text().count("\n") == 30_001


def test_a_reader_that_waits_does_not_hold_up_the_status(project):
    """The pipe is full; status.json is rewritten all the same, or another host would take the run for dead.

    In the end the reader has all of it.
    """
    project.write("train.py", MUCH)
    changed = "stat -c %Y run/status.json"
    reader = "until [ -e printed ]; do sleep 0.1; done"
    end = "touch end; until grep -q finished run/status.json; do sleep 0.1; done"
    for _ in range(2):
        reader += f"; last=$({changed}); until [ $({changed}) != $last ]; do sleep 0.1; done"
    done = project.shell(f"touch go; dtrain launch --run-dir run train.py | ({reader}; {end}; wc -l)")
    assert done.out.strip() == "30001", done.err


# -- dtrain logs ----------------------------------------------------------------------------------


@pytest.fixture
def running(project):
    """A run of one rank that this process writes. The rank has no log yet."""
    run = project.run_dir()
    run.create()
    Heartbeat(run.heartbeat(0), create=True)
    with run.lock(is_agent=True):
        set_state(run, "running")
        yield run


def set_state(run, state):
    write_json(run.status_file, {"state": state, "exit_code": None, "epoch": 0, "step": 0, "error": None})


def append(run, text):
    with run.rank_log(0).open("ab") as file:
        file.write(text)


def test_follow_goes_on_until_the_run_has_ended(running, project):
    with project.running("logs", "--follow", "run") as command:
        time.sleep(1)  # most likely it waits for the log by now
        append(running, b"one\n")
        command.until(lambda: command.out == "one\n")
        append(running, b"half")
        command.until(lambda: command.out == "one\nhalf")
        append(running, b" a line\nand the end")
        set_state(running, "stopped")
        done = command.wait()
    assert (done.code, done.out, done.err) == (0, "one\nhalf a line\nand the end", "")


def test_without_follow_it_is_what_is_there(running, project):
    done = project.run("logs", "run")
    assert (done.code, done.out) == (2, "")
    assert done.err == "rank 0 of run has printed nothing yet; -f waits for it\n"
    text = random.Random(0).randbytes(3 * CHUNK + 7)
    append(running, text)
    done = project.shell("dtrain logs run > bytes")
    assert (done.code, done.err) == (0, "")
    assert (project.folder / "bytes").read_bytes() == text


def test_ctrl_c_is_quiet(running, project):
    append(running, b"one\n")
    with project.running("logs", "-f", "run") as command:
        command.until(lambda: command.out)
        command.signal(signal.SIGINT, to_group=True)
        done = command.wait()
    assert (done.code, done.out, done.err) == (130, "one\n", "")


@pytest.mark.parametrize("lines", [1, 100_000], ids=["idle", "much"])
def test_a_reader_that_has_seen_enough(lines, running, project):
    """It ends, with nothing more to print as well, although the run goes on."""
    append(running, b"one\n" * lines)
    done = project.shell("dtrain logs -f run | head -n 1")
    assert (done.code, done.out, done.err) == (0, "one\n", "")


def test_logs_of_a_script_without_an_agent(project):
    run = project.run_dir()
    run.create()
    Heartbeat(run.heartbeat(0), create=True)
    with run.lock():
        set_state(run, "running")
        done = project.run("logs", "-f", "run")
    assert (done.code, done.out) == (2, "")
    assert "run has no logs: its script was started without dtrain launch" in done.err


def test_logs_of_no_run(project):
    done = project.run("logs", "runs")
    assert (done.code, done.out, done.err) == (2, "", "runs holds no run (there is no status.json)\n")
