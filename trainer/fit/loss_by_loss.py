"""A step that yields one loss after another: an optimizer's step follows on each, before the next is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from dtrain.errors import UserError, among
from dtrain.run.heartbeat import Phase

from ..checks.optimizer_kinds import needs_closure
from ..data.indexed import MicroBatch
from ..distributed.seeds import rng_kept
from ..loss.batch_weight import BatchWeight
from ..loss.step import Outcome, require_graph
from ..loss.user_step import LossByLoss, Losses, detached, together
from ..model.buffers import renew_buffers, set_buffers
from ..model.optimizers import Optimizers
from ..model.sync_batchnorm import counting_no_sample
from .progress import Progress
from .trained import Trained


class StepByLosses:
    """Makes an optimizer's step after each loss of a batch. All ranks take part.

    The micro-batches of a batch go on side by side: each computes its part of a loss, then the optimizer makes its
    step, then each computes its part of the next loss. What a user's step keeps from one loss to the next, such as a
    generated picture with its graph, is kept of all of them.

    Raises:
        UserError: an optimizer or a strategy that can't do so.
    """

    def __init__(self, trained: Trained, step: LossByLoss, progress: Progress) -> None:
        self._trained = trained
        self._step = step
        self._progress = progress
        optimizer = trained.optimizer
        self._members = optimizer.members if isinstance(optimizer, Optimizers) else {"": optimizer}
        if needs_closure(optimizer):
            name = type(optimizer).__name__
            raise UserError(f"{name} computes the gradient several times a step, so a step can't yield its losses")
        self._learning: set[str] = set()  # in this step: all parameters of an optimizer may be frozen until later
        self._order: list[str] | None = None  # of the optimizers that learn, in this process's first step
        trained.model.divide(list(self._members.values()))

    def __call__(self, micro_batches: Sequence[MicroBatch], number: int) -> tuple[list[Outcome], bool]:
        """Make the steps; what is to be reported of each micro-batch, and whether none was left out.

        Args:
            number: of this step of the run.
        """
        model = self._trained.model
        self._learning = {name for name, each in self._members.items() if model.trained(each)}
        losses = [self._step.begin() for _ in micro_batches]
        found: list[list[Outcome]] = [[] for _ in micro_batches]
        order: list[str] = []
        is_done = True
        while micro_batches and (name := self._next(losses, found, micro_batches, order)) is not None:
            order.append(name)
            if name in self._learning:
                is_done &= self._trained.update.apply(number, self._members[name])
        if micro_batches and self._order is None:
            self._order = order
        outcomes = [together(each, part) for each, part in zip(found, micro_batches, strict=True)]
        return outcomes, is_done

    def _next(
        self,
        losses: Sequence[Losses],
        found: Sequence[list[Outcome]],
        micro_batches: Sequence[MicroBatch],
        order: Sequence[str],
    ) -> str | None:
        """Compute the next loss of all micro-batches, with its gradient; the name of its optimizer, None at the end.

        Args:
            found: what was computed of each micro-batch, to which it is added.
            order: the optimizers that have learned before.
        """
        model, place = self._trained.model, len(order)
        weight = BatchWeight(self._trained.world)
        name: str | None = None
        for i, (each, part) in enumerate(zip(losses, micro_batches, strict=True)):
            undone = contextlib.nullcontext() if part.samples else self._undone()
            with model.accumulating(last=part.is_last), undone:
                self._progress.enter(Phase.FORWARD)
                outcome = model.run(each.compute, part)
                own = None if each.is_over else self._name_of(outcome)
                if i == 0:
                    name = own
                    self._require_order(name, place)
                    if name is not None:
                        model.zero_grad(self._trained.optimizer)  # also what an earlier loss has left
                elif own != name:
                    raise UserError(
                        f"step yields its loss number {place + 1} {_for(name)} for one micro-batch, and {_for(own)} "
                        "for another: yield the same losses for each"
                    )
                if name is None:
                    continue
                if name in self._learning:
                    self._backward(name, outcome, part, weight, place)
            found[i].append(detached(outcome))
        if name not in self._learning:
            model.pass_over()
        elif weight.is_summed:
            weight.rescale(model.gradients(self._members[name]))
        return name

    def _backward(self, name: str, outcome: Outcome, part: MicroBatch, weight: BatchWeight, place: int) -> None:
        model, optimizer = self._trained.model, self._members[name]
        require_graph(outcome)
        if not self._progress.samples_done:  # in this process's first step
            model.require_all_used(outcome.total, optimizer)
        self._progress.enter(Phase.BACKWARD)
        scale = weight.scale(outcome, part)
        total = model.expect(outcome.total, optimizer, place) if part.is_last else outcome.total
        model.backward(self._trained.precision.scaled(total * scale), optimizer)
        if part.is_last:
            model.require_averaged(outcome.total, self._progress.position.step + 1)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Around what is computed of a filler: buffers and random states are then what they were.

        The very same tensors: the loss to come may have a graph that they are part of.
        """
        net = self._trained.model.bare
        before = renew_buffers(net)
        with rng_kept(self._trained.world.device), counting_no_sample(net):
            yield
        set_buffers(net, before)

    def _name_of(self, outcome: Outcome) -> str:
        name, known = outcome.optimizer, sorted(self._members)
        if name is None and len(known) > 1:
            raise UserError(f"step yields a loss without the name of its `optimizer`; known: {', '.join(known)}")
        if name is None:
            return known[0]
        if name not in self._members:
            hint = among(name, known) if known != [""] else "there is one, without a name: leave the key out"
            raise UserError(f"step yields a loss for the optimizer {name}; {hint}")
        return name

    def _require_order(self, name: str | None, place: int) -> None:
        """Raise UserError where the losses are for other optimizers than on other ranks, or than in the first step.

        All ranks take part in this process's first step. Later ones keep to its order, so that nobody has to ask.
        """
        if self._order is None:
            main, *others = self._trained.world.gather(name)
            for rank, other in enumerate(others, 1):
                if other != main:
                    raise UserError(
                        f"step yields its loss number {place + 1} {_for(main)} on rank 0, and {_for(other)} on rank "
                        f"{rank}: all ranks must yield the same losses"
                    )
            return
        first = self._order[place] if place < len(self._order) else None
        if name != first:
            raise UserError(
                f"step yields its loss number {place + 1} {_for(name)}, and {_for(first)} in the first step: yield the "
                "same losses for each batch. To train one optimizer more often, yield several losses for it; to begin "
                "with another later, freeze its parameters until then (fit.freeze)"
            )


def _for(name: str | None) -> str:
    return "not at all" if name is None else f"for {name}" if name else "for the optimizer"
