"""FSDP2 and ZeRO beside ddp, and two ranks on one card."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from checks import HERE, Job, LeftOut, Place, apart, below, check, difference
from repeats import CURVES, stopped_and_continued, uninterrupted

PLAIN = "model.dropout=0"
FSDP = "fit.strategy=fsdp"


def losses(place: Place, **settings: list[str]) -> dict[str, list[dict[str, float]]]:
    """The rows of jobs by name, all trained at once."""
    jobs = {name: Job(place, name, PLAIN, *each) for name, each in settings.items()}
    with ThreadPoolExecutor(4 if place.has_gpu else 1) as pool:
        return dict(zip(jobs, pool.map(lambda job: job.train(), jobs.values()), strict=True))


@check(12, "fp16 with fsdp.offload: as with ddp, or refused in words")
def fp16_offload(place: Place) -> str:
    coarse = Job(place, "fp16", PLAIN, FSDP, "fsdp.offload=true", "fit.precision=fp16")
    done = coarse.launch().wait()
    if done.code == 2:
        message = done.err.strip().splitlines()[-1]
        assert "fp16" in done.err, done.last_lines
        assert "Traceback" not in done.err, done.last_lines
        if not place.has_gpu:
            raise LeftOut(f"refused on a CPU: {message}")
        return f"refused: {message}"
    assert done.code == 0, done.last_lines
    expected = Job(place, "ddp", PLAIN, "fit.precision=fp16").train()
    assert expected[-1]["train_loss"] < expected[0]["train_loss"]
    return below("train_loss", apart(coarse.run.rows(), expected), 0.02)


@check(13, "ZeRO 1 to 3 beside ddp: clip_norm, clip_value, offload, MSE", limit_s=240)
def zero(place: Place) -> str:
    if importlib.util.find_spec("deepspeed") is None:
        raise LeftOut("deepspeed is not installed")
    section = "deepspeed.zero_optimization"
    offload = f"{section}.offload_optimizer.device=cpu"
    number = ["loss._target_=torch.nn.MSELoss", "model.outputs=1", "data.train.classes=0", "data.val.classes=0"]
    number.append("metrics={}")
    # Adam would not notice a gradient that is clipped to another length.
    sgd = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1"]
    norm = [*sgd, "fit.clip_norm=0.1"]
    kinds = {"norm": norm, "value": [*sgd, "fit.clip_value=0.001"], "mse": [*number, *norm]}
    cases = {(1, "norm"): [], (2, "norm"): [offload], (2, "value"): [offload], (2, "mse"): [offload]}
    cases |= {(3, "norm"): [offload], (3, "value"): []}
    found = losses(
        place,
        **kinds,
        **{
            f"{kind}-{stage}": [*kinds[kind], "fit.strategy=deepspeed", f"{section}.stage={stage}", *more]
            for (stage, kind), more in cases.items()
        },
    )
    worst = {
        stage: max(apart(found[f"{kind}-{stage}"], found[kind], CURVES) for each, kind in cases if each == stage)
        for stage in (1, 2, 3)
    }
    return ", ".join(below(f"stage {stage}", value, 1e-3) for stage, value in worst.items())


@check(14, "FSDP: bf16, offload, save and resume", limit_s=180)
def fsdp(place: Place) -> str:
    bf16 = "fit.precision=bf16"
    settings = {"ddp": [], "ddp16": [bf16], "fsdp": [FSDP], "bf16": [FSDP, bf16]}
    if place.has_gpu:
        settings["offload"] = [FSDP, "fsdp.offload=true"]
    found = losses(place, **settings)
    figures = [below("bf16", apart(found["bf16"], found["ddp16"]), 0.02)]
    for name in found.keys() & {"fsdp", "offload"}:
        figures.append(below(name, apart(found[name], found["ddp"], CURVES), 1e-3))
    expected = uninterrupted(place, "straight", FSDP, "fit.deterministic=true").run.rows()
    stopped = stopped_and_continued(place, "stopped", FSDP, "fit.deterministic=true").run.rows()
    return ", ".join([*figures, below("resumed", apart(stopped, expected, CURVES), 1e-6)])


@check(16, "two ranks on one card over gloo: DDP, an empty share", limit_s=120)
def two_ranks(place: Place) -> str:
    import torch

    histories, weights = [], []
    for ranks in (1, 2):
        folder = place.folder / f"{ranks}"
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(HERE / "two_ranks.py"), place.device]
        started = [subprocess.Popen(command, cwd=folder, env={**common, "RANK": str(rank)}) for rank in range(ranks)]
        codes = [process.wait() for process in started]
        assert codes == [0] * ranks, f"exit codes {codes} on {ranks} ranks"
        histories.append(json.loads((folder / "history.json").read_text()))
        weights.append(torch.load(folder / "best.pt", weights_only=True))
    figure = below("curves", apart(histories[1], histories[0], CURVES), 1e-4)
    worst = max(difference(weights[1][name], value) for name, value in weights[0].items())
    return f"{figure}, " + below("weights", worst, 1e-4)
