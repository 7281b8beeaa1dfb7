"""The callbacks that dtrain brings along: weight averaging, profiles, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from ranks import run_ranks
from test_callbacks import BATCH, NUM_SAMPLES, job
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, IterableDataset
from training import Samples, differences, epoch_order, final_state, fit, prepare, train

from dtrain import Profiler, SamplePictures, Trainer, WeightAveraging
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.run.profiling import Profiling
from dtrain.schema.sections import Fsdp

EPOCHS, SEED = 4, 0


def normed(callbacks: list[Any], stop_after: int | None = None, norm: bool = True, **options: Any) -> Any:
    """The job of test_callbacks, with batch norm and dropout in the model."""
    made = job(callbacks, {"fit": {"epochs": EPOCHS}}, stop_after)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), *[nn.BatchNorm1d(6)] * norm, nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for hook in made["trainer"]["optimizer"]._optimizer_step_post_hooks.values():
        optimizer.register_step_post_hook(hook)
    made["trainer"] |= {"net": net, "optimizer": optimizer, **options}
    return made


def averaged_plainly(start: int, every: int | None, norm: bool) -> dict[str, torch.Tensor]:
    """By torch's AveragedModel in a plain loop: after epochs from `start` on, or every so many steps."""
    made = normed([], norm=norm)
    net, optimizer, data = made["trainer"]["net"], made["trainer"]["optimizer"], made["train"]

    def batches(epoch: int) -> list[torch.Tensor]:
        return list(epoch_order(NUM_SAMPLES, SEED, epoch).split(BATCH))

    average, step = AveragedModel(net), 0
    for epoch in range(1, EPOCHS + 1):
        for batch in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.features[batch]), data.target[batch]).backward()
            optimizer.step()
            step += 1
            if every is not None and step >= start and step % every == 0:
                average.update_parameters(net)
        if every is None and epoch >= start:
            average.update_parameters(net)
    update_bn([data.features[batch] for batch in batches(EPOCHS + 1)], average)
    return average.module.state_dict()


