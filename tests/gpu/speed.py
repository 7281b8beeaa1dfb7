"""What a step and a checkpoint cost on the card, and whether copies to it hide behind kernels."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from checks import LeftOut, Place, below, check
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from dtrain import Trainer
from dtrain.trainer.checkpoint.background import Copies

CLASSES = 16
Span = tuple[float, float]


class Ready(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches that lie in memory."""

    def __init__(self, batch_size: int, width: int, steps: int) -> None:
        self.features = torch.randn(batch_size, width)
        self.target = torch.randint(CLASSES, (batch_size,))
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features, self.target


def loader(place: Place, batch_size: int, width: int, steps: int) -> DataLoader[Any]:
    workers = 2 if place.has_gpu else 0
    ready = Ready(batch_size, width, steps)
    return DataLoader(ready, batch_size=None, num_workers=workers, pin_memory=place.has_gpu)


def parts(width: int, layers: int) -> tuple[nn.Module, torch.optim.Optimizer, torchmetrics.Metric]:
    torch.manual_seed(0)
    blocks = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*blocks, nn.Linear(width, CLASSES))
    metric = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES, average="micro")
    return net, torch.optim.AdamW(net.parameters(), lr=1e-4), metric


class Timer:
    """The mean time of steps, the first ones left out; a hook of the optimizer."""

    def __init__(self, place: Place, skip: int = 10) -> None:
        self._place, self._skip = place, skip
        self.steps, self._began = 0, 0.0

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == self._skip:
            self._began = self._now()

    def end(self) -> float:
        """Seconds a step; to be called after the last."""
        return (self._now() - self._began) / (self.steps - self._skip)

    def _now(self) -> float:
        if self._place.has_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def bare(place: Place, batches: Iterable[Any], width: int, layers: int, name: str) -> float:
    net, optimizer, metric = parts(width, layers)
    net, metric = net.to(place.device), metric.to(place.device)
    timer, loss_fn = Timer(place), nn.CrossEntropyLoss()
    optimizer.register_step_post_hook(timer)
    total = torch.zeros((), device=place.device)
    for features, target in batches:
        features, target = (tensor.to(place.device, non_blocking=True) for tensor in (features, target))
        optimizer.zero_grad()
        predictions = net(features)
        loss = loss_fn(predictions, target)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        metric.update(predictions.detach(), target)
    return timer.end()


def trainer(place: Place, batches: Iterable[Any], width: int, layers: int, name: str) -> float:
    net, optimizer, metric = parts(width, layers)
    timer = Timer(place)
    seconds = []
    optimizer.register_step_post_hook(timer)
    # The epoch's end, with its checkpoint, is not a step's: the time is taken at the last one.
    steps = len(batches)  # type: ignore[arg-type]
    optimizer.register_step_post_hook(lambda *_: seconds.append(timer.end()) if timer.steps == steps else None)
    run_dir = place.folder / name
    made = Trainer(net, nn.CrossEntropyLoss(), optimizer, {"acc": metric}, device=place.device, run_dir=run_dir)
    made.fit(batches, epochs=1)
    return seconds[0]


@check(22, "a step beside a bare loop's", limit_s=120, alone=True)
def steps(place: Place) -> str:
    sizes = {"large": (1024, 4096, 6, 60), "small": (256, 512, 4, 400)}
    if not place.has_gpu:
        sizes = {"large": (64, 256, 2, 30), "small": (16, 64, 2, 30)}
    figures = []
    for size, (batch, width, layers, count) in sizes.items():
        batches = loader(place, batch, width, count)
        ways: list[Callable[..., float]] = [bare, trainer]
        times: dict[str, list[float]] = {way.__name__: [] for way in ways}
        for number, way in itertools.product(range(4 if place.has_gpu else 1), ways):
            times[way.__name__].append(way(place, batches, width, layers, f"{size}-{number}"))
        one, other = (statistics.median(times[way.__name__]) for way in ways)
        figures.append(f"{size}: {one * 1e3:.2f} ms bare, {other * 1e3:.2f} ms, ratio {other / one:.3f}")
        if place.has_gpu and size == "large":
            below("a large step's ratio", other / one, 1.05)
    spans = profiled(place, loader(place, *sizes["large"][:2], 40), *sizes["large"][1:3])
    if not place.has_gpu:
        raise LeftOut(f"no figures of a GPU; on the CPU {'; '.join(figures)}")
    kernels = merged(spans["kernel"])
    idle = 1 - length(kernels) / (kernels[-1][1] - kernels[0][0])
    return f"{'; '.join(figures)}; the large one leaves the card idle for {idle:.1%}"


