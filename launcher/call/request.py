"""What `dtrain.launch` asks of its agent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from .mailbox import Mailbox


@dataclass(frozen=True)
class FunctionRequest:
    """On the agent's command line.

    Attributes:
        name: of the function.
        launcher: the process that asks: all ends with it.
        mailbox: what it wrote, and what it will read.
        modules: the packages that it has loaded.
    """

    name: str
    gpus: str
    run_dir: str | None
    resume: bool
    show_ranks: str
    launcher: int
    mailbox: Mailbox
    modules: list[str]

    def text(self) -> str:
        """This, for `read`."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> FunctionRequest:
        """The request that this text is of."""
        values = json.loads(text)
        return cls(**{**values, "mailbox": Mailbox(**values["mailbox"])})
