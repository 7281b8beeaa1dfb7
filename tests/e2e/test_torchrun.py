"""The same script under the real torchrun, under `dtrain launch`, and under `dtrain launch --no-preload`."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from command import DTRAIN, Command
from launchers import LAUNCHERS, run, start

from dtrain.launcher.rank.preparation import PRELOAD_FOR

OURS = [name for name in LAUNCHERS if name != "torchrun"]
RANKS = (0, 1)

# -- what a script sees ----------------------------------------------------------------------------

REPORT = '''"""Tells what it can see of how it was started."""
NAMES = sorted(globals())
import gc, json, logging, multiprocessing, os, random, resource, signal, subprocess, sys, threading, warnings

ENVIRONMENT = dict(os.environ)
MODULES = {name.partition(".")[0] for name in sys.modules}
DESCRIPTORS = sorted(os.listdir("/proc/self/fd"))
LIMIT = sys.getrecursionlimit()

import faulthandler, numpy, threadpoolctl, torch, torch._dynamo
import beside  # lies beside the script


def stream(file):
    shown = [file.name, file.mode, file.fileno(), type(file.buffer).__name__, file.buffer.fileno(), file.encoding]
    return [*shown, file.errors, file.line_buffering, file.write_through]


def ignored_by(command):
    """What a program that the script starts finds ignored."""
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in status.splitlines() if line.startswith(("SigIgn", "SigBlk"))]


try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    interrupted = True
else:
    interrupted = False
rank = os.environ["RANK"]
child = "import multiprocessing, sys; print(sys.flags, multiprocessing.get_start_method())"
report = {
    "environment": ENVIRONMENT,
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "working directory": os.getcwd(),
    "names": NAMES,
    "identity": [__name__, __file__, __package__, repr(__spec__), __doc__, __annotations__, __builtins__.__name__],
    "loader": [type(__loader__).__name__, __loader__.name, __loader__.path],
    "main": [name for name, module in sys.modules.items() if module.__dict__ is globals()],
    "click": "click" in MODULES or "pydantic" in MODULES,
    "flags": str(sys.flags),
    "interpreter": [sys.executable, sys.warnoptions, sys._xoptions, sys.flags.dev_mode, LIMIT, sys.getswitchinterval()],
    "hooks": [sys.excepthook is sys.__excepthook__, threading.excepthook is threading.__excepthook__],
    "finders": [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path],
    "streams": [stream(file) for file in (sys.stdin, sys.stdout, sys.stderr)],
    "originals": [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
    "terminal": [os.isatty(number) for number in range(3)],
    "stdin": sys.stdin.read() if rank == "0" else "",
    "descriptors": DESCRIPTORS,
    "signals": {int(each): str(signal.getsignal(each)) for each in sorted(signal.valid_signals())},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "interrupted": interrupted,
    "ignored by children": ignored_by(["cat", "/proc/self/status"]),
    "child": subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout,
    "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "umask": [os.umask(0o22), os.nice(0), resource.getrlimit(resource.RLIMIT_NOFILE), os.sched_getaffinity(0)],
    "start method": multiprocessing.get_start_method(allow_none=True),
    "process": [repr(multiprocessing.current_process()), repr(multiprocessing.parent_process())],
    "children": [repr(each) for each in multiprocessing.active_children()],
    "thread": [threading.main_thread().native_id == os.getpid(), threading.current_thread() is threading.main_thread()],
    "threads": [thread.name for thread in threading.enumerate()],
    "garbage": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold(), gc.get_debug()],
    "faulthandler": faulthandler.is_enabled(),
    "filters": [str(each) for each in warnings.filters],
    "logging": [repr(logging.root.handlers), logging.root.level, logging.root.disabled, logging.raiseExceptions],
    "bad fork": [torch.cuda._is_in_bad_fork(), torch.cuda._initialized],
    "torch": [torch.get_num_interop_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled()],
    "torch's threads": torch.get_num_threads(),
    "numpy's threads": sorted(each["num_threads"] for each in threadpoolctl.threadpool_info()),
    "seeds": [torch.initial_seed(), torch.rand(1).item(), numpy.random.rand(), random.random()],
}
with open(f"report-{rank}.json", "w") as file:
    json.dump(report, file, default=str)
'''

# In these, two starts differ, or one must be told from the other.
OWN_VALUES = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "DTRAIN_TEST_COMMAND", "_"}


def under_each(new_project, action):
    """What the action gives for each launcher, in a project of its own. Two at a time: much of a start is waiting."""
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda launcher: action(launcher, new_project(launcher)), LAUNCHERS)
        return dict(zip(LAUNCHERS, results, strict=True))


def read_json(project, name):
    """A file that a script wrote, without the name of the folder that it ran in."""
    return json.loads((project.folder / name).read_text().replace(str(project.folder), "FOLDER"))


@pytest.fixture(scope="module")
def reports(new_project):
    """Each launcher's reports, by rank. The script is named by a link that lies elsewhere."""

    def report(launcher, project):
        for folder in ("code", "links"):
            (project.folder / folder).mkdir()
        project.write("code/beside.py", "")
        project.write("code/train.py", REPORT)
        project.write("stdin", "what the user typed")
        (project.folder / "links" / "link.py").symlink_to("../code/train.py")
        arguments = ["--lr", "0.1", "key=value", "", "a b", "--", "-m", "$$x ${local_rank} $HOME"]
        done = run(launcher, project, ["./links/../links/link.py"], *arguments, PYTHONPATH="some:", MY_OWN="$x")
        assert done.code == 0, done.err
        return [read_json(project, f"report-{rank}.json") for rank in RANKS]

    return under_each(new_project, report)


