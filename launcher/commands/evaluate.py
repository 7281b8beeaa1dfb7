"""`dtrain evaluate`, `predict`, `export` and `summary`: uses of a model after training or before it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.errors import Problem, UserError, among, did_you_mean
from dtrain.run.folder import RunDir
from dtrain.run.rank_request import Evaluate, Export, RankRequest, Summarize
from dtrain.schema.job import LoadedJob, LoadedScript
from dtrain.schema.loading import load
from dtrain.schema.packages import require
from dtrain.schema.sections import Fsdp

from ..agent.scratch_run import new_run, run_request, scratch_folder
from ..rank.preparation import prepare

HERE = ("launch.device=auto",)  # a run's job.yaml has the device that it ran on
WEIGHTS = ("best", "last", "ema", "swa")
SETS = ("train", "val", "test")
TABLES = (".npy", ".csv")
NEEDED_FOR = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",), ".csv": ("pandas",)}


@dataclass(frozen=True)
class Trained:
    """A run's weights, and its job with overrides such as `data.val.split=test`."""

    run: str
    overrides: tuple[str, ...] = ()
    weights: str = "best"

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.run)

    @property
    def code(self) -> str:
        """The folder of the job's own modules."""
        return str(self.run_dir.code.absolute())

    @property
    def file(self) -> Path:
        """The weights.

        Raises:
            UserError: there are none.
        """
        run = self.run_dir
        files = dict(zip(WEIGHTS, (run.best_weights, run.last_weights, run.ema_weights, run.swa_weights), strict=True))
        if not run.job.exists():
            raise UserError(f"{run} holds no run: expected a run folder, such as those under runs/")
        if not files[self.weights].exists():
            found = [name for name, file in files.items() if file.exists()]
            hint = f"there are {', '.join(found)}: --weights {found[0]}" if found else "it has not finished an epoch"
            raise UserError(f"{files[self.weights]} does not exist; {hint}")
        return files[self.weights].absolute()

    def load(self) -> LoadedJob:
        """The run's job, for the devices of this machine.

        Raises:
            UserError: what is wrong with it now.
        """
        loaded = load(self.run_dir.job, (*HERE, *self.overrides))
        if isinstance(loaded, LoadedScript):
            raise UserError(
                f"{self.run} is a script's run, and only the script can build its model: {loaded.job.program}"
            )
        return loaded


def evaluate(trained: Trained, data: str, gpus: str) -> int:
    """Print loss and metrics of a run's model on one of its datasets, as JSON."""
    weights, loaded = trained.file, trained.load()
    sets = loaded.job.data.sets
    if data not in SETS and data not in sets:
        known = list(dict.fromkeys([*SETS, *sets]))
        raise UserError(f"--data {data}: expected one of the job's datasets; {among(data, known)}")
    _require_set(loaded, data, "evaluate on")
    print(_ask(Evaluate(trained.code, str(weights), data), loaded, gpus))
    return 0


def predict(trained: Trained, data: str, out: str | None, gpus: str) -> int:
    """Write the predictions of a run's model for one of its datasets, or for a file of features."""
    weights, loaded = trained.file, trained.load()
    sets = loaded.job.data.sets
    if data in SETS or data in sets:
        _require_set(loaded, data, "predict from")
        if data not in sets:
            raise UserError(f"data.{data} has several sets; name one: {', '.join(loaded.job.data.places(data))}")
    else:
        file = Path(data)
        if file.suffix not in TABLES:
            hint = did_you_mean(data, [*SETS, *sets]) or f"or one of the job's datasets: {', '.join(SETS)}"
            raise UserError(f"{data}: expected features in a file, {' or '.join(TABLES)}, {hint}")
        if not file.is_file():
            raise UserError(f"{data}: no such file")
        require(f"to read {data}, dtrain", *NEEDED_FOR.get(file.suffix, ()))
        data = str(file.absolute())
    target = Path(out) if out is not None else trained.run_dir.path / "predictions.npy"
    if target.suffix not in TABLES:
        raise UserError(f"--out {target}: expected a name ending in {' or '.join(TABLES)}")
    with _new_file(target) as filled:
        _ask(Evaluate(trained.code, str(weights), data, str(filled)), loaded, gpus)
    print(target)
    return 0


def export(trained: Trained, form: str, out: str | None) -> int:
    """Export a run's model."""
    weights, loaded = trained.file, trained.load()
    require(f"--format {form}", *NEEDED_FOR.get(form, ()))
    target = Path(out or f"{loaded.job.name}.{form}")
    with _new_file(target) as filled:
        if says := _ask(Export(trained.code, str(weights), form, str(filled)), _whole(loaded), "1"):
            print(says, file=sys.stderr)
    print(target)
    return 0


def summary(path: str, overrides: Sequence[str]) -> int:
    """Print a job's layers, their output shapes and parameters."""
    require("dtrain summary", "torchinfo")
    loaded = load(path, (*HERE, *overrides))
    if isinstance(loaded, LoadedScript):
        raise UserError(loaded.at(Problem("builds its own model: call dtrain.summary(net, ...) in it", "script")))
    print(_ask(Summarize(str(loaded.folder.absolute())), _whole(loaded), "1"))
    return 0


def _require_set(loaded: LoadedJob, data: str, purpose: str) -> None:
    """Raise UserError if the job has no such dataset."""
    if not loaded.job.data.places(data):
        raise UserError(f"the job has no data.{data} to {purpose}; set one: data.{data}._target_=module.function")


def _whole(loaded: LoadedJob) -> LoadedJob:
    """The job for one process on the CPU, with the whole model in float32."""
    job = loaded.job
    fit = job.fit.model_copy(update={"strategy": "ddp", "precision": "fp32", "sync_batchnorm": False})
    launch = job.launch.model_copy(update={"device": "cpu"})
    update = {"fit": fit, "fsdp": Fsdp(), "deepspeed": {}, "launch": launch}
    return replace(loaded, job=job.model_copy(update=update))


def _ask(request: RankRequest, loaded: LoadedJob, gpus: str) -> str:
    """What the ranks have answered, beside the run that the job is of.

    Raises:
        UserError: the job is wrong.
        RanksFailed: a rank failed, which has been said.
    """
    without = loaded.job.model_copy(update={"init_from": None})  # the file need not be there any more
    ready = prepare(replace(loaded, job=without), Path(request.code), gpus)
    with scratch_folder() as scratch:
        run = new_run(scratch / "run", ready.job)
        run_request(run, request, ready.num_ranks, ready.num_threads)
        return run.answer.read_text(encoding="utf-8") if run.answer.exists() else ""


@contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """Where to write what becomes the target when the block ends. Nothing existing is overwritten.

    Raises:
        UserError: there is something, or no folder to write to.
    """
    if target.exists():
        raise UserError(f"{target} exists; name another file with --out")
    try:
        folder = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}."))
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror}; name another file with --out") from None
    try:
        filled = folder / target.name
        yield filled
        if target.exists():
            raise UserError(f"{target} was created in the meantime; name another file with --out")
        filled.chmod(0o644)
        filled.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
