"""What a run leaves, and in what it differs from the run that nothing interrupted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults.job.fault import EPOCH_STEPS, EPOCHS, SAMPLES, VAL_SAMPLES
from training import timeless

from dtrain.run.folder import RunDir

Pass = tuple[bool, int, int]  # in training (else in validation), optimizer steps done before, rank


@dataclass(frozen=True)
class History:
    """A finished run.

    Attributes:
        rows: what metrics.jsonl says, but for how fast it was.
        weights: last.pt, best.pt and swa.pt, as far as there are such.
        seen: the micro-batches of each pass that counts: the last time that its step was done, or its epoch
            validated. A sample is [index, what was drawn for it...].
    """

    rows: list[dict[str, Any]]
    weights: dict[str, dict[str, torch.Tensor]]
    seen: dict[Pass, list[list[list[float]]]]

    @classmethod
    def read(cls, run: RunDir, launches: list[Path], *, resumes_validation: bool = False) -> History:
        """Of a run that these launches made, one after the other.

        Args:
            resumes_validation: whether a validation that was stopped goes on where it was, and not from its beginning.
        """
        rows = [timeless(row) for row in run.rows()]
        files = (run.last_weights, run.best_weights, run.swa_weights)
        weights = {path.name: torch.load(path, weights_only=True) for path in files if path.exists()}
        seen: dict[Pass, list[list[list[float]]]] = {}
        for launch in launches:
            own: dict[Pass, list[list[list[float]]]] = {}
            for record in launch.glob("rank-*.jsonl"):
                rank = int(record.stem.removeprefix("rank-"))
                for training, step, samples in map(json.loads, record.read_text().splitlines()):
                    own.setdefault((training, step, rank), []).append(samples)
            for key, parts in own.items():
                rest = not key[0] and resumes_validation
                seen[key] = continued(seen.get(key, []), parts) if rest else parts
        return cls(rows, weights, seen)


def continued(before: list[list[list[float]]], after: list[list[list[float]]]) -> list[list[list[float]]]:
    """A validation's batches, by the samples in them: of those that were seen again, what was seen then."""
    return list({tuple(sample[0] for sample in part): part for part in [*before, *after]}.values())


def differences(found: History, expected: History) -> list[str]:
    """What is not the same to the bit, named."""
    rows = unequal(dict(enumerate(found.rows)), dict(enumerate(expected.rows)))
    passes = unequal(found.seen, expected.seen)
    weights = [
        f"{name} in {file}"
        for file, tensors in expected.weights.items()
        for name, value in tensors.items()
        if not torch.equal(found.weights[file][name], value)
    ]
    return [
        *(f"row {row + 1} of metrics.jsonl" for row in rows),
        *weights,
        *(f"rank {rank} {'in' if training else 'validating after'} step {step}" for training, step, rank in passes),
    ]


def unequal(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> list[Any]:
    return [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]


def lost_and_repeated(history: History) -> tuple[list[str], list[str]]:
    """The samples that an epoch's training or validation left out, and those that it took more than once."""
    lost, repeated = [], []
    for training, size in ((True, SAMPLES), (False, VAL_SAMPLES)):
        for epoch in range(EPOCHS):
            times = Counter(
                int(sample[0])
                for (is_training, step, _), micro_batches in history.seen.items()
                # The first epoch's steps have 0 to 7 done before them, its validation has 8.
                if is_training == training and (step - (not training)) // EPOCH_STEPS == epoch
                for micro_batch in micro_batches
                for sample in micro_batch
            )
            where = f"{'training' if training else 'validation'} of epoch {epoch + 1}"
            lost += [f"{index} in {where}" for index in range(size) if not times[index]]
            repeated += [f"{index} in {where}" for index in times if times[index] > 1]
    return lost, repeated
