"""Which MLflow store is meant: one rule for the tracker that fills it and for `dtrain ui` that shows it."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEFAULT = "sqlite:///mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"

_SQLITE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<file>[^?:][^?]*)(?P<options>\?.*)?")


def resolve_tracking_uri(asked: str | None, before: str | None = None) -> str:
    """The store that was asked for, else MLFLOW_TRACKING_URI, else the one used before, else mlflow.db here.

    The path of an SQLite store comes back absolute, so that it still names the same file elsewhere.
    """
    uri = asked or os.environ.get(VARIABLE) or before or DEFAULT
    sqlite = _SQLITE.fullmatch(uri)
    if not sqlite:
        return uri
    return f"{sqlite['scheme']}{Path(sqlite['file']).absolute()}{sqlite['options'] or ''}"


def is_off() -> bool:
    """Whether runs are not to go to MLflow at all: MLFLOW_TRACKING_URI is set, and empty."""
    return os.environ.get(VARIABLE) == ""


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other uri."""
    sqlite = _SQLITE.fullmatch(uri)
    return Path(sqlite["file"]) if sqlite else None


def hide_password(text: str) -> str:
    """The text without the user and password that its uris may carry."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)
