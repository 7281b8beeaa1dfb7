"""The commands for a model: what its layers are, how good it is, what it predicts, and its weights for others."""

from __future__ import annotations

import click

from .arguments import GPUS, check_gpus

_WEIGHTS = click.option(
    "--weights",
    type=click.Choice(["best", "last", "ema", "swa"]),
    default="best",
    show_default=True,
    help="Which of the run's weights to load.",
)


@click.command()
@click.argument("job")
@click.argument("overrides", nargs=-1)
def summary(job: str, overrides: tuple[str, ...]) -> int:
    """Print the layers of JOB's model, with output shapes, parameters and memory."""
    from .commands.evaluate import summary

    return summary(job, overrides)


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1)
@click.option("--data", default="val", show_default=True, help="The job's dataset: train, val, test or val.NAME.")
@GPUS
@_WEIGHTS
def evaluate(run: str, overrides: tuple[str, ...], data: str, gpus: str, weights: str) -> int:
    """Print the loss and metrics of RUN's model on a dataset of its job, as JSON.

    OVERRIDES may change the dataset: data.val.split=other.
    """
    from .commands.evaluate import Trained, evaluate

    check_gpus(gpus)
    return evaluate(Trained(run, overrides, weights), data, gpus)


@click.command()
@click.argument("run")
@click.argument("data")
@click.argument("overrides", nargs=-1)
@click.option("-o", "--out", metavar="FILE", help="Output file, .npy or .csv; default: predictions.npy in RUN.")
@GPUS
@_WEIGHTS
def predict(run: str, data: str, overrides: tuple[str, ...], out: str | None, gpus: str, weights: str) -> int:
    """Write RUN's predictions for DATA, one per sample and in order, and print the file's name.

    DATA is train, val, test or val.NAME, a dataset of RUN's job (OVERRIDES may change it: data.val.split=other), or a
    .npy or .csv file of features with one sample per row.
    """
    from .commands.evaluate import Trained, predict

    check_gpus(gpus)
    return predict(Trained(run, overrides, weights), data, out, gpus)


@click.command()
@click.argument("run")
@click.option("--format", "form", type=click.Choice(["onnx", "safetensors", "pt"]), required=True)
@click.option("-o", "--out", metavar="FILE", help="Output file; default: the job's name with the format's extension.")
@_WEIGHTS
def export(run: str, form: str, out: str | None, weights: str) -> int:
    """Export RUN's model as ONNX, which is compared with PyTorch on real samples, or its weights alone."""
    from .commands.evaluate import Trained, export

    return export(Trained(run, (), weights), form, out)
