"""Callbacks: when they are called, what they see, what they ask for, and that a stop in between loses nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from training import Job, Samples, differences, final_state, fit, prepare, timeless, train

from dtrain import FitContext, Trainer
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.checkpoint.manager import saved

# 4 steps an epoch.
NUM_SAMPLES, BATCH = 20, 5


class Witness:
    """Writes down what each hook sees."""

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []

    def _note(self, hook: str, fit: FitContext) -> None:
        self.seen.append([hook, fit.epoch, fit.step, fit.row.get("step")])
        if hook == "on_end":
            assert (fit.rank, fit.world_size) == (dist.get_rank(), dist.get_world_size())
            assert isinstance(fit.model, nn.Linear)
            assert fit.optimizer.param_groups[0]["params"][0] is fit.model.weight
            (fit.folder / f"seen-{fit.rank}.json").write_text(json.dumps(self.seen))

    def on_start(self, fit: FitContext) -> None:
        self._note("on_start", fit)

    def on_step_end(self, fit: FitContext) -> None:
        self._note("on_step_end", fit)

    def on_validation_end(self, fit: FitContext) -> None:
        self._note("on_validation_end", fit)

    def on_epoch_end(self, fit: FitContext) -> None:
        self._note("on_epoch_end", fit)

    def on_save(self, fit: FitContext) -> None:
        self._note("on_save", fit)

    def on_end(self, fit: FitContext) -> None:
        self._note("on_end", fit)


class Asker:
    """The last rank asks, in these hooks at these steps. Its state counts the steps that it has seen."""

    def __init__(self, asks: dict[str, dict[int, str]]) -> None:
        self.asks = asks
        self.steps = 0

    def on_step_end(self, fit: FitContext) -> None:
        self.steps += 1
        assert self.steps == fit.step  # also after a stop
        self._ask("on_step_end", fit)

    def on_epoch_end(self, fit: FitContext) -> None:
        self._ask("on_epoch_end", fit)

    def _ask(self, hook: str, fit: FitContext) -> None:
        wish = self.asks.get(hook, {}).get(fit.step)
        if wish and fit.rank == fit.world_size - 1:
            getattr(fit, wish)()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Raiser:
    def on_epoch_end(self, fit: FitContext) -> None:
        if fit.rank == 1:
            raise ValueError("bad luck")


def job(callbacks: list[Any], options: dict[str, Any], stop_after: int | None = None) -> Job:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    features = torch.randn(NUM_SAMPLES, 4)
    samples = Samples(features, features[:, :3].argmax(1))
    counts = {"step": 0}

    def ask_to_stop(*_: Any) -> None:
        counts["step"] += 1
        if counts["step"] == stop_after and dist.get_rank() == 0:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(0)).stop = signal.SIGTERM

    optimizer.register_step_post_hook(ask_to_stop)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "callbacks": callbacks}
    data = {"train": samples, "val": samples, "batch_size": BATCH}
    return {"trainer": {**trainer, **options.get("trainer", {})}, **data, "fit": options.get("fit", {"epochs": 2})}


def test_when_they_are_called_and_what_they_see(tmp_path):
    prepare(tmp_path, 2)
    run_ranks(2, fit, str(tmp_path), job, [Witness()], {"trainer": {"validate_every": 6}, "fit": {"steps": 8}})
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == [
        ["on_start", 1, 0, None],
        *(["on_step_end", 1, step, None] for step in (1, 2, 3, 4)),
        ["on_epoch_end", 1, 4, 4],
        ["on_save", 2, 4, 4],
        *(["on_step_end", 2, step, 4] for step in (5, 6)),
        ["on_validation_end", 2, 6, 6],
        *(["on_step_end", 2, step, 6] for step in (7, 8)),
        ["on_validation_end", 2, 8, 8],  # the run's last
        ["on_epoch_end", 2, 8, 8],
        ["on_save", 3, 8, 8],
        ["on_end", 3, 8, 8],
    ]


# What is asked for, in which hook and after which step; then the rows, and the checkpoints.
ASKS: dict[str, tuple[dict[str, dict[int, str]], list[tuple[int, str]], list[str]]] = {
    "a validation": (
        {"on_step_end": {1: "validate", 4: "validate"}},  # each after the next step
        [(2, "val"), (4, "train+val"), (5, "val"), (8, "train+val")],
        ["step-000000004-epoch-0001", "step-000000008-epoch-0002"],
    ),
    "a checkpoint": (
        {"on_step_end": {1: "save"}, "on_epoch_end": {4: "save"}},
        [(4, "train+val"), (8, "train+val")],
        ["step-000000002", "step-000000004-epoch-0001", "step-000000008-epoch-0002"],
    ),
    "the end within an epoch": (
        {"on_step_end": {5: "end"}},
        [(4, "train+val"), (6, "train+val")],
        ["step-000000004-epoch-0001", "step-000000006-row"],
    ),
    "the end of an epoch": ({"on_epoch_end": {4: "end"}}, [(4, "train+val")], ["step-000000004-epoch-0001"]),
}


@pytest.mark.parametrize("name", ASKS)
def test_what_one_rank_asks_for_all_do(name, tmp_path):
    """At the same step on 1 and 2 ranks, and in a run that is stopped in between."""
    asks, rows, checkpoints = ASKS[name]
    options = {"trainer": {"keep": 9}}
    for world_size in (1, 2):
        train(world_size, tmp_path / str(world_size), job, [Asker(asks)], options)
        run = RunDir(tmp_path / str(world_size))
        assert [(row["step"], row["phase"]) for row in run.rows()] == rows
        assert [path.name for path in saved(run)] == checkpoints
    # Rank 0 is asked to stop after its first step: what was asked for then is still to be done when the run continues.
    assert train(2, tmp_path / "stopped", job, [Asker(asks)], options, 1) == [None, None]
    train(2, tmp_path / "stopped", job, [Asker(asks)], options)
    assert differences(final_state(tmp_path / "stopped"), final_state(tmp_path / "2")) == []
    train(2, tmp_path / "stopped", job, [Asker(asks)], options)  # nothing is left to do
    assert [timeless(row) for row in RunDir(tmp_path / "stopped").rows()] == [
        timeless(row) for row in RunDir(tmp_path / "2").rows()
    ]


def test_one_that_raises_is_named_with_its_moment(tmp_path):
    prepare(tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"callbacks.0: Raiser.on_epoch_end failed after step 4: ValueError: bad"):
        run_ranks(2, fit, str(tmp_path), job, [Raiser()], {})


class Mistaken:
    def on_epoch_ends(self, fit: FitContext) -> None: ...


class Unsavable(Asker):
    def state_dict(self) -> dict[str, Any]:
        return {"file": Path("x")}


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (Asker, "callbacks.0: Asker is a class: give it an object, such as Asker()"),
        (Mistaken(), "Mistaken has on_epoch_ends, which nothing calls; did you mean on_epoch_end?"),
        (3, "int is no callback: it has none of on_start"),
        (Unsavable({}), "callbacks.0.*Unsavable a state_dict of such"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_first_step(callback, says, tmp_path):
    made = job([callback], {})
    steps: list[Any] = []
    made["trainer"]["optimizer"]._optimizer_step_post_hooks.clear()
    made["trainer"]["optimizer"].register_step_post_hook(lambda *_: steps.append(1))
    loader = torch.utils.data.DataLoader(made["train"], batch_size=BATCH)
    with pytest.raises(UserError, match=says):
        Trainer(**made["trainer"], device="cpu", run_dir=tmp_path / "run").fit(loader, epochs=1)
    assert not steps


CALLBACKS = """
class Count:
    def __init__(self, word):
        self.word = word

    def on_epoch_end(self, fit):
        if fit.rank == 0:
            print(self.word, fit.epoch, fit.row["step"])


class Broken(Count):
    def on_epoch_end(self, fit):
        return self.sentence
"""


def test_a_job_has_them_too(project):
    project.write("callbacks.py", CALLBACKS)
    project.job(callbacks=[{"_target_": "callbacks.Count", "word": "done"}])
    done = project.run("launch", "--gpus", "2", "job.yaml", "launch.device=cpu", "--run-dir", "run")
    assert done.code == 0, done.err
    assert project.run_dir().rank_log(0).read_text().splitlines()[-2:] == ["done 1 5", "done 2 10"]
    broken = project.run("launch", "job.yaml", "launch.device=cpu", "callbacks.0._target_=callbacks.Broken")
    assert broken.code == 1
    assert "callbacks.0: Broken.on_epoch_end failed after step 5: AttributeError: 'Broken' object has no" in broken.err
    assert "in on_epoch_end\n    return self.sentence" in broken.err
    wrong = project.run("check", "job.yaml", "callbacks.0.wrd=1")
    assert wrong.code == 2
    assert "callbacks.0.wrd: callbacks.Count takes no argument wrd" in wrong.err
