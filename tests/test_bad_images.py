"""Tests of fastdino.data.bad_images."""

from __future__ import annotations

import pytest

from fastdino.data.bad_images import BadImages
from fastdino.errors import DataError


def test_bad_image_is_replaced_by_the_next_good_one():
    bad = BadImages(5, max_bad_share=0.5)
    bad.add(3, "d", "is broken")
    bad.add(4, "e", "is broken")
    assert [bad.next_good(i) for i in range(5)] == [0, 1, 2, 0, 0]
    assert bad.skipped == {"d": "is broken", "e": "is broken"}
    with pytest.raises(DataError, match="3 of 5"):
        bad.add(0, "a", "is broken")


def test_images_skipped_by_the_scan_count_towards_the_share():
    bad = BadImages(8, max_bad_share=0.3, broken=2)
    bad.add(0, "a", "is broken")
    with pytest.raises(DataError, match="4 of 10"):
        bad.add(1, "b", "is broken")


def test_no_good_image_is_error():
    bad = BadImages(2, max_bad_share=1.0)
    bad.add(0, "a", "is broken")
    with pytest.raises(DataError, match="none of the 2"):
        bad.add(1, "b", "is broken")
    for index in range(2):  # also for callers that did not see the first error
        with pytest.raises(DataError, match="none of the 2"):
            bad.next_good(index)
