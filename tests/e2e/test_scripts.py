"""`dtrain launch train.py`, and job files that name a script: the run folder, what is refused, Trainer in a script.

That a script sees and does what it does under torchrun is in test_torchrun.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch
import yaml
from mlflow import MlflowClient

from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.job import job_json_schema
from dtrain.schema.loading import differences, dump_job, load, load_job
from dtrain.trainer.distributed import world

PRINTING = """
import os, sys
import torch
print("from rank", os.environ["RANK"])
print("to stderr of rank", os.environ["RANK"], file=sys.stderr)
"""


@pytest.mark.fresh
def test_what_a_script_leaves(project):
    """Nothing but the script's own folder is imported from: the working directory may hold anything."""
    (project.folder / "code").mkdir()
    project.write("code/train.py", PRINTING)
    for name in ("numpy.py", "torch.py", "dtrain.py"):
        project.write(name, "raise RuntimeError('imported from the working directory')")
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "code/train.py")
    assert done.code == 0, done.err
    assert "finished: logs are in run;" in done.err  # no Trainer, so no weights to speak of
    assert "from rank" not in done.err
    assert "from rank 0" in done.out
    assert "to stderr of rank 0" in done.out
    for rank in (0, 1):
        log = project.run_dir().rank_log(rank).read_text()
        assert log == f"from rank {rank}\nto stderr of rank {rank}\n"
    assert project.status()["state"] == "finished"
    assert (project.run_dir().code / "train.py").read_text() == PRINTING


DESTROYED = """
import os

class Kept:
    def __del__(self):
        open(f"destroyed-{os.environ['RANK']}", "w").close()

kept = Kept()
"""


@pytest.mark.parametrize("fast", ["0", "1"])
def test_a_scripts_destructors_are_called_unless_it_asks_for_a_fast_exit(fast, project):
    project.write("train.py", DESTROYED)
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "train.py", DTRAIN_FAST_EXIT=fast)
    assert done.code == 0, done.err
    destroyed = [(project.folder / f"destroyed-{rank}").exists() for rank in range(2)]
    assert destroyed == [fast == "0"] * 2


TRAINER = """
import sys
import torch
from torch.utils.data import DataLoader
from torchmetrics import Accuracy
from dtrain import Trainer
import data, net

torch.manual_seed(0)
model = net.Net()
trainer = Trainer(
    model,
    torch.nn.CrossEntropyLoss(),
    torch.optim.SGD(model.parameters(), lr=float(sys.argv[2])),
    {"acc": Accuracy(task="multiclass", num_classes=2)},
)
history = trainer.fit(DataLoader(data.points(40), batch_size=8, shuffle=True), epochs=2)
print(len(history), "epochs")
"""


def test_a_script_with_a_trainer(project):
    project.write("train.py", TRAINER)
    done = project.run("launch", "--gpus", "2", "--run-dir", "trainer", "train.py", "--", "--lr", "0.1")
    assert done.code == 0, done.err
    assert done.out == "[rank 0] 2 epochs\n"
    run = project.run_dir("trainer")
    assert [(row["epoch"], row["step"], row["lr"]) for row in run.rows()] == [(1, 5, 0.1), (2, 10, 0.1)]
    assert (project.status("trainer")["state"], project.status("trainer")["step"]) == ("finished", 10)
    assert torch.load(run.best_weights, weights_only=True).keys() == {
        f"layers.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert (run.code / "train.py").read_text() == TRAINER


GATED = """
import os
import torch
from torch.utils.data import DataLoader
from dtrain import Trainer
import data, net

with open(f"process-{os.environ['RANK']}", "w") as file:
    file.write(str(os.getpid()))
model = net.Net(gate=7)
trainer = Trainer(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
trainer.fit(DataLoader(data.points(40), batch_size=8), epochs=2)
"""


def test_a_trainer_leaves_requests_to_stop_to_the_agent(project):
    """As of a cluster, which sends a signal to all processes: those that hear of it twice would end at the first."""
    project.write("train.py", GATED)
    with project.running("launch", "--gpus", "2", "--run-dir", "run", "train.py") as command:
        command.until((project.folder / "waiting").exists)
        for rank in (0, 1):
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
                os.kill(int((project.folder / f"process-{rank}").read_text()), number)
        project.write("go", "")
        done = command.wait()
    assert done.code == 0, done.err
    assert [row["step"] for row in project.run_dir().rows()] == [5, 10]


def test_a_rank_that_failed_does_not_leave_in_good_order(monkeypatch):
    """It would wait for the others, which may be in a collective."""
    left: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append("left"))
    monkeypatch.delattr(sys, "last_value", raising=False)
    world._leave()
    assert left == ["left"]
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)  # as python does with an uncaught one
    world._leave()
    assert left == ["left"]


