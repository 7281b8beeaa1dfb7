"""What is submitted to Slurm: golden files, quoting that nothing breaks out of, and what sbatch does not know."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.clusters.cluster import Array, Gpus, Submittable
from dtrain.errors import UserError
from dtrain.launcher.agent.subcommand import own_command
from dtrain.launcher.commands.allocation import located
from dtrain.launcher.commands.request import RankOptions, Request
from dtrain.schema.job import ScriptJob
from dtrain.schema.loading import load
from dtrain.schema.sbatch import unknown_to
from dtrain.schema.sections import Slurm
from dtrain.slurm.cluster import dtrain_command
from dtrain.slurm.command import outside_a_job
from dtrain.slurm.environment import Place, cpus, expand, is_task, place
from dtrain.slurm.jobs import SlurmJob, look_up
from dtrain.slurm.partition import cpus_beside
from dtrain.slurm.render import BatchScript, probe, render

GOLDEN = Path(__file__).parent / "golden"
RUN, FOLDER = Path("/data/runs/digits-1"), Path("/home/me/thesis")


def submittable(
    name: str = "digits", job: ScriptJob | None = None, nodes: int = 1, gpus: str = "1", **others: Any
) -> Submittable:
    size = Gpus.parse(gpus)
    assert size is not None
    return Submittable(name, job, FOLDER, nodes, size, ["/opt/dtrain"], **others)


def rendered(
    slurm: Slurm, *, run: Path = RUN, array: Array | None = None, cpus: int | None = None, **job: Any
) -> BatchScript:
    wanted = submittable(**{"nodes": 2, "gpus": "4", **job})
    return render(wanted, slurm, run, FOLDER, dtrain=["/opt/dtrain"], array=array, cpus=cpus)


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
    "cpu": (
        Slurm(),
        {"job": ScriptJob.model_validate({"name": "digits", "script": "train.py", "launch": {"device": "cpu"}})},
    ),
    "gpus": (Slurm.model_validate({"gres": ["lscratch:100", "nic:2"], "dtrain": "/nodes/dtrain"}), {"cpus": 32}),
    "pyxis": (
        Slurm.model_validate(
            {
                "container-image": "nvcr.io#nvidia/pytorch:25.05-py3",
                "container-mounts": ["/scratch", "/data:/data:ro"],
                "container-writable": True,
                "env": {"PYTHONPATH": "/data/python"},
            }
        ),
        {"cpus": 8},
    ),
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
    assert f"# {shlex.join(['sbatch', *submission.arguments])}\n{submission.script}" == expected


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
    submission = render(submittable(text, options=[text], target=[text]), slurm, run, tmp_path, dtrain=[text])
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
    script = render(submittable(), Slurm(), tmp_path / "run", tmp_path, dtrain="dtrain").script

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
    ("node_list", "hosts"),
    [
        ("node0", ("node0",)),
        ("a,b", ("a", "b")),
        ("gpu[09-10,7],login", ("gpu09", "gpu10", "gpu7", "login")),
        ("r[1-2]n[3,4]-ib", ("r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib")),
    ],
)
def test_the_hosts_of_a_list(node_list, hosts):
    assert expand(node_list) == hosts


TASK = {
    "SLURM_JOB_ID": "15",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.[1-3]",
    "SLURM_NODELIST": "127.0.0.[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_CPUS_ON_NODE": "8",
}


def test_a_place_among_the_tasks():
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    assert is_task(TASK)
    assert place(TASK) == Place(5, 4, "127.0.0.1", 20015, hosts, 0, 1)
    second = {**TASK, "SLURM_STEP_ID": "1", "SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    assert place(second) == Place(5, 3, "127.0.0.1", 21024, hosts, 1, 2)
    assert (cpus(TASK), cpus(second), cpus({})) == (8, 4, None)
    unknown = {**TASK, "SLURM_STEP_NODELIST": "no-such-host-[1-3]", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}
    assert place(unknown).host == "10.0.0.7"
    assert not is_task({**TASK, "SLURM_NODELIST": "127.0.0.7"})  # a batch job that was submitted from a step
    with pytest.raises(UserError, match="only srun may start this, within a Slurm job: no SLURM_STEP_ID"):
        place({"SLURM_JOB_ID": "15"})


@pytest.mark.parametrize(
    ("visible", "on_node", "asked", "gpus", "own"),
    [
        ("0,1,2,3", "4", "auto", "auto", "2,3"),  # all tasks see all GPUs of the node
        ("0,1,2,3", "4", "4", "2", "2,3"),
        ("6", "4", "auto", "auto", "6"),  # --gpus-per-task=1
        ("GPU-a,GPU-b", "4", "2", "1", "GPU-a,GPU-b"),
        ("NoDevFiles", None, "2", "1", "NoDevFiles"),
        ("0", None, "2", "1", "0"),  # of a node whose GPUs Slurm does not know
    ],
)
def test_the_part_of_one_of_two_tasks_on_a_node(visible, on_node, asked, gpus, own, monkeypatch):
    here = {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"}
    for name, value in {**TASK, **here, "CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    found = located(Request(("job.yaml",), RankOptions(asked)), None, started_by_srun=False)
    assert (found.nodes.count, found.nodes.rank, found.ranks.gpus) == (5, 1, gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_what_does_not_fit_the_tasks(monkeypatch):
    for name, value in {**TASK, "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--gpus 3 is per node, but srun started 2 tasks on this one"):
        located(Request(("job.yaml",), RankOptions("3")), None, started_by_srun=False)
    with pytest.raises(UserError, match="--nodes 2: srun started this on 3"):
        located(Request(("job.yaml",)), 2, started_by_srun=False)
    with pytest.raises(UserError, match="2 tasks on a node with 1 GPUs: start one per GPU, or one per node"):
        located(Request(("job.yaml",)), None, started_by_srun=False)
    assert located(Request(("job.yaml",)), 1, started_by_srun=False).nodes.count == 1


# What scontrol prints of a node: Slurm 21.08 without CPUEfctv.
NODES = {
    "21.08": "NodeName=n1 CPUAlloc=0 CPUTot=64 Gres=gpu:a100:4(S:0-1) ThreadsPerCore=2 Comment=Gres=gpu:8",
    "22.05": "NodeName=n1 CPUAlloc=0 CPUEfctv=60 CPUTot=64 Gres=gpu:a100:4(S:0-1),gpu:t4:2 ThreadsPerCore=2",
    "25.05": "NodeName=n1 CPUAlloc=0 CPUEfctv=128 CPUTot=128 Gres=gpu:h100:8 ThreadsPerCore=1",
}


@pytest.mark.parametrize(
    ("nodes", "gpus", "options", "partition", "cpus"),
    [
        (["21.08"], "1", {}, "", 16),
        (["21.08"], "a100:3", {"hint": "nomultithread"}, "", 24),
        (["22.05"], "4", {}, "", 40),
        (["22.05"], "t4:1", {}, "", 10),
        (["25.05"], "8", {}, "MaxCPUsPerNode=96", 96),
        (["25.05", "21.08"], "4", {}, "", 64),  # on either
        (["25.05", "21.08"], "8", {}, "", 128),
        (["25.05"], "1", {}, "JobDefaults=DefCpuPerGPU=8", None),
        (["25.05"], "1", {"cpus-per-gpu": 4}, "", None),
        (["25.05"], "1", {"exclusive": True}, "", None),
    ],
)
def test_the_cpus_that_go_with_gpus(nodes, gpus, options, partition, cpus, tmp_path, monkeypatch):
    shown = "\n".join(NODES[name] for name in nodes)
    (tmp_path / "scontrol").write_text(
        f"""#!/bin/bash
