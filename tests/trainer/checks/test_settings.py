"""Trainer's settings: what job.yaml would refuse, a script is refused too, before anything is trained."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from dtrain import Trainer
from dtrain.errors import UserError
from dtrain.schema.loading import load_job
from dtrain.schema.sections import Checkpoint, Fit, Launch
from dtrain.trainer.checks.arguments import OF_THE_RUN

# By what it is called in job.yaml: what Trainer calls it, and values that both refuse.
BOTH = {
    "fit.strategy": ("strategy", ["fsdpp", 3]),
    "fit.precision": ("precision", ["bfloat16", 16]),
    "fit.micro_batch_size": ("micro_batch_size", [0, 2.5]),
    "fit.deterministic": ("deterministic", ["of", 3]),
    "fit.sync_batchnorm": ("sync_batchnorm", ["maybe"]),
    "fit.unused_parameters": ("unused_parameters", ["some", True]),
    "fit.freeze": ("freeze", [[["a"]], {"until": 3}, {"patterns": "*", "until": "3 days"}, {"patterns": "*", "at": 1}]),
    "fit.clip_norm": ("clip_norm", [-1, "a lot"]),
    "fit.clip_value": ("clip_value", [0]),
    "fit.l1": ("l1", [-0.5]),
    "fit.l2": ("l2", ["much"]),
    "fit.ema": ("ema", [2, 0]),
    "fit.on_nonfinite": ("on_nonfinite", ["ignore"]),
    "checkpoint.every": ("checkpoint_every", ["epochs", 0]),
    "checkpoint.keep": ("keep", [0]),
    "launch.device": ("device", ["gpu"]),
    "seed": ("seed", [-1, "a"]),
    "scheduler.interval": ("scheduler_interval", ["batch"]),
}
# The same of what `fit` is told.
OF_FIT = {
    "fit.epochs": ("epochs", [0, 2.5, "many"]),
    "fit.early_stopping.patience": ("patience", [0, "long"]),
    "fit.early_stopping.mode": ("mode", ["maximum", 3]),
    "fit.early_stopping.monitor": ("monitor", [3]),
}
TOGETHER = {
    "clipped twice": {"clip_norm": 1.0, "clip_value": 1.0},
    "unused": {"unused_parameters": "allow", "strategy": "fsdp"},
    "unfrozen": {"freeze": [{"patterns": "*", "until": 3}], "strategy": "deepspeed"},
    "fp16": {"precision": "fp16", "on_nonfinite": "stop"},
}
JOB = """
name: settings
model: {_target_: torch.nn.Linear, in_features: 2, out_features: 1}
data: {train: {_target_: data.points}, batch_size: 8}
loss: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 1}
fit: {epochs: 1}
"""
NAMES = {
    "activations": ({"activations": {"mes": "none"}}, "activations: names the metric mes.* did you mean mse"),
    "train_metrics": ({"train_metrics": ["mes"]}, "train_metrics: names the metric mes.* did you mean mse"),
}


def trainer(**settings):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Trainer(net, nn.MSELoss(), optimizer, {"mse": MeanSquaredError()}, **settings)


def said_of_job(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / "job.yaml"
    path.write_text(JOB)
    with pytest.raises(UserError) as refused:
        load_job(path, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return str(refused.value)


def said_of_trainer(settings: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        trainer(**settings)
    return str(refused.value)


def said_of_fit(settings: Mapping[str, Any]) -> str:
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(UserError) as refused:
        trainer().fit(DataLoader(data, batch_size=2), **settings)
    return str(refused.value)


@pytest.mark.parametrize("key", BOTH | OF_FIT)
def test_both_doors_refuse_in_the_same_words(key, tmp_path):
    keyword, values = (BOTH | OF_FIT)[key]
    for value in values:
        said = (said_of_fit if key in OF_FIT else said_of_trainer)({keyword: value})
        assert said_of_job(tmp_path, {key: value}).endswith(said), (value, said)


@pytest.mark.parametrize("name", TOGETHER)
def test_both_doors_refuse_what_contradicts_itself(name, tmp_path):
    settings = TOGETHER[name]
    assert said_of_trainer(settings) in said_of_job(tmp_path, {f"fit.{key}": each for key, each in settings.items()})


@pytest.mark.parametrize("name", NAMES)
def test_names_of_metrics_that_there_are_not(name):
    settings, says = NAMES[name]
    assert re.search(says, said_of_trainer(settings))


def test_trainers_arguments_are_the_schemas_by_name_and_default():
    arguments = {name: each.default for name, each in inspect.signature(Trainer).parameters.items()}
    fit = {name: each.get_default(call_default_factory=True) for name, each in Fit.model_fields.items()}
    assert fit.keys() - OF_THE_RUN <= arguments.keys()
    own = {name: fit[name] for name in fit.keys() - OF_THE_RUN}
    assert own == {name: list(value) if isinstance(value := arguments[name], tuple) else value for name in own}
    assert (arguments["checkpoint_every"], arguments["keep"]) == (Checkpoint().every, Checkpoint().keep)
    assert arguments["device"] == Launch().device


def named(rank: int, world_size: int) -> list[str]:
    return [type(trainer(strategy=name, device="cpu").model).__name__ for name in ("ddp", "fsdp", "deepspeed")]


def test_strategies_by_name():
    assert run_ranks(2, named) == [["DataParallel", "FullySharded", "DeepSpeedStage0"]] * 2


def test_numbers_of_numpy_are_numbers():
    made = trainer(seed=np.int64(3), l1=np.float32(0.5), micro_batch_size=np.int32(4), train_metrics=["mse"])
    assert (made.seed, made.settings.fit.l1, made.micro_batch_size) == (3, 0.5, 4)
