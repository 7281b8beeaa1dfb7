"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary file in the folder of `path`, then give it that name.

    A reader sees the old file or the new one, never a part. With `durable`, the bytes are on disk
    before the name is, so that a crash of the machine can't leave an empty file either.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o640)  # mkstemp's 0o600 would hide the run from colleagues
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the file by `text`, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace the file by `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file; None if the file is missing or invalid."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def refusal(error: OSError) -> str:
    """Why this host could not write, with a remedy if one is known."""
    full = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space, or ask for a larger quota"}
    remedy = f"; {full[error.errno]}" if error.errno in full else ""
    return f"{error.strerror or error} (on {socket.gethostname()}){remedy}"


def hidden_name(folder: Path) -> Path:
    """Where a folder is filled before it gets its name, and emptied after it has lost it."""
    return folder.with_name(f".{folder.name}")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