case "$*" in
    *"show partition"*) echo 'PartitionName=gpu Default=YES Nodes=n[1-2] MaxTime=60 {partition}' ;;
    *"show node n[1-2]") echo '{shown}' ;;
    *) echo 'JobDefaults             = (null)' ;;
esac
"""
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    size = Gpus.parse(gpus)
    assert size is not None
    assert cpus_beside(size, options) == cpus


def test_cpus_that_can_t_be_known_are_said(project):
    done = project.run("launch", "--slurm", "--dry-run", "job.yaml", PATH="/usr/nothing")
    assert done.code == 0
    assert "warning: scontrol is not found" in done.err
    assert "the job may get one CPU for all its GPUs; set slurm.cpus-per-gpu" in done.err


def test_options_by_version():
    asked = ["--parsable", "--stepmgr", "--power=level", "--prefer=a100"]
    assert unknown_to("21.08.8", asked) == [
        "slurm.stepmgr: new in Slurm 24.05, but this is 21.08.8",
        "slurm.prefer: new in Slurm 22.05, but this is 21.08.8",
    ]
    assert unknown_to("25.05.1", asked) == ["slurm.power: gone after Slurm 23.11, but this is 25.05.1"]
    assert unknown_to("24.05.0-rc1", asked[:2]) == []


def test_what_is_submitted_knows_nothing_of_the_job_around_it():
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "SBATCH_EXPORT": "NONE"}
    left = ("SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "SQUEUE_USERS")
    taken = ("SBATCH_GPUS_PER_TASK", "SBATCH_ARRAY_INX", "SBATCH_WAIT", "SBATCH_ERROR")
    assert outside_a_job({**kept, **dict.fromkeys((*left, *taken), "1")}) == kept


def test_python_in_a_container_does_not_look_outside():
    """Nor for the check's look at a node; what the job says itself stays."""
    slurm = Slurm.model_validate({"container": "x.sif", "env": {"PYTHONPATH": "/data"}})
    script = probe(slurm, FOLDER, FOLDER / "token", dtrain=["dtrain"])
    lines = [line for line in script.splitlines() if "PYTHON" in line]
    shown = "; ".join([*lines, 'echo "$PYTHONPATH $PYTHONNOUSERSITE"'])
    done = subprocess.run(["bash", "-c", shown], env={"PYTHONPATH": "/leak"}, capture_output=True, text=True)
    assert done.stdout == "/data 1\n"


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("Resources", "queued: waiting for free nodes or GPUs"),
        ("(Priority)", "queued: waiting: jobs of higher priority are ahead"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "queued: a node it needs is down or reserved"),
        ("JobHeldUser", "queued: held by you: scontrol release 7"),
        ("SomethingNew", "queued: SomethingNew"),
    ],
)
def test_why_a_job_waits(reason, says):
    assert SlurmJob("7", "PENDING", reason, "", "N/A").in_words() == says
    soon = SlurmJob("7", "PENDING", reason, "", "2026-11-22T01:30:00").in_words()
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
    "unknown": ("{tme: 5}", "slurm.tme: is not an sbatch option; did you mean time?"),
    "underscore": ("{cpus_per_task: 5}", "slurm.cpus_per_task: is not an sbatch option; did you mean cpus-per-task?"),
    "ours": ("{nodes: 2}", "slurm.nodes: is set by dtrain: set it on the command line with --nodes and --gpus"),
    "gres": (
        "{gres: 'nic:1,gpu:2'}",
        "slurm.gres: names GPUs, which dtrain requests itself: set it on the command line",
    ),
    "array": ("{array: 1-4}", "slurm.array: is set by dtrain: dtrain sweep makes arrays"),
    "no-flag": ("{mem: true}", "slurm.mem: true is not a value for it"),
    "flag": ("{contiguous: 3}", "slurm.contiguous: expected true or false"),
    "mapping": ("{mem: {a: 1}}", "slurm.mem: expected text or a number, or a list of them"),
    "null": ("{mem: null}", "slurm.mem: expected text or a number, or a list of them"),
    "setup": ("{setup: {module: x}}", "slurm.setup: expected a list"),
    "env": ("{env: {'a b': x}}", "slurm.env.a b: "),
    "signal": ("{signal: USR1@90}", "slurm.signal: expected B:USR2@ and a number of seconds before the time limit"),
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
    assert "slurm.tme: is not an sbatch option; did you mean time?" in done.err
    assert "Traceback" not in done.err
    assert not project.runs()


