"""What a run's files, MLflow, the screen and the network do not get to know."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import JOB, Command, processes

from dtrain.errors import UserError
from dtrain.monitoring.tracking_uri import hand_on, resolve_tracking_uri
from dtrain.redact import hide_in_command, hide_in_job, hide_password
from dtrain.run.folder import RunDir
from dtrain.run.provenance import environment
from dtrain.run.snapshot import MAX_FILE, CodeSnapshot
from dtrain.schema.job import Job
from dtrain.schema.loading import dump_job

URI = "https://bob:hunter2@mlflow.example/x"
HF = "hf_" + "hunter2" * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (URI, "https://***@mlflow.example/x"),
        ("postgresql+psycopg2://u:p@ss@db:5432/m?sslmode=on", "postgresql+psycopg2://***@db:5432/m?sslmode=on"),
        ('{a: "http://h/?b=1&token=abc"}', '{a: "http://h/?b=1&token=***"}'),
        ('["http://host","a@b.c"] http://host/a@b sqlite:///a@b.db a@b.c', None),
    ],
)
def test_passwords_in_addresses(text: str, expected: str | None):
    assert hide_password(text) == (expected or text)


def test_passwords_on_a_command_line():
    words = [
        "dtrain",
        "x.py",
        "--password",
        "a",
        "--hf-token=hf_abcdefgh",
        "slurm.env.A=b",
        f"mlflow.tracking_uri={URI}",
    ]
    words += ["model.pad_token=<pad>", "optimizer.lr=0.1", "--tokens", "512", "--wandb-key=0123456789abcdef0123", HF]
    words += ["data.sort_key=a_name_of_a_column"]
    assert hide_in_command(words) == [
        *["dtrain", "x.py", "--password", "***", "--hf-token=***", "slurm.env.A=***"],
        *["mlflow.tracking_uri=https://***@mlflow.example/x", "model.pad_token=<pad>", "optimizer.lr=0.1"],
        *["--tokens", "512", "--wandb-key=***", "***", "data.sort_key=a_name_of_a_column"],
    ]


def test_a_job_for_others_to_see():
    job = {
        "slurm": {"env": {"A": "b"}, "partition": "gpu"},
        "data": [{"url": URI, "api_key": "abcdefgh", "pad_token": "[PAD]"}],
        "headers": {"Authorization": "Bearer hunter2", "X": f"Bearer {HF}"},
        "key": "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----\n",
        "credentials": "hunter2",
    }
    assert hide_in_job(job) == {
        "slurm": {"env": {"A": "***"}, "partition": "gpu"},
        "data": [{"url": "https://***@mlflow.example/x", "api_key": "***", "pad_token": "[PAD]"}],
        "headers": {"Authorization": "***", "X": "Bearer ***"},
        "key": "***\n",
        "credentials": "***",
    }


def test_the_store_is_found_without_its_password_in_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    hand_on(URI)
    assert os.environ["MLFLOW_TRACKING_URI"] == ""  # off stays off
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another")
    text = dump_job(Job.model_validate({**JOB, "mlflow": {"tracking_uri": URI}}))
    assert "tracking_uri: https://***@mlflow.example/x" in text
    kept = "https://***@mlflow.example/x"
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to the full address"):
        resolve_tracking_uri(kept)
    hand_on(URI)
    assert resolve_tracking_uri(kept) == resolve_tracking_uri(None, kept) == URI


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder with secrets in it, and links out of it, in a repository that begins above it."""
    folder, shared = tmp_path / "Übung äö" / "job", tmp_path / "shared"
    folder.mkdir(parents=True)
    shared.mkdir()
    (shared / "labels.txt").write_text("cat")
    (folder / "labels.txt").symlink_to(shared / "labels.txt")
    (folder / "data").symlink_to(shared)
    (folder / "again.py").symlink_to(folder / "net.py")
    files = {"net.py": "import torch\n", "job.yaml": f'uri: "{URI}"\n', "tokenizer.json": "{}"}
    for name in ("id_rsa", "server.PEM", "aws_credentials.json", "token.txt", ".env", ".envrc", "openai_api_key.txt"):
        files[name] = "hunter2\n"
    (folder / "innocent.txt").symlink_to("id_rsa")
    files["account.json"] = '{"key": "-----BEGIN PRIVATE KEY-----hunter2"}'
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_the_copy_of_the_code_has_no_secrets(folder: Path, tmp_path: Path):
    copy = CodeSnapshot(tmp_path / "copy")
    copy.add(folder)
    assert {path.name for path in copy.folder.iterdir()} == {"net.py", "again.py", "job.yaml", "tokenizer.json"}
    assert (copy.folder / "job.yaml").read_text() == 'uri: "https://***@mlflow.example/x"\n'
    links = dict.fromkeys(["labels.txt", "data"], "a link out of the folder")
    secrets = dict.fromkeys(
        [
            "id_rsa",
            "innocent.txt",
            "server.PEM",
            "aws_credentials.json",
            "token.txt",
            "account.json",
            "openai_api_key.txt",
        ],
        "secret, judging by its name or content",
    )
    assert copy.left_out == {**links, **secrets, "job.yaml's passwords": "in addresses"}


