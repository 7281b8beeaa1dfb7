"""A model's summary, as torchinfo prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError, first_line
from dtrain.schema.packages import require

from .distributed.seeds import rng_kept
from .distributed.torch_private import tree_leaves

if TYPE_CHECKING:
    import torchinfo


def summary(
    net: nn.Module, input_shape: Sequence[int] | None = None, *, features: Any = None
) -> torchinfo.ModelStatistics:
    """The model's layers with their output shapes and parameters, and the memory that they take; to be printed.

    The model computes a batch in evaluation mode; its weights, buffers and mode, and random numbers, stay as they are.

    Args:
        input_shape: of one sample, without the batch's dimension; or else
        features: a batch as the model takes it: a tensor, or a dict, list or tuple of tensors, its one argument.

    Raises:
        UserError: neither, or what the model does not take.
    """
    require("summary", "torchinfo")
    import torchinfo

    device = next(net.parameters(), torch.zeros(())).device
    if features is None:
        if input_shape is None:
            raise UserError("summary needs input_shape, one sample's shape such as (1, 28, 28), or features, a batch")
        features = torch.zeros(1, *input_shape, device=device)
    columns = ("output_size", "num_params", "mult_adds")
    try:
        with rng_kept(device):
            found = torchinfo.summary(
                net, input_data=[features], mode="eval", device=device, col_names=columns, verbose=0, depth=10
            )
    except RuntimeError as error:
        cause = error.__cause__ or error
        shapes = ", ".join(str(list(leaf.shape)) for leaf in tree_leaves(features) if isinstance(leaf, Tensor))
        raise UserError(f"the model does not take features of shape {shapes}: {first_line(cause)}") from None
    return found
