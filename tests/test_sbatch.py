"""What is submitted to Slurm: golden files, quoting that nothing breaks out of, and what sbatch does not know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.errors import UserError
from dtrain.job import Slurm
from dtrain.loading import load
from dtrain.slurm.environment import Place, first_host, place
from dtrain.slurm.jobs import QueuedJob, look_up
from dtrain.slurm.render import Array, Gpus, Submission, render

GOLDEN = Path(__file__).parent / "golden"
RUN, FOLDER = Path("/data/runs/digits-1"), Path("/home/me/thesis")


def rendered(slurm: Slurm, *, run: Path = RUN, gpus: str = "4", **others: Any) -> Submission:
    size = Gpus.parse(gpus)
    assert size is not None
    return render("digits", slurm, run, FOLDER, 2, size, dtrain="/opt/dtrain", **others)


# By name: the section, and what else is asked for.
JOBS = {
    "plain": (Slurm(), {}),
    "all": (
        Slurm.model_validate(
            {
                "time": "01:00:00",
                "partition": "gpu",
                "mail-type": ["END", "FAIL"],
                "exclusive": True,
                "hold": False,
                "signal": "B:USR2@300",
                "setup": ["module load cuda/12.8", "source ~/env/bin/activate"],
                "env": {"HF_HOME": "/data/it's mine"},
                "container": "/images/torch 2.sif",
                "requeue_on_failure": True,
            }
        ),
        {"gpus": "a100:4"},
    ),
    "cpu": (Slurm(), {"on_cpu": True}),
    "script": (
        Slurm(),
        {"options": ["--show-ranks", "all"], "target": ["/home/me/it's/train.py", "--", "--lr", "0.1"]},
    ),
    "array": (Slurm(), {"array": Array([0, 1, 2, 5, 7, 8], 2)}),
}


@pytest.mark.parametrize("name", JOBS)
def test_what_is_submitted(name):
    slurm, options = JOBS[name]
    submission = rendered(slurm, **options)
    expected = (GOLDEN / f"{name}.sbatch").read_text()
    assert f"# {submission.command}\n{submission.script}" == expected


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_valid_shell(name):
    slurm, options = JOBS[name]
    done = subprocess.run(["bash", "-n"], input=rendered(slurm, **options).script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


NASTY = [
    "a b",
    "it's",
    'say "x"',
    "$(touch owned)",
    "`touch owned`",
    "; touch owned",
    "a\nb",
    "%j",
    "ü\u2028",
    "-x",
    "@run@",
]


@pytest.mark.parametrize("text", NASTY)
def test_data_stays_data(text, tmp_path):
    """As bash and srun get it: each value arrives whole, and nothing in it is executed."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$VALUE" "$@" > seen\n')
    (tmp_path / "srun").chmod(0o755)
    run = tmp_path / text
    run.mkdir()
    slurm = Slurm.model_validate({"comment": text, "env": {"VALUE": text}, "container": text})
    submission = render(text, slurm, run, tmp_path, 1, Gpus(1), dtrain=text, options=[text], target=[text])
    assert f"--comment={text}" in submission.arguments
    assert f"--job-name={text}" in submission.arguments
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    subprocess.run(["bash"], input=submission.script, text=True, cwd=tmp_path, env=environment, check=False)
    value, *arguments = (tmp_path / "seen").read_text().split("\0")[:-1]
    assert value == text
    image, dtrain, *launch = arguments[arguments.index("--pwd") + 2 :]
    assert (image, dtrain) == (text, text)
    assert launch == ["launch", "--slurm-node", "--gpus", "1", "--resume", "--run-dir", str(run), text, text]
    assert arguments[arguments.index("--bind") + 1] == str(run)
    assert not (tmp_path / "owned").exists()


# A start that its time limit ends: it has done a step, and saved it if it may.
STARTS = """#!/bin/bash
echo . >> steps; step=$(wc -l < steps)
echo "{\\"step\\": $step}" > run/status.json
[[ -e may-save ]] && echo "step-$step" > "$(cat may-save)/checkpoints/latest"
exit 75
"""
SAYS = """#!/bin/bash
if [[ $1 == requeue ]]; then echo requeued; else echo "JobId=1 Reason=TimeLimit Restarts=0 PreemptTime=None "; fi
"""


def test_starts_that_save_nothing_are_not_requeued_for_ever(tmp_path):
    for name, text in (("srun", STARTS), ("scontrol", SAYS)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for folder in ("run", "elsewhere"):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "fits.json").write_text(json.dumps({"fits": ["../elsewhere"]}, indent=2))
    script = render("digits", Slurm(), tmp_path / "run", tmp_path, 1, Gpus(1), dtrain="dtrain").script

    def start() -> str:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
        done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 75
        return done.stdout + done.stderr

    for saves_in in ("run", "elsewhere"):  # the script's own run folder, and one that it has given to a fit
        (tmp_path / "may-save").write_text(saves_in)
        assert all("requeued, to continue" in start() for _ in range(4))
    (tmp_path / "may-save").unlink()
    assert ["requeued, to continue" in start() for _ in range(3)] == [True, True, False]
    assert "3 starts in a row saved no new checkpoint: not requeued" in start()


def test_a_percent_sign_in_the_run_folder_is_no_pattern():
    [output] = [each for each in rendered(Slurm(), run=Path("/data/%j")).arguments if each.startswith("--output")]
    assert output == "--output=/data/%%j/logs/slurm.log"


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("4", Gpus(4)), ("a100:2", Gpus(2, "a100")), ("nvidia_h100.80gb:1", Gpus(1, "nvidia_h100.80gb"))],
)
def test_gpus(text, gpus):
    assert Gpus.parse(text) == gpus
    assert str(gpus) == text


