"""One rank that evaluates a trained model, or predicts with it.

Run as dtrain.trainer.entrypoints.train is, with an `Evaluate`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dtrain.errors import UserError, first_line
from dtrain.files import write_text
from dtrain.run.rank_request import Evaluate
from dtrain.schema.job import Job
from dtrain.schema.metrics.sets import phase_of

from ..data.indexed import Source
from ..data.workers import Processes
from ..trainer import Trainer
from .train import begin, build_sets, build_source, build_trainer, settle

CHUNK = 65_536  # rows that are written as text at once


def main() -> int:
    """Do this rank's part; the exit code."""
    asked = Evaluate.read()
    run, job = begin(asked)
    trainer = build_trainer(settle(job, is_trained=True)[0], Path(asked.weights))
    if asked.out is not None:
        write_predictions(trainer, source_of(job, asked.data), Path(asked.out))
        return 0
    trainer.model.loss.load(Path(asked.weights))
    data = build_sets(job, asked.data)
    assert data is not None  # the command has seen to that
    values = trainer.evaluate(data, phase_of(asked.data))
    if trainer.world.is_main:
        write_text(run.answer, json.dumps(values))
    return 0


def source_of(job: Job, data: str) -> Source:
    """A dataset of the job by its place, or a file's rows as features."""
    if data in job.data.sets:
        return build_source(job, data, training=False)
    return Source(Rows(Path(data)), job.data.batch_size, shuffle=False, processes=Processes(job.data.workers))


class Rows(Dataset[Tensor]):
    """The rows of a file of numbers, as the features of samples: .npy, [N, ...], or .csv, with or without a header.

    Floats become float32, as models have them; whole numbers in an .npy stay as they are.

    Raises:
        UserError: a file that holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if self._rows.ndim == 0:
            raise UserError(f"{path} holds a single number; its array's first dimension must be the samples")

    @functools.cached_property
    def _rows(self) -> NDArray[Any]:
        try:
            if self._path.suffix == ".csv":
                return _read_csv(self._path)
            rows = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._path} can't be read: {first_line(error)}") from None
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiub":
            raise UserError(f"{self._path} is not an array of numbers")
        return rows

    def __getstate__(self) -> dict[str, Any]:  # of a loading process, which opens the file itself
        return {"_path": self._path}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        row = np.array(self._rows[index])
        return torch.from_numpy(row.astype(np.float32) if row.dtype.kind == "f" else row)


def _read_csv(path: Path) -> NDArray[Any]:
    import pandas

    first = pandas.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True)
    has_header = pandas.to_numeric(first.iloc[0], errors="coerce").isna().all()
    table = pandas.read_csv(path, header=0 if has_header else None, skipinitialspace=True)
    for name in table.columns:
        numbers = pandas.to_numeric(table[name], errors="coerce")
        if numbers.isna().any():
            line = int(numbers.isna().argmax()) + 1 + has_header
            raise UserError(f"{path}:{line}: column {name} holds no number there")
    rows: NDArray[Any] = table.to_numpy(np.float32)
    return rows


def write_predictions(trainer: Trainer, source: Source, out: Path) -> None:
    """Write the prediction for each sample of the source, in its order. All ranks take part: each writes its rows.

    Raises:
        UserError: predictions of several shapes, or more than the disk takes.
    """
    world = trainer.world
    shares = trainer.predict_shares(source)
    own = next(shares, None)
    kinds = world.gather(None if own is None else (tuple(own[1].shape[1:]), str(own[1].numpy().dtype)))
    shape, dtype = next(kind for kind in kinds if kind is not None)
    file = out.with_suffix(".npy")
    refused = _reserve(file, (len(cast(Sized, source.dataset)), *shape), np.dtype(dtype)) if world.is_main else ""
    if refused := world.from_main(refused):
        raise UserError(refused)
    rows = np.load(file, mmap_mode="r+")
    for position, part in itertools.chain([] if own is None else [own], shares):
        if len(part) and tuple(part.shape[1:]) != shape:
            raise UserError(
                f"samples have predictions of shape {list(shape)}, and from sample {position} on of "
                f"{list(part.shape[1:])}: they cannot be concatenated into one array"
            )
        rows[position : position + len(part)] = part.numpy()
    rows.flush()
    world.barrier()
    if out.suffix == ".csv" and world.is_main:
        _write_csv(rows, out)


def _reserve(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Make an .npy file of that size; why that can't be, or nothing."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        with file.open("wb") as handle:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, header)
            handle.flush()
            # Reserve the space now: a mapped file that runs out of it ends the process.
            os.posix_fallocate(handle.fileno(), 0, handle.tell() + num_bytes)
    except OSError as error:
        what = f"predictions of shape {list(shape)} take {num_bytes / 1e6:,.1f} MB"
        return f"{what}, which do not fit in {file.parent.parent}: {error.strerror}; choose another place with --out"
    return ""


def _write_csv(rows: NDArray[Any], out: Path) -> None:
    if rows.ndim > 2:
        raise UserError(f"predictions of shape {list(rows.shape)} are not a table: name an .npy file with --out")
    form = "%.9g" if rows.dtype.kind == "f" else "%d"
    try:
        with out.open("w", encoding="utf-8") as file:
            for begin in range(0, len(rows), CHUNK):
                np.savetxt(file, rows[begin : begin + CHUNK], fmt=form, delimiter=",")
    except OSError as error:
        raise UserError(
            f"the predictions as text don't fit: {error.strerror}; choose another place with --out"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
