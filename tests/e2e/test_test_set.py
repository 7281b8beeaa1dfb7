"""data.test: the best weights' results on it, once, when training is over, and nothing else that differs."""

from __future__ import annotations

import signal

import pytest
import torch
from command import DATA
from torch import nn
from training import differences, final_state

from dtrain import load_weights
from dtrain.files import read_json
from dtrain.run.folder import RunDir

SIZE = 13  # in batches of 8: an uneven one
# The first epoch is to be the best one, so that its weights are not the last.
FIT = {"epochs": 2, "early_stopping": {"monitor": "val_loss", "mode": "max"}}
METRICS = {"acc": {"_target_": "torchmetrics.Accuracy", "task": "multiclass", "num_classes": 2}}
# In a model that is built twice, from what the job says: of what is done once, the second time would do it again.
WORDED = """
import net

class Worded(net.Net):
    def __init__(self, word, **others):
        super().__init__(**others)
        assert word == "${no.reference}"
"""
MODEL = ("model._target_=worded.Worded", r"model.word=\${no.reference}")
TEST = ("data.test._target_=data.points", f"data.test.size={SIZE}", *MODEL)
GATED = """

class Gated(torch.utils.data.Dataset):
    '''The points, with a gate at the ninth, the first of the second batch: it waits there for a file called `go`.'''

    def __init__(self, size):
        self.points = points(size)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        if index == 8:
            open("waiting", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.02)
        return self.points[index]
"""


@pytest.fixture
def make(new_project):
    def make(name):
        project = new_project(name)
        project.write("worded.py", WORDED)
        project.job(metrics=METRICS, launch={"device": "cpu"}, fit=FIT)
        return project

    return make


def expected(run: RunDir) -> dict[str, float]:
    """The results of the run's best weights by a plain loop."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    holder = nn.Module()
    holder.layers = net
    load_weights(holder, run.best_weights)
    x = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(SIZE))
    y = (x[:, 0] > 0).long()
    with torch.no_grad():
        predictions = net(x)
    accuracy = (predictions.argmax(1) == y).float().mean().item()
    values = {"test_loss": nn.functional.cross_entropy(predictions, y).item(), "test_acc": accuracy}
    return {name: pytest.approx(value, rel=1e-6) for name, value in values.items()}


def test_the_best_weights_are_evaluated_at_the_end(make):
    project = make("test-set")
    plain = project.run("launch", "--gpus", "2", "--run-dir", "plain", "job.yaml")
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", *TEST)
    assert (plain.code, done.code) == (0, 0), done.err
    run = project.run_dir()
    values = project.status()["test"]
    assert values == expected(run)
    line = f"finished: test_loss {values['test_loss']:.4g}  test_acc {values['test_acc']:.4g}; weights/best.pt and"
    assert done.err.splitlines()[-1].startswith(line)
    assert f"test      test_loss {values['test_loss']:.4g}  " in project.run("status", "run").out
    assert "test" not in project.status("plain")
    # Nothing that is trained or saved depends on it.
    assert differences(final_state(project.folder / "plain"), final_state(run.path)) == []
    before = run.test.stat().st_mtime_ns
    again = project.run("launch", "--resume", "--run-dir", "run", "job.yaml", *TEST)
    assert (again.code, again.err) == (0, "run is finished; nothing to resume\n")
    assert run.test.stat().st_mtime_ns == before
    for name in ("test", "train"):
        answer = project.run("evaluate", "run", "--gpus", "1", "--data", name)
        assert f'{{"{name}_loss": ' in answer.out, answer.err
    longer = project.run("launch", "--resume", "--gpus", "1", "--run-dir", "run", "job.yaml", *TEST, "fit.epochs=3")
    assert longer.code == 0, longer.err
    assert project.status()["test"] == expected(run)
    assert project.status()["epoch"] == 3


def test_a_run_that_is_stopped_or_killed_there_evaluates_it_when_it_is_continued(make):
    project = make("test-set-stopped")
    project.write("data.py", f"import os\nimport time\n{DATA}{GATED}")
    gated = ("job.yaml", "data.test._target_=data.Gated", f"data.test.size={SIZE}")
    arguments = ("launch", "--gpus", "1", "--run-dir", "run")
    waiting = project.folder / "waiting"
    with project.running(*arguments, *gated) as command:
        command.until(waiting.exists)
        assert len(project.run_dir().rows()) == 2
        command.signal_all(signal.SIGKILL)
        assert command.wait().code == -signal.SIGKILL
    waiting.unlink()
    with project.running(*arguments, "--resume", *gated) as command:
        command.until(waiting.exists)
        command.signal(signal.SIGTERM)
        command.until(lambda: "stopping at the next step" in command.err)
        project.write("go", "")
        assert command.wait().code == 75
    run = project.run_dir()
    assert (project.status()["state"], run.test.exists()) == ("stopped", False)
    done = project.run(*arguments, "--resume", *gated)
    assert done.code == 0, done.err
    assert read_json(run.test) == project.status()["test"] == expected(run)
    assert [row["epoch"] for row in run.rows()] == [1, 2]


REFUSED = {
    "empty": ("data.test.size=0", "data.test: TensorDataset is empty: its len() is 0"),
    "misfit": ("data.test.columns=3", "mat1 and mat2 shapes cannot be multiplied"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_seen_before_the_first_step(name, make):
    project = make(f"test-set-{name}")
    project.write("data.py", DATA.replace("(size)", "(size, columns=4)", 1).replace("size, 4", "size, columns"))
    override, says = REFUSED[name]
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", *TEST, override)
    assert done.code == 1
    assert says in done.last_lines
    assert project.status()["step"] == 0
