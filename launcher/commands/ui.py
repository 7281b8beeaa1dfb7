"""`dtrain ui`: MLflow's own pages for the runs recorded here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

from dtrain.errors import UserError
from dtrain.monitoring.tracking_uri import resolve_tracking_uri, sqlite_file
from dtrain.redact import hide_password
from dtrain.run.folder import EXIT_INTERRUPTED
from dtrain.schema.packages import require

HOST = "127.0.0.1"
USUAL_PORT = 5000


def ui(tracking_uri: str | None, port: int | None) -> int:
    """Serve the store until Ctrl-C, and print the address; if the store is a server itself, only print its address."""
    uri = resolve_tracking_uri(tracking_uri)
    if uri.startswith(("http://", "https://")):
        print(hide_password(uri))
        return 0
    file = sqlite_file(uri)
    if file and not file.exists():
        raise UserError(
            f"no runs recorded in {file} yet; `dtrain launch` creates it in the working directory, a few seconds "
            "after the first step"
        )
    require("dtrain ui", "mlflow")
    return _serve(uri, _choose_port(port))


def _choose_port(asked: int | None) -> int:
    """The port asked for, else MLflow's usual one, else any that is free."""
    if asked is not None:
        if not _is_free(asked):
            raise UserError(f"port {asked} is taken; omit --port to use a free one")
        return asked
    if _is_free(USUAL_PORT):
        return USUAL_PORT
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def _is_free(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


def _serve(uri: str, port: int) -> int:
    # Either ends the server too. SIGINT is set as well, since a shell ignores it for what runs in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # One worker and no runners for MLflow's background jobs: 2 processes up in 5 s instead of 15 in 29 s.
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--workers", "1"]
    # In a session of its own, so that one signal to the group ends all of its processes.
    server = subprocess.Popen(
        [*command, "--host", HOST, "--port", str(port)],
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ},
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        if _wait_until_up(server, port):
            print(f"http://{HOST}:{port}", flush=True)
        return 1 if server.wait() else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        _end(server)


def _wait_until_up(server: subprocess.Popen[bytes], port: int) -> bool:
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return True
        time.sleep(0.1)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_s)
            return
