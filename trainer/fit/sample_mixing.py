"""Whether a sample's result depends on the others in its batch: tries a few samples, as one batch and as two.

Ranks and micro-batches have parts of a batch. What a collate function pads or mixes, and what a model computes across
samples, differs from part to part.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..data.batch_samples import num_collated
from ..data.indexed import Data, MicroBatch, Source
from ..data.sampler import length
from ..data.samples import SampleReading
from ..data.sharding import Shard, index_batches
from ..data.transfer import to_device
from ..data.workers import Loader
from ..distributed.seeds import derive_seed
from ..distributed.world import World
from ..loss.loss_trial import COARSE, FINE, standing_still
from ..loss.step import Step
from ..strategies.base import Parallel

SAMPLES = 4


def look_for_mixing(
    model: Parallel, step: Step, data: Data, seed: int, warn: Callable[[str], None], *, is_coarse: bool
) -> None:
    """Warn if the loss of some training samples, evaluated, is not that of their batch's two halves.

    Only where a collate function of the user's own makes the batches: of others the first step shows it. What fails
    here, training will tell. It leaves no trace. All ranks take part: each evaluates the same samples.
    """
    source = Source.of(data) if isinstance(data, DataLoader) else data
    if not isinstance(source, Source) or source.is_stream or source.is_ready or source.is_regular:
        return
    batches: list[MicroBatch] = []
    with contextlib.suppress(Exception):  # of the user's dataset or collate function, on one rank perhaps
        batches = list(_read(source, model.world, seed))
    if not _all_have(batches, model.world):
        return
    losses: list[tuple[float, float]] = []
    own = inspect.unwrap(step)
    with contextlib.suppress(Exception), model.preserving_state(), model.evaluating(), standing_still(model.bare, own):
        for batch in batches:
            outcome = model.run(step, batch)
            losses.append((float(outcome.total), float(batch.samples if outcome.weight is None else outcome.weight)))
    if len(losses) == len(batches):
        warn_of_mixing(losses, batches[0].samples, warn, is_coarse=is_coarse)


def warn_of_mixing(
    losses: Sequence[tuple[float, float]], samples: int, warn: Callable[[str], None], *, is_coarse: bool
) -> None:
    """Warn if a batch's loss is not that of its two parts.

    Args:
        losses: of the whole, of the whole once more, and of the parts: each as a sum, and its weight.
    """
    if not all(units for _, units in losses):
        return
    whole, again = (total / units for total, units in losses[:2])
    parts = sum(total for total, _ in losses[2:]) / sum(units for _, units in losses[2:])
    near = functools.partial(math.isclose, whole, rel_tol=COARSE if is_coarse else FINE, abs_tol=1e-6)
    if math.isfinite(whole + parts) and near(again) and not near(parts):
        warn(
            f"the loss of {samples} training samples is {whole:.6g} as one batch and {parts:.6g} as two: "
            "what comes of a sample depends on the others in its batch (padding that no mask hides, samples mixed by "
            "the collate function or the model). Ranks and micro-batches have parts of a batch, so that results will "
            "depend on their number: mask the padding, or pad to one length; let no layer look across samples"
        )


def _read(source: Source, world: World, seed: int) -> Iterator[MicroBatch]:
    """Samples from all over the dataset: in one batch, in another one, and in two."""
    size = length(source.dataset) or 0
    samples = min(SAMPLES, source.batch_size or SAMPLES, size) // 2 * 2
    if not samples:
        return
    chosen = np.linspace(0, size - 1, samples).astype(int)
    whole, halves = Shard(samples, samples), Shard(samples, samples, micro_batch_size=samples // 2)
    key = derive_seed("mixing", seed)
    requests = [
        request
        for shard in (whole, whole, halves)
        for request in index_batches(shard, chosen.__getitem__, key, 0, fill_empty=False)
    ]
    reading = SampleReading(source.dataset, source.collate, source.processes.worker_init_fn)
    processes = replace(source.processes, num_workers=min(1, source.processes.num_workers), persistent_workers=False)
    loader = Loader(reading, processes, world, seed)
    for request, data in zip(requests, loader.read(requests, 1), strict=True):
        if count := num_collated(data, len(request)):
            yield MicroBatch(to_device(data, world.device), count, 1, is_regular=False)


def _all_have(batches: list[MicroBatch], world: World) -> bool:
    """Whether no rank lacks one. All ranks take part."""
    lacking = torch.tensor(float(len(batches) != 4), device=world.device)
    return not world.sum(lacking)
