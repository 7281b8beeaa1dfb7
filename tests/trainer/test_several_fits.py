"""Several fits in one script, as of a cross-validation: their folders, a stop in one of them, a model fitted again."""

from __future__ import annotations

import os
import runpy
import signal
import sys

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader
from training import Samples, differences, epoch_order, final_state, prepare

from dtrain.errors import UserError
from dtrain.files import write_json
from dtrain.launcher.commands.status import status
from dtrain.monitoring.run_monitor import Keeper
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.sections import Fsdp
from dtrain.trainer.distributed.seeds import derive_seed
from dtrain.trainer.trainer import Trainer

FOLDS = """
import json, os
import torch
from torch.utils.data import DataLoader, Subset
from dtrain import Trainer
import data, net

torch.manual_seed(0)
points = data.points(30)
report = []
for fold in range(3):
    held_out = range(10 * fold, 10 * fold + 10)
    train = Subset(points, [i for i in range(30) if i not in held_out])
    # The folds differ in their weights too, and draw in training.
    model = torch.nn.Sequential(net.Net(gate=7 if fold == 1 else 0), torch.nn.Dropout(0.2))
    trainer = Trainer(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    history = trainer.fit(
        DataLoader(train, batch_size=4, shuffle=True),
        DataLoader(Subset(points, held_out), batch_size=4),
        epochs=2,
        run_dir="third" if fold == 2 else None,
    )
    predictions = trainer.predict(DataLoader(points, batch_size=7))
    report.append([history.drop(columns=["samples_per_s", "time"]).to_dict("records"), predictions.tolist()])
with open(f"report-{os.environ['RANK']}.json", "w") as file:
    json.dump(report, file)
"""


