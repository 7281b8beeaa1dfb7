"""A checkpoint's files: written in parts by several ranks, checked by hand, read at any number of ranks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dtrain.trainer.checkpoint import manifest, storage
from dtrain.trainer.checkpoint.codec import DTYPES
from dtrain.trainer.checkpoint.manifest import Damaged, read_manifest, verify

ABOUT = {"format": manifest.FORMAT, "job": "test"}


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    kinds = [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.bool, torch.int64, torch.uint16]
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(3, 5, generator=generator) * 100
    return {
        **{f"kind/{dtype}": numbers.abs().to(dtype) for dtype in kinds},
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 3),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "transposed": numbers.t(),
        "expanded": torch.ones(1).expand(4),
        "conjugated": torch.tensor([1 + 2j]).conj(),
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    index, sums = read_manifest(folder)
    verify(folder, sums, sums, index["files"])
    tensors = {name: storage.empty_tensor(each) for name, each in index["tensors"].items()}
    storage.load(folder, index, tensors)
    return tensors


def test_tensors_come_back_to_the_bit(tmp_path):
    tensors = tensors_of_all_kinds()
    storage.save(tmp_path / "c", tensors, ABOUT, {}, None)
    found = read(tmp_path / "c")
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        expected = tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].contiguous().reshape(-1).view(torch.uint8), expected), name
    assert found["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert found["transposed"].stride() == (1, 5)


def test_the_index_alone_is_enough_to_read_the_files(tmp_path):
    """With nothing but json and bytes."""
    storage.save(tmp_path / "c", {"a": torch.arange(3), "b": torch.arange(4.0)}, ABOUT, {}, None)
    index = json.loads((tmp_path / "c" / "index.json").read_text())
    [[_, _, file, position]] = index["tensors"]["b"]["parts"]
    data = (tmp_path / "c" / file).read_bytes()
    assert torch.frombuffer(bytearray(data[position : position + 16]), dtype=torch.float32).tolist() == [0, 1, 2, 3]
    assert position % 64 == 0


def test_sha256sum_checks_it(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"the best")
    attached = {"best.pt": tmp_path / "weights.pt", "other.pt": tmp_path / "there is none"}
    storage.save(tmp_path / "c", {"a": torch.arange(3)}, ABOUT, attached, None)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=tmp_path / "c", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["best.pt: OK", "index.json: OK", "rank-0.bin: OK"]
    for name in ("best.pt", "index.json", "rank-0.bin"):
        path = tmp_path / "c" / name
        data = path.read_bytes()
        path.unlink()  # best.pt has another name, whose bytes stay
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert subprocess.run(check, cwd=tmp_path / "c", capture_output=True, check=False).returncode == 1
        path.write_bytes(data)
    assert os.listdir(tmp_path / "c") != []
    assert not list(tmp_path.glob(".*"))


# -- several ranks -------------------------------------------------------------------------------


def global_tensors() -> dict[str, tuple[torch.Tensor, Any]]:
    """By name, a tensor and how it is placed: rows or columns that don't divide evenly, and less rows than ranks."""
    values = {"rows": (5, 3), "columns": (2, 7), "one row": (1, 4), "replicated": (4, 2), "vector": (11,)}
    generator = torch.Generator().manual_seed(2)
    placements = {"columns": Shard(1), "replicated": Replicate()}
    return {
        name: (torch.randn(shape, generator=generator), placements.get(name, Shard(0)))
        for name, shape in values.items()
    }


