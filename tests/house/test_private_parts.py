"""What is used of others' private parts: where it stands, that it is still there, and that it does what it is used for.

Where one of these fails after an upgrade, the module that it names is the one to change.
"""

from __future__ import annotations

import ast
import atexit
import functools
import importlib.metadata
import multiprocessing.util
import os
import platform
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR
from torch.utils import _pytree
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import worker
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.classification import group_fairness
from torchmetrics.functional.classification.stat_scores import _binary_stat_scores_format
from torchmetrics.utilities import compute

from dtrain import Trainer
from dtrain.launcher.rank import flight_recorder
from dtrain.trainer.data.torch_data_private import WorkerInfo, end_by_kill, show
from dtrain.trainer.distributed import torch_private
from dtrain.trainer.metrics.torchmetrics_private import forget_result, reductions, set_update_count

ROOT = Path(__file__).parents[2]
TOP = ("dtrain", "launcher", "slurm", "trainer")
# By the module in which all private uses of a library stand: the library, as its distribution is called.
MODULES = {
    "launcher/agent/torch_elastic.py": "torch",
    "launcher/rank/cpython.py": "python",
    "trainer/data/torch_data_private.py": "torch",
    "trainer/distributed/torch_private.py": "torch",
    "trainer/metrics/torchmetrics_private.py": "torchmetrics",
    "trainer/strategies/deepspeed_private.py": "deepspeed",
}
PUBLIC = {"_asdict", "_make", "_replace", "_exit"}  # documented: of named tuples, and os._exit


# -- where they stand ------------------------------------------------------------------------------


def private_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names with one underscore that a file takes from something else: attributes, imported names and modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((part, node.lineno) for part in (node.module or "").split("."))
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            texts = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
            yield from ((str(text), node.lineno) for text in texts)


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines itself: functions, classes, fields, and attributes that it sets on itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_each_librarys_private_parts_are_used_in_one_module():
    trees = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text()) for top in TOP for path in (ROOT / top).rglob("*.py")
    }
    own = {name for path, tree in trees.items() if path not in MODULES for name in own_names(tree)} | PUBLIC
    found = [
        f"{path}:{line}: {name}"
        for path, tree in trees.items()
        if path not in MODULES
        for name, line in private_names(tree)
        if name.startswith("_") and not name.startswith("__") and name not in own
    ]
    assert not found, f"private parts of others, which belong into one of {', '.join(MODULES)}"


# -- that they are there ---------------------------------------------------------------------------

NET = nn.BatchNorm1d(2)
SGD = functools.partial(torch.optim.SGD, list(NET.parameters()), lr=1.0)


def parts() -> dict[str, Sequence[tuple[Any, str]]]:
    """By module, what each thing must have."""
    optimizer = SGD()
    rates = [ConstantLR(optimizer), ConstantLR(optimizer)]
    foreach = ("_foreach_mul_", "_foreach_add_", "_foreach_clamp_min_", "_foreach_clamp_max_")
    tree = ("tree_flatten", "tree_leaves", "tree_map", "tree_unflatten")
    agent = ("_start_workers", "_monitor_workers", "_restart_workers", "_shutdown", "_exit_barrier", "get_worker_group")
    return {
        "launcher/agent/torch_elastic.py": [
            *((LocalElasticAgent, name) for name in agent),
            *((api, name) for name in ("get_subprocess_handler", "SubprocessContext")),
            (SubprocessHandler, "_popen"),
        ],
        "launcher/rank/cpython.py": [
            (runpy, "_run_module_as_main"),
            (threading.main_thread(), "_set_native_id"),
            (threading, "_shutdown"),
            (atexit, "_run_exitfuncs"),
            (multiprocessing.util, "_exit_function"),
        ],
        "trainer/data/torch_data_private.py": [(worker, "_worker_info"), (worker, "WorkerInfo")],
        "trainer/distributed/torch_private.py": [
            *((torch, name) for name in foreach),
            *((_pytree, name) for name in tree),
            (NET, "_buffers"),
            (torch.eye(2).to_sparse(), "_indices"),
            (torch.eye(2).to_sparse(), "_values"),
            (torch.distributed.Reducer, "_check_reducer_finalized"),
            *((torch.cuda.memory, name) for name in ("_record_memory_history", "_dump_snapshot")),
            *[(torch._C, "_cuda_attach_out_of_memory_observer")] * torch.backends.cuda.is_built(),
            (ChainedScheduler(rates), "_schedulers"),
            *((SequentialLR(optimizer, rates, [1]), name) for name in ("_schedulers", "_milestones")),
        ],
        "trainer/metrics/torchmetrics_private.py": [
            *((MeanMetric(), name) for name in ("_update_count", "_computed", "_reductions")),
            # What dtrain/schema/metrics/logits.py and unfit_metrics.py look for by name.
            (compute, "normalize_logits_if_needed"),
            (group_fairness, "_AbstractGroupStatScores"),
        ],
    }


# Of the wrapper around the optimizer, in each stage.
OF_ZERO = {
    2: "optimizer cpu_offload averaged_gradients refresh_fp32_params round_robin_bit16_groups "
    "round_robin_bit16_offsets single_partition_of_fp32_groups",
    3: "optimizer offload_optimizer averaged_gradients refresh_fp32_params grad_position get_param_id "
    "fp32_partitioned_groups_flat",
}


