"""Which torchmetrics metrics can't be computed from samples that several ranks, or micro-batches, have seen."""

from __future__ import annotations

_REASONS = {
    "Running": "depends on how many updates a batch is split into, and so on the number of ranks",
    "BootStrapper": "draws random samples in each update, which depend on the number of ranks; a function of all "
    "(predictions, target) can draw from all of them",
    "MetricTracker": "keeps the values of epochs, which metrics.jsonl does: give the metric in it",
    "_AbstractGroupStatScores": "counts a group as another one where a batch, or a rank's part of it, lacks a group; "
    "torchmetrics.functional's is right, as a function of all (predictions, target, groups)",
    "NormalizedRootMeanSquaredError": "is brought together wrongly by torchmetrics itself where several processes have "
    "samples; MeanSquaredError(squared=False) is right, and can be divided by what is known of the target",
}


def why_unfit(metric: object) -> str | None:
    """Why this metric, or one inside it, is refused: `Running counts ...`; None where it is not."""
    modules = getattr(metric, "modules", None)  # torch.nn.Module's: the metric itself and all in it
    for part in modules() if callable(modules) else ():
        for base in type(part).__mro__:
            if base.__name__ in _REASONS and base.__module__.partition(".")[0] == "torchmetrics":
                return f"{type(part).__name__} {_REASONS[base.__name__]}"
    return None
