"""What is made of the ends of ranks: what an exception says, who is to blame, what the screen shows of it."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from dtrain.launcher.agent.root_cause import (
    RankEnd,
    end_of_output,
    error_of,
    first_cause,
    headline,
    left_early,
    left_unmet,
)
from dtrain.launcher.rank import reports
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Beat, Phase

GLOO = "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:6576."


class Unreadable(Exception):
    """Can't be made of a message alone, as torch tries to."""

    def __init__(self, path, code):
        super().__init__(f"{path} is damaged")


class Samples:
    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.error is not None:
            raise self.error
        return next(iter([]))


def raised(error, *, handling=None):
    """The error, raised while another one was handled."""
    try:
        if handling is None:
            raise error
        try:
            raise handling
        except type(handling):
            raise error  # noqa: B904 (as programs do)
    except BaseException as caught:
        return caught


class SomeGroup(Exception):
    """As ExceptionGroup, which Python 3.10 doesn't have."""

    exceptions = (ValueError("one\nof many lines"), KeyError("two"))


def test_what_an_error_was_raised_from_is_said_with_it():
    error = RuntimeError("training failed")
    error.__cause__ = ValueError("no such colour\nin line 3")
    assert reports.of(error, 1)["message"] == "training failed\nraised from ValueError: no such colour"
    error.__cause__ = ValueError("training")
    assert reports.of(error, 1)["message"] == "training failed"
    assert reports.of(SomeGroup("several"), 1)["message"] == "several\nValueError: one\nKeyError: 'two'"
    nameless = StopIteration()
    nameless.__notes__ = ["sample 13"]
    assert reports.of(nameless, 1)["message"] == "sample 13"


def read(samples, workers):
    """The error of a DataLoader, in a generator as dtrain has it."""

    def batches():
        iterator = iter(DataLoader(samples, num_workers=workers))
        for _ in range(2):
            yield next(iterator)

    try:
        list(batches())
    except Exception as error:
        return error


FAILED = {
    "gloo": RuntimeError(GLOO),
    "gloo-mesh": RuntimeError(f"Gloo connectFullMesh failed with {GLOO}"),
    "gloo-enforce": RuntimeError("[enforce fail at /gloo/transport/tcp/device.cc:84] rv != -1"),
    "nccl": dist.DistBackendError("NCCL error"),
    "nccl-2": RuntimeError("NCCL AllReduce failed: remote process exited or there was a network error"),
    "nccl-2-in-words": RuntimeError("NCCL Send failed in gather: unhandled system error\nNCCL Last Error: socketPoll"),
    "nccl-init": RuntimeError("Failed to initialize NCCL communicator: internal error"),
    "nccl-late": RuntimeError("NCCL communicator was aborted after a previous error"),
    "nccl-watchdog": RuntimeError("[Rank 1] Watchdog caught collective operation timeout: NCCL operation timed out"),
    "store": dist.DistNetworkError("Failed to recv, got 0 bytes"),
    "wrapped": raised(ValueError("the step failed"), handling=RuntimeError(GLOO)),
    "then-exit": raised(SystemExit(1), handling=RuntimeError(GLOO)),
}
OWN = {
    "words-of-a-connection": RuntimeError("Connection reset by peer: the data server went away"),
    "words-of-gloo": RuntimeError("/data/gloo/points.bin:7: Broken pipe"),
    "words-of-nccl": RuntimeError("the NCCL settings failed: see NCCL_ALGO"),
    "nccl-call": RuntimeError("NCCL AllReduce failed: invalid usage\nNCCL Last Error: Duplicate GPU detected"),
    "nccl-gpu": RuntimeError("NCCL AllReduce failed: unhandled cuda error"),
    "connection": ConnectionResetError(104, "Connection reset by peer"),
    "exit": SystemExit(1),
    "quoted": ValueError(GLOO),
}


@pytest.mark.parametrize("name", [*FAILED, *OWN])
def test_a_failed_collective_is_told_from_an_error_of_ones_own(name):
    assert reports.is_failed_collective({**FAILED, **OWN}[name]) == (name in FAILED)


def test_what_an_exception_says():
    """Programs leave by sys.exit where they have caught an error; notes count; a full /dev/shm gets a remedy."""
    logged = reports.of(raised(SystemExit(1), handling=ValueError("the loss is nan")), 1)
    assert (logged["type"], logged["message"]) == ("ValueError", "the loss is nan")
    assert "raise handling" in logged["traceback"]
    noted = ValueError("boom")
    noted.add_note("in sample 13")
    assert reports.of(noted, 1)["message"] == "boom\nin sample 13"
    left = reports.of(raised(SystemExit(3)), 3)
    assert (left["type"], left["message"]) == ("SystemExit", "exit code 3")
    assert "raise error" in left["traceback"]
    full = "unable to write to file </torch_1_2_3>: No space left on device (28)"
    assert "/dev/shm" in reports.of(RuntimeError(full), 1)["message"]
    assert "/dev/shm" not in reports.of(OSError(28, "No space left on device", "/data/x"), 1)["message"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [Unreadable("13.png", 7), KeyError("x"), None], ids=repr)
