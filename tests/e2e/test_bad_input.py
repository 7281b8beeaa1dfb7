"""What users get wrong: exit 2 before anything starts, 1 after; a message that says what to change; nothing left."""

from __future__ import annotations

import pytest
import yaml
from command import JOB

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def check_refused(project, done, *says, code=2):
    """One message, on stderr; nothing was written, and nothing of the command runs (see Command.wait)."""
    assert done.code == code, done.err
    assert done.out == ""
    for text in says:
        assert text in done.err
    assert "Traceback" not in done.err
    if code == 2:
        assert not (project.folder / "runs").is_dir()
        assert not (project.folder / "run").exists()


# By name: what is in job.yaml, and what must be said.
FILES = {
    "broken": ("name: [tiny\nmodel: x", ["job.yaml:2", "not valid YAML"]),
    "bomb": (BOMB, ["job.yaml:", "more than 50000 values"]),
    "empty": ("", ["job.yaml:1", "expected a mapping"]),
    "a-list": ("- name: tiny", ["expected a mapping"]),
    "code": ("name: !!python/object/apply:os.system ['touch hacked']", ["job.yaml:1", "tag"]),
    "binary": ("\x00\x01", ["job.yaml:1", "not allowed"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_job(name, project):
    text, says = FILES[name]
    project.write("job.yaml", text)
    check_refused(project, project.run("launch", "job.yaml"), *says)
    assert not (project.folder / "hacked").exists()


REQUESTS = {
    "missing-file": (["launch", "jbo.yaml"], ["jbo.yaml: no such file", "did you mean job.yaml?"]),
    "a-folder": (["launch", "."], ["is a folder; name the job file in it"]),
    "gpus-0": (["launch", "--gpus", "0", "job.yaml"], ["--gpus 0", "a number above 0, or auto"]),
    "gpus-negative": (["launch", "--gpus", "-1", "job.yaml"], ["--gpus -1", "a number above 0, or auto"]),
    "gpus-word": (["launch", "--gpus", "abc", "job.yaml"], ["--gpus abc", "a number above 0, or auto"]),
    "gpus-which": (["launch", "--gpus", "0,1", "job.yaml"], ["--gpus 0,1", "set CUDA_VISIBLE_DEVICES=0,1"]),
    "whose-option": (
        ["launch", "train.py", "--gpus", "2", "--lr", "0.1"],
        ["--gpus follows train.py", "dtrain launch train.py -- --gpus 2 --lr 0.1"],
    ),
    "torchruns-option": (
        ["launch", "--master_addr", "here", "train.py"],
        ["--master_addr is a torchrun option that dtrain does not have", "--rendezvous HOST:PORT"],
    ),
    "a-program": (["launch", "--gpus", "2", "./run.sh"], ["run.sh: is a program", "subprocess.run(['./run.sh']"]),
    "show-ranks-word": (["launch", "--show-ranks", "0,x", "job.yaml"], ["--show-ranks 0,x", "such as 0,2, or all"]),
    "show-ranks-none": (["launch", "--show-ranks", "", "job.yaml"], ["expected ranks, such as 0,2, or all"]),
    "show-ranks-not-there": (
        ["launch", "--gpus", "2", "--show-ranks", "0,2", "job.yaml", "launch.device=cpu"],
        ["--show-ranks 0,2", "there is no rank 2; the last is 1"],
    ),
    "unknown-command": (["lanch", "job.yaml"], ["No such command 'lanch'"]),
    "unknown-option": (["launch", "--gpu", "2", "job.yaml"], ["No such option", "--gpus"]),
    "no-job": (["launch"], ["Missing argument 'JOB'"]),
    "no-override": (["launch", "job.yaml", "epochs"], ["override epochs", "expected key=value"]),
    "override-of-a-leaf": (["launch", "job.yaml", "name.x=1"], ["override name.x=1"]),
    "override-not-yaml": (["launch", "job.yaml", "model.width=[1"], ["override model.width=[1", "not valid YAML"]),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_wrong(name, project):
    arguments, says = REQUESTS[name]
    project.write("run.sh", "#!/bin/bash\necho $RANK\n")
    check_refused(project, project.run(*arguments), *says)


def test_a_working_directory_that_is_gone(project):
    done = project.shell("mkdir gone; cp job.yaml gone; cd gone; rm -r ../gone; dtrain launch job.yaml")
    check_refused(project, done, "the working directory no longer exists")
    assert len(done.err.splitlines()) == 1


def test_all_that_is_wrong_in_a_job_at_once(project):
    """Each with its line, what is wrong, and the nearest valid name."""
    project.write("broken.py", "def points(:\n")
    bad = {
        **JOB,
        "seeed": 1,
        "model": {"_target_": "net.Nett"},
        "data": {
            "train": {"_target_": "data.points"},
            "val": {"_target_": "data.points", "size": 12, "sise": 13},
            "batch_size": "many",
        },
        "loss": {"_target_": "torhc.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "broken.points"},
        "metrics": {"acc": {"_target_": "torchmetrics.AUROC", "task": "binary"}},
        "fit": {"epochs": 2, "early_stopping": {"monitor": "val_ac", "mode": "max"}},
    }
    text = yaml.safe_dump(bad, sort_keys=False)
    project.write("job.yaml", text)
    done = project.run("launch", "--run-dir", "run", "job.yaml", "fit.micro_batch_size=.inf", "checkpoint.keep=0")
    check_refused(project, done)

    def line(key):
        return next(i for i, each in enumerate(text.splitlines(), start=1) if each.strip().startswith(key))

    expected = [
        (f"job.yaml:{line('seeed')}: seeed: unknown key", "did you mean seed?"),
        (f"job.yaml:{line('_target_: net.Nett')}: model._target_: net has no Nett", "did you mean Net?"),
        (f"job.yaml:{line('train:')}: data.train: data.points needs the argument size", ""),
        (f"job.yaml:{line('sise')}: data.val.sise: data.points takes no argument sise", "did you mean size?"),
        (f"job.yaml:{line('batch_size')}: data.batch_size: expected a whole number, found 'many'", ""),
        (f"job.yaml:{line('_target_: torhc')}: loss._target_: there is no module torhc", "did you mean torch?"),
        (f"job.yaml:{line('_target_: broken')}: optimizer._target_: broken.py:1: SyntaxError", ""),
        (f"job.yaml:{line('acc:')}: metrics.acc: BinaryAUROC guesses", "set activation: sigmoid or softmax"),
        (f"job.yaml:{line('monitor')}: fit.early_stopping.monitor: nothing is reported as val_ac", "mean val_acc?"),
        ("override fit.micro_batch_size=.inf: fit.micro_batch_size: expected a whole number", ""),
        ("override checkpoint.keep=0: checkpoint.keep: expected at least 1, found 0", ""),
    ]
    lines = done.err.splitlines()
    for start, hint in expected:
        assert [each for each in lines if each.startswith(start) and hint in each], f"{start}\n\n{done.err}"
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("name", "arguments"), [("runs", []), ("file", ["--run-dir", "file/run"])], ids=["runs", "run-dir"]
)
def test_a_place_that_takes_no_run_folder(name, arguments, project):
    project.write(name, "a file in the way")
    done = project.run("launch", *arguments, "job.yaml", "launch.device=cpu")
    check_refused(project, done, "cannot be used", "choose another --run-dir")
    assert (project.folder / name).read_text() == "a file in the way"


MORE_DATA = """
import torch
from torch.utils.data import IterableDataset

from data import points


class Silent(IterableDataset):
    def __iter__(self):
        yield from ()


def triples():
    return [(x, y, 1) for x, y in points(40)]


def empty():
    return points(0)
"""
ACCURACY_OF_3 = {"_target_": "torchmetrics.Accuracy", "task": "binary"}
# By name: the dataset, the metrics, and what must be said.
TRAINING = {
    "empty": ({"_target_": "more.empty"}, {}, ["is empty: its len() is 0"]),
    "silent": ({"_target_": "more.Silent"}, {}, ["Silent yields no samples in epoch 1"]),
    "no-dataset": ({"_target_": "builtins.int"}, {}, ["int has no length", "__len__ and __getitem__", "__iter__"]),
    "triples": ({"_target_": "more.triples"}, {}, ["a sample must be (features, target)", "_target_: module.function"]),
    "metric": (JOB["data"]["train"], {"acc": {**ACCURACY_OF_3, "activation": "none"}}, ["acc"]),
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_only_training_can_find(name, project):
    dataset, metrics, says = TRAINING[name]
    project.write("more.py", MORE_DATA)
    project.job(data={"train": dataset, "batch_size": 8}, metrics=metrics)
    done = project.run("launch", "--run-dir", "run", "job.yaml", "launch.device=cpu")
    check_refused(project, done, code=1)
    for text in ("rank 0 failed: ", *says):
        assert text in done.last_lines
    assert project.status()["state"] == "failed"