def test_what_git_says_is_of_the_folder_alone_and_has_no_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch):
    root = folder.parents[1]
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for arguments in (["init", "-q"], ["add", "-A", "-f"], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    (root / "shared" / "labels.txt").write_text("elsewhere")
    assert environment(folder)["git"]["dirty"]
    assert environment(folder)["git"]["diff"] == ""
    for file in folder.iterdir():
        if file.is_file() and b"hunter2" in file.read_bytes():
            file.write_text(file.read_text() + "hunter2 again")
    (folder / "net.py").write_text(f"password = 'hunter2'\nstore = '{URI}'\nwidth = 3\ntoken = words.next\n")
    monkeypatch.setattr(sys, "argv", ["dtrain", "launch", f"mlflow.tracking_uri={URI}"])
    found = environment(folder)
    assert "+width = 3\n+token = words.next\n" in found["git"]["diff"]
    assert "hunter2" not in str(found)


def test_modules_from_elsewhere_are_copied_whole_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project, loaded = tmp_path / "project", set(sys.modules)
    files = {"src/pkg/__init__.py": "", "src/pkg/net.py": "", "src/pkg/classes.json": "[]", "src/pkg/a.key": "hunter2"}
    files |= {"parts/__init__.py": "", "parts/build/__init__.py": ""}  # build is what tools make
    files |= {"single.py": "", "large/__init__.py": "", "large/_c.so": "x" * (MAX_FILE + 1)}
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    (folder / "linked.py").symlink_to(project / "single.py")
    monkeypatch.setattr(sys, "path", [str(folder), str(project), *sys.path])
    try:
        (
            __import__("src.pkg.net"),
            __import__("large"),
            __import__("parts.build"),
            __import__("linked"),
            __import__("single"),
        )
        copy = CodeSnapshot(tmp_path / "copy")
        copy.add(folder)
        copy.add_modules()
    finally:
        for name in set(sys.modules) - loaded:
            del sys.modules[name]
    copied = {str(path.relative_to(copy.folder)) for path in copy.folder.rglob("*") if path.is_file()}
    expected = {"src/pkg/__init__.py", "src/pkg/net.py", "src/pkg/classes.json", "single.py", "linked.py", "net.py"}
    assert expected <= copied
    assert not any(name.startswith(("large", "parts")) or name.endswith(".key") for name in copied)
    for name in ("large", "parts"):
        assert copy.left_out[name].endswith(f"the run uses the original in {project / name}")
    assert "linked.py" not in copy.left_out


@pytest.mark.fresh
def test_a_run_on_one_machine_is_nobody_elses(project):
    """Its ranks and their store listen on loopback, its folder is closed to others, its files are without passwords."""
    project.write("id_rsa", "hunter2")
    project.job(
        model={"_target_": "net.Net", "gate": 2},
        mlflow={"tracking_uri": URI},
        slurm={"env": {"KEY": "of the cluster"}},
    )
    arguments = ["launch", "--gpus", "2", "--run-dir", "run", "job.yaml", "launch.device=cpu"]
    command = project.start(*arguments, MLFLOW_TRACKING_URI="")
    try:
        command.until((project.folder / "waiting").exists)
        addresses = listening(command)
        (project.folder / "go").touch()
        done = command.wait()
    finally:
        command.kill()
    assert done.code == 0, done.err
    assert len(addresses) >= 3  # the store's, and one or more of each rank
    assert set(addresses) <= {"127.0.0.1", "::1"}
    run = RunDir(project.folder / "run")
    assert run.path.stat().st_mode & 0o777 == 0o750
    assert "id_rsa (secret, judging by its name or content)" in done.err
    everything = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert not [text for text in (*everything, done.err.encode()) if b"hunter2" in text]
    assert "of the cluster" not in run.env.read_text()


def listening(command: Command) -> list[str]:
    """The addresses at which a command's processes wait for connections."""
    pids = processes(command._mark)
    sockets = {os.readlink(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists()}
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{next(iter(pids))}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.append(socket.inet_ntop(family, address))
    return found