def save_sharded(rank: int, world_size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    tensors: dict[str, torch.Tensor] = {
        name: distribute_tensor(value, mesh, [placement]) for name, (value, placement) in global_tensors().items()
    }
    tensors |= {f"rank-{rank}/own": torch.full((3,), float(rank)), "shared": torch.arange(4)}
    storage.save(Path(folder), tensors, ABOUT, {}, dist.group.WORLD)


def load_sharded(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    tensors: dict[str, torch.Tensor] = {
        name: distribute_tensor(torch.zeros_like(value), mesh, [placement])
        for name, (value, placement) in global_tensors().items()
    }
    index, _ = read_manifest(Path(folder))
    storage.load(Path(folder), index, tensors)
    return {name: tensor.full_tensor() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (3, 2)])
def test_sharded_tensors_load_at_another_number_of_ranks(before, after, tmp_path):
    run_ranks(before, save_sharded, str(tmp_path / "c"))
    for found in run_ranks(after, load_sharded, str(tmp_path / "c")):
        for name, (value, _) in global_tensors().items():
            assert torch.equal(found[name], value), name
    whole = read(tmp_path / "c")  # as plain tensors too
    assert all(torch.equal(whole[name], value) for name, (value, _) in global_tensors().items())
    assert [whole[f"rank-{rank}/own"].tolist() for rank in range(before)] == [[float(r)] * 3 for r in range(before)]
    files = read_manifest(tmp_path / "c")[0]["files"]
    assert sorted(files) == [f"rank-{rank}.bin" for rank in range(before)]
    assert sum(files.values()) < sum(t.nbytes + 64 for t in whole.values()) + 1  # what all have is written once


def fail_to_write(rank: int, world_size: int, folder: str) -> Any:
    if rank == 1:
        storage.HashedFile.write = refuse
    try:
        storage.save(Path(folder), {f"rank-{rank}/a": torch.ones(1)}, ABOUT, {}, dist.group.WORLD)
    except OSError as error:
        return error.errno


def refuse(*_: Any) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_rank_that_can_not_write_is_known_to_all(tmp_path):
    assert run_ranks(3, fail_to_write, str(tmp_path / "c")) == [errno.EDQUOT] * 3
    assert not (tmp_path / "c").exists()


# -- what is wrong in the files ------------------------------------------------------------------


def test_no_pickle_is_read(tmp_path, monkeypatch):
    """Neither by us nor by DCP, whose own storage keeps its metadata in one."""
    storage.save(tmp_path / "c", tensors_of_all_kinds(), ABOUT, {}, None)
    assert not any(path.name.startswith(".") for path in (tmp_path / "c").iterdir())

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    assert read(tmp_path / "c")["scalar"].isnan()


def test_an_index_can_not_lead_out_of_the_folder(tmp_path):
    storage.save(tmp_path / "c", {"a": torch.arange(3)}, ABOUT, {}, None)
    (tmp_path / "secret").write_bytes(bytes(1000))
    index, _ = read_manifest(tmp_path / "c")
    index["tensors"]["a"]["parts"][0][2] = "../secret"
    with pytest.raises(KeyError):
        storage.load(tmp_path / "c", index, {"a": torch.zeros(3, dtype=torch.int64)})
    index["files"]["../secret"] = 1000
    (tmp_path / "c" / "index.json").write_text(json.dumps(index))
    digest = manifest.file_sum(tmp_path / "c" / "index.json")
    for line in ("", f"{manifest.file_sum(tmp_path / 'secret')}  ../secret\n"):
        (tmp_path / "c" / "SHA256SUMS").write_text(f"{digest}  index.json\n{digest}  rank-0.bin\n{line}")
        with pytest.raises(Damaged, match=r"does not (list|name)"):
            read_manifest(tmp_path / "c")


def test_a_place_behind_the_files_end_is_damage(tmp_path):
    storage.save(tmp_path / "c", {"a": torch.arange(3)}, ABOUT, {}, None)
    index, _ = read_manifest(tmp_path / "c")
    index["tensors"]["a"]["parts"][0][3] += 8
    with pytest.raises(Damaged, match=r"rank-0\.bin is cut short: a is incomplete"):
        storage.load(tmp_path / "c", index, {"a": torch.zeros(3, dtype=torch.int64)})


def test_all_of_torchs_dtypes_have_a_name():
    assert len(set(DTYPES.values())) == len({v for v in vars(torch).values() if isinstance(v, torch.dtype)})


def test_the_trainer_does_not_import_dcp_at_start():
    code = "import sys, dtrain.trainer.trainer; print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
