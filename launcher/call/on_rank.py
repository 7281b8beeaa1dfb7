"""A rank's part: the function is called, and what it returns is sent back."""

from __future__ import annotations

import os
import sys
from typing import Any

from dtrain.errors import UserError, first_line

from .mailbox import Mailbox, Returned


def call(mailbox: Mailbox) -> None:
    """Call the function that is in the mailbox."""
    try:
        function, args, kwargs = mailbox.receive()
    except Exception as error:  # of whatever is in it
        raise UserError(f"the function can't be loaded in a rank: {type(error).__name__}: {error}") from error
    if getattr(function, "__module__", None) == "__main__":  # what it uses is then found by its name, as it was there
        vars(sys.modules["__main__"]).update(getattr(function, "__globals__", {}))
    value = function(*args, **kwargs)
    mailbox.give_back(Returned(int(os.environ["RANK"]), _pickled(value)))


def _pickled(value: Any) -> bytes:
    from . import by_value

    try:
        return by_value.dumps(value)
    except Exception as error:
        kind, why = type(value).__name__, f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the function returned what can't be sent to another process (a {kind}; {why}); "
            "return numbers, tensors or a state_dict"
        ) from error
