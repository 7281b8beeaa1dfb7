"""Which MLflow store is meant: one rule for the tracker that fills it and for `dtrain ui` that shows it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dtrain.errors import UserError
from dtrain.redact import HIDDEN, hide_password

DEFAULT = "sqlite:///mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"

_SQLITE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<file>[^?:][^?]*)(?P<options>\?.*)?")


def resolve_tracking_uri(asked: str | None, before: str | None = None) -> str:
    """The store that was asked for, else MLFLOW_TRACKING_URI, else the one used before, else mlflow.db here.

    The path of an SQLite store comes back absolute, so that it still names the same file elsewhere.

    Raises:
        UserError: what a run's files hold of that address is without its password, and the variable has none either.
    """
    given = os.environ.get(VARIABLE)
    uri = asked or given or before or DEFAULT
    if HIDDEN in uri:
        if given is None or hide_password(given) != uri:
            raise UserError(f"{uri}: its password is not stored in the run's files; set {VARIABLE} to the full address")
        uri = given
    sqlite = _SQLITE.fullmatch(uri)
    if not sqlite:
        return uri
    return f"{sqlite['scheme']}{Path(sqlite['file']).absolute()}{sqlite['options'] or ''}"


def hand_on(asked: str | None) -> None:
    """Gives processes that this one starts an address with its password, which the run's files leave out."""
    if asked is not None and not is_off() and hide_password(asked) != asked:
        os.environ[VARIABLE] = asked


def is_off() -> bool:
    """Whether runs are not to go to MLflow at all: MLFLOW_TRACKING_URI is set, and empty."""
    return os.environ.get(VARIABLE) == ""


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for any other uri."""
    sqlite = _SQLITE.fullmatch(uri)
    return Path(sqlite["file"]) if sqlite else None
