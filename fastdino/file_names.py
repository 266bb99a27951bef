"""File names as text, whatever their bytes and the locale's encoding are.

Python decodes the bytes of a name by the locale's encoding, and represents each byte that does not
fit by a lone surrogate. In an ASCII locale the name of a file differs from the same name in a list,
an archive or JSON, which are UTF-8. `as_text` and `as_path` convert between the two. Both return
UTF-8 names unchanged in a UTF-8 locale.
"""

from __future__ import annotations

import os
from typing import Any

_CODEC = ("utf-8", "surrogateescape")


def as_text(name: str) -> str:
    """Return a path as text: UTF-8 as its characters, any other byte as a lone surrogate."""
    try:
        return name.encode(*_CODEC).decode(*_CODEC)
    except UnicodeEncodeError:  # other surrogates, from JSON or a pickle
        return name


def as_path(text: str) -> str:
    """Return the path, as the functions of the operating system take it, that `as_text` gave."""
    try:
        return os.fsdecode(text.encode(*_CODEC))
    except UnicodeEncodeError:
        return text


def decode_lines(data: bytes) -> list[str]:
    """Return the lines of a text file as text, without a byte order mark.

    Only line breaks separate lines, unlike in str.splitlines: names may contain its other
    separators, such as U+2028.
    """
    text = data.decode(*_CODEC).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def texts_in(value: Any) -> Any:
    """Return a value for JSON with `as_text` applied to all strings in it, keys included."""
    if isinstance(value, str):
        return as_text(value)
    if isinstance(value, dict):
        return {texts_in(key): texts_in(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [texts_in(item) for item in value]
    return value
