"""Text for terminals and logs."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return one line in which control characters and bytes that are no text are escaped.

    File names may contain any of them: \x1b[2J clears a terminal, a line break forges a log line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
