"""A run's plots: its curves, and the confusion matrices of its best epoch. Drawn by rank 0 at the end."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.files import write_atomic
from dtrain.run.folder import Row, RunDir
from dtrain.schema.metrics.sets import value_of
from dtrain.schema.packages import missing
from dtrain.stderr import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WITHOUT_CURVE = ("epoch", "step", "samples_per_s")  # numbers, but no results
_MOST_CELLS = 20  # classes, of which the numbers can be read


def try_to_draw(
    run: RunDir, rows: Sequence[Row], best_step: int, phases: Sequence[str], confusions: Sequence[str] = ()
) -> None:
    """`draw` in a run's folder; say so if that can't be done."""
    try:
        draw(run.plots, rows, best_step, phases, confusions)
    except (OSError, ImportError) as error:
        cause = error.strerror if isinstance(error, OSError) else missing("matplotlib")
        say(f"{run}: can't draw plots/: {cause or error}; everything else is there")


def draw(
    folder: Path, rows: Sequence[Row], best_step: int, phases: Sequence[str], confusions: Sequence[str] = ()
) -> None:
    """Write curves.png, where there are two rows or more, and a picture for each confusion matrix.

    The curves are drawn over epochs, or over steps where there are rows within epochs.

    Args:
        best_step: after which the weights were best: it is marked, and its matrices are drawn.
        phases: what begins the names of the values: train, val.
        confusions: names of metrics whose values are confusion matrices, a row for each target class.
    """
    figures = {}
    axis = "epoch" if all(isinstance(row["epoch"], int) and row["epoch"] for row in rows) else "step"
    if len(rows) > 1 and (panels := curves(rows, phases, axis)):
        figures["curves"] = _curves(panels, axis, next((row[axis] for row in rows if row["step"] == best_step), None))
    for row in rows:
        if row["step"] == best_step:
            names = [f"{phase}_{name}" for phase in phases for name in confusions]
            figures |= {name: _confusion(name, row[name]) for name in names if row.get(name)}
    if figures:
        folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        write_atomic(folder / f"{name}.png", functools.partial(figure.savefig, format="png", dpi=120))


def curves(
    rows: Sequence[Row], phases: Sequence[str], axis: str = "epoch"
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What there is to draw: for each value (loss, acc, lr) its phases, and for each of them (epoch or step, value)."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            if key in _WITHOUT_CURVE or not isinstance(value, float):  # lists are no curves
                continue
            name = value_of(key, phases)
            panel, line = (name, key.removesuffix(f"_{name}")) if name else (key, key)
            panels.setdefault(panel, {}).setdefault(line, []).append((row[axis], value))
    return dict(sorted(panels.items(), key=lambda panel: panel[0] == "lr"))  # the rest as reported


def _curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], axis: str, best: int | None) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (name, phases) in zip(grid, panels.items(), strict=False):
        for phase, points in phases.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=phase)
        if best is not None:
            axes.axvline(best, color="grey", linestyle=":", label=f"best {axis}")
        axes.set(title=name, xlabel=axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _confusion(name: str, matrix: Sequence[Sequence[float]]) -> Figure:
    from matplotlib.figure import Figure

    classes = len(matrix)
    size = max(3.6, min(0.5 * classes + 1.6, 12.0))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes: Any = figure.subplots()
    shares = [[value / (sum(row) or 1.0) for value in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(title=name, xlabel="prediction", ylabel="target")
    if classes <= _MOST_CELLS:
        axes.set(xticks=range(classes), yticks=range(classes))
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                axes.text(
                    j, i, f"{value:g}", ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black"
                )
    figure.colorbar(image, label="share of the target's samples")
    return figure
