"""A notebook: cells that a real Jupyter kernel runs one after the other, and what appears below each."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command import MARK, PATIENCE_S, RANK_VARIABLES, processes
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager


@dataclass
class Output:
    """What a cell has put out so far."""

    text: str = ""
    error: tuple[str, str] | None = None  # the exception's name and its message
    is_over: bool = field(default=False, repr=False)


class Notebook:
    """A kernel with a working directory of its own. `opened` makes one."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient, mark: str) -> None:
        self._manager = manager
        self._client = client
        self._mark = mark

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[Notebook]:
        """In that folder; nothing of it stays."""
        mark = uuid.uuid4().hex
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {MARK: mark, "MLFLOW_TRACKING_URI": "", "IPYTHONDIR": str(folder / ".ipython")}
        manager = KernelManager(connection_file=str(folder / ".kernel.json"))
        manager.start_kernel(cwd=str(folder), env=environment)
        client = manager.client()
        try:
            client.start_channels()
            client.wait_for_ready(timeout=PATIENCE_S)
            yield cls(manager, client, mark)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            for pid in processes(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def run(self, code: str) -> Output:
        """Run a cell to its end."""
        output = self.start(code)
        self.until(output, lambda: output.is_over)
        return output

    def start(self, code: str) -> Output:
        """Begin to run a cell."""
        self._client.execute(code)
        return Output()

    def until(self, output: Output, condition: Callable[[], object]) -> None:
        """Wait for something that the cell brings about."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain: {output}"
            self._read(output)

    def interrupt(self) -> None:
        """The stop button."""
        self._manager.interrupt_kernel()

    def kill(self) -> None:
        """As the kernel for lack of memory."""
        self._manager.signal_kernel(signal.SIGKILL)

    def others(self) -> list[str]:
        """The command lines of what the kernel has started and what still runs."""
        kernel = self._manager.provisioner.pid
        return [command for pid, command in processes(self._mark).items() if pid != kernel]

    def await_others(self) -> None:
        """The end of all that the kernel has started: nothing may stay."""
        deadline = time.monotonic() + PATIENCE_S
        while left := self.others():
            assert time.monotonic() < deadline, left
            time.sleep(0.02)

    def _read(self, output: Output) -> None:
        with contextlib.suppress(Exception):  # there is no message yet
            message: dict[str, Any] = self._client.get_iopub_msg(timeout=0.05)
            content = message["content"]
            if message["msg_type"] == "stream":
                output.text += content["text"]
            elif message["msg_type"] == "error":
                output.error = content["ename"], content["evalue"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                output.is_over = True
