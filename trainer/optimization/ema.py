"""An exponential moving average of the weights (Polyak and Juditsky, 1992), evaluated and saved beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..distributed.torch_private import add_, multiply_


class Ema:
    """average = decay * average + (1 - decay) * weights after each step; it begins with the weights of the start.

    Of parameters only: batch norm's statistics are those of the weights themselves. So are whole numbers.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in net.named_parameters()
            if parameter.is_floating_point() or parameter.is_complex()
        }
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        averages = list(self._averages.values())
        multiply_(averages, self._decay)
        add_(averages, list(self._parameters.values()), 1 - self._decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the model has the average as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(weights)

    def by_parameter(self) -> dict[int, Tensor]:
        """The average of each parameter, by its id."""
        return {id(parameter): self._averages[name] for name, parameter in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(state[name])
