"""Runs on a real Slurm cluster of two nodes, from submission through interruptions to the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import SIZE, Cluster, Site
from command import DTRAIN, STEPS, Project

from dtrain.files import read_json
from dtrain.run.sweep import Sweep

GATE = 7  # the step that waits for a file, the second one of epoch 2
TOTAL = 2 * STEPS
FAULT = """
import os

import net


class Net(net.Net):
    def forward(self, x):
        if self.training and self.calls == 3 and os.environ["RANK"] == "3":
            raise ValueError("the flux capacitor is empty")
        return super().forward(x)
"""

# Leaves what it sees of the environment.
NOTING = """
import os

import net


class Net(net.Net):
    def __init__(self, seen):
        super().__init__()
        with open(seen, "w") as file:
            file.write(os.environ.get("NASTY", ""))
"""


@pytest.fixture
def site(project: Project, cluster: Cluster) -> Site:
    project.job(launch={"device": "cpu"}, slurm={"time": 30})
    return Site(project, cluster)


@pytest.fixture(scope="module")
def alone(new_project) -> Site:
    """The same job on four ranks of one machine, left alone."""
    project = new_project("alone")
    project.job(launch={"device": "cpu"})
    done = project.run("launch", "--gpus", "4", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    return Site(project, None)


# What a job leaves in a shell within it, or a user in their profile: each of these would change what is submitted, or
# have srun refuse it.
AROUND = {
    "SLURM_JOB_ID": "999999",
    "SLURM_MEM_PER_CPU": "1",
    "SLURM_MEM_PER_NODE": "1",
    "SLURM_NTASKS_PER_NODE": "7",
    "SLURM_CPU_BIND": "mask_cpu:0x8000000",
    "SLURM_DISTRIBUTION": "arbitrary",
    "SQUEUE_STATES": "SUSPENDED",
    "SBATCH_ARRAY_INX": "1-3",
    "SBATCH_ERROR": "elsewhere",
    "SBATCH_GPUS_PER_TASK": "1",
}


def test_two_nodes_train_as_one_machine_does(site, alone):
    """Also where it is submitted from within a job, and the site's jobs begin with an environment of their own."""
    site.project.write("noting.py", NOTING)
    own = ("slurm.export=NONE", "slurm.env.MLFLOW_TRACKING_URI=''", "slurm.env.NASTY=here", "model.seen=seen")
    own += ("model._target_=noting.Net",)
    done = site.run("launch", "--slurm", *SIZE, "--wait", "--run-dir", "run", "job.yaml", *own, **AROUND)
    assert done.code == 0, done.err
    assert site.history() == alone.history()  # to the bit
    assert (site.folder / "seen").read_text() == "here"
    assert site.project.status()["slurm_job_id"] == done.err.split("Slurm job ")[1].split()[0]
    status = site.run("status", "run")
    assert "state     finished (exit code 0)" in status.out
    assert "completed" in status.out


def test_an_allocation_of_the_user_s_own(site, alone):
    """The options that it was made with are meant for other steps."""
    own = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=1")
    done = site.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", within=own)
    assert done.code == 0, done.err
    assert "at 127.0.0.1:" in done.err
    assert site.history() == alone.history()

    done = site.run("launch", "--nodes", "3", "--run-dir", "other", "job.yaml", within=own)
    assert done.code == 2
    assert "--nodes 3: Slurm job" in done.err


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("tasks", "options"),
    [
        ("--ntasks-per-node=1", "--gpus 2"),
        ("--ntasks-per-node=1", "--nnodes 2 --nproc-per-node 2 --rdzv-endpoint 127.0.0.1:20999"),
        ("--ntasks-per-node=2 --gpus-per-task=1", ""),
    ],
)
def test_tasks_of_the_user_s_own_srun(tasks, options, site, alone):
    """One for each node, or for each GPU; also with what a script says to torchrun."""
    line = f"srun {DTRAIN} launch {options} --run-dir run job.yaml"
    job = site.cluster.sbatch(f"export MLFLOW_TRACKING_URI=; {line}", "--nodes=2", *tasks.split(), cwd=site.folder)
    site.cluster.wait(job, "COMPLETED")
    assert site.history() == alone.history()