def uninterrupted(rank, world_size, folder):
    """The script on a rank, in a run folder that an agent might have made."""
    os.chdir(folder / "whole")
    os.environ |= {RUN_DIR_VARIABLE: str(folder / "whole" / "run"), "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / "folds.py"))


def test_folds_that_were_stopped_in_the_second_come_to_the_same_bits(project):
    project.write("folds.py", FOLDS)
    prepare(project.folder / "whole" / "run", 2)
    (project.folder / "whole" / "go").touch()
    run_ranks(2, uninterrupted, project.folder)
    command = ["launch", "--gpus", "2", "--run-dir", "run", "folds.py"]
    with project.running(*command) as stopped:
        stopped.until((project.folder / "waiting").exists)
        stopped.signal(signal.SIGTERM)
        stopped.until(lambda: "SIGTERM: stopping at the next step, with a checkpoint" in stopped.err)
        project.write("go", "")
        done = stopped.wait()
    assert done.code == 75, done.err
    run = project.run_dir()
    status = run.status()
    assert (status["state"], status["fit"]) == ("stopped", 2)
    assert 7 <= status["step"] < 10, status  # the step that waits, or one soon after
    assert [fit.status()["state"] for fit in run.fits()] == ["stopped"]
    assert not (project.folder / "report-0.json").exists()

    done = project.run(*command, "--resume")
    assert done.code == 0, done.err
    assert done.err.count("\nepoch ") == 3, done.err  # the second fit's last, and the third's: no other is done again
    assert [fit.path for fit in run.fits()] == [run.path / "fit-2", project.folder / "third"]
    for rank in range(2):
        name = f"report-{rank}.json"
        assert (project.folder / name).read_text() == (project.folder / "whole" / name).read_text()
    for fit in ("run", "run/fit-2", "third"):
        assert RunDir(project.folder / fit).status()["state"] == "finished"
        assert differences(final_state(project.folder / fit), final_state(project.folder / "whole" / fit)) == []
    done = project.run("launch", "--resume", "--run-dir", "run/fit-2", "folds.py")
    assert (done.code, done.err) == (2, f"run/fit-2 is one fit of the run in {run.path}; --resume that run\n")


def test_a_fit_that_ends_with_the_run_says_what_the_run_does(tmp_path, monkeypatch, capsys):
    """Its own keeper, rank 0, may have been another rank's victim, or killed. Fits that are over are left alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    script = RunDir(tmp_path / "run")
    script.create()
    Heartbeat(script.heartbeat(0), create=True)
    (script.logs / "rank-1.log").write_text("boom")
    error = {"rank": 1, "host": "here", "type": "ValueError", "message": "boom", "traceback": ""}
    with script.lock(), Keeper(script, quiet=True) as keeper:
        for number, state in ((2, "finished"), (3, "failed")):
            fit = script.fit(number)
            fit.create()
            fit.take_heartbeats(script)
            script.add_fit(fit)
            victim = {**error, "rank": 0, "message": "another rank is gone"}
            write_json(fit.status_file, {"state": state, "fit": number, "epoch": 1, "step": 4, "error": victim})
        keeper.finish("failed", 1, error)
    assert [fit.status()["error"]["rank"] for fit in script.fits()] == [0, 1]
    assert status(str(fit)) == 0
    out = capsys.readouterr().out
    assert "epoch     fit 3, 1, step 4\nrank 1 failed: ValueError: boom\n" in out
    assert script.fit(3).rank_log(1).read_text() == "boom"


# -- the same model fitted again -------------------------------------------------------------------

FEATURES = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
POINTS = Samples(FEATURES, (FEATURES.sum(1) > 0).long())


def make_parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    net[2].bias.requires_grad_(False)
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def fit_again(rank, world_size, folder, strategy, by_another):
    """Two fits of a model of which more is trained in the second; the losses."""
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    net, optimizer = make_parts()
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, strategy=strategy, device="cpu")
    loader = DataLoader(POINTS, batch_size=5, shuffle=True)
    first = trainer.fit(loader, epochs=2)
    if by_another or not isinstance(strategy, dict):  # DeepSpeed can't follow
        net[2].bias.requires_grad_(True)
    if by_another:
        trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, strategy=strategy, device="cpu", seed=trainer.seed)
    drawn = torch.rand(())
    second = trainer.fit(loader, epochs=2)
    return [*first["train_loss"], *second["train_loss"]], float(drawn)


def plain_losses(frees):
    net, optimizer = make_parts()
    losses = []
    for seed in (0, derive_seed("fit", 0)):
        for epoch in (1, 2):
            total = 0.0
            for indices in epoch_order(22, seed, epoch).split(5):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(FEATURES[indices]), POINTS.target[indices])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(indices) / 22
            losses.append(total)
        net[2].bias.requires_grad_(frees)
    return losses, float(torch.rand(()))


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("by_another", [False, True])
def test_a_model_fitted_again_goes_on(world_size, by_another, tmp_path):
    """With its weights and its optimizer, in another order; what is trained may change. The script draws as without."""
    prepare(tmp_path, world_size)
    losses, drawn = plain_losses(frees=True)
    for each in run_ranks(world_size, fit_again, tmp_path, "ddp", by_another):
        assert each[0] == pytest.approx(losses, rel=1e-5)
        assert each[1] == drawn


def cut_models(rank, world_size, folder, strategy):
    """Two fits of a model in parts, and what else is asked of it then."""
    found = fit_again(rank, world_size, folder / "again", strategy, by_another=False)
    os.environ[RUN_DIR_VARIABLE] = str(folder / "cut")
    net, optimizer = make_parts()
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, strategy=strategy, device="cpu")
    said = []
    for other in ("ddp", strategy):
        with pytest.raises(UserError) as caught:
            Trainer(net, nn.CrossEntropyLoss(), optimizer, strategy=other, device="cpu")
        said.append(str(caught.value))
    for parameter in (net[2].bias, net[0].bias) if isinstance(strategy, dict) else ():
        parameter.requires_grad_(not parameter.requires_grad)
        with pytest.raises(UserError) as caught:
            trainer.fit(DataLoader(POINTS, batch_size=5), epochs=1)
        said.append(str(caught.value))
        parameter.requires_grad_(not parameter.requires_grad)
    return found, said


@pytest.mark.parametrize(
    "strategy",
    [
        Fsdp(),
        {"zero_optimization": {"stage": 1}},
        pytest.param({"zero_optimization": {"stage": 3}}, marks=pytest.mark.campaign),
    ],
)
def test_a_model_in_parts_is_fitted_again_by_the_same_trainer_and_with_the_same_parameters(strategy, tmp_path):
    for name in ("again", "cut"):
        prepare(tmp_path / name, 2)
    losses, drawn = plain_losses(frees=not isinstance(strategy, dict))
    for found, said in run_ranks(2, cut_models, tmp_path, strategy):
        assert found == (pytest.approx(losses, rel=1e-5), drawn)
        assert all(each.startswith("another Trainer has sharded the model") for each in said[:2])
        changed = [each.split(" was changed after Trainer sharded the model")[0] for each in said[2:]]
        assert changed == (["requires_grad of 2.bias", "requires_grad of 0.bias"] if isinstance(strategy, dict) else [])


def test_each_fit_has_a_folder_of_its_own(tmp_path):
    net, optimizer = make_parts()
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, device="cpu", run_dir=tmp_path / "a")
    loader = DataLoader(POINTS, batch_size=5)
    trainer.fit(loader, epochs=1, run_dir=tmp_path / "b")
    trainer.fit(loader, epochs=1)
    assert [len(RunDir(tmp_path / name).rows()) for name in "ab"] == [1, 1]
    with pytest.raises(UserError, match="a already holds a fit of this script; give each fit its own run_dir"):
        trainer.fit(loader, epochs=1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "kept").touch()
    with pytest.raises(UserError, match="c already exists: choose another run_dir, or resume=True to continue it"):
        trainer.fit(loader, epochs=1, run_dir=tmp_path / "c")
