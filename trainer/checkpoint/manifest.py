"""A checkpoint folder's description of itself: index.json, and SHA256SUMS over all of its files.

Both are text, written last and read first. SHA256SUMS has sha256sum's own format: `sha256sum -c SHA256SUMS` checks a
checkpoint by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain import __version__

FORMAT = 2  # 1 was torch.save's files, state.pt and rank-K.pt
INDEX = "index.json"
SUMS = "SHA256SUMS"

_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")
_PIECE = 1 << 23  # bytes written, read and hashed at a time


class Unusable(Exception):
    """A checkpoint that this run can't continue from; the message says which file, and what is wrong."""


class Damaged(Unusable):
    """Its files are not what was written: no run can continue from it."""


class HashedFile:
    """A new file that is on disk, with known size and SHA-256, when the block ends."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._sum = hashlib.sha256()
        self.name = path.name
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append the bytes without copying them. Neither writing nor hashing blocks other threads."""
        view = memoryview(data)
        for begin in range(0, len(view), _PIECE):
            piece = view[begin : begin + _PIECE]
            self._sum.update(piece)
            self.size += len(piece)
            while piece:
                piece = piece[os.write(self._file, piece) :]

    @property
    def sum(self) -> str:
        return self._sum.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)


def file_sum(path: Path) -> str:
    """A file's SHA-256, in hex."""
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def write_manifest(folder: Path, index: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Write index.json, and SHA256SUMS over it and the files in `sums`."""
    with HashedFile(folder / INDEX) as file:
        file.write(json.dumps(index).encode())
    lines = [f"{digest}  {name}\n" for name, digest in sorted({**sums, INDEX: file.sum}.items())]
    with HashedFile(folder / SUMS) as file:
        file.write("".join(lines).encode())


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The index, and each file's sum by its name. Of the files, only the index is checked yet.

    Raises:
        Damaged: the index or the sums are not there, or not what was written.
        Unusable: another format.
    """
    if not (folder / INDEX).exists() and (folder / "state.pt").exists():
        raise Unusable(f"state.pt: an older format (1), this version reads format {FORMAT}")
    try:
        lines = (folder / SUMS).read_text().splitlines()
        matches = [_SUM_LINE.fullmatch(line) for line in lines]
        sums = {match[2]: match[1] for match in matches if match}
    except FileNotFoundError:
        raise Damaged(f"{SUMS} is missing") from None
    except OSError as error:
        raise Unusable(f"{SUMS} can't be read: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{SUMS} is damaged: it is not text") from None
    if len(sums) < len(lines) or INDEX not in sums:
        raise Damaged(f"{SUMS} is damaged: it does not list a checksum for each file")
    verify(folder, sums, [INDEX])
    try:
        index = json.loads((folder / INDEX).read_text())
        if index["format"] != FORMAT:
            writer = index.get("versions", {}).get("dtrain", "of an unknown version")
            said = f"{INDEX}: format {index['format']}, written by dtrain {writer}"
            raise Unusable(f"{said}; this one, dtrain {__version__}, reads format {FORMAT}")
        if unlisted := sorted(set(index["files"]) - set(sums)):
            raise Damaged(f"{SUMS} does not list {unlisted[0]}")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{INDEX} is not an index: {type(error).__name__}: {error}") from None
    return index, sums


def verify(folder: Path, sums: Mapping[str, str], names: Iterable[str], sizes: Mapping[str, int] | None = None) -> None:
    """Read the named files, and compare them with their sums.

    Raises:
        Damaged: one is missing, truncated, or has other content.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        size, expected = path.stat().st_size, (sizes or {}).get(name)
        if expected is not None and size < expected:
            raise Damaged(f"{name} is cut short: {size} of {expected} bytes")
        try:
            found = file_sum(path)
        except OSError as error:
            raise Unusable(f"{name} can't be read: {error.strerror}") from None
        if found != sums[name]:
            raise Damaged(f"{name} is damaged: its checksum differs from {SUMS}")
