"""One rank of a rehearsal: trains two epochs of a job's first batches as the job would.

`dtrain check --exact` compares rehearsals at several numbers of ranks, and one that is stopped and continued. Run as
dtrain.trainer.entrypoints.train is, with a `Rehearse`. It leaves metrics.jsonl and weights/ as training does.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset, Sampler, Subset

from dtrain.files import write_text
from dtrain.run.folder import EXIT_STOPPED, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.run.rank_request import Rehearse
from dtrain.schema.interval import Interval
from dtrain.schema.job import Job

from ..checks.batch_norm import is_per_rank
from ..data.indexed import Source
from ..distributed.stop import Stopped
from ..model.optimizers import members_of
from .train import begin, build_sets, build_source, build_trainer, settle

BATCHES = 5  # whole ones in an epoch, and a half one
EPOCHS = 2
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def main() -> int:
    """Rehearse this rank's part; the exit code."""
    request = Rehearse.read()
    run, job = begin(request)
    try:
        rehearse(job, run, request.stop_after)
    except Stopped:
        return EXIT_STOPPED
    return 0


def rehearse(job: Job, run: RunDir, stop_after: int) -> None:
    """Train on the first batches. All ranks take part."""
    soon = {name: sooner(getattr(job.fit, name)) for name in ("validate_every", "report_every")}
    freeze = [each.model_copy(update={"until": each.until and sooner(each.until)}) for each in job.fit.freeze]
    fit = job.fit.model_copy(update={"epochs": EPOCHS, "steps": None, "max_time": None, "freeze": freeze, **soon})
    job, train = settle(job.model_copy(update={"fit": fit}), beginning)
    trainer = build_trainer(job)
    assert trainer.optimizer is not None
    rank, steps = trainer.world.rank, itertools.count(1)

    def stop(*_: Any) -> None:
        if next(steps) == stop_after:
            Heartbeat(run.heartbeat(rank)).stop = signal.SIGTERM

    members_of(trainer.optimizer)[-1].register_step_post_hook(stop)
    loop = trainer.train(
        train or beginning(build_source(job, "train", training=True)),
        build_sets(job, "val", beginning),
        epochs=EPOCHS,
        early_stopping={"monitor": job.monitor, "mode": job.stopping.mode},
    )
    if trainer.world.is_main:
        splits = loop.data.train.state_dict().get("splits")
        apart = [*layers_apart(trainer.net), *["part of the stream"] * bool(splits)]
        write_text(run.answer, json.dumps(apart))


def sooner(every: int | str) -> int | str:
    """The interval, or one of the same kind that a rehearsal is long enough for."""
    interval = Interval.of(every)
    return "epoch" if interval is None or interval.unit == "epoch" else min(interval.count, EPOCHS)


def beginning(source: Source) -> Source:
    """The source's first samples, an odd number of them: some batches, and an uneven one."""
    assert source.batch_size is not None  # a job says it
    samples = BATCHES * source.batch_size + source.batch_size // 2 + 1
    if source.is_stream:
        return replace(source, dataset=FirstOfStream(source.dataset, samples))
    if source.sampling.sampler is not None:
        first = First(source.sampling.sampler, samples)
        return replace(source, sampling=replace(source.sampling, sampler=first))
    samples = min(len(cast(Sized, source.dataset)), samples)
    return replace(source, dataset=Subset(source.dataset, range(samples)))


class First(Sampler[Any]):
    """The first samples that a sampler draws."""

    def __init__(self, sampler: Iterable[Any], samples: int) -> None:
        self._sampler = sampler
        self._samples = samples

    def __getattr__(self, name: str) -> Any:  # its generator, or set_epoch
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._sampler, self._samples)

    def __len__(self) -> int:
        return min(len(cast(Sized, self._sampler)), self._samples)


class FirstOfStream(IterableDataset[Any]):
    """The first samples of a stream, or of each part of one that splits itself. Without its state: it is read again."""

    def __init__(self, stream: Any, samples: int) -> None:
        self._stream = stream
        self._samples = samples

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._stream, self._samples)


def layers_apart(net: nn.Module) -> list[str]:
    """The types of the layers that work differently on each rank: statistics and masks of its own share."""
    found = {
        type(layer).__name__
        for layer in net.modules()
        if is_per_rank(layer)
        or (isinstance(layer, _DROPOUTS) and layer.p > 0)
        or (isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and layer.dropout > 0)
    }
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
