"""Activation checkpointing changes no number, and does compute twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from training import Job, Samples, differences, final_state, fit, prepare

from dtrain.errors import UserError
from dtrain.schema.sections import Fsdp
from dtrain.trainer.model.activation_checkpointing import recompute_activations

calls = 0  # of a block's layer, in this process

STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": Fsdp(), "ZeRO 3": {"zero_optimization": {"stage": 3}}}


class Block(nn.Module):
    """With all that a second forward pass could disturb: masks, statistics, and a buffer that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global calls
        calls += self.training == torch.is_grad_enabled()  # not where it is tried, in the first step
        if self.training:
            self.seen += 0.1 * x.mean().detach()
        return x + self.dropout(torch.tanh(self.norm(self.layer(x)) + self.seen))


def job(classes: list[str], strategy: Any) -> Job:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 1))
    trainer = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": torch.optim.Adam(net.parameters(), lr=0.01)}
    trainer |= {"activation_checkpointing": classes, "strategy": strategy}
    train, val = (Samples(torch.randn(n, 4), torch.randn(n, 1)) for n in (32, 8))
    return {"trainer": trainer, "train": train, "val": val, "batch_size": 8, "fit": {"epochs": 2}}


def count_calls(rank: int, world_size: int, folder: str, classes: list[str], strategy: Any) -> int:
    global calls
    calls = 0
    fit(rank, world_size, folder, job, classes, strategy)
    return calls


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_run_has_the_bits_of_one_that_keeps_its_activations(strategy, tmp_path):
    found = {}
    for name, classes in (("kept", []), ("again", ["Block"])):
        prepare(tmp_path / name, 2)
        found[name] = run_ranks(2, count_calls, str(tmp_path / name), classes, strategy)
    assert differences(final_state(tmp_path / "kept"), final_state(tmp_path / "again")) == []
    training, validation = 2 * 2 * 4, 2 * 2 * 1  # blocks, epochs, steps
    assert found == {"kept": [training + validation] * 2, "again": [2 * training + validation] * 2}


def test_the_outermost_block_is_the_one_that_is_repeated():
    net = nn.Sequential(nn.Sequential(Block(), Block()))
    recompute_activations(net, ["Sequential", "Block"])
    assert ["forward" in vars(module) for module in net.modules()] == [False, True, *[False] * 8]


def test_a_class_that_does_not_occur():
    with pytest.raises(UserError, match=r"activation_checkpointing: .* no module of class Blok; did you mean Block\?"):
        recompute_activations(nn.Sequential(Block()), ["Blok"])


def test_a_block_that_fails_the_second_time_is_named():
    """A model of transformers', whose cache has the first time's keys by then."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    net = transformers.LlamaForCausalLM(config).train()
    recompute_activations(net, ["LlamaDecoderLayer"])
    tokens = torch.tensor([[1, 2, 3], [1, 2, 0]])
    loss = net(input_ids=tokens, attention_mask=tokens > 0, labels=tokens).loss
    with pytest.raises(UserError, match=r"LlamaDecoderLayer can't be computed a second time: .*use_cache: false"):
        loss.backward()
