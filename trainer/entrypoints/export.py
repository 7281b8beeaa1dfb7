"""Exports a trained model: its weights alone, or as ONNX, compared with PyTorch on real samples.

Run as dtrain.trainer.entrypoints.train is, on one rank, with an `Export`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError, first_line
from dtrain.files import write_text
from dtrain.run.rank_request import Export
from dtrain.schema.job import Job

from ..distributed.torch_private import tree_leaves, tree_map
from ..model.weights import bare_state_dict, save_weights
from ..trainer import Trainer
from .first_samples import Call, call_of, first_samples
from .train import begin, build_source, build_trainer, settle

SAMPLES = 8  # with which the model is traced and compared


def main() -> int:
    """Export; the exit code."""
    asked = Export.read()
    run, job = begin(asked)
    trainer = build_trainer(settle(job, is_trained=True)[0], Path(asked.weights))
    out = Path(asked.out)
    if asked.format == "onnx":
        write_text(run.answer, export_onnx(trainer, job, out))
    elif asked.format == "safetensors":
        with _writing(out):
            export_safetensors(trainer.net, out)
    else:
        with _writing(out):
            save_weights(bare_state_dict(trainer.net), out)
    return 0


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out.name} can't be written to {out.parent.parent}: {error.strerror}; use --out") from None


def export_safetensors(net: nn.Module, out: Path) -> None:
    """The bare state_dict. Tensors that the model shares are in the file once under each name.

    Raises:
        UserError: the model's state is more than tensors.
    """
    from safetensors.torch import save_file

    state = bare_state_dict(net)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"safetensors holds tensors alone, and {others[0]} (get_extra_state) is none: --format pt")
    save_file({name: value.contiguous().clone() for name, value in state.items()}, out)


def export_onnx(trainer: Trainer, job: Job, out: Path) -> str:
    """The model as ONNX, with any number of samples in a batch; how far onnxruntime is from PyTorch.

    Raises:
        UserError: ONNX can't express the model, or its results differ.
    """
    net = trainer.net.eval()
    source = build_source(job, next(iter(job.data.places("val")), "train"), training=False)
    batch, samples = first_samples(source, SAMPLES)
    call = call_of(net, trainer.predict_step, batch, samples)
    arguments = _by_name(net, call)
    with_batch = _is_of_samples(samples)
    shapes = tree_map(lambda leaf: {0: torch.export.Dim.DYNAMIC} if with_batch(leaf) else None, arguments)
    inputs = ["features"] if len(arguments) == 1 and isinstance(next(iter(arguments.values())), Tensor) else None
    try:
        program = torch.onnx.export(
            net, kwargs=arguments, dynamic_shapes=shapes, input_names=inputs, dynamo=True, verbose=False
        )
    except Exception as error:  # the exporter raises whatever it, or the model under it, has met
        raise UserError(
            f"the model can't be exported to ONNX: {_cause(error)}; what its forward does must not depend on the "
            "values of tensors. --format safetensors takes any model"
        ) from None
    assert program is not None  # as with dynamo=True
    with _writing(out):
        program.save(out)
    largest = max(_differences(out, net, arguments, samples))
    return f"compared with PyTorch by onnxruntime on {samples} samples and on 1: they differ by {largest:.1e} at most"


def _by_name(net: nn.Module, call: Call) -> dict[str, Any]:
    args, kwargs = call
    try:
        return dict(inspect.signature(net.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise UserError(f"{type(net).__name__}.forward can't be exported: {error}") from None


def _is_of_samples(samples: int) -> Any:
    return lambda leaf: isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples


@torch.no_grad()
def _differences(out: Path, net: nn.Module, arguments: dict[str, Any], samples: int) -> Iterator[float]:
    """The largest difference between their results, relative to the largest value, for all samples and for one.

    Raises:
        UserError: it is larger than float32's rounding explains.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    with_batch = _is_of_samples(samples)
    for count in {samples, 1}:
        part = tree_map(lambda leaf, n=count: leaf[:n] if with_batch(leaf) else leaf, arguments)
        expected = [leaf for leaf in tree_leaves(net(**part)) if isinstance(leaf, Tensor)]
        values = [leaf.numpy() for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, dict(zip(names, values, strict=True)))
        for one, other in zip(expected, found, strict=True):
            scale = one.double().abs().max().clamp(min=1e-12)
            apart = float(((one.double() - torch.as_tensor(other).double()).abs().max()) / scale)
            if not apart < 1e-3:
                raise UserError(
                    f"onnxruntime's results differ from PyTorch's for {count} samples: a relative difference of "
                    f"{apart:.1e}; --format safetensors takes any model"
                )
            yield apart


def _cause(error: BaseException) -> str:
    """The first line of what the exporter's error came from."""
    while (inner := error.__cause__) is not None:
        error = inner
    return f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    sys.exit(main())
