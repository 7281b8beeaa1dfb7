"""Pictures of validation samples, with what the model predicts for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dtrain.errors import UserError
from dtrain.files import refusal, write_atomic
from dtrain.run.folder import RunDir
from dtrain.schema.packages import require
from dtrain.stderr import say

from ..data.indexed import MicroBatch
from ..fit.callbacks import FitContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 8


class SamplePictures:
    """After each validation draws the first samples of data.val into RUN/pictures/, with predicted and true class.

    Args:
        samples: how many, at most a batch.
        keep: how many of the newest pictures are kept.
        image: where in a batch the images are: an index, or a key. [N, H, W], or [N, 1, H, W] or [N, 3, H, W].
        classes: their names; else their numbers are shown.
    """

    def __init__(self, samples: int = 16, keep: int = 5, image: int | str = 0, classes: Sequence[str] = ()) -> None:
        if samples < 1 or keep < 1:
            raise UserError(f"SamplePictures: samples and keep must be above 0, found {samples} and {keep}")
        require("SamplePictures", "matplotlib")
        self._most, self._keep, self._where, self._classes = samples, keep, image, list(classes)
        self._batch: MicroBatch | None = None
        self._is_refused = False

    def on_start(self, fit: FitContext) -> None:
        """Read the samples, and refuse what has no images in it."""
        if fit.rank > 0 and not fit.is_sharded:
            return
        self._batch = fit.validation_samples(self._most)
        if self._batch is None:
            raise UserError("SamplePictures needs data.val, a dataset whose samples have indices")
        self._images(self._batch.data)
        self._draw(fit, self._batch, into=None)
        if fit.rank == 0:
            for _, path in _drawn(RunDir(fit.folder).pictures, after=fit.step):
                path.unlink()  # of steps that will be done again

    def on_validation_end(self, fit: FitContext) -> None:
        """Draw. All ranks take part where the model is sharded."""
        if self._batch is not None:
            self._draw(fit, self._batch, into=RunDir(fit.folder).pictures)

    def _draw(self, fit: FitContext, batch: MicroBatch, into: Path | None) -> None:
        """Draw into the folder; None: only see whether it can be done."""
        with fit.evaluating():
            outcome = fit.run(batch)
        titles = self._titles(outcome.predictions, outcome.target, batch.samples)
        if into is None or fit.rank > 0:
            return
        figure = draw(self._images(batch.data), titles, f"step {fit.step}")
        try:
            into.mkdir(exist_ok=True)
            path = into / f"step-{fit.step:09}.png"
            write_atomic(path, functools.partial(figure.savefig, format="png", dpi=100))
            for _, path in _drawn(into)[: -self._keep]:
                path.unlink()
        except OSError as error:
            if not self._is_refused:
                say(f"warning: can't write {into}: {refusal(error)}; training goes on")
            self._is_refused = True

    def _images(self, data: Any) -> Tensor:
        """[N, H, W] or [N, H, W, 3], between 0 and 1."""
        try:
            parts: Any = data
            found = parts[self._where] if isinstance(data, dict | list | tuple) else data
        except (LookupError, TypeError):
            found = None
        if not isinstance(found, Tensor) or not (found.dim() == 3 or (found.dim() == 4 and found.shape[1] in (1, 3))):
            shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"SamplePictures finds no images at {self._where!r} in a batch, but {shape}: images are [N, H, W], or "
                "[N, C, H, W] with 1 or 3 channels; `image` says where they are"
            )
        images = found.detach().float().cpu()
        if images.dim() == 4:
            images = images.squeeze(1) if images.shape[1] == 1 else images.movedim(1, -1)
        low, high = images.amin(), images.amax()  # normalised images have other limits than 0 and 1
        return (images - low) / (high - low).clamp(min=1e-12)

    def _titles(self, predictions: Any, target: Any, samples: int) -> list[tuple[str, bool]]:
        """For each sample what is written above it, and whether that is right."""
        is_scores = isinstance(predictions, Tensor) and predictions.dim() == 2 and predictions.shape[1] > 1
        is_classes = isinstance(target, Tensor) and target.shape == (samples,) and not target.is_floating_point()
        if not is_scores or not is_classes:
            raise UserError(
                "SamplePictures shows the class that is predicted and the true one: it needs predictions [N, classes] "
                "and a target [N] of class numbers"
            )
        pairs = zip(predictions.argmax(1).tolist(), target.tolist(), strict=True)
        return [(f"{self._name(found)} / {self._name(true)}", found == true) for found, true in pairs]

    def _name(self, number: int) -> str:
        return self._classes[number] if 0 <= number < len(self._classes) else str(number)


def draw(images: Tensor, titles: Sequence[tuple[str, bool]], heading: str) -> Figure:
    """The images in rows, each with its title: predicted / true, in red where it is wrong."""
    from matplotlib.figure import Figure

    columns = min(len(images), _COLUMNS)
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.6 * lines + 0.4), layout="constrained")
    figure.suptitle(f"{heading}: predicted / true", fontsize="medium")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, image, (title, is_right) in zip(grid, images, titles, strict=False):
        axes.imshow(image.numpy(), cmap="gray" if image.dim() == 2 else None, vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize="small", color="black" if is_right else "red")
    return figure


def _drawn(folder: Path, after: int = -1) -> list[tuple[int, Path]]:
    """The pictures of steps after that one, in order."""
    numbers = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.png")}
    found = [(int(number), path) for path, number in numbers.items() if number.isdecimal()]
    return sorted(each for each in found if each[0] > after)
