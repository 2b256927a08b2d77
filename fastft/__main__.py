"""The process of a command, `fastft` or `python -m fastft`: it ends without taking Python's interpreter down.

gloo's threads free tensors, for which they take Python's lock. One that waits for it when the interpreter shuts down is
ended by pthread_exit inside a C++ destructor, and the process aborts ("terminate called without an active exception")
after all its work was done. `destroy_process_group` does not end these threads: DeepSpeed's parameters hold the groups.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `fastft ARGUMENT ...` (default: those of this process) and end the process with its exit code."""
    status = {"code": 1}  # of an error that nobody caught
    atexit.register(_end, status)  # before torch is imported: the functions registered last are called first
    from fastft.cli import main

    try:
        status["code"] = main(None if arguments is None else list(arguments))
    except SystemExit as stopped:  # from argparse
        status["code"] = int(stopped.code or 0)
    sys.exit(status["code"])


def _end(status: dict[str, int]) -> None:
    code = status["code"]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # Python's own for output that nobody takes
    os._exit(code)


if __name__ == "__main__":
    command()
