"""A small model whose result depends on all that a run has to remember, and its optimizer."""

import time

import fault
import torch
from torch import nn

WIDTH = 256
SECONDS = 0.01  # a forward pass takes, so that faults find something going on


class Net(nn.Module):
    """Takes data.Points: [batch, 1 + DRAWN + FEATURES]; writes down whom it sees."""

    def __init__(self):
        super().__init__()
        fault.announce_rank()
        self.first = nn.Linear(fault.FEATURES, WIDTH)
        self.rest = nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)
        )

    def forward(self, x):
        seen, x = x.split([1 + fault.DRAWN, fault.FEATURES], dim=1)
        if self.training == torch.is_grad_enabled():  # else it is tried, without a trace
            fault.forward_pass(self.training, steps_done(), seen.tolist())
        time.sleep(SECONDS)
        first = self.first(x + 0.1 * seen[:, 1:].sum(1, keepdim=True))
        if first.requires_grad:
            # Its weight's gradient is the last one: the other ranks, which have all of theirs, wait for it by then.
            first.register_hook(lambda _: fault.moment("backward"))
        return self.rest(first)


class Adam(torch.optim.Adam):
    """Adam, which is where this process reads how many steps are done: they are part of its state."""

    made = None

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        Adam.made = self


def steps_done():
    """Optimizer steps since the run began."""
    states = Adam.made.state.values() if Adam.made else ()
    return max((int(state["step"]) for state in states), default=0)