def test_what_goes_with_slurm(project):
    for arguments, says in {
        ("--wait",): "--wait needs --slurm",
        ("--slurm", "--gpus", "a100"): "--gpus a100: expected a number above 0, optionally with a type, such as a100:4",
    }.items():
        done = project.run("launch", *arguments, "job.yaml")
        assert done.code == 2
        assert says in done.err


@pytest.mark.parametrize(
    ("argv", "slurm", "command"),
    [
        ("/opt/bin/dtrain", {}, ["/opt/bin/dtrain"]),
        ("/lib/dtrain/__main__.py", {}, [sys.executable, "-m", "dtrain"]),
        ("/opt/bin/dtrain", {"dtrain": "/nodes/dtrain"}, ["/nodes/dtrain"]),
        ("/opt/bin/dtrain", {"container": "x.sif"}, ["dtrain"]),
        ("/opt/bin/dtrain", {"container-image": "x"}, ["dtrain"]),
    ],
)
def test_the_command_on_the_nodes(argv, slurm, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv, "launch"])
    assert dtrain_command(Slurm.model_validate(slurm), own_command()) == command


def test_a_dry_run_prints_what_would_be_submitted(project):
    done = project.run(
        "launch", "--slurm", "--dry-run", "--nodes", "3", "--gpus", "a100:2", "--run-dir", "run", "job.yaml"
    )
    assert done.code == 0, done.err
    command, _, script = done.out.partition("\n\n")
    assert command.startswith("sbatch --parsable --job-name=tiny --nodes=3 ")
    assert "--gres=gpu:a100:2" in command
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
    assert found.in_words() == "cancelled on node[0-1]"
    assert look_up("8") is None
