"""What cannot be read: counted, named, passed over, and too much where it passes a share."""

from __future__ import annotations

import itertools

from fastdino.errors import DataError

_NAMED = 5


def raise_if_many_bad(
    bad: dict[str, str], total: int, max_bad_share: float, broken: int = 0
) -> None:
    """Raises DataError, with the first few names, where more than max_bad_share are bad.

    broken: bad ones that are neither in `bad` nor in `total`.
    """
    count = len(bad) + broken
    if count > max_bad_share * (total + broken):
        raise DataError(
            f"{count} of {total + broken} images cannot be read, more than --max_bad_share "
            f"{max_bad_share:g} allows: {first_names(bad)}"
        )


def first_names(bad: dict[str, str]) -> str:
    """The first few with their reasons, and how many more there are."""
    named = "; ".join(f"{path} {reason}" for path, reason in list(bad.items())[:_NAMED])
    return named + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")


class BadImages:
    """The files found broken while running, and what takes their place: the next good sample.

    `skipped` holds path -> reason, `reasons` sample -> reason. Safe to use from several threads.

    Args:
        n: samples, those that the scan kept.
        max_bad_share: of all files, those that the scan skipped as broken among them.
        broken: how many these are.
    """

    def __init__(self, n: int, max_bad_share: float, broken: int = 0) -> None:
        self.n, self.max_bad_share, self.broken = n, max_bad_share, broken
        self.skipped: dict[str, str] = {}
        self.reasons: dict[int, str] = {}

    def add(self, index: int, path: str, reason: str) -> None:
        """Notes a broken file; raises DataError where there are too many."""
        self.reasons[index] = self.skipped[path] = reason
        raise_if_many_bad(self.skipped, self.n, self.max_bad_share, self.broken)

    def next_good(self, index: int) -> int:
        """The first sample from index on that is not known to be broken; DataError if all are."""
        for candidate in itertools.chain(range(index, self.n), range(index)):
            if candidate not in self.reasons:
                return candidate
        raise DataError(f"none of the {self.n} images can be read: {first_names(self.skipped)}")
