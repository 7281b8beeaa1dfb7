"""A machine without the packages that not every run needs: each is a sentence where it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import Project
from marks import campaign

from dtrain.errors import UserError
from dtrain.schema import packages

WITHOUT = [
    "mlflow",
    "deepspeed",
    "matplotlib",
    "torchinfo",
    "torchvision",
    "safetensors",
    "pandas",
    "sklearn",
    "onnx",
    "onnxruntime",
    "onnxscript",
]


@pytest.fixture
def bare(project: Project) -> Project:
    """A project whose commands, and all processes that they start, have none of those packages, and track as usual."""
    project.write("sitecustomize.py", f"import sys\nsys.modules.update(dict.fromkeys({WITHOUT}))\n")
    project.environment["PYTHONPATH"] = str(project.folder)
    del project.environment["MLFLOW_TRACKING_URI"]
    return project


def test_a_run_is_whole_without_them(bare):
    done = bare.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if "pip install" in line]
    [untracked] = [line for line in said if "MLflow" in line]
    assert untracked.startswith("the run is not recorded in MLflow, which needs the package mlflow: ")
    assert untracked.endswith("-m pip install mlflow; or set MLFLOW_TRACKING_URI to nothing")
    [unpictured] = [line for line in said if "plots/" in line]
    assert "can't draw plots/: needs the package matplotlib" in unpictured
    assert len(said) == 2
    run = bare.run_dir()
    assert len(list(run.rows())) == 2
    assert run.best_weights.exists()
    assert not (run.logs / "mlflow.log").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["launch", "job.yaml", "fit.strategy=deepspeed"], "fit.strategy: deepspeed needs the package deepspeed: "),
        campaign(
            ["check", "job.yaml", "fit.strategy=deepspeed"], "fit.strategy: deepspeed needs the package deepspeed: "
        ),
        (
            ["launch", "job.yaml", "mlflow.tracking_uri=http://mlflow:5000"],
            "mlflow.tracking_uri: needs the package mlflow: ",
        ),
        (["ui", "--tracking-uri", "file:runs"], "dtrain ui needs the package mlflow: "),
        campaign(["summary", "job.yaml"], "dtrain summary needs the package torchinfo: "),
        (["export", "run", "--format", "onnx"], "--format onnx needs the packages onnx, onnxscript, onnxruntime: "),
        campaign(["export", "run", "--format", "safetensors"], "--format safetensors needs the package safetensors: "),
        campaign(["predict", "run", "features.csv"], "to read features.csv, dtrain needs the package pandas: "),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each),
)
def test_what_needs_one_is_refused_before_it_begins(bare, arguments, says):
    bare.write("features.csv", "1,2\n")
    weights = bare.run_dir().best_weights
    weights.parent.mkdir(parents=True)
    weights.touch()
    bare.run_dir().job.write_text((bare.folder / "job.yaml").read_text())
    done = bare.run(*arguments)
    assert done.code == 2
    assert f"{says}{sys.executable} -m pip install " in done.err
    assert len(done.err.splitlines()) == 1


def test_an_older_torch_is_named(monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: "2.5.1+cu124")
    with pytest.raises(UserError, match=r"dtrain needs torch 2\.11 or newer, and .* has 2\.5\.1\+cu124"):
        packages.require_for()


def test_the_oldest_torch_is_the_requirements():
    oldest = ".".join(map(str, packages.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