@pytest.mark.parametrize("launcher", OURS)
@pytest.mark.parametrize("rank", RANKS)
def test_a_script_sees_what_it_sees_under_torchrun(rank, launcher, reports):
    expected, seen = copy.deepcopy(reports["torchrun"][rank]), copy.deepcopy(reports[launcher][rank])
    assert seen["seeds"] != expected["seeds"]
    # These follow from the number of cores here, where torchrun gives one thread to each rank.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert seen["torch's threads"] == threads
    assert seen["numpy's threads"] == [threads] * len(expected["numpy's threads"])
    # What is preloaded is exempt from garbage collection; and output is written by a class of ours.
    assert (seen["garbage"].pop(1) > 0, expected["garbage"].pop(1)) == (launcher == "forked", 0)
    for stream in seen["streams"][1:]:
        stream[stream.index("_Log")] = "FileIO"
    for name in ("environment", "seeds", "torch's threads", "numpy's threads"):
        del expected[name], seen[name]
    assert seen == expected


@pytest.mark.parametrize("launcher", OURS)
@pytest.mark.parametrize("rank", RANKS)
def test_the_environment_is_torchruns(rank, launcher, reports):
    expected, seen = (dict(reports[each][rank]["environment"]) for each in ("torchrun", launcher))
    assert seen.pop("DTRAIN_RUN_DIR") == "FOLDER/run"
    assert float(seen.pop("DTRAIN_HANG_TIMEOUT_S")) == 1800
    assert seen.pop("DTRAIN_DEVICE") in ("cpu", "cuda")  # as the agent has chosen
    assert (expected.pop("OMP_NUM_THREADS"), int(seen.pop("OMP_NUM_THREADS"))) == (
        "1",
        max(1, len(os.sched_getaffinity(0)) // 2),
    )
    assert seen.keys() == expected.keys()
    assert {name for name in seen if seen[name] != expected[name]} <= OWN_VALUES
    assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (str(rank), str(rank), "2")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_rank_has_random_numbers_of_its_own(launcher, reports):
    first, second = (reports[launcher][rank]["seeds"] for rank in RANKS)
    assert not set(first) & set(second)


def test_the_users_thread_count_is_kept(project):
    script = "import os, sys, torch\nprint(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], flush=True)\n"
    project.write("train.py", script)
    done = run("forked", project, ["train.py"], OMP_NUM_THREADS="3,1")
    assert done.code == 0, done.err
    assert project.run_dir().rank_log(1).read_text() == "3 3,1\n"


# -- what a script does ----------------------------------------------------------------------------

LIFE = """
import argparse, atexit, ctypes, multiprocessing, os, pickle, signal, sys, threading, _thread

import beside


class Item:
    def __init__(self, value):
        self.value = value


class Squares:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Item(index**2)


class Deleted:
    def __del__(self, write=os.write):  # when the module is taken down
        write(self.descriptor, b"deleted\\n")


def square(item):
    return Item(item.value**2)


def values(batch):
    return [item.value for item in batch]


def note(text):
    with open(f"notes-{RANK}", "a") as file:
        print(text, file=file)


def at_exit():
    note(f"at exit, {type(pickle.loads(pickle.dumps(Item(1)))).__module__}")


def later():
    threading.main_thread().join()
    note(f"thread, {len(pickle.dumps(Item(1))) > 0}, {sys.modules['__main__'].Item is Item}")


def main():
    import torch, torch.distributed as dist  # not in the spawned children of a pool, where it would take seconds
    from torch.utils.data import DataLoader

    parser = argparse.ArgumentParser()
    parser.add_argument("--local-rank", "--local_rank", type=int, default=int(os.environ["LOCAL_RANK"]))
    parser.add_argument("--lr", type=float)
    arguments = parser.parse_args()
    note(f"local rank {arguments.local_rank}, lr {arguments.lr}, {open('words.txt').read()}")

    with open(f"item-{RANK}", "wb") as file:
        pickle.dump(Item(3), file)
    with open(f"item-{RANK}", "rb") as file:
        note(pickle.load(file).value)
    torch.save(Item(torch.ones(2)), f"saved-{RANK}")
    note(torch.load(f"saved-{RANK}", weights_only=False).value.tolist())

    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            note([method, *values(pool.map(square, [Item(2), Item(3)]))])
    for method in ("fork", "spawn"):
        loader = DataLoader(Squares(), batch_size=2, num_workers=1, collate_fn=values, multiprocessing_context=method)
        note([method, *loader])
    note(list(DataLoader(Squares(), num_workers=1, collate_fn=lambda batch: batch[0].value)))

    dist.init_process_group("gloo")
    total = torch.full((1,), RANK + 1.0)
    dist.all_reduce(total)
    note(total.item())
    dist.destroy_process_group()

    try:
        _thread.interrupt_main()
    except KeyboardInterrupt:
        note("interrupted")
    signal.signal(signal.SIGUSR2, lambda number, frame: note("signal"))
    os.kill(0, signal.SIGUSR2)  # to this rank's own group
    if os.fork() == 0:
        sys.exit(3)  # and not this rank
    os.wait()
    os.chdir("/")


if __name__ == "__mp_main__":
    print("from a spawned child", flush=True)
if __name__ == "__main__":
    RANK = int(os.environ["RANK"])
    here = os.getcwd()
    main()
    os.chdir(here)
    deleted = Deleted()
    deleted.descriptor = os.open(f"notes-{RANK}", os.O_WRONLY | os.O_APPEND)
    forever = open(f"left-open-{RANK}", "w")
    forever.write("as the interpreter ends")
    beside.forever = open(f"left-open-beside-{RANK}", "w")
    beside.forever.write("in another module")
    ctypes.CDLL(None).printf(b"from C\\n")
    atexit.register(at_exit)
    threading.Thread(target=later).start()
    note("last line")
"""


@pytest.fixture(scope="module")
def lives(new_project):
    """By launcher: the files that the script wrote, and all that its ranks printed."""

    def live(launcher, project):
        (project.folder / "life").mkdir()
        project.write("life/beside.py", "")
        project.write("life/train.py", LIFE)
        project.write("words.txt", "relative")
        done = run(launcher, project, ["life/train.py"], "--lr", "0.1")
        assert done.code == 0, done.err
        names = [f"{name}-{rank}" for rank in RANKS for name in ("notes", "left-open", "left-open-beside")]
        assert not any(project.run_dir().rank_error(rank).exists() for rank in RANKS)
        logs = [project.run_dir().rank_log(rank) for rank in RANKS]
        printed = done.out if launcher == "torchrun" else "".join(log.read_text() for log in logs)
        return {name: (project.folder / name).read_text() for name in names}, printed

    return under_each(new_project, live)


@pytest.mark.parametrize("launcher", OURS)
def test_a_script_does_what_it_does_under_torchrun(launcher, lives):
    """Pickles, processes of all kinds, signals, and an end in the right order, with nothing left in a buffer."""
    assert lives[launcher][0] == lives["torchrun"][0]
    notes = lives[launcher][0]["notes-1"].splitlines()
    assert notes[-4:] == ["last line", "thread, True, True", "at exit, __main__", "deleted"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_that_a_script_prints_arrives(launcher, lives):
    printed = lives[launcher][1]
    assert printed.count("from C\n") == 2  # libc has a buffer of its own
    assert printed.count("from a spawned child") == 2 * 3  # in a pool started in two ways, and a loader in one


# -- how a script ends -----------------------------------------------------------------------------

ENDS = """
import atexit
import ctypes
import os
import signal
import sys
import threading


def boom():
    raise ValueError("the flux capacitor is empty")


def by_hook(kind, error, traceback):
    print("by the script's own hook:", kind.__name__, error)


def uncaught():
    sys.excepthook = by_hook
    boom()


def aside():
    atexit.register(boom)
    threading.Thread(target=boom).start()


def interrupted():
    signal.raise_signal(signal.SIGINT)


def missing():
    import beside


ENDS = {
    "zero": lambda: sys.exit(256),  # the kernel keeps the last byte
    "none": lambda: sys.exit(None),
    "hard": lambda: os._exit(0),
    "aside": aside,
    "number": lambda: sys.exit(-1),
    "text": lambda: sys.exit("there is no data"),
    "uncaught": uncaught,
    "interrupted": interrupted,
    "C": lambda: ctypes.CDLL(None).exit(7),
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "missing": missing,
}
names = sys.argv[1:]
name = names[int(os.environ["RANK"])] if len(names) > 1 else names[0]
if len(names) > 1 or os.environ["RANK"] == "1":
    ENDS[name]()
"""
GOOD_ENDS = ["zero", "none", "hard", "aside"]
# By name: how the ranks are started, and what the screen must say.
BAD_ENDS = {
    "number": ("fresh", "exit code 255"),
    "text": ("forked", "there is no data"),
    "uncaught": ("forked", "ValueError: the flux capacitor is empty"),
    "interrupted": ("fresh", "KeyboardInterrupt"),
    "C": ("forked", "exit code 7"),
    "terminated": ("forked", "killed by signal SIGTERM"),
    "missing": ("fresh", "ModuleNotFoundError: No module named 'torhc'"),
}


@pytest.fixture(scope="module")
def ends(new_project):
    """By name: the project and the command's end, for each bad end of rank 1 and, by launcher, for all good ones."""

    def end(name):
        project = new_project("ends")
        project.write("train.py", ENDS)
        project.write("beside.py", "\n\nimport torhc\n")
        if name in BAD_ENDS:
            return project, run(BAD_ENDS[name][0], project, ["train.py"], name)
        command = [DTRAIN, "launch", "--gpus", str(len(GOOD_ENDS)), "--run-dir", "run", "train.py"]
        command[2:2] = ["--no-preload"] * (name == "fresh")
        return project, Command([*command, "--", *GOOD_ENDS], project.folder, project.environment).wait()

    names = [*BAD_ENDS, *OURS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(end, names), strict=True))


def as_python_runs(project, name):
    """The end of `python train.py` as rank 1."""
    environment = {**project.environment, "RANK": "1"}
    command = [sys.executable, "train.py", name]
    return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", BAD_ENDS)
def test_an_end_that_python_calls_a_failure_is_one(name, ends):
    project, done = ends[name]
    assert as_python_runs(project, name).returncode != 0
    assert done.code == 1, done.err
    assert f"rank 1 failed: {BAD_ENDS[name][1]}" in done.last_lines
    assert project.status()["error"]["rank"] == 1
    assert project.status()["state"] == "failed"


@pytest.mark.parametrize("launcher", OURS)
def test_an_end_that_python_calls_good_is_one(launcher, ends):
    project, done = ends[launcher]
    assert [as_python_runs(project, name).returncode for name in GOOD_ENDS] == [0, 0, 0, 0]
    assert done.code == 0, done.err
    assert project.status()["state"] == "finished"
    log = project.run_dir().rank_log(3).read_text()
    assert log.count("ValueError: the flux capacitor is empty") == 2


def test_the_users_line_is_shown(ends):
    _, done = ends["missing"]
    assert 'beside.py", line 3' in done.last_lines
    assert "launcher/" not in done.err


def test_the_log_of_a_failed_rank_is_pythons(ends):
    """A traceback from the script's first line on, its last words, what its own hook makes of it."""
    logs = {name: project.run_dir().rank_log(1).read_text() for name, (project, _) in ends.items() if name in BAD_ENDS}
    assert logs["missing"].endswith(as_python_runs(ends["missing"][0], "missing").stderr)
    assert logs["text"] == "there is no data\n"
    assert logs["uncaught"].endswith("by the script's own hook: ValueError the flux capacitor is empty\n")


# -- while it runs ---------------------------------------------------------------------------------

WAITING = """
import os
import signal
import sys
import time

def save(number, frame):
    with open(f"saved-{os.environ['RANK']}", "w") as file:
        file.write(signal.Signals(number).name)
    sys.exit()

signal.signal(signal.SIGTERM, save)
print("half a line", end="")
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_output_appears_at_once_and_signals_reach_a_script(launcher, project):
    """SIGTERM to the launcher comes to each rank, which has time to save what it needs."""
    project.write("train.py", WAITING)
    command = start(launcher, project, ["train.py"], [])

    def printed(rank):
        log = project.run_dir().rank_log(rank)
        return log.exists() and log.read_text() == "half a line"

    try:
        command.until(lambda: command.out == 2 * "half a line" if launcher == "torchrun" else all(map(printed, RANKS)))
        command.signal(signal.SIGTERM)
        done = command.wait()
    finally:
        command.kill()
    assert done.code != 0
    assert [(project.folder / f"saved-{rank}").read_text() for rank in RANKS] == ["SIGTERM", "SIGTERM"]


# -- a module --------------------------------------------------------------------------------------

MODULE = """
import json
import multiprocessing
import os
import sys

from . import beside


class Item:
    def __init__(self, value):
        self.value = value


def square(item):
    return Item(item.value**2)


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        squares = [item.value for item in pool.map(square, [Item(3)])]
    report = {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "identity": [__package__, __file__, __spec__.name, __spec__.origin, __spec__.parent, type(__loader__).__name__],
        "main": sorted(name for name, module in sys.modules.items() if vars(module) is globals()),
        "squares": squares,
    }
    with open(f"module-{os.environ['RANK']}.json", "w") as file:
        json.dump(report, file)
"""


@pytest.fixture(scope="module")
def modules(new_project):
    def report(launcher, project):
        (project.folder / "package" / "sub").mkdir(parents=True)
        project.write(
            "package/__init__.py", "import sys\nassert 'package' not in sys.orig_argv, 'imported too early'\n"
        )
        project.write("package/sub/__init__.py", "")
        project.write("package/sub/beside.py", "")
        project.write("package/sub/module.py", MODULE)
        # What is defined there, multiprocessing does not find in a spawned child.
        project.write("package/sub/__main__.py", MODULE.replace("pool.map(square, [Item(3)])", "[]"))
        done = run(launcher, project, ["-m", "package.sub.module"], "--lr", "0.1", "-m")
        assert done.code == 0, done.err
        return project, [read_json(project, f"module-{rank}.json") for rank in RANKS]

    return under_each(new_project, report)


@pytest.mark.parametrize("launcher", OURS)
def test_a_module_runs_as_under_torchrun(launcher, modules):
    assert modules[launcher][1] == modules["torchrun"][1]
    assert modules[launcher][1][0]["squares"] == [9]


def test_a_package_runs_its_main(modules):
    project, _ = modules["forked"]
    done = project.run("launch", "--gpus", "1", "--run-dir", "of-package", "-m", "package.sub", "--", "--lr", "0.1")
    assert done.code == 0, done.err
    seen = read_json(project, "module-0.json")
    command = [sys.executable, "-u", "-m", "package.sub", "--lr", "0.1"]
    subprocess.run(command, cwd=project.folder, env={**project.environment, "RANK": "0"}, check=True)
    assert seen == read_json(project, "module-0.json")


# -- CUDA ------------------------------------------------------------------------------------------

# Runs the launcher here, to look at it, with more modules imported before the fork.
DRIVER = """
import sys

from dtrain.launcher.commands import launch
from dtrain.launcher.commands.request import RankOptions, Request
from dtrain.launcher.rank import preparation

preparation.PRELOAD = (*preparation.PRELOAD, *sys.argv[1:])
assert launch.launch(Request(("train.py",), RankOptions("1"), run_dir="run")) == 0
import torch

print(torch.cuda.is_initialized())
"""
REPORT_CUDA = """
import sys
import torch

names = [name for name in {modules} if name not in sys.modules]
print(names, torch.cuda._initialized, torch.cuda._is_in_bad_fork())
"""


@pytest.mark.parametrize("touched", [False, True], ids=["all-preloads", "one-that-touches-CUDA"])
def test_no_rank_comes_from_a_process_that_has_touched_cuda(touched, project):
    """Neither the launcher nor all that it may import before the fork; the second case shows that it would be seen."""
    modules = ["touches"] if touched else sorted({module for names in PRELOAD_FOR.values() for module in names})
    project.write("touches.py", "import torch\ntorch.cuda.is_available()\n")
    project.write("train.py", REPORT_CUDA.replace("{modules}", str(modules)))
    project.write("driver.py", DRIVER)
    environment = {**project.environment, "PYTHONPATH": str(project.folder)}
    done = Command([sys.executable, "driver.py", *modules], project.folder, environment).wait()
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "False"
    assert project.run_dir().rank_log(0).read_text() == f"[] False {touched}\n"
