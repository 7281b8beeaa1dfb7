"""Writing in the background: copies to write from, a thread that writes, and what happens if the disk refuses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtrain.files import refusal
from dtrain.run.folder import RunDir
from dtrain.stderr import say

from ..distributed.forking import begin_first_time, end_first_time

K = TypeVar("K", bound=Hashable)

GRACE_S = 10.0  # for writes in progress when the training fails


class Copied(dict[str, Any]):
    """A state_dict of copies on the CPU that nobody changes: it can be written later without another copy."""


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a GPU's tensor in pinned memory, in one transfer. Waits for the device."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


class Copies:
    """Copies of tensors on the CPU, in memory that is reused for the next copies of the same shape."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """The tensors as they are now, in their memory formats, over the copies made before. Waits for the device.

        Of a DTensor this rank's part is copied, and comes as a DTensor on the CPU.
        """
        before, self._buffers = self._buffers, {}
        shared: dict[Any, Tensor] = {}  # tied weights stay tied
        for name, given in tensors.items():
            tensor = given.to_local() if isinstance(given, DTensor) else given
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place not in shared:
                buffer = before.get(name)
                if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                    # Copies to pinned memory need no wait between the tensors.
                    buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                shared[place] = buffer.copy_(tensor, non_blocking=True)
            self._buffers[name] = shared[place]
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: _as_part(self._buffers[name], given) for name, given in tensors.items()}


def _as_part(copy: Tensor, of: Tensor) -> Tensor:
    """The copy of a shard as a shard of the same larger tensor. No collective."""
    if not isinstance(of, DTensor):
        return copy
    mesh = DeviceMesh("cpu", of.device_mesh.mesh)
    return DTensor.from_local(copy, mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())


class Background:
    """A thread that does one thing at a time. A context manager, which waits for it to finish.

    A block that ends with an error waits for a moment only, since the ranks that the thread works with may be gone;
    usually it then fails as well. An interpreter that ends with a thread in a collective aborts.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_first = True  # until the first jobs are done

    def start(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Start doing the jobs, one after the other, and return; wait for earlier ones first, as `wait` does."""
        self.wait()
        if self._is_first:
            begin_first_time()
        self._thread = threading.Thread(target=self._run, args=(jobs,), name="dtrain-write", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is done. Raises what a job raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(GRACE_S)

    def _run(self, jobs: Sequence[Callable[[], None]]) -> None:
        try:
            for job in jobs:
                job()
        except BaseException as error:
            self._error = error
        finally:
            if self._is_first:
                self._is_first = False
                end_first_time()


class Disk:
    """Reports once that the run's files can't be written, and lets the training continue. Rank 0 only."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._failing: set[str] = set()

    @contextlib.contextmanager
    def tolerated(self, action: str, name: str = "") -> Iterator[None]:
        """Around an action such as "write checkpoint": an OSError ends the block, and is reported.

        Once, until all that failed has succeeded again.
        """
        try:
            yield
        except OSError as error:
            if not self._failing:
                say(
                    f"{self._run}: can't {' '.join([action, name]).rstrip()}: {refusal(error)}; "
                    f"training goes on, and {self.last_good()}"
                )
            self._failing.add(action)
        else:
            self._failing.discard(action)

    def last_good(self) -> str:
        """What the run can continue from: the checkpoint that `latest` names."""
        with contextlib.suppress(OSError):
            return f"the last good checkpoint is {self._run.latest.read_text().strip()}"
        return "there is no checkpoint yet"