@pytest.mark.parametrize("text", ["0", "-1", "a100", "a100:", ":4", "a100:0", "a 100:2", "4:a100", ""])
def test_no_gpus(text):
    assert Gpus.parse(text) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node0", "node0"), ("a,b", "a"), ("gpu[01-04,07],login", "gpu01"), ("n[7,9-11]", "n7"), ("r[1-2]n[3,4]", "r1n3")],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


def test_a_place_among_the_nodes():
    environment = {
        "SLURM_JOB_ID": "15",
        "SLURM_NODEID": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
    }
    assert place(environment) == Place(2, 1, "127.0.0.1", 20015)
    unknown = {**environment, "SLURM_JOB_NODELIST": "no-such-host-[1-2]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert place(unknown).host == "10.0.0.7"
    with pytest.raises(UserError, match="for srun to start, within a job of Slurm: no SLURM_NODEID"):
        place({"SLURM_JOB_ID": "15"})


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("Resources", "queued: waiting for free nodes or GPUs"),
        ("(Priority)", "queued: waiting: jobs of higher priority are ahead"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "queued: a node that it needs is down or reserved"),
        ("JobHeldUser", "queued: held by you: scontrol release 7"),
        ("SomethingNew", "queued: SomethingNew"),
    ],
)
def test_why_a_job_waits(reason, says):
    assert QueuedJob("7", "PENDING", reason, "", "N/A").describe() == says
    soon = QueuedJob("7", "PENDING", reason, "", "2026-11-22T01:30:00").describe()
    assert soon == f"{says}; expected to start 2026-11-22 01:30:00"


MODEL = """
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
data: {train: {_target_: torch.utils.data.TensorDataset}, batch_size: 8}
loss: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.Adam}
fit: {epochs: 1}
""".strip()
# By name: the section, and what is said of it.
WRONG = {
    "unknown": ("{tme: 5}", "slurm.tme: is no option of sbatch; did you mean time?"),
    "underscore": ("{cpus_per_task: 5}", "slurm.cpus_per_task: is no option of sbatch; did you mean cpus-per-task?"),
    "ours": ("{nodes: 2}", "slurm.nodes: is dtrain's own: the command line says how many: --nodes and --gpus"),
    "array": ("{array: 1-4}", "slurm.array: is dtrain's own: dtrain sweep makes arrays"),
    "no-flag": ("{mem: true}", "slurm.mem: true is no value for it"),
    "flag": ("{contiguous: 3}", "slurm.contiguous: expected true or false"),
    "mapping": ("{mem: {a: 1}}", "slurm.mem: expected text or a number, or a list of them"),
    "null": ("{mem: null}", "slurm.mem: expected text or a number, or a list of them"),
    "setup": ("{setup: {module: x}}", "slurm.setup: expected a list"),
    "env": ("{env: {'a b': x}}", "slurm.env.a b: "),
    "signal": ("{signal: USR1@90}", "slurm.signal: expected B:USR2@ and the seconds ahead of the time limit"),
    "nul": ('{comment: "a\\0b"}', "slurm.comment: holds a NUL character"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_section_that_sbatch_would_not_take(name, tmp_path, monkeypatch):
    section, says = WRONG[name]
    monkeypatch.setattr("sys.path", [*sys.path])
    for kind in ("script: train.py", MODEL):
        (tmp_path / "job.yaml").write_text(f"name: x\n{kind}\nslurm: {section}\n")
        with pytest.raises(UserError) as refused:
            load(tmp_path / "job.yaml")
        assert f"job.yaml:{2 + len(kind.splitlines())}: {says}" in str(refused.value)


def test_a_wrong_section_is_said_before_anything_is_submitted(project):
    project.job(slurm={"tme": 5})
    done = project.run("launch", "--slurm", "--dry-run", "job.yaml")
    assert done.code == 2
    assert "slurm.tme: is no option of sbatch; did you mean time?" in done.err
    assert "Traceback" not in done.err
    assert not project.runs()


def test_what_goes_with_slurm(project):
    for arguments, says in {
        ("--wait",): "--wait goes with --slurm",
        ("--slurm", "--gpus", "a100"): "--gpus a100: expected a number above 0, or with a type, such as a100:4",
    }.items():
        done = project.run("launch", *arguments, "job.yaml")
        assert done.code == 2
        assert says in done.err


def test_a_dry_run_prints_what_would_be_submitted(project):
    done = project.run(
        "launch", "--slurm", "--dry-run", "--nodes", "3", "--gpus", "a100:2", "--run-dir", "run", "job.yaml"
    )
    assert done.code == 0, done.err
    command, _, script = done.out.partition("\n\n")
    assert command.startswith("sbatch --parsable --job-name=tiny --nodes=3 ")
    assert "--gpus-per-node=a100:2" in command
    assert command.endswith(f" {project.folder}/run/job.sbatch")
    assert script.startswith("#!/bin/bash\n")
    assert not (project.folder / "run").exists()


def test_a_job_that_has_left_the_queue_is_looked_up_in_the_accounts(tmp_path, monkeypatch):
    """What the commands of Slurm 22.05 print there; the development cluster keeps no accounts."""
    answers = {
        "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "sacct": "[[ $* == *--jobs=7 ]] && echo 'CANCELLED by 1000|node[0-1]'",
    }
    for name, line in answers.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = look_up("7")
    assert found.is_over
    assert found.describe() == "cancelled on node[0-1]"
    assert look_up("8") is None
