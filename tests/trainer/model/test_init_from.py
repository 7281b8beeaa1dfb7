"""Weights that training begins with: which are loaded, what is said of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training import Job, Samples, epoch_order, train

from dtrain import Trainer, load_weights
from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.sections import InitFrom
from dtrain.trainer.model.loading import begin_from

BATCH, EPOCHS, SAMPLES, SEED = 7, 2, 20, 3


class Net(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight


def net(seed: int, classes: int = 2) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


def equal(ones: dict[str, Any], others: dict[str, Any]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def begin(model: nn.Module, **given: Any) -> list[str]:
    """What is said."""
    said: list[str] = []
    begin_from(model, InitFrom.model_validate(given), said.append)
    return [line.removeprefix("init_from: ") for line in said]


def as_lightning(weights: dict[str, Any], path: Path) -> None:
    named = {f"model.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": named, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{}]}, path)


def as_compiled_in_lightning(weights: dict[str, Any], path: Path) -> None:
    torch.save({"state_dict": {f"model._orig_mod.{name}": value for name, value in weights.items()}}, path)


def as_parallel(weights: dict[str, Any], path: Path) -> None:
    torch.save({f"module._orig_mod.{name}": value for name, value in weights.items()}, path)


def as_run(weights: dict[str, Any], path: Path) -> None:
    run = RunDir(path)
    run.best_weights.parent.mkdir(parents=True)
    torch.save(weights, run.best_weights)


FORMS = {
    "w.ckpt": as_lightning,
    "compiled.ckpt": as_compiled_in_lightning,
    "w.pth": as_parallel,
    "w.safetensors": save_file,
    "run": as_run,
}


@pytest.mark.parametrize("name", FORMS)
def test_what_others_save_is_understood(name, tmp_path):
    weights = net(1).state_dict()
    FORMS[name](weights, tmp_path / name)
    begun, loaded = net(2), net(3)
    assert begin(begun, weights=str(tmp_path / name))[0].startswith("loaded 9 of the model's 9 tensors from ")
    load_weights(loaded, tmp_path / name)
    assert equal(begun.state_dict(), weights)
    assert equal(loaded.state_dict(), weights)


NEW = ["head.weight", "head.bias"]
# What is asked for, of a file with ten classes, and two lines of what is said.
PARTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "by name": ({"skip": ["head.*"]}, "head.weight, head.bias", "head.weight, head.bias"),
    "a pattern alone": ({"skip": "head.?*"}, "head.weight, head.bias", "head.weight, head.bias"),
    "by class": (
        {"skip": ["head.*", "BatchNorm1d.*"]},
        "body.1.weight, body.1.bias, body.1.running_mean and 4 more",
        "body.1.weight, body.1.bias, body.1.running_mean and 4 more",
    ),
    "renamed": ({"rename": {"head": "old"}, "strict": False}, "old.weight, old.bias", "head.weight, head.bias"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_loaded_and_the_rest_is_said(name, tmp_path):
    asked, left_out, left_new = PARTS[name]
    weights, before = net(1, classes=10).state_dict(), net(2).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    begun = net(2)
    said = begin(begun, weights=str(tmp_path / "w.pt"), **asked)
    loaded = 7 - 5 * (name == "by class")
    path = tmp_path / "w.pt"
    assert said == [
        f"loaded {loaded} of the model's 9 tensors from {path}",
        f"left out of the file: {left_out}",
        f"left new in the model: {left_new}",
    ]
    is_new = {entry: entry.startswith("head") or (name == "by class" and ".1." in entry) for entry in weights}
    for entry, value in begun.state_dict().items():
        assert torch.equal(value, (before if is_new[entry] else weights)[entry]), entry


def test_names_of_another_model_are_renamed(tmp_path):
    weights = net(1).state_dict()
    torch.save({name.replace("body.", "encoder.layers."): value for name, value in weights.items()}, tmp_path / "w.pt")
    begun = net(2)
    said = begin(begun, weights=str(tmp_path / "w.pt"), rename={"encoder.layers": "body"})
    assert said[1:] == ["left out of the file: nothing", "left new in the model: nothing"]
    assert equal(begun.state_dict(), weights)
    begin(inner := net(3).body, weights=str(tmp_path / "w.pt"), rename={"encoder.layers": ""}, skip="head.*")
    assert torch.equal(inner[0].weight, weights["body.0.weight"])


def test_a_tensor_of_two_names_may_be_in_the_file_under_one(tmp_path):
    tied = Tied()
    torch.save({"embedding.weight": torch.ones(5, 3)}, tmp_path / "w.pt")
    assert begin(tied, weights=str(tmp_path / "w.pt"))[2] == "left new in the model: nothing"
    assert torch.equal(tied.out.weight, torch.ones(5, 3))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which PEFT looks at
def test_a_folder_of_transformers_for_the_model_and_for_one_with_adapters(tmp_path):
    """GPT-2's output layer is its embedding, which safetensors keep under one name."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    saved, begun, adapted = (transformers.GPT2LMHeadModel(config) for _ in range(3))
    saved.save_pretrained(tmp_path)
    assert begin(begun, weights=str(tmp_path))[2] == "left new in the model: nothing"
    assert equal(begun.state_dict(), saved.state_dict())
    lora = peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    skip = ["*.lora_*", "*.modules_to_save.*"]
    _, left_out, left_new = begin(peft.get_peft_model(adapted, lora), weights=str(tmp_path), skip=skip)
    assert left_out == "left out of the file: nothing"
    assert left_new.endswith("c_attn.lora_B.default.weight, transformer.ln_f.modules_to_save.default.weight and 1 more")
    for name, value in saved.state_dict().items():
        in_adapted = name.replace("c_attn.", "c_attn.base_layer.").replace("ln_f.", "ln_f.original_module.")
        assert torch.equal(adapted.state_dict()[in_adapted], value), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"weights": "there is none.pt"}, "init_from: no such file: there is none.pt"),
    "a folder": ({"weights": "."}, "init_from: no such file: weights/best.pt"),
    "no weights": ({"weights": "text.pt"}, "init_from: text.pt is not a weights file"),
    "no safetensors": ({"weights": "text.safetensors"}, "init_from: text.safetensors is not a weights file"),
    "code": ({"weights": "code.pt"}, "init_from: code.pt is not a weights file: it needs pathlib.*could execute code"),
    "another model": (
        {"weights": "other.pt"},
        r"init_from: other.pt holds weights of another model: head.weight is \(10, 6\) in the file, \(2, 6\) in the "
        r"model; head.bias is \(10,\) in the file",
    ),
    "shapes, also loosely": ({"weights": "other.pt", "strict": False}, r"head.weight is \(10, 6\) in the file"),
    "less": ({"weights": "less.pt"}, "another model: body.0.weight, body.0.bias, body.1.weight and 4 more not in the"),
    "more": ({"weights": "more.pt"}, "another model: extra not in the model"),
    "nothing": ({"weights": "less.pt", "skip": "*"}, "none of the 2 tensors in less.pt would be loaded: head.weight, "),
    "a pattern": (
        {"weights": "w.pt", "skip": ["head.wieght"]},
        "init_from.skip: no tensor is called head.wieght; did you mean head.weight",
    ),
    "a name": (
        {"weights": "w.pt", "rename": {"hea": "x"}},
        "init_from.rename: no tensor.*is hea or.*did you mean head",
    ),
    "one name for two": (
        {"weights": "w.pt", "rename": {"body.0": "head"}},
        "init_from.rename: several tensors in",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_loaded_is_refused_and_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = net(1).state_dict()
    torch.save(weights, "w.pt")
    torch.save(net(1, classes=10).state_dict(), "other.pt")
    torch.save({entry: weights[entry] for entry in NEW}, "less.pt")
    torch.save({**weights, "extra": torch.zeros(1)}, "more.pt")
    torch.save({"state_dict": weights, "folder": tmp_path}, "code.pt")
    for kind in ("pt", "safetensors"):
        Path(f"text.{kind}").write_text("weights")
    asked, says = REFUSED[name]
    model = net(5)
    with pytest.raises(UserError, match=says):
        Trainer(model, nn.CrossEntropyLoss(), init_from=asked, device="cpu")
    assert equal(model.state_dict(), net(5).state_dict())


# -- training ------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Without batch norm, whose statistics are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def plain(seed: int) -> Plain:
    torch.manual_seed(seed)
    return Plain()


def samples() -> Samples:
    generator = torch.Generator().manual_seed(SEED)
    features = torch.randn(SAMPLES, 4, generator=generator)
    return Samples(features, (features[:, 0] > 0).long())


def job(weights: str, strategy: Any) -> Job:
    begun = plain(2)
    optimizer = torch.optim.Adam(begun.parameters(), lr=0.05)
    trainer = {"net": begun, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "seed": SEED}
    given = {"weights": weights, "skip": ["head.*"]}
    trainer |= {"init_from": given, "strategy": strategy}
    return {"trainer": trainer, "train": samples(), "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def trained_plainly() -> dict[str, Any]:
    """By a plain loop that begins with the same."""
    begun, data = plain(2), samples()
    begun.body.load_state_dict(plain(1).body.state_dict())
    optimizer = torch.optim.Adam(begun.parameters(), lr=0.05)
    for epoch in range(1, EPOCHS + 1):
        for batch in epoch_order(SAMPLES, SEED, epoch).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(begun(data.features[batch]), data.target[batch]).backward()
            optimizer.step()
    return begun.state_dict()


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_training_goes_on_from_them_as_a_plain_loop_does(world_size, strategy, tmp_path):
    torch.save({f"module.{name}": value for name, value in plain(1).state_dict().items()}, tmp_path / "w.pt")
    expected = trained_plainly()
    ((_, trained), *_) = train(world_size, tmp_path / "run", job, str(tmp_path / "w.pt"), strategy)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_that_continues_takes_its_checkpoint_and_needs_no_file(project):
    """And one that begins is refused without it, by all commands that begin one."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, project.folder / "w.pt")
    project.job(init_from="w.pt", launch={"device": "cpu"})
    first = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", "fit.epochs=1")
    assert first.code == 0, first.err
    assert first.err.count("init_from: loaded 4 of the model's 4 tensors from w.pt") == 1
    whole = project.run("launch", "--gpus", "2", "--run-dir", "whole", "job.yaml")
    assert whole.code == 0, whole.err
    (project.folder / "w.pt").unlink()
    for command in (["check", "job.yaml"], ["launch", "job.yaml"]):
        refused = project.run(*command)
        assert refused.code == 2
        assert "init_from.weights: no such file: w.pt" in refused.err
        assert refused.err.startswith("job.yaml:")
    second = project.run("launch", "--resume", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert second.code == 0, second.err
    assert "init_from" not in second.err  # no line of what is loaded
    last = [torch.load(project.run_dir(name).last_weights) for name in ("run", "whole")]
    assert equal(*last)
    evaluated = project.run("evaluate", "run")
    assert evaluated.code == 0, evaluated.err
