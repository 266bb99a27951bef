"""The syntax of --data_path: [SCHEME:]PATH[?name=value&name=value]."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdino.errors import DataError

EXPECTED = (
    "expected a folder of images (one folder per class, or flat), a .tar or .zip file or a folder "
    "of them, a pattern such as 'train-{000..146}.tar' or 'train-*.tar', a text file with one "
    "image path per line, torchvision:NAME or hf:NAME"
)
_SCHEME = re.compile(r"([A-Za-z]\w*):(.*)", re.DOTALL)
_OPTIONS = re.compile(r"(.+?)\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)", re.DOTALL)


@dataclass(frozen=True)
class DataPath:
    """A parsed --data_path.

    text: the argument as given.
    scheme: "" for a file, a folder or a pattern.
    role: "train" or "val" if an evaluation asks for one of its two splits, else "".
    """

    text: str
    scheme: str
    path: str
    options: dict[str, str] = field(default_factory=dict)
    role: str = ""

    def error(self, problem: str) -> DataError:
        """Return an error that names the data path."""
        return DataError(f"--data_path {self.text}: {problem}")


def parse(text: str, schemes: Sequence[str], role: str = "") -> DataPath:
    """Parse --data_path. A file or folder of exactly that name takes precedence.

    Raises: DataError: an option is repeated or empty, or the scheme is unknown.
    """
    whole = DataPath(text, "", text, role=role)
    if os.path.lexists(text):
        return whole
    match = _OPTIONS.fullmatch(text)
    path = match[1] if match else text
    options: dict[str, str] = {}
    for pair in match[2].split("&") if match else ():
        name, _, value = pair.partition("=")
        if name in options or not value:
            raise whole.error(f"option {name!r} {'is given twice' if value else 'has no value'}")
        options[name] = value
    scheme = _SCHEME.fullmatch(path)
    if scheme is None or os.path.exists(path):
        return DataPath(text, "", path, options, role)
    name, rest = scheme.groups()
    if name in schemes:
        return DataPath(text, name, rest, options, role)
    similar = difflib.get_close_matches(name.lower(), schemes, n=1)
    if similar or rest.startswith("//"):
        supported = f"supported are {', '.join(f'{one}:' for one in schemes)}"
        hint = f"did you mean {similar[0]}:{rest}?" if similar else supported
        raise whole.error(f"unknown scheme {name}:; {hint}")
    return DataPath(text, "", path, options, role)
