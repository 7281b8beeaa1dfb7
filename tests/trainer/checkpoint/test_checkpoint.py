"""Checkpoints that can be trusted: copied in an instant, complete or invisible, checked before they are used."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from torch import nn
from training import content, differences

from dtrain import __version__
from dtrain.errors import ResumeError, UserError
from dtrain.run.folder import RunDir
from dtrain.schema.sections import Checkpoint
from dtrain.trainer.checkpoint.background import Background, Disk
from dtrain.trainer.checkpoint.manager import Checkpoints, Moment, assign, saved
from dtrain.trainer.checkpoint.manifest import FORMAT, HashedFile, file_sum
from dtrain.trainer.checkpoint.optimizer_state import load_named_state, named_state
from dtrain.trainer.distributed.world import World, join_world

ALONE = World(0, 1, torch.device("cpu"))


def new_run(folder: Path, name: str = "test") -> RunDir:
    run = RunDir(folder)
    run.create()
    run.job.write_text(yaml.safe_dump({"name": name}))
    return run


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((40,), float(step))}, "rows": []}


def own(step: int, rank: int = 0) -> dict[str, Any]:
    return {"drawn": torch.full((5,), step + rank / 10)}


def open_checkpoints(run: RunDir, world: World = ALONE, keep: int = 10) -> Checkpoints:
    return Checkpoints(run, world, Checkpoint(keep=keep), Disk(run))


def save(checkpoints: Checkpoints, moment: Moment, best_step: int | None = None) -> None:
    checkpoints.snapshot(moment, best_step, state(moment.step), own(moment.step))()
    assert not checkpoints.failed


def fits(shared: dict[str, Any]) -> None:
    """It always does."""


def names(run: RunDir) -> list[str]:
    return [path.name for path in saved(run)]


# -- saving --------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """It holds what was there when it was copied, and has no name before all of it is on disk."""
    run = new_run(tmp_path)
    checkpoints, background = open_checkpoints(run), Background()
    gate, close = threading.Event(), HashedFile.__exit__

    def slow_close(file: HashedFile, *error: Any) -> None:
        assert gate.wait(60)
        close(file, *error)

    monkeypatch.setattr(HashedFile, "__exit__", slow_close)
    weight = torch.ones(1000)
    view = weight.view(10, 100).t()
    for step in (1, 2):  # the second time in the memory of the first
        background.start([checkpoints.snapshot(Moment(step), 0, {"model": {"a": weight, "view": view}}, own(step))])
        weight += 1
        assert names(run) == ([] if step == 1 else ["step-000000001"])
        gate.set()
        background.wait()
        gate.clear()
        found = checkpoints.load(fits)
        assert found is not None
        assert found.path.name == f"step-{step:09d}"
        assert found.shared["model"]["a"].tolist() == [float(step)] * 1000
        assert found.shared["model"]["view"].stride() == view.stride()
        assert run.latest.read_text() == f"step-{step:09d}\n"


def test_the_writing_thread_imports_nothing(tmp_path):
    """A loading process that is forked in the middle of an import would wait for it forever."""
    checkpoints = open_checkpoints(new_run(tmp_path))
    job = checkpoints.snapshot(Moment(1), 0, state(1), own(1))
    before = set(sys.modules)
    job()
    assert set(sys.modules) == before


def test_names_are_in_the_order_of_time(tmp_path):
    moments = [Moment(9), Moment(10), Moment(10, 1), Moment(11), Moment(999_999_999, 2), Moment(1_000_000_000)]
    run = new_run(tmp_path)
    for moment in reversed(moments):
        (run.checkpoints / moment.name).mkdir()
    for other in (".step-000000012", "damaged-step-000000013", "step-14-old"):
        (run.checkpoints / other).mkdir()
    assert names(run) == [moment.name for moment in moments]


def test_the_newest_and_the_best_are_kept(tmp_path):
    run = new_run(tmp_path)
    checkpoints = open_checkpoints(run, keep=2)
    for epoch, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4), (7, 4)):
        save(checkpoints, Moment(epoch, epoch), best)
        expected = {moment for moment in (best, epoch - 1, epoch) if moment}
        assert names(run) == [Moment(each, each).name for each in sorted(expected)]
    assert sorted(os.listdir(run.checkpoints)) == ["latest", *names(run)]


def test_the_same_moment_is_not_saved_twice(tmp_path):
    run = new_run(tmp_path)
    checkpoints = open_checkpoints(run)
    save(checkpoints, Moment(3))
    before = (run.checkpoints / Moment(3).name / "rank-0.bin").stat()
    save(checkpoints, Moment(3))
    assert (run.checkpoints / Moment(3).name / "rank-0.bin").stat() == before


def test_each_rank_writes_its_share():
    sizes = {"embedding": 900, **{f"layer{i}": 100 for i in range(27)}, **{f"bias{i}": 1 for i in range(9)}}
    for world_size in (1, 2, 3, 4):
        writers = assign(sizes, world_size)
        loads = [sum(size for name, size in sizes.items() if writers[name] == r) for r in range(world_size)]
        assert sum(loads) == sum(sizes.values())
        assert max(loads) - min(loads) <= 100
        assert writers == assign(dict(reversed(sizes.items())), world_size)  # the same on all ranks


def test_best_weights_stay_as_they_were(tmp_path):
    run = new_run(tmp_path)
    run.best_weights.write_bytes(b"first")
    save(open_checkpoints(run), Moment(1))
    assert (run.checkpoints / Moment(1).name / "best.pt").samefile(run.best_weights)  # not a copy
    (tmp_path / "new").write_bytes(b"second")
    (tmp_path / "new").rename(run.best_weights)
    assert (run.checkpoints / Moment(1).name / "best.pt").read_bytes() == b"first"


def test_what_was_left_half_written_is_removed(tmp_path):
    run = new_run(tmp_path)
    save(open_checkpoints(run), Moment(1))
    (run.checkpoints / ".step-000000002").mkdir()
    left = [".step-000000002/rank-0.bin", ".latest.xyz", "../weights/.last.pt.abc", "../.metrics.jsonl.123"]
    for name in left:
        (run.checkpoints / name).touch()
    found = open_checkpoints(run).load(fits)
    assert found is not None
    assert found.shared["step"] == 1
    assert sorted(os.listdir(run.checkpoints)) == ["latest", "step-000000001"]
    assert os.listdir(run.best_weights.parent) == []
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "heartbeat", "job.yaml", "logs", "weights"]


# -- several ranks -------------------------------------------------------------------------------


def save_on_ranks(rank: int, world_size: int, folder: str, steps: list[int]) -> None:
    checkpoints = open_checkpoints(RunDir(folder), join_world("cpu"))
    for step in steps:
        # What is the same on all ranks is marked by who wrote it.
        shared = {"step": step, "model": {str(i): torch.full((100 * i,), float(rank)) for i in range(1, 9)}}
        checkpoints.snapshot(Moment(step), 0, shared, own(step, rank), ["model/8"])()


def load_on_ranks(rank: int, world_size: int, folder: str) -> Any:
    found = open_checkpoints(RunDir(folder), join_world("cpu")).load(fits)
    assert found is not None
    return found.shared["step"], found.world_size, {r: each["drawn"].tolist()[0] for r, each in found.ranks.items()}


def test_what_is_the_same_on_all_ranks_is_written_by_one_of_them(tmp_path):
    run = new_run(tmp_path)
    run_ranks(3, save_on_ranks, str(tmp_path), [1])
    found = content(saved(run)[0])
    writers = [int(found["shared"]["model"][str(i)][0]) for i in range(1, 9)]
    assert sorted(set(writers)) == [0, 1, 2]
    assert writers[7] == 0  # as was asked for
    assert [each["drawn"].tolist()[0] for each in found["ranks"]] == pytest.approx([1.0, 1.1, 1.2])


def test_each_rank_gets_its_own_state_back_or_that_of_all(tmp_path):
    new_run(tmp_path)
    run_ranks(3, save_on_ranks, str(tmp_path), [5])
    answers = run_ranks(3, load_on_ranks, str(tmp_path))
    assert [(step, size, list(ranks)) for step, size, ranks in answers] == [(5, 3, [rank]) for rank in range(3)]
    for step, size, ranks in run_ranks(2, load_on_ranks, str(tmp_path)):
        assert (step, size) == (5, 3)
        assert ranks == pytest.approx({0: 5.0, 1: 5.1, 2: 5.2})


@pytest.mark.parametrize("file", ["rank-0.bin", "rank-1.bin", "rank-2.bin", "index.json", "SHA256SUMS"])
def test_all_ranks_pass_over_what_one_of_them_finds_damaged(file, tmp_path):
    run = new_run(tmp_path)
    run_ranks(3, save_on_ranks, str(tmp_path), [1, 2])
    flip(saved(run)[1] / file)
    assert [answer[0] for answer in run_ranks(2, load_on_ranks, str(tmp_path))] == [1, 1]
    assert sorted(os.listdir(run.checkpoints)) == ["damaged-step-000000002", "latest", "step-000000001"]


# -- bad input -----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    path.unlink()  # best.pt has another name, under which it is to stay
    path.write_bytes(data)


def sign(folder: Path) -> None:
    """Make the checksums right, as one would who wants a file to be read."""
    sums = {path.name: file_sum(path) for path in folder.iterdir() if path.name != "SHA256SUMS"}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    sign(folder)


def signed(function: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        function(folder)
        sign(folder)

    return damage


# What is done to the checkpoint's folder, and what is said about it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard truncated": (
        lambda folder: replace(folder / "rank-0.bin", (folder / "rank-0.bin").read_bytes()[:100]),
        r"rank-0\.bin is cut short: 100 of \d+ bytes",
    ),
    "shard empty": (lambda folder: replace(folder / "rank-0.bin", b""), r"rank-0\.bin is cut short: 0 of"),
    "shard missing": (lambda folder: (folder / "rank-0.bin").unlink(), r"rank-0\.bin is missing"),
    "shard flipped": (lambda folder: flip(folder / "rank-0.bin"), r"rank-0\.bin is damaged: its checksum"),
    "shard is a folder": (
        lambda folder: (folder / "rank-0.bin").unlink() or (folder / "rank-0.bin").mkdir(),
        r"rank-0\.bin is missing",
    ),
    "best weights missing": (lambda folder: (folder / "best.pt").unlink(), r"best\.pt is missing"),
    "best weights flipped": (lambda folder: flip(folder / "best.pt"), r"best\.pt is damaged: its checksum"),
    "index missing": (lambda folder: (folder / "index.json").unlink(), r"index\.json is missing"),
    "index empty": (lambda folder: replace(folder / "index.json", b""), r"index\.json is damaged: its checksum"),
    "index flipped": (lambda folder: flip(folder / "index.json"), r"index\.json is damaged: its checksum"),
    "index no JSON": (
        signed(lambda folder: replace(folder / "index.json", b"{")),
        r"index\.json is not an index: JSON",
    ),
    "index no text": (
        signed(lambda folder: replace(folder / "index.json", b"\xff")),
        r"index\.json is not an index: Uni",
    ),
    "index a list": (
        signed(lambda folder: replace(folder / "index.json", b"[]")),
        r"index\.json is not an index: TypeEr",
    ),
    "index without files": (
        lambda folder: edit_index(folder, lambda index: index.pop("files")),
        r"index\.json is not an index: KeyError: 'files'",
    ),
    "index without tensors": (
        lambda folder: edit_index(folder, lambda index: index.pop("tensors")),
        "its content is invalid: KeyError: 'tensors'",
    ),
    "index with another place": (
        lambda folder: edit_index(folder, lambda index: index["tensors"]["state.json"]["parts"][0].__setitem__(3, 64)),
        "its content is invalid",
    ),
    "index with a place behind the end": (
        lambda folder: edit_index(
            folder, lambda index: index["tensors"]["state.json"]["parts"][0].__setitem__(3, 10**6)
        ),
        r"rank-0\.bin is cut short: state\.json is incomplete",
    ),
    "index with no such dtype": (
        lambda folder: edit_index(folder, lambda index: index["tensors"]["model/weight"].update(dtype="object")),
        "its content is invalid: KeyError: 'object'",
    ),
    "index with an endless shape": (
        lambda folder: edit_index(folder, lambda index: index["tensors"]["model/weight"].update(shape=[2**60])),
        "its content is invalid: RuntimeError",
    ),
    "sums missing": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "sums empty": (lambda folder: replace(folder / "SHA256SUMS", b""), "SHA256SUMS is damaged: it does not list"),
    "sums garbled": (lambda folder: replace(folder / "SHA256SUMS", b"\x00 1"), "SHA256SUMS is damaged: it does not"),
    "sums no text": (lambda folder: replace(folder / "SHA256SUMS", b"\xff"), "SHA256SUMS is damaged: it is not text"),
    "sums flipped": (lambda folder: flip(folder / "SHA256SUMS"), "(is damaged|SHA256SUMS does not list|is missing)"),
    "sums cut": (
        lambda folder: replace(folder / "SHA256SUMS", (folder / "SHA256SUMS").read_bytes()[:-100]),
        "SHA256SUMS is damaged: it does not list",
    ),
    "all gone": (lambda folder: [path.unlink() for path in folder.iterdir()], "SHA256SUMS is missing"),
}


@pytest.fixture
def two(tmp_path):
    """A run with two checkpoints."""
    run = new_run(tmp_path)
    run.best_weights.write_bytes(b"the best weights of all")
    checkpoints = open_checkpoints(run)
    save(checkpoints, Moment(1, 1))
    save(checkpoints, Moment(2, 2))
    return run


FIRST, SECOND = Moment(1, 1).name, Moment(2, 2).name


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(kind, two, capsys):
    damage, said = DAMAGE[kind]
    damage(two.checkpoints / SECOND)
    found = open_checkpoints(two).load(fits)
    assert found is not None
    assert (found.path.name, found.shared["step"], found.ranks[0]["drawn"].tolist()) == (FIRST, 1, [1.0] * 5)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {two.checkpoints}/{SECOND} is skipped: ")
    assert line.endswith(f"; continuing from {FIRST}")
    assert re.search(said, line), line
    assert sorted(os.listdir(two.checkpoints)) == [f"damaged-{SECOND}", "latest", FIRST]  # nothing is lost
    assert two.latest.read_text() == f"{FIRST}\n"


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_checkpoint_that_can_be_used_is_an_error(kind, two):
    """And changes nothing: another try must not begin anew."""
    damage, said = DAMAGE[kind]
    for folder in saved(two):
        damage(folder)
    before = sorted(two.checkpoints.rglob("*"))
    for _ in range(2):
        with pytest.raises(ResumeError, match=said) as caught:
            open_checkpoints(two).load(fits)
        lines = str(caught.value).splitlines()
        assert [line.split(": ")[0] for line in lines] == [
            *(f"{two.checkpoints}/{name}" for name in (SECOND, FIRST)),
            str(two),
        ]
        assert "no other checkpoint is left" in lines[-1]
        assert sorted(two.checkpoints.rglob("*")) == before


def test_no_checkpoint_at_all_is_a_beginning(tmp_path):
    assert open_checkpoints(new_run(tmp_path)).load(fits) is None


def test_the_name_of_a_damaged_checkpoint_is_free(two, capsys):
    flip(two.checkpoints / SECOND / "rank-0.bin")
    checkpoints = open_checkpoints(two)
    checkpoints.load(fits)
    save(checkpoints, Moment(2, 2))
    found = open_checkpoints(two).load(fits)
    assert found is not None
    assert found.path.name == SECOND


def other_job(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(job="other"))


def newer_format(folder: Path) -> None:
    edit_index(folder, lambda index: index.update(format=FORMAT + 1, versions={"dtrain": "9.0"}))


def older_format(folder: Path) -> None:
    """As this project's first version wrote them."""
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"place": {}, "model": {}, "world_size": 1}, folder / "state.pt")
    torch.save({"rng": {}}, folder / "rank-0.pt")


