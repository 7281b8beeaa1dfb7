"""Parameters that a fit does not train, or not from its beginning: `fit.freeze`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError
from dtrain.schema.interval import Interval
from dtrain.schema.sections import Freeze

from ..distributed.torch_private import RUNNING_NORMS
from ..model.patterns import called, match, require_matches
from ..strategies.base import Parallel, shortened
from .run_length import RunLength

_PATH = "fit.freeze"


class Freezing:
    """What is frozen follows from the entries and from how far a fit has come, so that a checkpoint need not hold it.

    Frozen means what it means in a loop of one's own: requires_grad is False, so that there is no gradient, and the
    optimizer, which has the parameters from the start, neither keeps a state for them nor changes them. Batch norms in
    a part of the model that is frozen as a whole stay in evaluation mode. After the fit all is as it was.

    Args:
        net: whose matching parameters are frozen now, before a strategy takes it.
        entries: of those that match a parameter the first one counts, as for the optimizer's groups.
        optimizer: with the parameters that are unfrozen later; None: nothing is trained, and nothing frozen.

    Raises:
        UserError: an entry without effect, or a parameter that nothing would train.
    """

    def __init__(self, net: nn.Module, entries: Sequence[Freeze], optimizer: Optimizer | None) -> None:
        given = [] if optimizer is None else entries
        # By the names of the parameters, which a strategy may exchange.
        self._until: dict[str, Interval | None] = dict(_assigned(net, given))
        self._model: Parallel | None = None
        self._later: list[Interval] = []  # when something will be unfrozen in this fit
        self._still: list[nn.Module] = []  # norms that are in evaluation mode for now
        _train(net, self._until, False)
        if optimizer is not None and self._until:
            later = {name: net.get_parameter(name) for name, until in self._until.items() if until is not None}
            _require_trained_by(optimizer, later)

    def begin_fit(self, model: Parallel, length: RunLength, warn: Callable[[str], None]) -> None:
        """Begin a fit of this length with all of them frozen. All ranks take part."""
        self._model = model
        self._later = [until for until in dict.fromkeys(self._until.values()) if until is not None]
        for until in self._later:
            if _is_beyond(until, length):
                warn(f"{_PATH}: what is frozen until {until} is never trained: the run ends before, or with it")
        _train(model.bare, self._until, False)
        model.follow_trained()

    def start(self, step: int, epochs: int) -> None:
        """Start to train, after so many steps and epochs of the fit. All ranks take part."""
        self._hold_norms()
        self.follow(step, epochs)

    def follow(self, step: int, epochs: int) -> None:
        """Before a step, unfreeze what is due after so many steps and epochs. All ranks take part, if anything is."""
        due = [until for until in self._later if until.number(step, epochs)]
        if not due or self._model is None:
            return
        self._later = [until for until in self._later if until not in due]
        names = [name for name, until in self._until.items() if until in due]
        _train(self._model.bare, names, True)
        self._model.follow_trained()
        self._hold_norms()

    def end_fit(self) -> None:
        """Leave the model's parts as they were. No collective."""
        if self._model is not None:
            _train(self._model.bare, self._until, True)
            _set_training(self._still, True)
            self._still = []

    def _hold_norms(self) -> None:
        """Have the norms in frozen parts normalise by the statistics that they have, and the others learn again."""
        assert self._model is not None
        frozen = {name for name, until in self._until.items() if until is None or until in self._later}
        norms = list(_norms_within(self._model.bare, frozen))
        _set_training([norm for norm in self._still if norm not in norms], True)
        held = [norm for norm in norms if norm.training or norm in self._still]
        _set_training(held, False)
        self._still = held


def _train(net: nn.Module, names: Iterable[str], wanted: bool) -> None:
    for name in names:
        net.get_parameter(name).requires_grad_(wanted)


def _assigned(net: nn.Module, entries: Sequence[Freeze]) -> Iterator[tuple[str, Interval | None]]:
    """The parameters that would be trained otherwise, with when they are."""
    names: dict[int, set[str]] = {}  # by id: a parameter may have several
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).update(called(net, name))
    known = sorted(set().union(*names.values()))
    taken = dict.fromkeys(names, False)
    for number, entry in enumerate(entries):
        path = f"{_PATH}.{number}"
        require_matches(entry.patterns, known, f"{path}.patterns")
        matching = {
            name: parameter
            for name, parameter in net.named_parameters()
            if match(names[id(parameter)], entry.patterns) and not taken[id(parameter)]
        }
        if not matching:
            raise UserError(Problem("has no effect: the entries before it have all that it matches", path))
        taken |= dict.fromkeys(map(id, matching.values()), True)
        trainable = [name for name, parameter in matching.items() if parameter.requires_grad]
        if entry.until is not None and not trainable:
            message = f"all of {shortened(list(matching))} is frozen already (requires_grad is False)"
            hint = "`until` unfreezes only what the setting has frozen: leave freezing to it, on a model made anew"
            raise UserError(Problem(message, path, hint=hint))
        yield from ((name, Interval.of(entry.until)) for name in trainable)


def _require_trained_by(optimizer: Optimizer, later: dict[str, nn.Parameter]) -> None:
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    if lacking := [name for name, parameter in later.items() if id(parameter) not in held]:
        message = f"{shortened(lacking)} are to be trained later, but the optimizer doesn't have them"
        raise UserError(Problem(message, _PATH, hint="create it with all of the model's parameters"))
    if not any(parameter.requires_grad for parameter in held.values()):
        raise UserError(Problem("leaves the first step no parameter to train", _PATH))


def _is_beyond(until: Interval, length: RunLength) -> bool:
    """Whether no step of the run follows on it, as far as is known."""
    if until.unit == "epoch" and length.steps_per_epoch is None:
        return length.epochs is not None and until.count >= length.epochs
    steps = until.count * (length.steps_per_epoch or 0) if until.unit == "epoch" else until.count
    return length.steps is not None and steps >= length.steps


def _norms_within(net: nn.Module, frozen: set[str]) -> Iterator[nn.Module]:
    """The norms with running statistics in those parts of the model of which all parameters are frozen."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found: dict[nn.Module, None] = {}
    for module in net.modules():
        own = [names[id(parameter)] for parameter in module.parameters()]
        if own and frozen.issuperset(own):
            found |= {norm: None for norm in module.modules() if isinstance(norm, RUNNING_NORMS)}
    yield from found


def _set_training(norms: Sequence[nn.Module], mode: bool) -> None:
    for norm in norms:
        norm.train(mode)