@pytest.mark.campaign
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_the_command_in_an_allocation_stops_its_run(number, code, site):
    conf, train = site.cluster.environment["SLURM_CONF"], f"--run-dir run job.yaml model.gate={GATE}"
    line = f"salloc --quiet --nodes=2 bash -c 'echo $$ > own; exec dtrain launch --gpus 1 {train}'"
    with site.project.shell_running(f"export SLURM_CONF={conf}; {line}") as command:
        command.until((site.folder / "waiting").exists)
        os.kill(int((site.folder / "own").read_text()), number)
        command.until(lambda: "stopping at the next step" in command.err)
        site.go_on()
        assert command.wait().code == code
    assert site.project.status()["state"] == "stopped"


@pytest.mark.mlflow
def test_a_run_near_its_time_limit_goes_on_to_the_same_end(site, alone):
    """The signal comes from here: Slurm's own clock goes by minutes (`make faults` waits for it)."""
    job = site.submit(f"model.gate={GATE}", "checkpoint.every=1")
    site.until_waiting()
    site.cluster.near_limit(job)
    site.cluster.until(lambda: "SIGUSR2: stopping" in site.log(), site.log)
    site.go_on()
    site.cluster.until(lambda: "the time limit was near: requeued" in site.log(), site.log)
    site.cluster.wait(job, "COMPLETED")
    assert site.history() == alone.history()
    assert (site.project.status()["state"], site.project.status()["restarts"]) == ("finished", 1)


def test_a_node_that_dies_costs_a_start(site, alone):
    job = site.submit(f"model.gate={GATE}", "checkpoint.every=1")
    site.until_waiting()
    site.cluster.kill_node("node1")
    site.go_on()
    site.cluster.wait(job, "PENDING")
    site.cluster.start_node("node1")
    site.cluster.wait(job, "COMPLETED")
    assert site.history() == alone.history()


def test_the_cause_on_the_second_node_is_the_headline(site):
    site.project.write("fault.py", FAULT)
    done = site.run("launch", "--slurm", *SIZE, "--wait", "--run-dir", "run", "job.yaml", "model._target_=fault.Net")
    assert done.code == 1
    assert "rank 3 failed: ValueError: the flux capacitor is empty" in done.err
    assert site.project.status()["error"]["rank"] == 3
    assert "requeued" not in done.err


@pytest.mark.parametrize(("by", "says"), [("scancel", "SIGTERM: stopping"), ("dtrain cancel", "SIGINT: stopping")])
def test_what_is_cancelled_stops_and_does_not_come_back(by, says, site):
    job = site.submit(f"model.gate={GATE}", size=("--gpus", "2"))
    site.until_waiting()
    assert f"slurm     job {job}, running on node" in site.run("status", "run").out
    with ThreadPoolExecutor() as beside:
        cancelled = (
            beside.submit(site.cluster.cancel, job) if by == "scancel" else beside.submit(site.run, "cancel", "run")
        )
        site.cluster.until(lambda: says in site.log(), site.log)
        site.go_on()
        found = site.cluster.wait(job, "CANCELLED", "FAILED")
        if by == "dtrain cancel":
            done = cancelled.result()
            assert done.code == 0, done.err
            assert "with a checkpoint" in done.out
    assert found["Restarts"] == "0"
    site.cluster.until(lambda: site.project.status()["state"] != "running")
    assert site.project.status()["state"] == "stopped"
    assert GATE <= site.project.status()["step"] < TOTAL


def test_a_preempted_run_continues(site, alone):
    job = site.submit(f"model.gate={GATE}", "slurm.partition=preemptable")
    site.until_waiting()
    other = site.cluster.sbatch("true", "--nodes=2", "--exclusive", cwd=site.folder)
    site.cluster.until(lambda: "SIGTERM: stopping" in site.log(), site.log)
    site.go_on()
    site.cluster.wait(other, "COMPLETED")
    assert site.cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert site.history() == alone.history()


@pytest.mark.campaign
@pytest.mark.mlflow
def test_a_sweep_is_an_array(site, alone):
    done = site.run(
        *("sweep", "--slurm", "--wait", "--max-parallel", "2", "--gpus", "1", "--run-dir", "all", "job.yaml"),
        *("optimizer.lr=0.1,0.02", "data.batch_size=8,4"),
    )
    assert done.code == 0, done.err
    sweep = Sweep.read(site.folder / "all")
    assert [run.status()["state"] for run in sweep.runs] == ["finished"] * 4
    numbers = {read_json(run.submitted("slurm"))["job_id"].partition("_")[0] for run in sweep.runs}
    assert numbers == {done.err.split("Slurm job ")[1].split()[0]}
    assert len({read_json(run.path / "mlflow.json")["run_id"] for run in sweep.runs}) == 4
    rows = [run.rows()[-1] for run in sweep.runs]
    assert [row["step"] for row in rows] == [10, 20, 10, 20]
    assert rows[0]["train_loss"] == pytest.approx(alone.history()[-1]["train_loss"], rel=1e-5)
    assert "4 of 4 finished" in site.run("runs", ".").out


