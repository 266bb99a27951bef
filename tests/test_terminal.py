"""fastdino.terminal: names in messages cannot control the terminal."""

import pytest

from fastdino.terminal import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a photo, Zo\u00eb \u732b.jpg", "a photo, Zo\u00eb \u732b.jpg"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nwarning: b\r", "a\\nwarning: b\\r"),
        ("\udcff\x07\u202e\u2028", "\\udcff\\x07\\u202e\\u2028"),
    ],
)
def test_only_characters_that_print_remain(text, expected):
    assert printable(text) == expected
