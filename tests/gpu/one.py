"""One check in this process: python one.py NUMBER DEVICE FOLDER. How it ended goes to FOLDER/result.json."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import accuracy  # noqa: F401  # each module registers its checks
import ends  # noqa: F401
import machine  # noqa: F401
import repeats  # noqa: F401
import speed  # noqa: F401
import strategies  # noqa: F401
import waiting  # noqa: F401
from checks import CHECKS, LeftOut, Place

from dtrain.files import write_json


def main() -> None:
    number, device, folder = sys.argv[1:]
    result = {"state": "passed"}
    try:
        result["figure"] = CHECKS[int(number)].run(Place(device, Path(folder)))
    except LeftOut as why:
        result = {"state": "left out", "figure": str(why)}
    except BaseException as error:
        traceback.print_exc()
        said = str(error).splitlines() or [""]
        result = {"state": "failed", "figure": f"{type(error).__name__}: {said[0]}"}
    write_json(Path(folder) / "result.json", result)
    # How a process that has used the card leaves is check 24's subject.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
