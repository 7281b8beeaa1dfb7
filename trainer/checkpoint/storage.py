"""How torch.distributed.checkpoint (DCP) writes and reads a checkpoint's tensors here. Nothing of it is a pickle.

Each rank writes one file, rank-K.bin: its tensors' bytes, one after the other. index.json has each tensor's dtype,
shape, and the place of each part of it, which DCP otherwise keeps in a pickle. DCP plans who reads and writes
which parts, so that sharded tensors can be read at another number of ranks.

Importing this imports DCP, which takes a moment: do it on the main thread, when there is something to save.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dtrain.files import hidden_name, sync
from dtrain.run.folder import CHECKPOINT_PART

from .codec import DTYPES
from .manifest import Damaged, HashedFile, file_sum, write_manifest

_ALIGNMENT = 64  # of a tensor's first byte

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is, where there is one rank


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    attached: Mapping[str, Path],
    group: dist.ProcessGroup | None,
) -> None:
    """Write a checkpoint of all ranks' tensors, which is complete when `folder` exists. All ranks take part.

    Args:
        tensors: this rank's. A plain tensor is written by one rank of those that have it, a DTensor in its parts.
        about: what index.json holds besides the tensors. Rank 0's counts, as with `attached`.
        attached: files to be linked into the folder, by their names there; those that don't exist are left out.

    Raises:
        OSError: a rank could not write; on all ranks.
    """
    writer = RankFilesWriter(folder, about, attached)
    try:
        dcp_save(
            {"tensors": tensors},
            storage_writer=writer,
            planner=Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as failures:
        errors = [error for _, (error, _) in sorted(failures.failures.items())]
        raise next((error for error in errors if not isinstance(error, OSError)), errors[0]) from None


def load(folder: Path, index: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, DTensors among them, from the checkpoint's of the same names. No collective.

    Args:
        index: what `read_manifest` found in the folder.

    Raises:
        Damaged: the files do not hold what the index says.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp_load(tensors, storage_reader=RankFilesReader(folder, index), planner=planner, no_dist=True)
    except CheckpointException as failures:
        [(error, _)] = failures.failures.values()
        raise error from None


def empty_tensor(description: Mapping[str, Any], device: str = "cpu") -> Tensor:
    """A tensor to read one of the index into, in the memory format that it was saved in."""
    shape, strides, dtype = description["shape"], description["strides"], DTYPES[description["dtype"]]
    if strides is None or not _is_dense(shape, strides):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no two elements overlap, and there are no gaps."""
    reached = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1 and stride != reached:
            return False
        reached *= length
    return True


class Planner(DefaultSavePlanner):
    """DCP's own, for tensors that come as one value: DCP writes a record for its log about each value it is given."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict["tensors"], storage_meta, is_coordinator)


class RankFilesWriter(StorageWriter):
    """Fills a hidden folder, and gives it its name when all of it is on disk."""

    def __init__(self, folder: Path, about: Mapping[str, Any], attached: Mapping[str, Path]) -> None:
        self._folder = folder
        self._hidden = hidden_name(folder)
        self._about = about
        self._attached = attached
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs["rank"]
        if is_coordinator:  # all ranks write only after this
            shutil.rmtree(self._hidden, ignore_errors=True)
            self._hidden.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        places = []
        with HashedFile(self._hidden / CHECKPOINT_PART.format(self._rank)) as file:
            for item in plan.items:
                file.write(bytes(-file.size % _ALIGNMENT))
                tensor: Any = planner.resolve_data(item)
                data = _bytes(tensor)
                places.append(WriteResult(item.index, len(data), (file.name, file.size, tensor.stride())))
                file.write(data)
        # The file's own line, for `finish`: it is no tensor's.
        places.append(WriteResult(MetadataIndex(file.name), file.size, file.sum))
        return _done(places)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = [written.pop() for written in results]
        sums = {file.index.fqn: file.storage_data for file in files}
        for name, source in self._attached.items():
            if source.exists():
                _link(source, self._hidden / name)
                sync(self._hidden / name)
                sums[name] = file_sum(self._hidden / name)
        places = {part.index: part.storage_data for written in results for part in written}
        tensors = {}
        for name, each in metadata.state_dict_metadata.items():
            if isinstance(each, TensorStorageMetadata):
                parts = [(chunk, *places[MetadataIndex(name, chunk.offsets)]) for chunk in each.chunks]
                tensors[name] = {
                    "dtype": str(each.properties.dtype).removeprefix("torch."),
                    "shape": each.size,
                    "strides": parts[0][-1] if parts[0][0].sizes == each.size else None,  # of a part
                    "parts": [[chunk.offsets, chunk.sizes, file, begin] for chunk, file, begin, _ in parts],
                }
        sizes = {file.index.fqn: file.size_in_bytes for file in files}
        write_manifest(self._hidden, {**self._about, "files": sizes, "tensors": tensors}, sums)
        sync(self._hidden)
        self._hidden.rename(self._folder)
        sync(self._folder.parent)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class RankFilesReader(StorageReader):
    """Reads what RankFilesWriter wrote."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self._paths = {name: folder / name for name in index["files"]}
        self._metadata = Metadata({})
        self._places: dict[MetadataIndex, tuple[ChunkStorageMetadata, str, int, torch.dtype]] = {}
        for name, each in index["tensors"].items():
            dtype, chunks = DTYPES[each["dtype"]], []
            for offsets, sizes, file, position in each["parts"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self._places[MetadataIndex(name, offsets)] = (chunks[-1], file, position, dtype)
            described = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(each["shape"]), chunks)
            self._metadata.state_dict_metadata[name] = described

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be done before the plan."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for item in plan.items:
                chunk, name, position, dtype = self._places[item.storage_index]
                if name not in files:
                    files[name] = stack.enter_context(self._paths[name].open("rb"))
                part = torch.empty(chunk.sizes, dtype=dtype)
                data = _bytes(part)
                files[name].seek(position)
                if files[name].readinto(data) != len(data):
                    raise Damaged(f"{name} is cut short: {item.storage_index.fqn} is incomplete")
                ranges = zip(item.storage_offsets, item.lengths, strict=True)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part[tuple(slice(begin, begin + length) for begin, length in ranges)])
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _bytes(tensor: Any) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _link(source: Path, target: Path) -> None:
    # Weights are replaced by renaming, never modified, so a second name costs nothing and keeps its content.
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, target)
