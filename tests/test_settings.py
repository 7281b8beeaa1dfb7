"""Trainer's settings: what job.yaml would refuse, a script is refused too, before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

from dtrain import Trainer
from dtrain.errors import UserError

REFUSED = {
    "strategy": ({"strategy": "fsdp"}, "strategy: expected 'ddp', Fsdp or a dict, found 'fsdp'"),
    "precision": ({"precision": "bfloat16"}, "fit.precision: .* found 'bfloat16'; did you mean bf16"),
    "interval": ({"scheduler_interval": "batch"}, "interval: expected epoch or step, found 'batch'"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, "fit.on_nonfinite: expected stop or skip"),
    "every": ({"checkpoint_every": "epochs"}, "checkpoint.every: expected epoch or a number"),
    "keep": ({"keep": 0}, "checkpoint.keep: expected at least 1, found 0"),
    "device": ({"device": "gpu"}, "launch.device: expected auto, cpu or cuda"),
    "seed": ({"seed": None}, "seed: expected a whole number"),
    "ema": ({"ema": 2.0}, "fit.ema: expected a number below 1"),
    "micro-batch": ({"micro_batch_size": 2.5}, "fit.micro_batch_size: expected a whole number"),
    "activations": ({"activations": {"mes": "none"}}, "activations: names the metric mes.* did you mean mse"),
    "train_metrics": ({"train_metrics": ["mes"]}, "train_metrics: names the metric mes.* did you mean mse"),
}


def trainer(**settings):
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Trainer(net, nn.MSELoss(), optimizer, {"mse": MeanSquaredError()}, **settings)


@pytest.mark.parametrize("name", REFUSED)
def test_what_job_yaml_refuses(name):
    settings, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        trainer(**settings)


def test_numbers_of_numpy_are_numbers():
    made = trainer(seed=np.int64(3), l1=np.float32(0.5), micro_batch_size=np.int32(4), train_metrics=["mse"])
    assert (made.seed, made.l1, made.micro_batch_size) == (3, 0.5, 4)
