"""A model's predictions for a whole dataset: each sample once, in the dataset's order, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dtrain.errors import UserError

from .checks.agreement import require_same_data
from .data.first_batch import unshuffled
from .data.indexed import Data, IndexedBatches, MicroBatch
from .distributed.world import World
from .loss.step import Outcome, Step, describe
from .strategies.base import Parallel


def predict_features(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
    """The model's predictions for `(features, target)`, for `(features,)`, or for features alone."""
    data = micro_batch.data
    features = data[0] if isinstance(data, (tuple, list)) and len(data) in (1, 2) else data
    return Outcome(torch.zeros(()), None, model(features), None)


@torch.no_grad()
def predict_shares(
    model: Parallel, step: Step, data: Data, world: World, micro_batch_size: int | None
) -> Iterator[tuple[int, Tensor]]:
    """This rank's predictions, on the CPU, each with the index of its first sample. All ranks take part.

    Where the ranks call the model together, each yields equally often; nothing where it has no sample.

    Raises:
        UserError: predictions that are no tensor with a row for each sample.
    """
    fill_empty = model.forwards_together
    source = unshuffled(data)
    require_same_data(world, source)
    batches = IndexedBatches(source, world, 0, micro_batch_size, fill_empty=fill_empty)
    assert batches.shard is not None  # without a sampler it is known from the start
    model.share_buffers()
    with model.evaluating():
        for number, batch in enumerate(batches.epoch(1)):
            parts = [part for part in batches.shard.micro_batches(number) if part or fill_empty]
            for part, micro_batch in zip(parts, batch.micro_batches, strict=True):
                if part:
                    rows = _rows(model.run(step, micro_batch), len(part))
                else:
                    with model.preserving_state():
                        rows = _rows(model.run(step, micro_batch), None)[:0]
                yield part.start, rows.cpu()


def _rows(outcome: Outcome, samples: int | None) -> Tensor:
    rows = outcome.predictions
    if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) != (samples or len(rows)):
        count = f" of {samples}" if samples else ""
        raise UserError(f"predictions must be a tensor with a row for each sample{count}, not {describe(rows)}")
    return rows