# -- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "missing": (["tarin.py"], "tarin.py: no such file; did you mean train.py?"),
    "a-folder": (["folder.py"], "folder.py: is a folder; name the script in it"),
    "syntax": (["broken.py"], "broken.py:3: SyntaxError: invalid syntax"),
    "indentation": (["package/indented.py"], "package/indented.py:2: IndentationError: expected an indented"),
    "null-byte": (["null.py"], "null.py"),
    "long-name": ([f"{'x' * 300}.py"], f"{'x' * 300}.py: cannot be read: File name too long"),
    "no-module": (["-m", "package.nothing"], "there is no module package.nothing; looked for in "),
    "no-package": (["-m", "nothing.at.all"], "there is no module nothing.at.all"),
    "in-a-module": (["-m", "package.fine.more"], "there is no module package.fine.more"),
    "no-main": (["-m", "package"], "package is a package without __main__.py; name a module in it"),
    "a-path": (["-m", "package/fine.py"], "there is no module package/fine.py; to run a script, omit -m"),
    "relative": (["-m", ".fine"], "-m .fine: expected a module's name"),
    "module-syntax": (
        ["-m", "package.indented"],
        "package/indented.py:2: IndentationError: expected an indented block",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_script_that_can_not_run(name, project):
    """Found before anything starts; nothing is left."""
    arguments, says = REFUSED[name]
    (project.folder / "package").mkdir()
    (project.folder / "folder.py").mkdir()
    project.write("train.py", "")
    project.write("broken.py", "import torch\n\ntorch = = 1\n")
    project.write("null.py", "x = 1\0")
    project.write("package/fine.py", "")
    project.write("package/__init__.py", "raise SystemExit('imported outside a rank')\n")
    project.write("package/indented.py", "if True:\npass\n")
    done = project.run("launch", "--run-dir", "run", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(says), done.err
    assert done.err.count("\n") == 1
    assert not (project.folder / "run").exists()


@pytest.mark.fresh
def test_a_module_that_only_an_import_can_find(project):
    """Where a package's __init__.py says where its modules are, and where packages have none."""
    for folder in ("package", "elsewhere", "plain/in/plain"):
        (project.folder / folder).mkdir(parents=True)
    project.write("package/__init__.py", "__path__.append('elsewhere')\n")
    project.write("elsewhere/train.py", "")
    project.write("plain/in/plain/train.py", "")
    for name in ("package.train", "plain.in.plain.train"):
        done = project.run("launch", "--dry-run", "-m", name)
        assert done.code == 0, done.err
        assert f"would run {name} on 1" in done.err


SETS = """
import os
os.environ["TORCH_LOGS"] = "+dynamo"
import logging
import torch
print(logging.getLogger("torch._dynamo").level == logging.DEBUG)
"""


@pytest.mark.fresh
def test_a_variable_that_torch_reads_on_import_is_not_set_too_late(project):
    project.write("train.py", SETS)
    done = project.run("launch", "--run-dir", "run", "train.py")
    assert done.code == 0, done.err
    assert "train.py sets TORCH_LOGS, which libraries read at import time: each rank gets a fresh" in done.err
    assert project.run_dir().rank_log(0).read_text() == "True\n"


# -- a job that names a script ---------------------------------------------------------------------

REPORTING = """
import json, os, sys, time

names = ["DTRAIN_RUN_DIR", "CUDA_VISIBLE_DEVICES"]
report = [sys.argv, sys.path[0], os.getcwd(), *(os.environ.get(name) for name in names)]
name = f"report-{os.environ['RANK']}.json"
with open(name + ".new", "w") as file:
    json.dump(report, file)
os.replace(name + ".new", name)
if not os.path.exists("go"):
    while not (os.path.exists("report-0.json") and os.path.exists("report-1.json")):
        time.sleep(0.01)  # the first failure ends the other rank
    raise RuntimeError("not yet")
"""
SCRIPT_JOB = """
name: by-script
script: [sub/train.py, --lr, 0.1, --fast, true, '007', 1e-3]
launch: {device: cpu}
mlflow: {experiment: tiny}
"""


@pytest.fixture
def jobs(project):
    """A job that names a script, in a folder that is not the working directory."""
    (project.folder / "jobs" / "sub").mkdir(parents=True)
    project.write("jobs/job.yaml", SCRIPT_JOB)
    project.write("jobs/sub/train.py", REPORTING)
    return project


def read_reports(project):
    return [json.loads((project.folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.mlflow
def test_a_script_job_runs_and_goes_on(jobs, store):
    done = jobs.run("launch", "--gpus", "2", "jobs/job.yaml", "script.2=0.5")
    assert done.code == 1
    assert "failed: RuntimeError: not yet" in done.last_lines
    [folder] = jobs.runs()
    run = RunDir(folder)
    arguments = ["--lr", "0.5", "--fast", "true", "007", "0.001"]
    path = str(jobs.folder / "jobs" / "sub")
    assert read_reports(jobs) == [[["jobs/sub/train.py", *arguments], path, str(jobs.folder), str(folder), ""]] * 2
    assert yaml.safe_load(run.job.read_text()) == {
        "name": "by-script",
        "restarts": 0,
        "script": ["sub/train.py", *arguments],
        "mlflow": {"experiment": "tiny", "tracking_uri": None, "run_name": None},
        "launch": {"device": "cpu", "hang_timeout_s": 1800.0},
        "slurm": {"setup": [], "env": {}, "container": None, "dtrain": None, "requeue_on_failure": False},
    }
    assert (run.code / "sub" / "train.py").read_text() == REPORTING

    again = ["launch", "--gpus", "2", "--resume", "jobs/job.yaml"]
    done = jobs.run(*again)
    assert done.code == 2
    assert 'script.2: "0.5" before, "0.1" now' in done.err
    jobs.write("go", "")
    before = read_reports(jobs)
    done = jobs.run(*again, "script.2=0.5", "--no-preload")
    assert done.code == 0, done.err
    assert jobs.runs() == [folder]
    assert read_reports(jobs) == before
    assert run.status()["state"] == "finished"
    recorded = MlflowClient(store).get_run(run.status()["mlflow_run_id"])
    assert (recorded.info.status, recorded.data.params["script.0"]) == ("FINISHED", "sub/train.py")
    done = jobs.run(*again, "--run-dir", str(folder), "script.2=0.5")
    assert (done.code, done.err) == (0, f"{folder} is finished; nothing to resume\n")


def test_a_script_job_may_name_a_module(jobs):
    """The job's folder is looked in first, as it is for a model; also where torch has loaded one of that name."""
    jobs.write("jobs/statistics.py", "of_ones_own = True\n")
    jobs.write("jobs/sub/module.py", f"import statistics\nassert statistics.of_ones_own\n{REPORTING}")
    jobs.write("go", "")
    done = jobs.run("launch", "--run-dir", "run", "jobs/job.yaml", "script=[-m, sub.module, --lr, 0.1]")
    assert done.code == 0, done.err
    assert (
        "jobs/statistics.py has the name of a standard library module that torch has imported: each rank gets"
        in done.err
    )
    argv, path, folder, *_ = json.loads((jobs.folder / "report-0.json").read_text())
    assert argv == [str(jobs.folder / "jobs" / "sub" / "module.py"), "--lr", "0.1"]
    assert (path, folder) == (str(jobs.folder / "jobs"), str(jobs.folder))


CHECKED = {
    "right": ("sub/train.py", 0, ""),
    "missing": ("sub/tarin.py", 2, "script: jobs/sub/tarin.py: no such file; did you mean train.py?"),
    "syntax": ("sub/broken.py", 2, "script: jobs/sub/broken.py:1: SyntaxError: invalid syntax"),
    "module": ("[-m, sub.nothing]", 2, "script: there is no module sub.nothing"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_check_finds_what_is_wrong_with_the_script(name, jobs):
    script, code, says = CHECKED[name]
    jobs.write("jobs/sub/broken.py", "= 1\n")
    jobs.write("jobs/job.yaml", f"name: by-script\nscript: {script}\n")
    done = jobs.run("check", "jobs/job.yaml")
    assert (done.code, done.err[: len("jobs/job.yaml:2: " + says)]) == (code, says and "jobs/job.yaml:2: " + says)
    assert ("jobs/job.yaml is right: schema and jobs/sub/train.py" in done.out) == (code == 0)


def test_check_exact_is_for_jobs_with_a_model(jobs):
    done = jobs.run("check", "--exact", "jobs/job.yaml")
    assert done.code == 2
    assert "jobs/job.yaml:3: script: is a script that trains by itself: --exact is for jobs with a model" in done.err


NO_EFFECT = "has no effect with script, which decides that itself; leave it out"
NO_SCRIPT = "expected a script such as train.py, or a list: the script (or -m, module) and its arguments, found"
MISTAKES = {
    "model": ("model: {_target_: net.Net}", f"job.yaml:3: model: {NO_EFFECT}"),
    "seed": ("seed: 1", f"job.yaml:3: seed: {NO_EFFECT}"),
    "two": ("fit: {epochs: 1}\nstep: x", f"job.yaml:3: fit: {NO_EFFECT}\njob.yaml:4: step: {NO_EFFECT}"),
    "restarts": ("fit: {restarts: 3}", f"job.yaml:3: fit: {NO_EFFECT}; with script, write restarts beside it"),
    "unknown": ("lunch: {device: cpu}", "job.yaml:3: lunch: unknown key; did you mean launch?"),
    "within": ("mlflow: {experimant: a}", "job.yaml:3: mlflow.experimant: unknown key; did you mean experiment?"),
    "device": (
        "launch: {device: gpu}",
        "job.yaml:3: launch.device: expected auto, cpu or cuda, found 'gpu'; did you mean cpu?",
    ),
}
SCRIPTS = {
    "null": ("null", f"{NO_SCRIPT} null"),
    "mapping": ("{a: 1}", f"{NO_SCRIPT} a mapping"),
    "empty": ("''", f"{NO_SCRIPT} ''"),
    "no-words": ("[]", f"{NO_SCRIPT} a list of 0"),
    "no-module": ("[-m]", f"{NO_SCRIPT} a list of 1"),
    "nested": ("[train.py, [1]]", f"{NO_SCRIPT} a list of 2"),
}


def mistakes(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load("job.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_go_with_a_script(name, tmp_path, monkeypatch):
    text, says = MISTAKES[name]
    assert mistakes(tmp_path, monkeypatch, f"name: tiny\nscript: train.py\n{text}\n").startswith(says)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_no_script(name, tmp_path, monkeypatch):
    text, says = SCRIPTS[name]
    assert mistakes(tmp_path, monkeypatch, f"name: tiny\nscript: {text}\n") == f"job.yaml:2: script: {says}"


def test_a_job_without_a_script_still_needs_a_model(tmp_path, monkeypatch):
    said = mistakes(tmp_path, monkeypatch, "name: tiny\nscirpt: train.py\n").splitlines()
    assert "job.yaml:2: scirpt: unknown key; did you mean script?" in said
    assert [line for line in said if ": model: missing" in line]
    assert mistakes(tmp_path, monkeypatch, "script: train.py\n") == "job.yaml:1: name: missing"


def test_a_script_job_comes_back_from_its_text(jobs, monkeypatch):
    monkeypatch.chdir(jobs.folder)
    job = load("jobs/job.yaml").job
    jobs.write("again.yaml", dump_job(job))
    assert load("again.yaml").job == job
    assert not differences(job, load("again.yaml").job)
    with pytest.raises(UserError, match=r"jobs/job.yaml:3: script: expected a job with a model"):
        load_job("jobs/job.yaml")


def test_the_schema_knows_both_kinds_of_job():
    schema = job_json_schema()
    assert schema["additionalProperties"] is False
    assert {"script", "model"} <= set(schema["properties"])
    assert schema["if"] == {"required": ["script"]}
    allowed = {key for key in schema["properties"] if schema["then"]["properties"].get(key, True)}
    assert allowed == {"name", "script", "mlflow", "launch", "slurm"}
    assert set(schema["else"]["required"]) == {"name", "model", "data", "optimizer", "fit"}
