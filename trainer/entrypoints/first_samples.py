"""A job's first samples, and what its model is called with for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from dtrain.errors import UserError

from ..data.indexed import MicroBatch, Source
from ..data.samples import collated
from ..distributed.seeds import loading_apart, seed_loading
from ..loss.step import Step

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a model, by position and by name


def first_samples(source: Source, count: int) -> tuple[Any, int]:
    """A batch of the first samples, at most so many, and how many they are."""
    with loading_apart():
        seed_loading(0)
        if source.is_stream:
            samples = list(itertools.islice(iter(source.dataset), count))
        else:
            dataset: Any = source.dataset
            samples = [dataset[index] for index in range(min(count, len(dataset)))]
        if not samples:
            raise UserError(f"{type(source.dataset).__name__} has no sample")
        return collated(samples, source.collate, source.dataset), len(samples)


@torch.no_grad()
def call_of(net: nn.Module, step: Step, batch: Any, samples: int) -> Call:
    """How the step calls the model for this batch, in evaluation mode."""
    calls: list[Call] = []
    hook = net.register_forward_pre_hook(lambda module, *given: calls.append(given), with_kwargs=True)
    try:
        step(net.eval(), MicroBatch(batch, samples, samples))
    finally:
        hook.remove()
    if not calls:
        raise UserError("the step does not call the model; perhaps it calls a method other than forward")
    return calls[0]
