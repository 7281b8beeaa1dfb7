"""What only a GPU shows: one rank over NCCL, 16 bits, TF32, and what lies in the GPU's memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from training import Samples, differences, final_state, prepare

from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.schema.sections import Fsdp
from dtrain.trainer.data.indexed import Source
from dtrain.trainer.optimization.precision import Precision
from dtrain.trainer.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

WIDTH, DEPTH, EPOCHS = 512, 8, 3
STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": Fsdp(),
    "fsdp, offloaded": Fsdp(offload=True),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def fit(rank: int, world_size: int, folder: str, strategy: str, options: dict[str, Any]) -> Any:
    """A run on this GPU: its rows, and the most memory that training took, in bytes."""
    os.environ[RUN_DIR_VARIABLE] = folder
    dist.destroy_process_group()  # run_ranks' is gloo's; Trainer makes its own, where it needs one
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, WIDTH), *(Block() for _ in range(DEPTH)), nn.Linear(WIDTH, 4))
    trainer = Trainer(
        net,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 0.5])),
        torch.optim.AdamW(net.parameters(), lr=1e-3),
        strategy=STRATEGIES[strategy],
        device="cuda",
        clip_norm=1.0,
        **options,
    )
    features = torch.randn(100, 16)
    data = Samples(features, features[:, :4].argmax(1))
    torch.cuda.reset_peak_memory_stats()
    history = trainer.fit(Source(data, 32, shuffle=True), Source(data, 32, shuffle=False), epochs=EPOCHS)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for run_ranks to take down
    return history.to_dict("records"), torch.cuda.max_memory_allocated()


def run(folder: Any, strategy: str, **options: Any) -> tuple[list[dict[str, float]], int]:
    prepare(folder, 1)
    return run_ranks(1, fit, str(folder), strategy, options)[0]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp, offloaded"])
def test_the_curve_is_ddps(strategy, tmp_path):
    rows, _ = run(tmp_path / "run", strategy, deterministic=True)
    expected, _ = run(tmp_path / "ddp", "ddp", deterministic=True)
    for row, other in zip(rows, expected, strict=True):
        for name in ("train_loss", "val_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)


def test_offload_leaves_less_in_the_gpus_memory(tmp_path):
    most = {strategy: run(tmp_path / strategy, strategy)[1] for strategy in ("ddp", "fsdp, offloaded")}
    assert most["fsdp, offloaded"] < 0.5 * most["ddp"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_fp32_rounds_nothing(precision):
    convolution, features = nn.Conv2d(64, 64, 3, device="cuda"), torch.randn(8, 64, 32, 32, device="cuda")
    with Precision(precision, features.device).in_force():
        found = convolution(features)
    expected = convolution.double()(features.double())
    assert ((found - expected).abs().max() / expected.abs().max() < 1e-5) == (precision == "fp32")


def test_an_optimizer_that_has_its_state_from_the_start_goes_along():
    net = nn.Linear(4, 2)
    trainer = Trainer(net, nn.MSELoss(), torch.optim.Adagrad(net.parameters()), device="cuda")
    net(torch.ones(1, 4, device="cuda")).sum().backward()
    trainer.optimizer.step()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_coarser_numbers_learn_the_same(precision, strategy, tmp_path):
    rows, _ = run(tmp_path / "run", strategy, precision=precision)
    expected, _ = run(tmp_path / "fp32", "ddp")
    assert rows[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_deterministic_run_repeats_its_bits(strategy, tmp_path):
    for name in ("one", "other"):
        run(tmp_path / name, strategy, deterministic=True)
    assert differences(final_state(tmp_path / "one"), final_state(tmp_path / "other")) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_learns_as_ddp_does(stage, precision, project):
    """By the command, since DeepSpeed has to meet the GPU in a process of its own."""
    project.job(fit={"epochs": 2})
    zero = ["fit.strategy=deepspeed", f"deepspeed.zero_optimization.stage={stage}", f"fit.precision={precision}"]
    zero.append("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    for name, settings in (("ddp", []), ("zero", zero)):
        done = project.run("launch", "--gpus", "1", "--run-dir", name, "job.yaml", "launch.device=cuda", *settings)
        assert done.code == 0, done.err
    rows, expected = (project.run_dir(name).rows() for name in ("zero", "ddp"))
    tolerance = 0.05 if precision == "bf16" else 1e-3  # the sums' order is not fixed
    assert [row["val_loss"] for row in rows] == pytest.approx([row["val_loss"] for row in expected], rel=tolerance)
