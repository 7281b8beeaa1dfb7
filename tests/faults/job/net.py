"""A small model whose result depends on all that a run has to remember, and its optimizer."""

import time

import fault
import torch
import torch.nn.functional as F
from fault import WIDTH
from torch import nn

SECONDS = 0.01  # a forward pass takes, so that faults find something going on


class Net(nn.Module):
    """Takes data.Points: [batch, 1 + DRAWN + FEATURES]; writes down whom it sees.

    With `drop` it has another layer, which a pass in training leaves out with this probability.
    """

    def __init__(self, drop=None):
        super().__init__()
        fault.announce_rank()
        self.first = nn.Linear(fault.FEATURES, WIDTH)
        self.rest = nn.Sequential(
            nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)
        )
        self.drop, self.aside = drop, None if drop is None else nn.Linear(WIDTH, 3)

    def forward(self, x):
        seen, x = x.split([1 + fault.DRAWN, fault.FEATURES], dim=1)
        if self.training == torch.is_grad_enabled():  # else it is tried, without a trace
            fault.forward_pass(self.training, steps_done(), seen.tolist())
        time.sleep(SECONDS)
        x = self.first(x + 0.1 * seen[:, 1:].sum(1, keepdim=True))
        if x.requires_grad:
            # Its weight's gradient is the last one: the other ranks, which have all of theirs, wait for it by then.
            x.register_hook(lambda _: fault.moment("backward"))
        is_left_out = self.aside is None or (self.training and float(torch.rand(())) < self.drop)
        return self.rest(x) if is_left_out else self.rest(x) + self.aside(x.tanh())


def classify(net, batch):
    """A step that logs a value with the loss's weight, and one with its own."""
    x, target = batch
    predictions = net(x)
    largest, is_first = predictions.max(), target == 0
    return {
        "loss": F.cross_entropy(predictions, target),
        "predictions": predictions,
        "target": target,
        "log": {"largest": largest, "of_first": (predictions[is_first, 0].sum() / 7, is_first.sum())},
    }


def in_turn(net, batch):
    """One optimizer learns from the samples, then the other one keeps its layer small."""
    yield {"optimizer": "rest", **classify(net, batch)}
    yield {"optimizer": "one", "loss": sum(parameter.square().mean() for parameter in net.rest[3].parameters())}


class Nudge:
    """A callback that has counted steps, and at every so many of them moves the weights."""

    def __init__(self, every):
        self.every, self.steps = every, 0

    def on_step_end(self, fit):
        self.steps += 1
        if self.steps % self.every == 0:
            with torch.no_grad():
                fit.model.first.bias.mul_(0.9)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


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