@check(23, "copies to the card behind kernels, by the profiler", limit_s=90, alone=True)
def overlap(place: Place) -> str:
    batch, width, layers = (1024, 4096, 6) if place.has_gpu else (16, 64, 2)
    spans = profiled(place, loader(place, batch, width, 40), width, layers)
    if not place.has_gpu:
        raise LeftOut("there is nothing to copy to")
    copies, kernels = spans["gpu_memcpy"], merged(spans["kernel"])
    hidden = sum(shared(copy, kernels) for copy in copies) / length(copies)
    assert hidden > 0.5, f"{hidden:.0%} of the copies' time is behind kernels"
    return f"{hidden:.0%} of {length(copies) / 1e3:.1f} ms in 20 steps"


def profiled(place: Place, batches: Iterable[Any], width: int, layers: int) -> dict[str, list[Span]]:
    """When kernels ran and copies to the card were made in 20 steps of Trainer, in microseconds."""
    net, optimizer, metric = parts(width, layers)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.has_gpu else [])]
    watching = profile(activities=activities)
    count = 0

    def look(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 15:
            watching.start()
        if count == 35:
            if place.has_gpu:
                torch.cuda.synchronize()
            watching.stop()

    optimizer.register_step_post_hook(look)
    run_dir = place.folder / "profiled"
    made = Trainer(net, nn.CrossEntropyLoss(), optimizer, {"acc": metric}, device=place.device, run_dir=run_dir)
    made.fit(batches, epochs=1)
    path = place.folder / "trace.json"
    watching.export_chrome_trace(str(path))
    return spans_in(path)


def spans_in(path: Path) -> dict[str, list[Span]]:
    """By category, of the trace's kernels and copies to the card."""
    found: dict[str, list[Span]] = {"kernel": [], "gpu_memcpy": []}
    for event in json.loads(path.read_text())["traceEvents"]:
        category = event.get("cat")
        if category == "kernel" or (category == "gpu_memcpy" and "HtoD" in event["name"]):
            found[category].append((event["ts"], event["ts"] + event["dur"]))
    return found


def merged(spans: list[Span]) -> list[Span]:
    """The same time, each moment once."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def shared(span: Span, others: Iterable[Span]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in others)


@check(17, "a snapshot of 1 GB: how long it holds up the training, how much it pins", alone=True)
def snapshot(place: Place) -> str:
    megabytes = 1000 if place.has_gpu else 32
    width = 1536  # 9.4 MB a tensor: no power of two
    count = megabytes * 10**6 // (4 * width**2)
    tensors = {str(i): torch.randn(width, width, device=place.device) for i in range(count)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    copies = Copies()
    seconds = []
    for _ in range(4):
        if place.has_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        made = copies.of(tensors)
        seconds.append(time.perf_counter() - began)
    assert all(torch.equal(made[name], tensor.cpu()) for name, tensor in tensors.items())
    figure = f"{total / 1e9:.2f} GB: the first {seconds[0]:.3f} s, then {statistics.median(seconds[1:]):.3f} s"
    if not place.has_gpu:
        raise LeftOut(f"nothing is pinned on a CPU; {figure}")
    below("seconds a GB", statistics.median(seconds[1:]) / (total / 1e9), 0.2)
    statistics_of_host: Callable[[], dict[str, int]] | None = getattr(torch.cuda, "host_memory_stats", None)
    if statistics_of_host is None:
        return figure
    pinned = statistics_of_host()["allocated_bytes.current"]
    below("pinned, as a multiple of what is copied", pinned / total, 1.25)
    return f"{figure}, {pinned / total:.2f} of it pinned"
