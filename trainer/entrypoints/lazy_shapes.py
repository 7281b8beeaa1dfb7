"""Parameters that get their shapes from a batch (nn.LazyLinear): a job does this before it uses them."""

from __future__ import annotations

import torch
from torch import nn

from ..data.indexed import MicroBatch, Source
from ..loss.step import Step
from ..model.modes import evaluation_mode
from ..model.weights import without_shape
from .first_samples import first_samples

SAMPLES = 2  # since batch norm may refuse one


@torch.no_grad()
def give_shapes(net: nn.Module, step: Step, source: Source) -> None:
    """Call the model once, with the first samples. No collective: all ranks see the same, and draw the same weights."""
    batch, samples = first_samples(source, SAMPLES)
    with evaluation_mode(net):
        try:
            step(net, MicroBatch(batch, samples, samples))
        except Exception:  # what a step does with the predictions may be for training alone
            if without_shape(net):
                raise
