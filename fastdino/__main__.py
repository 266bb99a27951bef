"""The command `fastdino` and `python -m fastdino`."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from fastdino.cli import main
from fastdino.terminal import finish_output
from fastdino.waiting import exit_process


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command line, by default that of the process, and exit."""
    try:
        status = main(argv)
    except Exception:
        sys.excepthook(*sys.exc_info())
        finish_output()
        status = 1
    exit_process(status)


if __name__ == "__main__":
    run()