def test_the_users_lines_of_a_dataset_are_shown(error, workers):
    """Also of loading processes, whose tracebacks are text, and of a StopIteration, which can't leave a generator."""
    found = reports.of(read(Samples(error), workers), 1)
    assert found["type"] == type(error or StopIteration()).__name__
    where = "(in loading process 0)" if workers else ""
    assert found["message"] == f"{error or ''} {where}".strip()
    frames = [line for line in found["traceback"].splitlines() if line.startswith("  File ")]
    assert frames[-1].endswith("in __getitem__")
    assert all(__file__ in frame for frame in frames)


def test_an_excerpt_has_whole_frames():
    frame = '  File "a.py", line {}, in f\n    g(1 + x)\n      ~~^~~\n'
    text = "".join(frame.format(number) for number in range(1, 5))
    assert reports.excerpt(text, 5) == [
        line for number in (3, 4) for line in frame.format(number).splitlines() if "~" not in line
    ]
    assert reports.excerpt(text, 1) == ['  File "a.py", line 4, in f']
    assert reports.excerpt("", 5) == []


MINE = f'  File "{__file__}", line 1, in f\n'


def end(rank, code, *, victim=None, kind="RuntimeError"):
    record = {"rank": rank, "type": kind, "message": "m", "traceback": MINE, "victim": victim, "time": 5.0}
    return RankEnd(rank, code, None if victim is None else record)


def test_who_left_early_is_to_blame_where_the_others_are_its_victims():
    ends = [end(0, 1, victim=True), end(1, 0), end(2, 0), end(3, None)]
    found = first_cause([ends[0]], [])
    blamed = left_early(found, ends, {0: 9.0, 1: 8.0, 2: 7.0})
    assert (blamed["rank"], blamed["type"], blamed["traceback"]) == (2, "LeftEarly", MINE)
    assert "left with exit code 0" in blamed["message"]
    # Who fails by itself later has nobody else to blame, nor has a rank whose fellows are still there.
    assert left_early(end(0, 1, victim=False), ends, {1: 8.0, 2: 7.0}) is None
    assert left_early(end(0, 1), ends, {1: 8.0, 2: 7.0}) is None
    assert left_early(found, [ends[0], ends[3]], {0: 9.0}) is None


def test_who_left_before_all_had_met_is_to_blame():
    waiting, met, before = Beat(phase=Phase.JOINING), Beat(fit=1), Beat()
    codes = {0: None, 1: 0, 2: 0, 3: None}
    blamed = left_unmet({0: waiting, 1: before, 2: before, 3: before}, codes, {1: 8.0, 2: 7.0})
    assert (blamed["rank"], blamed["type"]) == (2, "LeftEarly")
    assert blamed["message"].endswith("while rank 0 was waiting for it to join")
    # A script may have ranks that have nothing to do, as long as nobody waits for them.
    assert not left_unmet({0: before, 1: before, 2: before, 3: before}, codes, {1: 8.0, 2: 7.0})
    assert not left_unmet({0: waiting, 1: met, 2: waiting, 3: before}, codes, {1: 8.0, 2: 7.0})


def test_the_end_of_a_log_is_shown_for_an_exit_code(tmp_path):
    log = tmp_path / "log"
    log.write_text("of an earlier start\n")
    begin = log.stat().st_size
    assert end_of_output(log, begin) == ""
    log.write_text(log.read_text() + "".join(f"line {number}\n\n" for number in range(1, 20)) + "no fuel" * 100)
    error = error_of(RankEnd(1, 9), 0, lambda rank: end_of_output(log, begin))
    shown = headline(error, RunDir("run")).splitlines()
    assert shown[0] == "rank 1 failed: exit code 9"
    assert shown[1:3] == ["the end of its log:", "line 15"]
    assert len(shown) <= 15
    assert max(map(len, shown)) <= 200


ABORTED = """terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  [enforce fail at /src/gloo/transport/tcp/pair.cc:464] op.preamble.length <= op.nbytes. 8 vs 4. A mismatch?
Fatal Python error: Aborted

Thread 0x00007f0000000000 (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 4181 in all_reduce
  File "/home/me/mine.py", line 26 in on_step_end
  File "{ours}", line 171 in call
"""


def test_what_ended_a_rank_by_a_signal_is_said_and_where():
    said = ABORTED.format(ours=reports.__file__)
    shown = headline(error_of(RankEnd(1, -6), 0, lambda rank: said), RunDir("run")).splitlines()
    assert shown[0] == "rank 1 failed: killed by signal SIGABRT: op.preamble.length <= op.nbytes. 8 vs 4. A mismatch?"
    assert shown[1] == '  File "/home/me/mine.py", line 26 in on_step_end'
    assert shown[2].startswith("host: ")
    # What a signal from outside ends has said nothing of it.
    assert error_of(RankEnd(1, -9), 0, lambda rank: "  what():  a joke\n")["message"] == "killed by signal SIGKILL"
