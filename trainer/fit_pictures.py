"""The pictures of a fit that is over, in its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.run.folder import RunDir

from .fit.progress import Progress
from .metrics.epoch_totals import Tally


def draw_fit(run: RunDir, progress: Progress, tallies: Sequence[Tally], metrics: Mapping[str, Any]) -> None:
    """Draw its curves, and the confusion matrices of its best weights; say so if that can't be done. Rank 0 only."""
    if run.plots.exists() and not progress.samples_done:
        return  # what was over before is drawn
    from .metrics.plots import try_to_draw

    confusions = [name for name, metric in metrics.items() if type(metric).__name__.endswith("ConfusionMatrix")]
    try_to_draw(run, progress.rows, progress.best.step, [tally.phase for tally in tallies], confusions)
