"""Facts about the processor, as Linux lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdino import environment

XEON = """\
processor\t: 0
model name\t: Some Xeon
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile
processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        (XEON, "Some Xeon", "amx_bf16, avx512_bf16, avx512f, avx2"),
        ("model name : Old\nflags : fpu avx2 not_avx512f\n", "Old", "avx2"),
    ],
)
def test_processor_has_a_name_and_features(monkeypatch, text, name, features):
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: text)
    assert (environment.processor(), environment.processor_features()) == (name, features)


def test_processor_is_described_without_linux(monkeypatch):
    def refuse(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert environment.processor()
    assert environment.processor_features() == "unknown"
