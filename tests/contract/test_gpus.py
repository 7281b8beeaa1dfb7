"""A node whose GPUs can't be used is named, with torch's reason: nobody trains on its CPU unasked."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch.torch_version import TorchVersion

from dtrain import gpus
from dtrain.errors import UserError
from dtrain.launcher.machine.devices import choose_processes
from dtrain.launcher.rank import fork_server
from dtrain.trainer.distributed.torch_versions import pin_exactly
from dtrain.trainer.distributed.world import own_device
from dtrain.trainer.entrypoints import train

HOST = re.escape(socket.gethostname())
OLD = "The NVIDIA driver on your system is too old (found version 11040)."
NONE = "No CUDA GPUs are available"


def raiser(error: Exception) -> Callable[..., Any]:
    def function(*_: Any) -> None:
        raise error

    return function


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """Has torch find so many GPUs, usable or not, with these variables and devices in /dev."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_LOCALID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # to be left as it is
    monkeypatch.setattr(gpus, "_DEV", tmp_path)

    def arrange(counted: int, error: Exception | None, devices: int = 0, **variables: str) -> None:
        for number in range(devices):
            (tmp_path / f"nvidia{number}").touch()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: counted > 0 and error is None)
        refuse = raiser(error) if error is not None else lambda *_: None
        monkeypatch.setattr(torch.cuda, "init", refuse)
        monkeypatch.setattr(torch.cuda, "set_device", refuse)

    return arrange


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no driver": (
        {"counted": 0, "error": RuntimeError("Found no NVIDIA driver on your system."), "SLURM_JOB_GPUS": "0"},
        r"\(SLURM_JOB_GPUS=0\), .*: Found no NVIDIA driver.*; to use the CPU instead: launch.device=cpu",
    ),
    "an old driver": ({"counted": 0, "error": RuntimeError(OLD), "devices": 2}, r"nvidia0, .*nvidia1\), .* too old"),
    "off the bus": (
        {
            "counted": 0,
            "error": RuntimeError("No CUDA GPUs are available"),
            "SLURM_STEP_GPUS": "3",
            "SLURM_JOB_ID": "1",
        },
        rf"No CUDA GPUs are available; .*sbatch --exclude={HOST} keeps a run off this node",
    ),
    "none of that name": (
        {"counted": 0, "error": RuntimeError(NONE), "devices": 1, "CUDA_VISIBLE_DEVICES": "5"},
        r"No CUDA GPUs are available \(CUDA_VISIBLE_DEVICES=5\)",
    ),
    "torch for CPUs": (
        {"counted": 0, "error": AssertionError("Torch not compiled with CUDA enabled"), "devices": 1},
        "Torch not compiled with CUDA enabled",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_gpus_that_torch_does_not_see_are_an_error(fault, machine):
    arranged, says = FAULTS[fault]
    machine(**arranged)
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=f"^{HOST} has GPUs .*{says}"):
            choose_processes("2", device)
        with pytest.raises(UserError, match=f"^{HOST} has GPUs .*{says}"):
            own_device(device)
    assert choose_processes("2", "cpu") == (2, "cpu")
    assert own_device("cpu").type == "cpu"


@pytest.mark.parametrize("value", gpus.HIDDEN)
def test_gpus_that_are_hidden_are_not_missed(value, machine, capsys):
    machine(0, RuntimeError("No CUDA GPUs are available"), 2, CUDA_VISIBLE_DEVICES=value, SLURM_JOB_GPUS="0,1")
    assert choose_processes("2", "auto") == (2, "cpu")
    assert "warning: CUDA_VISIBLE_DEVICES hides all GPUs; 2 CPU processes instead" in capsys.readouterr().err
    assert own_device("auto").type == "cpu"
    with pytest.raises(UserError, match=f"there is no GPU on {HOST}: No CUDA GPUs"):
        own_device("cuda")