def other_model(folder: Path) -> None:
    """`only_first` will say so."""


def only_first(shared: dict[str, Any]) -> str | None:
    return None if shared["step"] == 1 else "a checkpoint of another model"


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another job": (other_job, "a checkpoint of another job, other; this one is test"),
    "newer format": (
        newer_format,
        f"index.json: format {FORMAT + 1}, written by dtrain 9.0; "
        f"this one, dtrain {__version__}, reads format {FORMAT}",
    ),
    "older format": (older_format, f"state.pt: an older format (1), this version reads format {FORMAT}"),
    "another model": (other_model, "a checkpoint of another model"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_this_runs_is_passed_over_and_stays(kind, two, capsys):
    change, said = FOREIGN[kind]
    change(two.checkpoints / SECOND)
    checkpoints = open_checkpoints(two, keep=1)
    found = checkpoints.load(only_first)
    assert found is not None
    assert found.path.name == FIRST
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {two.checkpoints}/{SECOND} is skipped: ")
    assert f"{said}; continuing from {FIRST}" in line
    assert names(two) == [FIRST, SECOND]
    save(checkpoints, Moment(1, 1))  # still there
    assert names(two) == [FIRST, SECOND]
    save(checkpoints, Moment(2, 2))  # the same name: the other one gives way, and is not lost
    assert names(two) == [SECOND]
    assert (two.checkpoints / f"foreign-{SECOND}").is_dir()
    found = open_checkpoints(two).load(fits)
    assert found is not None
    assert found.shared["step"] == 2


@pytest.mark.parametrize("kind", FOREIGN)
def test_nothing_but_what_is_not_this_runs_is_an_error(kind, two):
    change, said = FOREIGN[kind]
    for folder in saved(two):
        change(folder)
    with pytest.raises(ResumeError) as caught:
        open_checkpoints(two).load(lambda shared: "a checkpoint of another model")
    assert [said in line for line in str(caught.value).splitlines()] == [True, True, False]
    assert names(two) == [FIRST, SECOND]


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
@pytest.mark.parametrize(
    "file", ["rank-0.bin", "index.json", "SHA256SUMS", "best.pt", ".metadata", "state.pt", "x.pkl"]
)
def test_a_pickle_is_never_loaded(file, dump, two, tmp_path):
    """Whoever wrote it, and whatever it replaces, with checksums that are right."""
    for folder in saved(two):
        payload = folder / "payload"
        with payload.open("wb") as opened:
            dump(Evil(tmp_path / "executed"), opened)
        payload.rename(folder / file)
        if file != "SHA256SUMS":
            sign(folder)
    try:
        found = open_checkpoints(two).load(fits)
    except ResumeError:
        assert file in ("rank-0.bin", "index.json", "SHA256SUMS")
    else:
        assert found is not None
        assert file in ("best.pt", ".metadata", "state.pt", "x.pkl")
    assert not (tmp_path / "executed").exists()


def test_the_payload_works(tmp_path):
    torch.save(Evil(tmp_path / "executed"), tmp_path / "payload")
    torch.load(tmp_path / "payload", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_pickle_in_a_tensors_place_is_never_loaded(two, tmp_path):
    payload = pickle.dumps(Evil(tmp_path / "executed"))
    for folder in saved(two):
        index = json.loads((folder / "index.json").read_text())
        data = bytearray((folder / "rank-0.bin").read_bytes())
        for each in index["tensors"].values():
            [[_, _, _, position]] = each["parts"]
            data[position : position + len(payload)] = payload
        replace(folder / "rank-0.bin", bytes(data[: index["files"]["rank-0.bin"]]))
        sign(folder)
    with pytest.raises(ResumeError, match="its content is invalid"):
        open_checkpoints(two).load(fits)
    assert not (tmp_path / "executed").exists()


# -- optimizers ----------------------------------------------------------------------------------


def make_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lbfgs": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=3, history_size=4),
    "lbfgs with line search": lambda net: torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe"),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=torch.tensor(0.01), amsgrad=True),
    "groups": lambda net: torch.optim.SGD(
        [{"params": [net[2].weight]}, {"params": list(net[0].parameters()), "lr": 0.1}], lr=0.2, momentum=0.9
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_continues_to_the_bit(kind, tmp_path):
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)

    checkpoints = open_checkpoints(new_run(tmp_path))
    net = make_net()
    optimizer = OPTIMIZERS[kind](net)
    steps(net, optimizer)
    shared = {"model": net.state_dict(), "optimizer": named_state(optimizer, net)}
    checkpoints.snapshot(Moment(1), 0, shared, {})()
    steps(net, optimizer)
    found = checkpoints.load(fits)
    assert found is not None
    again = make_net()
    again.load_state_dict(found.shared["model"])
    other = OPTIMIZERS[kind](again)
    load_named_state(other, again, found.shared["optimizer"])
    steps(again, other)
    assert differences(again.state_dict(), net.state_dict()) == []
    assert differences(other.state_dict(), optimizer.state_dict()) == []


def test_parameters_go_by_their_names():
    net, scale = make_net(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": net[2].parameters()}, {"params": [net[0].bias, scale]}], momentum=0.9)
    (net(torch.ones(1, 4)).sum() * scale).backward()
    optimizer.step()
    found = named_state(optimizer, net)
    assert [group["params"] for group in found["param_groups"]] == [["2.weight", "2.bias"], ["0.bias", "parameter-3"]]
    assert torch.equal(found["state"]["0.bias"]["momentum_buffer"], net[0].bias.grad)
    assert torch.equal(found["state"]["parameter-3"]["momentum_buffer"], scale.grad)


def test_what_can_not_be_saved_is_named(tmp_path):
    checkpoints = open_checkpoints(new_run(tmp_path))
    with pytest.raises(UserError, match="can't hold scheduler/hook: it is a function"):
        checkpoints.snapshot(Moment(1), 0, {"scheduler": {"hook": lambda x: x}}, {})
    assert os.listdir(checkpoints._run.checkpoints) == []
