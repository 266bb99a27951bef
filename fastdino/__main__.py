"""The command `fastdino` and `python -m fastdino`."""

import sys
from typing import NoReturn

from fastdino.cli import main
from fastdino.terminal import finish_output
from fastdino.waiting import exit_process


def run() -> NoReturn:
    """Run the command line and exit."""
    try:
        status = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        finish_output()
        status = 1
    exit_process(status)


if __name__ == "__main__":
    run()
