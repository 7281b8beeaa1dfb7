"""The development cluster is a real Slurm: it places, signals, requeues, preempts and cancels jobs as others do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cluster import Cluster, control

# The first time it waits for its end, the second time it has nothing to do.
TWICE = """
echo "started ${SLURM_RESTART_COUNT:-anew}" >> events
[ -n "$SLURM_RESTART_COUNT" ] && exit
"""


def events(folder: Path) -> list[str]:
    file = folder / "events"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job soon at its time limit, and its folder. Slurm looks each half minute: other tests go on meanwhile."""
    folder = tmp_path_factory.mktemp("limited")
    script = TWICE + "trap 'echo asked >> events; scontrol requeue $SLURM_JOB_ID' USR2; sleep 1000 & wait; wait"
    options = ["--time=1", "--signal=B:USR2@60", "--nodelist=node0"]
    return cluster.sbatch(script, *options, cwd=folder), folder


def test_tasks_run_on_both_nodes_each_with_a_gpu_of_its_own(cluster, tmp_path):
    script = "srun bash -c 'echo $SLURMD_NODENAME $SLURM_NODEID $CUDA_VISIBLE_DEVICES > task-$SLURM_PROCID'"
    job = cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", cwd=tmp_path)
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    tasks = [(tmp_path / f"task-{task}").read_text().split() for task in range(4)]
    assert tasks == [["node0", "0", "0"], ["node0", "0", "1"], ["node1", "1", "0"], ["node1", "1", "1"]]


def test_an_array(cluster, tmp_path):
    job = cluster.sbatch("echo $SLURM_ARRAY_JOB_ID > $SLURM_ARRAY_TASK_ID", "--array=1,3", cwd=tmp_path)
    for task in ("1", "3"):
        cluster.wait(f"{job}_{task}", "COMPLETED")
        assert (tmp_path / task).read_text().strip() == job
    assert not (tmp_path / "2").exists()


@pytest.mark.campaign
def test_a_preempted_job_is_asked_and_requeued(cluster, tmp_path):
    script = TWICE + "srun bash -c 'trap \"echo asked >> events; exit\" TERM; touch up; sleep 1000 & wait'; sleep 1000"
    gpus = ["--nodes=1", "--nodelist=node1", "--gpus-per-node=2"]
    job = cluster.sbatch(script, "--partition=preemptable", *gpus, cwd=tmp_path)
    cluster.until((tmp_path / "up").exists, lambda: str(cluster.job(job)))
    preemptor = cluster.sbatch("echo preemptor >> events", *gpus, cwd=tmp_path)
    cluster.wait(preemptor, "COMPLETED")
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert events(tmp_path) == ["started anew", "asked", "preemptor", "started 1"]


def test_a_node_dies_and_comes_back(cluster, tmp_path):
    folders = [tmp_path / "requeued", tmp_path / "failed"]
    for folder in folders:
        folder.mkdir()
    script = TWICE + "trap 'echo asked >> events' TERM; sleep 1000 & wait"
    requeued = cluster.sbatch(script, "--nodelist=node1", cwd=folders[0])
    failed = cluster.sbatch(script, "--nodelist=node1", "--no-requeue", cwd=folders[1])
    for folder in folders:
        cluster.until(lambda folder=folder: events(folder))
    cluster.kill_node("node1")
    cluster.wait(failed, "NODE_FAIL")
    cluster.wait(requeued, "PENDING")
    cluster.start_node("node1")
    cluster.wait(requeued, "COMPLETED")
    assert [events(folder) for folder in folders] == [["started anew", "started 1"], ["started anew"]]


def test_a_cancelled_job_ends(cluster, tmp_path):
    script = "srun --ntasks=2 bash -c 'echo $$ > pid-$SLURM_PROCID; exec sleep 1000'"
    job = cluster.sbatch(script, "--nodes=2", "--ntasks-per-node=1", cwd=tmp_path)
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    cluster.until(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
    cluster.cancel(job)
    cluster.wait(job, "CANCELLED")
    for file in files:
        assert not is_alive(int(file.read_text()))


def test_a_job_is_asked_before_its_time_limit_and_requeues_itself(cluster, limited):
    job, folder = limited
    assert cluster.wait(job, "COMPLETED", "TIMEOUT")["JobState"] == "COMPLETED"
    assert events(folder) == ["started anew", "asked", "started 1"]


def test_a_second_cluster_runs_beside_the_first_and_leaves_nothing(cluster, tmp_path):
    other = cluster.folder.parent / "other"
    pid = tmp_path / "pid"
    try:
        assert control(other, "up").returncode == 0
        second = Cluster(other)
        second.sbatch("setsid sleep 1000 & echo $! > pid; wait", cwd=tmp_path)
        second.until(lambda: pid.exists() and pid.read_text())
        assert control(other, "up").returncode == 0
        assert is_alive(int(pid.read_text()))
    finally:
        assert [control(other, "down").returncode for _ in range(2)] == [0, 0]
    assert not is_alive(int(pid.read_text()))
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if str(other).encode() in environ(path)]
    assert cluster.run("sinfo", "--noheader", "--format=%D %a", "--partition=gpu") == "2 up\n"


def test_what_is_not_a_cluster_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = control(tmp_path, "up")
    assert done.returncode == 2
    assert "holds something else" in done.stderr
    assert os.listdir(tmp_path) == ["thesis.tex"]


def environ(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Whether it runs; a process that nobody has waited for yet does not."""
    return bool(environ(Path(f"/proc/{pid}/environ")))
