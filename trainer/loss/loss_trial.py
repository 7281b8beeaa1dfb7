"""Whether the user's own loss is a mean over samples, as assumed: checked on a batch and its two parts.

Any other loss can't be put together from the parts that ranks and micro-batches have.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError, first_line
from dtrain.stderr import say

from ..data.batch_samples import Take, is_by_rows, join, take, ways_to_take
from ..data.batch_tensors import map_tensors, tensors
from ..distributed.seeds import rng_kept

FINE, COARSE = 1e-3, 2e-2  # tolerance of a sum; the latter with 16 bits, and on GPUs, whose TF32 has 10
_OF_LOSS = "derive it from dtrain.WeightedMean, or write it as a `step` that returns its `weight`"
_UNSEEN = "dtrain can't tell whether it is the mean over samples"
_OF_STEP = "return its `weight`, of how many units it is the mean"


class Pairs:
    """Pairs up batches of a single sample, which prove nothing by themselves, with the previous one."""

    def __init__(self) -> None:
        self._before: Any = None

    def of(self, batch: Any, samples: int) -> tuple[Any, int]:
        """What to try, and its number of samples; still one if there was none before."""
        if samples != 1:
            return batch, samples
        before, self._before = self._before, map_tensors(Tensor.detach, batch)
        if before is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # samples of different shapes
                return join((before, batch)), 2
        return batch, 1


def try_loss(loss_fn: Any, name: str, is_sum: bool, given: tuple[Any, Any], samples: int) -> bool:
    """Try a function of predictions and target; whether it can be tried again, since one batch may pass by luck.

    Its gradients are compared as well: they differ where values agree by accident.

    Raises:
        UserError: it is not a mean (with `is_sum`: not a sum) over samples, or that can't be checked.
    """
    what = f"the loss {name}"
    if not is_by_rows(given, samples):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors(given))
        raise UserError(
            f"{what} gets tensors of shapes {shapes} of {samples} samples, with which they don't all begin: dtrain "
            "can't see whether it is the mean over samples, and so can't compute it in parts, on several ranks or in "
            f"micro-batches; {_OF_LOSS}"
        )
    with contextlib.suppress(RuntimeError, TypeError):  # its content may not allow it
        loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn  # it may count its calls
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_floating_point():
            leaves.append(tensor.requires_grad_())
        return tensor

    def gradients(rows: Sequence[int]) -> tuple[float, list[Tensor]]:
        predictions, target = take(given, samples, rows)
        leaves.clear()
        loss = loss_fn(map_tensors(leaf, predictions), map_tensors(Tensor.detach, target)).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        pairs = zip(leaves, found, strict=True)
        return float(loss.detach()), [torch.zeros_like(each) if grad is None else grad for each, grad in pairs]

    device, dtypes = next(tensors(given)).device, {tensor.dtype for tensor in tensors(given)}
    is_coarse = device.type != "cpu" or not dtypes.isdisjoint({torch.float16, torch.bfloat16})
    with torch.enable_grad():
        return _adds_up(gradients, what, samples, device, is_sum, is_coarse, _OF_LOSS)


def try_step(
    run: Callable[[Any], float],
    data: Any,
    samples: int,
    device: torch.device,
    is_coarse: bool,
    *,
    is_forward_collective: bool = False,
) -> None:
    """Try a step that does not say its loss's weight: call it for the data and for two parts of them.

    Args:
        run: the loss of such data.
        is_forward_collective: whether other ranks call it as often. What holds the samples in one of several ways is
            not tried then; else in all of these ways, of which one must do.

    Raises:
        UserError: its loss is not a mean over samples, or it fails on a part of its batch.
    """
    ways = ways_to_take(data, samples)
    if is_forward_collective and len(ways) > 1:
        say(f"can't tell which lists have an entry for each of {samples} samples: {_UNSEEN}; if not, {_OF_STEP}")
        ways = []

    def of(taken: Take, rows: Sequence[int]) -> tuple[float, list[Tensor]]:
        if len(rows) == samples:
            return run(taken(rows)), []
        try:
            return run(taken(rows)), []
        except Exception as error:  # of the user's code
            raise UserError(
                f"the step fails on {len(rows)} samples of a batch ({type(error).__name__}: {first_line(error)}), "
                f"but ranks and micro-batches have parts of a batch; to skip this check, {_OF_STEP}"
            ) from error

    refused: list[UserError] = []
    for taken in ways or [lambda rows: data]:  # whole each time
        try:
            _adds_up(functools.partial(of, taken), "the step's loss", samples, device, False, is_coarse, _OF_STEP)
            return
        except UserError as error:
            refused.append(error)
    raise refused[0]


def _adds_up(
    of: Callable[[Sequence[int]], tuple[float, list[Tensor]]],
    what: str,
    samples: int,
    device: torch.device,
    is_sum: bool,
    is_coarse: bool,
    mend: str,
) -> bool:
    """Compare the value and the gradients of all rows (a single one, twice) with those of two parts; as `try_loss`."""
    rows = list(range(samples)) if samples > 1 else [0, 0]
    cut = len(rows) // 2
    with rng_kept(device):
        (again, _), (whole, gradients) = of(rows), of(rows)
        parts = [of(part) for part in (rows[:cut], rows[cut:])]
    values = [value for value, _ in parts]
    shares = [1.0 if is_sum else share / len(rows) for share in (cut, len(rows) - cut)]
    made = sum(share * value for share, value in zip(shares, values, strict=True))
    distance = max(
        (
            _distance(gradient, torch.cat([share * piece for share, piece in zip(shares, pieces, strict=True)]))
            for gradient, *pieces in zip(gradients, *(pieces for _, pieces in parts), strict=True)
        ),
        default=0.0,
    )
    tolerance = COARSE if is_coarse else FINE
    if math.isfinite(again + whole) and not math.isclose(again, whole, rel_tol=FINE / 10, abs_tol=1e-7):
        say(f"{what} differs each time, as if it drew random numbers: {_UNSEEN}; if not, {mend}")
        return False
    near = functools.partial(math.isclose, whole, rel_tol=tolerance, abs_tol=1e-6)
    if not math.isfinite(whole) or (near(made) and distance <= tolerance):  # a part's nan is not near
        return True
    sizes = f"its parts of {cut} and {len(rows) - cut}"
    found = f"is {whole:.6g}, but {sizes} make {made:.6g}"
    if near(made):
        found = f"has gradients other than those of {sizes}"
    if not is_sum and all(values) and near(sum(values)):
        mend = "it is their sum: return their mean, or set the loss's attribute `reduction` to 'sum'"
        mend = mend.partition(", or")[0] if what == "the step's loss" else mend
    raise UserError(
        f"{what} of {len(rows)} samples {found}: it is not a {'sum' if is_sum else 'mean'} over samples, so it can't "
        f"be computed in parts, on several ranks or in micro-batches; {mend}, or train in one process"
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Their difference relative to the largest number; 0 if that is not finite."""
    if not one.numel() or not one.isfinite().all():
        return 0.0
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


@contextlib.contextmanager
def standing_still(net: nn.Module, step: Any) -> Iterator[None]:
    """Within the block torch's own layers draw nothing and update no statistics; then all attributes are restored.

    Those of the modules, and of the user's step, which may count its calls. The user's modules stay in training, so
    that a step does what it does there.
    """
    own = vars(nn.Module()).keys() - {"training"}
    holders = [*net.modules(), getattr(step, "__self__", step)]  # for a method, its object
    before = [(each, {key: value for key, value in _attributes(each).items() if key not in own}) for each in holders]
    for module in [each for each in net.modules() if each is not net]:
        if any(kind.__module__.startswith("torch.nn.") for kind in type(module).__mro__[:-1] if kind is not nn.Module):
            module.training = False
    # Compiled functions would be recompiled for other sizes.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for holder, attributes in before:
            _attributes(holder).update(attributes)


def _attributes(holder: Any) -> dict[str, Any]:
    return getattr(holder, "__dict__", {})  # classes with __slots__ have none
