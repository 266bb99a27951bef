"""Text for terminals and logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from fastdino.file_names import as_text


def printable(text: str) -> str:
    r"""Return one line in which control characters and bytes that are no text are escaped.

    File names may contain any of them: \x1b[2J clears a terminal, a line break forges a log line.
    """
    text = as_text(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if a stream is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def print_line(text: str, stream: TextIO | None, write: Callable[..., None] = print) -> None:
    """Print one printable line; characters that the stream cannot encode are escaped.

    A stream that is closed, full, or a terminal that is gone, is no error.

    Args: write: called as write(text, file=stream).
    """
    if stream is None:  # closed before the program was started
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        write(line, file=stream)
        stream.flush()
    except (OSError, ValueError):
        pass


def print_out(*lines: str) -> None:
    """Print lines to stdout, as print_line does."""
    for line in lines:
        print_line(line, sys.stdout)


def print_err(*lines: str) -> None:
    """Print lines to stderr, as print_line does."""
    for line in lines:
        print_line(line, sys.stderr)


def finish_output() -> None:
    """Flush stdout and stderr; what cannot be written any more is dropped.

    The interpreter would otherwise fail at its exit, and replace the exit status by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed
            pass
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