def test_what_is_meant_as_data_is_never_executed(site):
    """In every text of the job, and in the paths."""
    nasty = "a b'\"$(touch owned)`touch owned`;%jü"
    folder = site.folder / nasty.replace("/", "")
    folder.mkdir()
    for name in ("net.py", "data.py"):
        shutil.copy(site.folder / name, folder)
    project = site.project
    project.job(
        model={"_target_": "noting.Net", "seen": str(site.folder / "seen")},
        launch={"device": "cpu"},
        slurm={"comment": nasty, "env": {"NASTY": nasty}, "mail-user": nasty},
    )
    (folder / "noting.py").write_text(NOTING)
    shutil.move(site.folder / "job.yaml", folder / "job.yaml")
    done = site.run("launch", "--slurm", "--wait", "--run-dir", f"{nasty}/run\n{nasty}", f"{nasty}/job.yaml")
    assert done.code == 0, done.err
    assert (site.folder / "seen").read_text() == nasty
    assert not list(site.folder.rglob("owned"))


def test_a_check_asks_slurm_and_a_node(site):
    done = site.run("check", "--slurm", *SIZE, "job.yaml")
    assert done.code == 0, done.err
    assert "using 4 processors on nodes node[0-1] in partition gpu" in done.out
    assert "partition gpu: up to 60 minutes, 4 CPUs and 2 GPUs a node" in done.out
    assert f"a node sees {site.folder} and has the same dtrain" in done.out
    assert not list(site.folder.glob(".dtrain-check-*"))

    done = site.run("launch", "--slurm", "--dry-run", "--gpus", "1", "job.yaml", "launch.device=auto")
    assert "--gres=gpu:1 --cpus-per-task=2 " in done.out  # half a node

    wrong = ("slurm.time=2-00", "launch.device=auto", "slurm.setup=[PATH=/nowhere]")
    done = site.run("check", "--slurm", "--nodes", "3", "--gpus", "h100:2", "job.yaml", *wrong)
    assert done.code == 2
    assert "sbatch refuses it: " in done.err
    assert "slurm.time: 2880 minutes are more than partition gpu allows, 60 minutes" in done.err
    assert "--gpus h100:2: partition gpu has no GPUs of this type, but some without a type" in done.err


def test_a_check_of_a_node_without_dtrain(site, tmp_path_factory):
    hidden = tmp_path_factory.mktemp("hidden")
    lines = ["source() { :; }", f"dtrain() {{ false; }}; cd {hidden}"]
    done = site.run("check", "--slurm", "job.yaml", f"slurm.setup={json.dumps([*lines, 'exit 3'])}")
    assert done.code == 2
    assert f"{site.folder} is not visible on the nodes" in done.err
    assert "the nodes can't run" in done.err


def test_a_queued_run_says_why_and_can_be_cancelled(site):
    job = site.submit("slurm.begin=now+1hour")
    status = site.run("status", "run")
    assert "state     submitted" in status.out
    assert f"slurm     job {job}, queued: waiting for its start time" in status.out
    assert "submitted" in site.run("runs", ".").out
    second = site.run("launch", "--slurm", "--resume", "--run-dir", "run", "job.yaml")
    assert second.code == 2
    assert f"already is Slurm job {job}, queued" in second.err
    done = site.run("cancel", "run")
    assert (done.code, done.out) == (0, "run was cancelled before it began\n")
    site.cluster.wait(job, "CANCELLED")


def test_what_sbatch_refuses_leaves_nothing(site):
    done = site.run("launch", "--slurm", "--run-dir", "run", "job.yaml", "slurm.partition=nowhere")
    assert done.code == 2
    assert "invalid partition specified: nowhere" in done.err
    assert "Traceback" not in done.err
    if re.search(r" 2[1-3]\.", site.cluster.run("sbatch", "--version")):
        done = site.run("launch", "--slurm", "--run-dir", "run", "job.yaml", "slurm.stepmgr=true")
        assert "slurm.stepmgr: new in Slurm 24.05, but this is 2" in done.err
    assert not (site.folder / "run").exists()


def test_without_slurm(project):
    done = project.run("launch", "--slurm", "job.yaml", PATH="/nowhere")
    assert done.code == 2
    assert "sbatch is not found: Slurm is not installed here, or not on PATH" in done.err
    assert not project.runs()
