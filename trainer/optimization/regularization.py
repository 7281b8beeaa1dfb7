"""L1 and L2 regularisation: pulls weights towards zero, as part of the batch's gradient."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dtrain.errors import UserError

from ..distributed.torch_private import RUNNING_NORMS, add_
from ..strategies.base import has_sparse_gradients

_SPARSE = "fit.l1 and fit.l2 apply to whole weights, but a sparse gradient covers a part: use sparse=False"
_NORMS = (*RUNNING_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Penalty:
    """The gradient of l1 sum |w| + l2/2 sum w^2 over a model's weights.

    It depends on the weights alone, so that it is added once a step, however many ranks and micro-batches have shared
    the batch. Weights are the parameters of two dimensions or more, without those of norms and those called bias. l2
    is what `weight_decay` is to SGD and Adam (AdamW's decay is another, see Loshchilov and Hutter, Decoupled Weight
    Decay Regularization, ICLR 2019). The reported loss is without it, in training as in validation.
    """

    def __init__(self, net: nn.Module, l1: float | None = None, l2: float | None = None) -> None:
        self._l1 = l1 or 0.0
        self._l2 = l2 or 0.0
        self._weights = list(penalised(net)) if l1 or l2 else []
        if self._weights and has_sparse_gradients(net):
            raise UserError(_SPARSE)

    def add(self) -> None:
        """Add it to the gradients of this rank's weights, or of its parts of them. No collective.

        Raises:
            UserError: a sparse gradient, which has no place for it.
        """
        # A weight without a gradient is frozen, or without effect on this loss.
        pairs = [(weight.grad, weight.detach()) for weight in self._weights if weight.grad is not None]
        if not pairs:
            return
        gradients, weights = map(list, zip(*pairs, strict=True))
        if any(gradient.is_sparse for gradient in gradients):
            raise UserError(_SPARSE)
        if self._l1:
            add_(gradients, [weight.sign() for weight in weights], self._l1)
        if self._l2:
            add_(gradients, weights, self._l2)


def penalised(net: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that L1 and L2 are for; one that modules share comes once."""
    seen = set()
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() > 1 and "bias" not in name and not isinstance(module, _NORMS) and parameter not in seen:
                seen.add(parameter)
                yield parameter
