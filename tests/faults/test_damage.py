"""What is damaged or gone: files of a run after a power failure, its folder, the streams of its command."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from dtrain.files import write_json
from dtrain.launcher.commands.status import status
from dtrain.launcher.machine.scratch import held_folder, remove_left_behind
from dtrain.run.folder import RunDir


def test_what_nobody_reads_and_what_is_damaged_stops_no_run_but_a_folder_that_is_gone_does(project):
    """Without a reader for its output; then with a half-written row and status, and stdin and stdout closed."""
    project.job(model={"_target_": "net.Net", "gate": 1})
    launch = "dtrain launch --gpus 2 --run-dir run job.yaml"
    (project.folder / "go").touch()
    assert project.shell(f"{launch} 2>&1 | true").code == 0
    assert project.status()["state"] == "finished"

    run = project.run_dir()
    whole = run.rows()
    with run.metrics.open("a") as file:
        file.write('{"epoch": 3, "st')
    run.status_file.write_text('{"sta')
    done = project.run("status", "run")
    assert "state     killed" in done.out
    assert "epoch     2, step 10" in done.out
    damage = ["run/metrics.jsonl:3: damaged", "run/status.json: damaged"]
    assert sorted(line.removeprefix("warning: ").partition(",")[0] for line in done.err.splitlines()) == damage

    (project.folder / "go").unlink()
    (project.folder / "waiting").unlink()
    with project.shell_running(f"{launch} --resume fit.epochs=3 <&- >&- 2>err") as command:
        command.until((project.folder / "waiting").exists)
        assert project.status()["state"] == "running"
        assert run.rows() == whole  # written anew, without the damage
        assert run.metrics.read_text().count("\n") == len(whole)
        run.path.rename(project.folder / "elsewhere")
        assert command.wait().code == 1
    errors = (project.folder / "err").read_text().splitlines()
    for text in damage:
        assert len([line for line in errors if text in line]) == 1
    assert errors[-1] == "run was removed or moved during the run: nothing more could be saved"
    assert not run.path.exists()


def test_rows_that_are_none_are_passed_over(tmp_path, capsys):
    run = RunDir(tmp_path)
    row = {"epoch": 1, "step": 5}
    run.write_rows([row])
    with run.metrics.open("ab") as file:
        file.write(b'\xff\x00\n{"epoch": "one", "step": 1}\n[]\n{"epoch": 2, "step": 10}\n{"ep')
    assert run.rows() == [row, {"epoch": 2, "step": 10}]
    assert run.last_row() == {"epoch": 2, "step": 10}
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {run.metrics}:{line}: damaged, so it is skipped" for line in (2, 3, 4, 6)]
    run.metrics.unlink()
    assert (run.rows(), run.last_row(), run.status()) == ([], None, {})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("status.json", '{"state": "failed"}'),
        ("status.json", '{"state": "failed", "epoch": 2, "step": "x"}'),
        ("status.json", '{"state": "failed", "epoch": 2, "step": 10, "error": {"rank": 0}}'),
        ("status.json", "[" * 10_000),
        ("fits.json", '{"fits": 3}'),
        ("sweep.json", "{}"),
    ],
)
def test_files_that_are_objects_of_another_kind_are_passed_over(file, text, tmp_path, capsys):
    run = RunDir(tmp_path)
    run.create()
    write_json(run.status_file, {"state": "finished", "epoch": 2, "step": 10})
    run.write_rows([{"epoch": 2, "step": 10, "samples_per_s": "fast"}])
    (tmp_path / file).write_text(text)
    assert status(str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "epoch     2, step 10\n" in printed.out
    assert printed.err == f"warning: {tmp_path / file}: damaged, so it is skipped\n"


def test_folders_of_killed_commands_are_removed(tmp_path):
    """Those that nobody holds, by the names that we give; what failed has its logs to be read for a day."""
    names = ["dtrain-scratch-abcd1234", "dtrain-scratch-held5678", "dtrain-aside-abcd1234", "dtrain-aside-of_mine"]
    names += ["dtrain-aside-old_5678", "dtrain-scratch-new_1234", "dtrain-notes"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        age = {"dtrain-scratch-new_1234": 0, "dtrain-aside-old_5678": 90000}.get(name, 3600)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    held = os.open(tmp_path / "dtrain-scratch-held5678", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    remove_left_behind(tmp_path)
    os.close(held)
    left = {path.name for path in tmp_path.iterdir()}
    assert set(names) - left == {"dtrain-scratch-abcd1234", "dtrain-aside-old_5678"}
    with held_folder("scratch") as folder:
        os.utime(folder, (time.time() - 3600,) * 2)
        remove_left_behind(folder.parent)
        assert folder.is_dir()
    remove_left_behind(folder.parent)
    assert not folder.exists()
