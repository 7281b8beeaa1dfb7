"""A job of 2 nodes by 2 ranks, interrupted five times on a real Slurm cluster, beside the same job left alone.

    python tests/faults/slurm.py

`scontrol requeue`, a node that dies, preemption, the time limit, and `scontrol requeue` once more. In the end the
weights must be the same to the bit, and MLflow must have one run with each step once. Exit code 1 if not. It takes
about four minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from cluster import Site, running
from command import STEPS, Project, make_store
from mlflow import MlflowClient

from dtrain.files import read_json

EPOCHS = 6
GATE = 4  # in each start, the step at which the ranks wait for the interruption


def requeue(site: Site, job: str, log: Callable[[], str]) -> None:
    site.cluster.run("scontrol", "requeue", job)


def kill_node(site: Site, job: str, log: Callable[[], str]) -> None:
    site.cluster.kill_node("node1")
    site.cluster.wait(job, "PENDING")
    site.cluster.start_node("node1")


def preempt(site: Site, job: str, log: Callable[[], str]) -> None:
    other = site.cluster.sbatch("true", "--nodes=2", "--exclusive", cwd=site.folder)
    site.cluster.until(lambda: "SIGTERM: stopping" in log(), log)
    site.go_on()
    site.cluster.wait(other, "COMPLETED")


def reach_time_limit(site: Site, job: str, log: Callable[[], str]) -> None:
    site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=2")
    site.cluster.until(lambda: "SIGUSR2: stopping" in log(), log)
    site.go_on()
    site.cluster.until(lambda: "the time limit was near: requeued" in log(), log)
    site.cluster.wait(job, "PENDING")
    site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="dtrain-slurm-faults-") as folder, running() as cluster:
        store = make_store(Path(folder))
        sites = []
        for name in ("alone", "interrupted"):
            (Path(folder) / name).mkdir()
            sites.append(Site(Project(Path(folder) / name, store), cluster))
            sites[-1].project.job(
                launch={"device": "cpu"},
                fit={"epochs": EPOCHS},
                checkpoint={"every": 1},
                slurm={"time": 30, "partition": "preemptable"},
                **({"model": {"_target_": "net.Net", "gate": GATE}} if name == "interrupted" else {}),
            )
        alone, interrupted = sites
        cluster.wait(alone.submit(), "COMPLETED")
        job = interrupted.submit()
        for interrupt in (requeue, kill_node, preempt, reach_time_limit, requeue):
            interrupted.until_waiting()
            begin = len(interrupted.log())
            print(interrupt.__name__, f"at step {interrupted.project.status()['step']}", flush=True)
            interrupt(interrupted, job, lambda begin=begin: interrupted.log()[begin:])
            for file in ("waiting", "go"):
                (interrupted.folder / file).unlink(missing_ok=True)
        interrupted.until_waiting()
        interrupted.go_on()
        ended = cluster.wait(job, "COMPLETED")
        problems = differences(interrupted, alone, MlflowClient(store))
    print(f"{ended['Restarts']} restarts; " + ("; ".join(problems) or "the bits, the rows and the curve of the other"))
    return 1 if problems else 0


def differences(interrupted: Site, alone: Site, client: MlflowClient) -> list[str]:
    """What tells the two runs apart, but should not."""
    found = []
    weights = [torch.load(site.project.run_dir().last_weights) for site in (interrupted, alone)]
    if not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1]):
        found.append("other weights")
    if interrupted.history() != alone.history():
        found.append("other rows in metrics.jsonl")
    run = client.get_run(read_json(interrupted.project.run_dir().path / "mlflow.json")["run_id"])
    if run.info.status != "FINISHED" or len(client.search_runs([run.info.experiment_id])) != 2:
        found.append("not one finished run in MLflow")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")]
    if sorted(steps) != [STEPS * epoch for epoch in range(1, EPOCHS + 1)]:
        found.append(f"the steps {steps} in MLflow")
    return found


if __name__ == "__main__":
    sys.exit(main())
