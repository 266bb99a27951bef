"""Unreadable images: counted, replaced by the next good one, an error above a given share."""

from __future__ import annotations

import itertools

from fastdino.errors import DataError

_SHOWN = 5


def raise_if_many_bad(
    bad: dict[str, str], total: int, max_bad_share: float, broken: int = 0
) -> None:
    """Raise DataError, with the first few paths, if all or more than max_bad_share are bad.

    Args:
        bad: path -> reason.
        total: images, the bad ones included.
        broken: further bad images, not included in `bad` and `total`.
    """
    count, total = len(bad) + broken, total + broken
    if count > max_bad_share * total:
        raise DataError(
            f"{count} of {total} images cannot be read, more than --max_bad_share "
            f"{max_bad_share:g} allows: {first_names(bad)}"
        )
    if count == total:
        raise DataError(f"none of the {total} images can be read: {first_names(bad)}")


def first_names(bad: dict[str, str]) -> str:
    """Return the first few paths with their reasons, and the number of further ones."""
    shown = "; ".join(f"{path} {reason}" for path, reason in list(bad.items())[:_SHOWN])
    return shown + (f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")


class BadImages:
    """Samples found broken while running, each replaced by the next good sample. Thread-safe.

    `skipped` maps path -> reason, `reasons` maps sample -> reason.

    Args:
        n: samples that the scan kept.
        max_bad_share: allowed share of broken images, those skipped by the scan included.
        broken: images skipped by the scan as broken.
    """

    def __init__(self, n: int, max_bad_share: float, broken: int = 0) -> None:
        self.n, self.max_bad_share, self.broken = n, max_bad_share, broken
        self.skipped: dict[str, str] = {}
        self.reasons: dict[int, str] = {}

    def add(self, index: int, path: str, reason: str) -> None:
        """Record a broken sample; raise DataError if there are too many."""
        self.reasons[index] = self.skipped[path] = reason
        raise_if_many_bad(self.skipped, self.n, self.max_bad_share, self.broken)

    def next_good(self, index: int) -> int:
        """Return the first sample from index on that is not broken; DataError if all are."""
        for candidate in itertools.chain(range(index, self.n), range(index)):
            if candidate not in self.reasons:
                return candidate
        raise DataError(f"none of the {self.n} images can be read: {first_names(self.skipped)}")