def test_ranks_take_what_the_agent_has_chosen(machine):
    """NVML counts GPUs for a driver that is too old for torch; a script that asks for none by name must not go on."""
    machine(2, RuntimeError(OLD))
    assert choose_processes("auto", "auto") == (2, "cuda")
    with pytest.raises(UserError, match=rf"^{HOST} has GPUs \(NVML counts 2\), .*too old"):
        own_device("auto")
    with patch.dict(os.environ, {gpus.DEVICE_VARIABLE: "cuda"}):
        with pytest.raises(UserError, match="dtrain launch has found them"):
            own_device("auto")
        assert own_device("cpu").type == "cpu"
        with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # by the script itself
            assert own_device("auto").type == "cpu"
    machine(2, None)
    with patch.dict(os.environ, {gpus.DEVICE_VARIABLE: "cpu"}):
        assert own_device("auto").type == "cpu"


def test_a_rank_finds_its_own_gpu(machine, monkeypatch):
    machine(2, None, LOCAL_RANK="1")
    assert own_device("auto") == torch.device("cuda", 1)
    machine(1, None, CUDA_VISIBLE_DEVICES="3")
    with pytest.raises(UserError, match=f"local rank 1 has no GPU: 1 found on {HOST}"):
        own_device("auto")
    machine(1, None, SLURM_LOCALID="1")  # srun --gpus-per-task=1: it sees its own alone
    assert own_device("auto") == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "set_device", raiser(RuntimeError("CUDA error: device is lost")))
    with pytest.raises(UserError, match=f"GPU 0 of {HOST} can't be used: CUDA error: device is lost"):
        own_device("auto")


def test_a_rank_has_its_gpu_before_its_model_is_built(monkeypatch):
    """A constructor may put something on "cuda": that is this rank's then, not the first."""
    chosen: list[str] = []
    monkeypatch.setattr(train, "own_device", chosen.append)
    monkeypatch.setattr(train, "build_model", raiser(KeyError()))
    with pytest.raises(KeyError):
        train.build_trainer(cast(Any, SimpleNamespace(launch=SimpleNamespace(device="cuda"))))
    assert chosen == ["cuda"]


@pytest.mark.parametrize("visible", ["0,7", "0, 7, 8", "MIG-a,MIG-b"])
def test_gpus_that_are_named_and_not_there(visible, machine):
    machine(1, None, CUDA_VISIBLE_DEVICES=visible)
    for asked in ("auto", "1"):
        with pytest.raises(UserError, match=rf"{visible} names \d GPUs, but a process on {HOST} sees 1: .*MIG"):
            choose_processes(asked, "auto")


@pytest.mark.parametrize("visible", ["1", "0,-1,7", "MIG-a", "0,"])
def test_gpus_that_are_named_and_there(visible, machine):
    machine(1, None, CUDA_VISIBLE_DEVICES=visible)
    assert choose_processes("auto", "auto") == (1, "cuda")


def test_a_launch_on_such_a_node_leaves_nothing(project):
    if torch.cuda.device_count():
        pytest.skip("there are GPUs")
    done = project.run("launch", "job.yaml", SLURM_JOB_GPUS="0,1", CUDA_VISIBLE_DEVICES="0,1")
    assert done.code == 2
    assert re.match(rf"{HOST} has GPUs \(SLURM_JOB_GPUS=0,1\), but torch can't use any of them: .+\n$", done.err)
    assert not project.runs()


def test_descriptors_are_closed_however_many_there_may_be(tmp_path):
    """Where a process may have 10^9, as in some containers, to try each would take minutes."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            with patch.object(os, "sysconf", return_value=10**9), patch.object(os, "closerange", side_effect=OSError):
                fork_server.close_inherited()
            code = 0 if len(os.listdir("/proc/self/fd")) == 4 else 2  # the standard ones, and the list's
        finally:
            os._exit(code)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 1) == b""  # the other end is closed
    os.close(reader)


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}])
def test_pinned_memory_is_not_rounded_up_unless_the_user_has_settings_of_its_own(monkeypatch, own):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    pin_exactly()
    found = os.environ.pop("PYTORCH_ALLOC_CONF", None)
    if own or TorchVersion(torch.__version__) < "2.15":
        assert found is None
    else:
        torch._C._accelerator_setAllocatorSettings(found)  # which refuses what it doesn't know