@pytest.mark.parametrize(
    ("world_size", "start", "every", "norm"), [(1, "2 epochs", "epoch", True), (2, 5, "3 steps", False)]
)
def test_weights_are_averaged_as_by_torch(world_size, start, every, norm, tmp_path):
    expected = averaged_plainly(int(str(start).split()[0]), None if every == "epoch" else 3, norm)

    def swa(name: str, stops: list[int | None], average: bool = True) -> dict[str, Any]:
        for stop_after in stops:
            callbacks = [WeightAveraging(start, every)] if average else []
            train(world_size, tmp_path / name, normed, callbacks, stop_after, norm)
        run = RunDir(tmp_path / name)
        return torch.load(run.swa_weights, weights_only=True) if average else {}

    found = swa("whole", [None])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    # Stopped while it averages, and continued: the same bits.
    assert differences(swa("stopped", [10, None]), found) == []
    assert differences(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole")) == []
    # The training knows nothing of it.
    swa("without", [None], average=False)
    whole, without = (final_state(tmp_path / name)["weights"] for name in ("whole", "without"))
    del whole["swa.pt"]
    assert differences(whole, without) == []


def refused_when_sharded(rank: int, world_size: int, folder: str) -> str:
    made = normed([WeightAveraging(1)], norm=False, strategy=Fsdp(wrap=["Linear"]))
    with pytest.raises(UserError) as refused:
        fit(rank, world_size, folder, lambda: made)
    return str(refused.value)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(job([], {})["train"])


def alone(folder: Path, callbacks: list[Any], data: Any = None) -> None:
    """Train in this process."""
    made = normed(callbacks)
    loader = DataLoader(made["train"] if data is None else data, batch_size=BATCH)
    Trainer(**made["trainer"], device="cpu", run_dir=folder).fit(loader, None, epochs=2)


def test_what_is_not_averaged_is_said(tmp_path, capfd, monkeypatch):
    prepare(tmp_path / "sharded", 1)
    said = "callbacks.0: WeightAveraging needs the whole model on each rank: ddp, or deepspeed up to stage 2"
    assert run_ranks(1, refused_when_sharded, str(tmp_path / "sharded")) == [said]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    alone(tmp_path / "late", [WeightAveraging("9 epochs")])
    assert "WeightAveraging averaged nothing: no 1 epoch ended after 9 epochs" in capfd.readouterr().err
    assert not RunDir(tmp_path / "late").swa_weights.exists()
    with pytest.raises(UserError, match="WeightAveraging: batch norm's statistics need an epoch"):
        alone(tmp_path / "stream", [WeightAveraging(1)], Stream())
    with pytest.raises(UserError, match=r"start: expected a number of steps above 0, or text such as 10 .*, found 0"):
        WeightAveraging(0)


# -- profiles --------------------------------------------------------------------------------------


def steps_in(trace: Path) -> list[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert any(event["name"] == "aten::addmm" for event in events)
    return sorted(name for name in names if name.startswith("step "))


def test_a_profile_of_some_steps(tmp_path, capfd, monkeypatch):
    def run(name: str, stops: list[int | None], *callbacks: Any) -> Path:
        for stop_after in stops:
            train(1, tmp_path / name, job, list(callbacks), {}, stop_after)
        return RunDir(tmp_path / name).profile

    run("plain", [None])
    folder = run("profiled", [None], Profiler(3, 5))
    assert [path.name for path in folder.iterdir()] == ["rank-0-steps-3-5.json"]
    assert steps_in(folder / "rank-0-steps-3-5.json") == ["step 3", "step 4", "step 5"]
    assert differences(*(final_state(tmp_path / name)["weights"] for name in ("plain", "profiled"))) == []
    # Of a run that is stopped among them, in two parts.
    folder = run("stopped", [3, None], Profiler(2, 6))
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0-steps-2-3.json", "rank-0-steps-4-6.json"]
    assert steps_in(folder / "rank-0-steps-4-6.json") == ["step 4", "step 5", "step 6"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    alone(tmp_path / "late", [Profiler(9, 10)])
    assert list(RunDir(tmp_path / "late").profile.iterdir()) == []
    assert "warning: steps 9 to 10 never came, and nothing was profiled: the run has 8 steps" in capfd.readouterr().err


def test_profile_is_an_option_of_launch(project):
    arguments = ("launch", "--gpus", "2", "job.yaml", "launch.device=cpu", "--run-dir", "run")
    done = project.run(*arguments, "--profile", "steps=4-6,ranks=0,1")
    assert done.code == 0, done.err
    folder = project.run_dir().profile
    assert sorted(path.name for path in folder.iterdir()) == [f"rank-{rank}-steps-4-6.json" for rank in (0, 1)]
    assert steps_in(folder / "rank-1-steps-4-6.json") == ["step 4", "step 5", "step 6"]
    submitted = project.run("launch", "--slurm", "--dry-run", "--profile", "steps=4-6", "job.yaml", "slurm.time=5")
    assert " --profile steps=4-6 " in submitted.out, submitted.err
    project.write("train.py", "")
    for words, says in (
        (["job.yaml", "--profile", "steps=4-6,ranks=2", *arguments[4:5]], "there is no rank 2; the last is 1"),
        (["job.yaml", "--profile", "4-6"], "--profile 4-6: expected steps=10-14, or steps=10-14,ranks=0,1"),
        (["--profile", "steps=1", "train.py"], "a script's Trainer takes callbacks=[dtrain.Profiler(first, last)]"),
    ):
        refused = project.run("launch", "--gpus", "2", *words)
        assert (refused.code, says in refused.err) == (2, True), refused.err


def test_how_a_profile_is_asked_for():
    assert Profiling.of("steps=10-14") == Profiling(10, 14)
    assert Profiling.of("steps=7, ranks=1,3") == Profiling(7, 7, (1, 3))
    with pytest.raises(UserError, match="step 3 is before step 5"):
        Profiling.of("steps=5-3")


# -- pictures --------------------------------------------------------------------------------------


def images(callbacks: list[Any], strategy: Any = "ddp", stop_after: int | None = None, **changed: Any) -> Any:
    made = normed(callbacks, stop_after, norm=False, strategy=strategy)
    torch.manual_seed(2)
    features = torch.rand(NUM_SAMPLES, 1, 2, 2)
    samples = Samples(features, features.flatten(1)[:, :3].argmax(1))
    net = nn.Sequential(nn.Flatten(), made["trainer"]["net"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    made["trainer"] |= {"net": net, "optimizer": optimizer}
    return {**made, "train": samples, "val": samples, **changed}


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, Fsdp(wrap=["Linear"]))])
def test_pictures_of_samples(world_size, strategy, tmp_path):
    drawn = SamplePictures(samples=5, keep=2, classes=["zero", "one", "two"])
    train(world_size, tmp_path / "run", images, [drawn], strategy)
    folder = RunDir(tmp_path / "run").pictures
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000012.png", "step-000000016.png"]
    picture = imread(folder / "step-000000016.png")
    assert picture.std() > 0.05
    # The training knows nothing of it.
    train(world_size, tmp_path / "plain", images, [], strategy)
    assert differences(*(final_state(tmp_path / name)["weights"] for name in ("run", "plain"))) == []


def test_what_a_picture_shows(monkeypatch, tmp_path):
    seen: list[Any] = []
    from dtrain.trainer.callbacks import pictures

    real = pictures.draw
    monkeypatch.setattr(pictures, "draw", lambda *given: seen.append(given) or real(*given))
    made = images([SamplePictures(samples=5)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    loader = DataLoader(made["train"], batch_size=BATCH)
    trainer = Trainer(**made["trainer"], device="cpu", run_dir=tmp_path / "run")
    trainer.fit(loader, loader, epochs=1)
    [(shown, titles, heading)] = seen
    features, target = made["train"].features[:5], made["train"].target[:5]
    torch.testing.assert_close(shown, ((features - features.min()) / (features.max() - features.min())).squeeze(1))
    with torch.no_grad():
        predicted = trainer.net(features).argmax(1)
    assert titles == [(f"{p} / {t}", p == t) for p, t in zip(predicted.tolist(), target.tolist(), strict=True)]
    assert heading == "step 4"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"val": None}, "SamplePictures needs data.val, a dataset whose samples have indices"),
        (
            {"val": Samples(torch.rand(6, 4), torch.zeros(6, dtype=torch.long))},
            "finds no images at 0 in a batch",
        ),
        ({"loss_fn": nn.MSELoss(), "val": Samples(torch.rand(6, 1, 2, 2), torch.rand(6, 3))}, "needs predictions"),
    ],
)
def test_what_cannot_be_drawn(changed, says, tmp_path):
    changed = dict(changed)
    loss = {"loss_fn": changed.pop("loss_fn")} if "loss_fn" in changed else {}
    with pytest.raises(RuntimeError, match=f"callbacks.0: SamplePictures.*{says.removeprefix('SamplePictures ')}"):
        train(1, tmp_path, drawing, changed, loss)


def drawing(changed: dict[str, Any], loss: dict[str, Any]) -> Any:
    made = images([SamplePictures()], **changed)
    made["trainer"] |= loss
    return made
