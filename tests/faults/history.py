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
        seen: the micro-batches of each pass that counts: the last time that its step was done, or what it had come to
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
    """The samples that an epoch's training or a validation left out, and those that it took more than once."""
    times: dict[str, Counter[int]] = {f"training of epoch {epoch + 1}": Counter() for epoch in range(EPOCHS)}
    for (training, step, _), micro_batches in history.seen.items():
        if not training and not step:  # what is tried before the first step
            continue
        where = f"training of epoch {step // EPOCH_STEPS + 1}" if training else f"validation after step {step}"
        times.setdefault(where, Counter()).update(int(sample[0]) for part in micro_batches for sample in part)
    lost, repeated = [], []
    for where, found in times.items():
        size = SAMPLES if where.startswith("training") else VAL_SAMPLES
        lost += [f"{index} in {where}" for index in range(size) if not found[index]]
        repeated += [f"{index} in {where}" for index in found if found[index] > 1]
    return lost, repeated
