"""The machine, the launcher on it, and the commands on a trained model."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from checks import HERE, Job, LeftOut, Place, below, check, dtrain, succeed

ROOT = HERE.parents[1]
SPARE = 64 << 20  # bytes that the driver may keep for a moment


@check(1, "driver, NCCL, is_available, the backend's class")
def driver(place: Place) -> str:
    device = torch.device(place.device, 0) if place.has_gpu else torch.device("cpu")
    assert torch.cuda.is_available() == place.has_gpu
    backend = "cpu:gloo,cuda:nccl" if place.has_gpu else "gloo"
    options = {"device_id": device} if place.has_gpu else {}
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    group = dist.distributed_c10d._get_default_group()
    name = type(group._get_backend(device)).__name__
    if not place.has_gpu:
        return name
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    memory = torch.cuda.mem_get_info()[1] / 2**30
    return f"{name}, NCCL {nccl}, {memory:.0f} GiB, compute capability {capability}"


@check(2, "tests/gpu/test_cuda.py", limit_s=240)
def test_cuda(place: Place) -> str:
    if not place.has_gpu:
        raise LeftOut("each of its tests needs a GPU")
    side_by_side = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    # ZeRO is check 13's.
    rest = ["-p", "no:cacheprovider", "-k", "not zero", *side_by_side, str(ROOT / "tests/gpu/test_cuda.py")]
    done = subprocess.run([*pytest, *rest], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, summary
    return summary.strip("= ")


@check(3, "digits and ResNet: they end well, the memory is free again, no process is left", limit_s=180, alone=True)
def examples(place: Place) -> str:
    if missing := [name for name in ("sklearn", "torchvision") if importlib.util.find_spec(name) is None]:
        raise LeftOut(f"the examples need {' and '.join(missing)}")
    small = ["data.train.samples=512", "data.val.samples=128", "data.batch_size=128"]
    if not place.has_gpu:
        small = ["data.train.samples=8", "data.val.samples=4", "data.batch_size=4", "data.workers=1"]
        small += ["data.train.size=32", "data.val.size=32"]
    before = free_memory(place)
    figures = []
    for name, settings in (("digits", []), ("resnet", small)):
        job = str(ROOT / "examples" / name / "job.yaml")
        began = time.monotonic()
        one = ["launch", "--gpus", "1", "--run-dir", name, job, "fit.epochs=1", f"launch.device={place.device}"]
        succeed(dtrain(place.folder, *one, *settings))  # that waits for all of its processes
        figures.append(f"{name} {time.monotonic() - began:.1f} s")
        assert free_memory(place) > before - SPARE, f"{(before - free_memory(place)) >> 20} MiB are not free again"
    return ", ".join(figures)


@check(15, "NCCL of one rank: sums of float64 and int64, a gather of bytes, an average")
def collectives(place: Place) -> str:
    device = torch.device(place.device, 0) if place.has_gpu else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if place.has_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for dtype, value in ((torch.float64, 1 + 2.0**-50), (torch.int64, 2**62 + 1), (torch.uint8, 255)):
        tensor = torch.full((3,), value, dtype=dtype, device=device)
        if dtype != torch.uint8:
            dist.all_reduce(tensor)
        gathered = [torch.empty_like(tensor)]
        dist.all_gather(gathered, tensor)
        assert gathered[0].tolist() == [value] * 3, f"{dtype}: {gathered[0].tolist()}"
    if place.has_gpu:  # gloo has no average
        average = torch.full((3,), 2.5, device=device)
        dist.all_reduce(average, op=dist.ReduceOp.AVG)
        assert average.tolist() == [2.5] * 3
    return "all as they were"


@check(25, "evaluate, predict, export, check --exact", limit_s=180)
def commands(place: Place) -> str:
    job = Job(place, "job")
    last = job.train()[-1]
    device = f"launch.device={place.device}"
    found = succeed(dtrain(job.folder, "evaluate", "run", "--weights", "last", device)).out
    evaluated = float(re.findall(r'"val_loss": ([0-9.e-]+)', found)[0])
    figures = [below("evaluate", abs(evaluated - last["val_loss"]) / last["val_loss"], 1e-4)]
    succeed(dtrain(job.folder, "predict", "run", "val", device))
    import numpy as np

    shape = np.load(job.folder / "run/predictions.npy").shape
    assert shape == (30, 4), f"predictions: {shape}"
    formats = ["pt", "safetensors"]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        formats.append("onnx")
    for name in formats:
        succeed(dtrain(job.folder, "export", "run", "--format", name))
    exact = dtrain(job.folder, "check", "--exact", "job.yaml", device).wait()
    # Batch norm's statistics are each rank's own, which it says; more ranks than GPUs it can't have.
    print(exact.out, exact.err)
    assert exact.code in (0, 1), exact.last_lines
    assert "Traceback" not in exact.err + exact.out
    verdict = (exact.out.strip() or exact.err.strip()).splitlines()[-1]
    return f"{figures[0]}, predict {shape}, export {' '.join(formats)}; check --exact: {verdict}"


def free_memory(place: Place) -> int:
    """Bytes of the card that nobody has."""
    if not place.has_gpu:
        return 0
    deadline = time.monotonic() + 3  # the driver takes a moment
    free = 0
    while time.monotonic() < deadline:
        free = max(free, torch.cuda.mem_get_info()[0])
        time.sleep(0.1)
    return free