def gone_from_deepspeed(rank: int, world_size: int) -> list[str]:
    gone = []
    for stage, names in OF_ZERO.items():
        net = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(net.parameters())
        settings = {"zero_optimization": {"stage": stage}}
        model: Any = Trainer(net, nn.MSELoss(), optimizer, strategy=settings, device="cpu").model
        gone += [name for name in names.split() if not hasattr(model._engine.optimizer, name)]
        if stage == 3:
            gone += [name for name in ("ds_id", "ds_shape") if not hasattr(net.weight, name)]
    ops = sys.modules["deepspeed"].ops
    return gone + ["ops.__compatible_ops__"] * ("deepspeed_shm_comm" not in ops.__compatible_ops__)


def test_deepspeeds_are_there():
    [gone] = run_ranks(1, gone_from_deepspeed)
    said = f"deepspeed {version('deepspeed')}: {', '.join(gone)}: gone; see trainer/strategies/deepspeed_private.py"
    assert not gone, said


def version(library: str) -> str:
    return platform.python_version() if library == "python" else importlib.metadata.version(library)


@pytest.mark.parametrize("module", [each for each in MODULES if "deepspeed" not in each])
def test_they_are_there(module):
    library = MODULES[module]
    for holder, name in parts()[module]:
        kind = getattr(holder, "__name__", type(holder).__name__)
        assert hasattr(holder, name), f"{library} {version(library)}: `{name}` of {kind} is gone; see {module}"


# -- that they do what they are used for -----------------------------------------------------------


def test_torch():
    ones, twos = [torch.ones(2), torch.ones(3)], [torch.full((2,), 2.0), torch.full((3,), 2.0)]
    torch_private.add_(ones, twos, 3.0)
    torch_private.multiply_(ones, torch.tensor(0.5))
    assert [each.tolist() for each in ones] == [[3.5] * 2, [3.5] * 3]
    torch_private.clamp_(ones, 2.0)
    assert ones[1].tolist() == [2.0] * 3
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm1d)
    assert all(issubclass(kind, torch_private.BATCH_NORMS) for kind in kinds)
    assert issubclass(nn.InstanceNorm2d, torch_private.RUNNING_NORMS)
    net = nn.Module()
    net.register_buffer("later", None)
    assert torch_private.own_buffers(net) == {"later": None}
    torch_private.remove_buffer(net, "later")
    assert not hasattr(net, "later")
    twice = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (1,), check_invariants=True)  # not coalesced
    assert {name: part.tolist() for name, part in torch_private.sparse_parts(twice).items()} == {
        "indices": [[0, 0]],
        "values": [1.0, 2.0],
    }
    optimizer = SGD()
    rates = [ConstantLR(optimizer), ConstantLR(optimizer)]
    sequence = SequentialLR(optimizer, rates, [7])
    assert torch_private.schedulers_in(sequence) == torch_private.schedulers_in(ChainedScheduler(rates)) == rates
    assert torch_private.milestones_of(sequence) == [7]


def test_torch_data():
    info = WorkerInfo(id=1, num_workers=2, seed=3, dataset=None)
    before = show(info)
    try:
        assert get_worker_info() is info
    finally:
        assert show(before) is info
    loaded = iter(DataLoader(range(4), num_workers=1))
    end_by_kill(loaded)
    [process] = loaded._workers  # which there must be, or nothing would have been changed
    process.terminate()
    process.join()
    assert process.exitcode == -9


def test_torchmetrics():
    metric = MeanMetric()
    assert reductions(metric).keys() == {"mean_value", "weight"}
    metric.update(1.0)
    assert metric.compute() == 1
    metric.mean_value = metric.mean_value + 1.0
    assert metric.compute() == 1  # it remembers
    forget_result(metric)
    assert metric.compute() == 2
    set_update_count(metric, 5)
    assert metric.update_count == 5
    assert reductions(CatMetric()).keys() == {"value"}
    assert "normalize_logits_if_needed" in _binary_stat_scores_format.__code__.co_names


END = """
import atexit, ctypes, sys, threading, time, types
from dtrain.launcher.rank import finalize
class Last:
    def __del__(self):
        print("destructor")
sys.modules["script"] = types.ModuleType("script")
sys.modules["script"].last = Last()
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
file = open(sys.argv[1], "w")
file.write("buffered")
ctypes.CDLL(None).printf(b"from C\\n")
before = {name: module for name, module in sys.modules.items() if name != "script"}
getattr(finalize, sys.argv[2])(3, *([before] if sys.argv[2] == "leave_script" else []))
"""


@pytest.mark.parametrize(
    ("how", "fast", "printed"),
    [
        ("leave", "", ["thread", "atexit", "from C"]),
        ("drop", "", ["from C"]),
        ("leave_script", "", ["thread", "atexit", "destructor", "from C"]),
        ("leave_script", "1", ["thread", "atexit", "from C"]),
    ],
)
def test_how_a_rank_ends(how, fast, printed, tmp_path):
    """A job's, a failed job's, a script's, and a script's without destructors."""
    command = [sys.executable, "-c", END, str(tmp_path / "file"), how]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DTRAIN_FAST_EXIT": fast})
    assert (done.returncode, done.stderr) == (3, "")
    assert sorted(done.stdout.split("\n")[:-1]) == sorted(printed)
    assert (tmp_path / "file").read_text() == "buffered"


def test_torch_dumps_what_its_flight_recorders_hold():
    """launcher/rank/flight_recorder.py goes by the names of torch's own functions for it."""
    assert "gloo" in flight_recorder.dump(), f"torch {torch.__version__}: _dump_fr_trace_json is gone; see there"
    assert "nccl" in flight_recorder.dump() or not torch.distributed.is_nccl_available()
