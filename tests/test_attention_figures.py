"""Pictures of attention: colors, masks, and the sheet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import colormaps, rcParams
from PIL import Image

from fastdino.evals.attention_figures import (
    CELL,
    DIMMED,
    DPI,
    TINT,
    draw_attention,
    drawable,
    heads_picture,
    map_picture,
    mask_picture,
    overlay_picture,
)


def color(value):
    return [int(c) for c in colormaps["inferno"](float(value), bytes=True)[:3]]


def test_map_picture_colors_blocks_from_minimum_to_maximum():
    map_ = torch.tensor([[2.0, 3.0, 4.0], [6.0, 5.0, 2.0]]) / 100
    picture = map_picture(map_, (8, 12))
    assert (picture.shape, picture.dtype) == ((8, 12, 3), np.uint8)
    assert picture[0, 0].tolist() == picture[7, 11].tolist() == color(0)
    assert picture[4, 3].tolist() == picture[7, 0].tolist() == color(1)
    assert np.abs(picture[3, 8].astype(int) - color(0.5)).max() <= 2
    blocks = picture.reshape(2, 4, 3, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_map_picture_of_a_constant_map_has_one_color():
    picture = map_picture(torch.full((2, 2), 0.25), (4, 4))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1


def test_overlay_mixes_the_image_with_the_map():
    map_ = torch.zeros(4, 4)
    map_[0, 0] = 1
    dark, light = (np.full((16, 16, 3), v, np.uint8) for v in (0, 200))
    over = overlay_picture(dark, map_).astype(int)
    assert over[0, 0].sum() > over[15, 15].sum() + 100
    difference = overlay_picture(light, map_).astype(int) - over
    assert np.abs(difference - 0.4 * 200).max() <= 1


def test_mask_picture_is_tinted_inside_and_dark_outside():
    pixels = np.full((8, 8, 3), (50, 100, 150), np.uint8)
    mask = torch.tensor([[True, False], [False, False]])
    for head in (0, 1):
        picture = mask_picture(pixels, mask, head)
        assert (picture[4:] == round(100 * DIMMED)).all()
        assert (picture[:4, 4:] == round(100 * DIMMED)).all()
        inside = (1 - TINT) * pixels[0, 0] + 255 * TINT * np.array(colormaps["tab10"](head)[:3])
        assert np.abs(picture[:4, :4] - inside).max() <= 0.51


def test_heads_picture_has_tiles_row_by_row():
    maps = torch.zeros(5, 2, 2)
    maps[4, 1, 1] = 1
    picture = heads_picture(maps, (20, 31))
    assert picture.shape == (20, 31, 3)
    bright = np.argwhere((picture == color(1)).all(2))
    assert bright.min(0).tolist() == [15, 15]  # 2 rows of 3 tiles of 10 x 10
    assert bright.max(0).tolist() == [19, 19]
    assert heads_picture(maps, (1, 1)).shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sheet_has_a_column_per_map_and_a_row_per_picture_and_its_masks(tmp_path, dtype):
    rng = np.random.default_rng(0)

    def draw(rows, heads, threshold=None):
        pixels = rng.integers(0, 256, (rows, 32, 48, 3), dtype=np.uint8)
        pictures = [Image.fromarray(image) for image in pixels]
        path, maps = tmp_path / "sheet.png", torch.rand(rows, heads, 4, 6).to(dtype)
        draw_attention(pictures, maps, path, threshold=threshold, title="100 $ of 100 $")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
            return image.size

    width, height = draw(1, 2)
    column, row = round(CELL * DPI), round(CELL * DPI * 32 / 48)
    assert draw(1, 4) == (width + 2 * column, height)
    assert draw(2, 2) == (width, height + row)
    assert draw(2, 2, threshold=0.6) == (width, height + 3 * row)


def test_sheet_needs_as_many_maps_as_pictures(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        draw_attention([Image.new("RGB", (8, 8))], torch.rand(2, 3, 4, 4), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo, été, مرحبا", "a photo, été, مرحبا"),
        ("中文 🦖", "\\u4e2d\\u6587 \\U0001f996"),
        ("bad\udcff\x1b\n", "bad\\udcff\\x1b\\n"),
    ],
)
def test_characters_without_a_glyph_are_escaped(tmp_path, text, expected):
    assert drawable(text) == expected
    maps = torch.rand(1, 2, 2, 2)
    draw_attention([Image.new("RGB", (16, 16))], maps, tmp_path / "a.png", title=text)  # no warning


def test_a_font_that_has_the_glyphs_is_used(monkeypatch):
    monkeypatch.setitem(rcParams, "font.family", ["DejaVu Sans", "STIXGeneral"])
    assert drawable("\ua727") == "\ua727"
    monkeypatch.setitem(rcParams, "font.family", ["cmr10"])
    assert drawable("é") == "\\xe9"
