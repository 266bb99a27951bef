"""fastdino.data.rgb_conversion: every image mode as RGB, the same in all loaders and commands."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence, TiffImagePlugin

from fastdino.data.image_files import DEEP, PAGED, Conversion, Header, quiet_pillow, read_header
from fastdino.data.rgb_conversion import deep_warning, is_deep, to_rgb
from tests.loaders import all_loaders, assert_same, photo, scan_images

SCALE = Conversion(image_range="scale")
GRAY16 = np.array([[0, 128, 129, 255, 256, 4095, 32768, 65535]], np.uint16)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def levels(data, conversion=SCALE):
    """Return the first row of a picture, which must be gray."""
    with quiet_pillow():
        pixels = np.asarray(conversion.decode(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def tiff(values, **tags):
    """Encode values as a TIFF with further tags, given by name."""
    image, info = Image.fromarray(np.asarray(values)), TiffImagePlugin.ImageFileDirectory_v2()
    numbers = {"smallest": (340, 12), "largest": (341, 12), "photometric": (262, 3)}
    for name, value in tags.items():
        number, kind = numbers[name]
        info.tagtype[number] = kind
        info[number] = value
    return encoded(image, "TIFF", tiffinfo=info)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_gray_is_clipped_as_by_the_papers_loader_or_divided_by_257(form):
    options = {"irreversible": False} if form == "JPEG2000" else {}
    data = encoded(Image.fromarray(GRAY16), form, **options)
    assert levels(data, Conversion()) == [0, 128, 129, 255, 255, 255, 255, 255]
    assert levels(data) == [round(value / 257) for value in GRAY16[0].tolist()]
    assert levels(data)[1:3] == [0, 1]


def test_every_16_bit_value_is_rounded_to_the_nearest_level():
    values = np.arange(65536, dtype=np.uint16)[None]
    with Image.open(io.BytesIO(encoded(Image.fromarray(values), "PNG"))) as image:
        scaled = np.asarray(to_rgb(image, "scale"))[0, :, 0]
    assert np.array_equal(scaled, (np.arange(65536) + 128) // 257)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(np.array([[-1, 0, 0.25, 1, 2]], np.float32)), [0, 0, 64, 255, 255]),
        (tiff(np.array([[np.nan, np.inf, -np.inf]], np.float32)), [0, 255, 0]),
        (tiff(np.array([[-1, 0, 3]], np.float32), smallest=-1.0, largest=3.0), [0, 64, 255]),
        # Tags that state no range.
        (tiff(np.array([[0, 1]], np.float32), smallest=2.0, largest=2.0), [0, 255]),
        (tiff(np.array([[0, 1]], np.float32), smallest=0.0, largest=np.inf), [0, 255]),
        (tiff(np.array([[0, 1]], np.float32), largest=9.0), [0, 255]),
        (tiff(GRAY16, smallest=0.0, largest=4095.0), [0, 8, 8, 16, 16, 255, 255, 255]),
        (tiff(GRAY16[:, :2], photometric=0), [255, 255]),  # WhiteIsZero
        (tiff(np.array([[-(2**31), 0, 2**31 - 1]], np.int32)), [0, 128, 255]),
    ],
    ids=str,
)
def test_range_of_floats_and_of_tiff(data, expected):
    assert levels(data) == expected


def test_white_is_zero_is_inverted():
    assert levels(tiff(GRAY16, photometric=0)) == [255 - x for x in levels(tiff(GRAY16))]


def raw_tiff(bits, sample_format, strip, width):
    """Encode one row of a type that Pillow does not write."""
    entries = [
        (256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4),
        (277, 1), (279, len(strip)), (339, sample_format),
    ]  # fmt: skip
    body = b"".join(
        number.to_bytes(2, "little") + b"\4\0" + b"\1\0\0\0" + value.to_bytes(4, "little")
        for number, value in entries
    )
    return b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + body + bytes(4) + strip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (raw_tiff(32, 1, np.array([0, 1 << 31, 2**32 - 1], "<u4").tobytes(), 3), [0, 128, 255]),
        (raw_tiff(16, 2, np.array([-(1 << 15), 0, 32767], "<i2").tobytes(), 3), [0, 128, 255]),
        (raw_tiff(12, 1, bytes([0xFF, 0xF0, 0x00]), 2), [255, 0]),
    ],
    ids=["32 bits, unsigned", "16 bits, signed", "12 bits"],
)
def test_integers_have_the_range_of_their_type(data, expected):
    assert levels(data) == expected


SHALLOW = {
    "1": lambda image: image.convert("1"),
    "L": lambda image: image.convert("L"),
    "P": lambda image: image.quantize(16),
    "LA": lambda image: image.convert("LA"),
    "RGBA": lambda image: Image.merge("RGBA", (*image.split(), image.convert("L"))),
    "CMYK": lambda image: image.convert("CMYK"),
}


@pytest.mark.parametrize("mode", SHALLOW)
def test_other_modes_do_not_depend_on_the_image_range(mode):
    image = SHALLOW[mode](photo(1))
    form, options = ("TIFF", {}) if mode == "CMYK" else ("PNG", {})
    data = encoded(image, form, **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        assert not is_deep(opened)
        expected = np.asarray(opened.convert("RGB"))
    for conversion in (Conversion(), SCALE):
        assert np.array_equal(np.asarray(conversion.decode(data)), expected)
    if mode == "1":
        assert set(np.unique(expected)) == {0, 255}
    if mode in ("LA", "RGBA"):  # the colors under transparent pixels
        opaque = image.convert("L" if mode == "LA" else "RGB").convert("RGB")
        assert np.array_equal(expected, np.asarray(opaque))


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255, 10])])
def test_a_palette_with_transparency_has_the_palettes_colors(transparency):
    image = photo(1).quantize(16)
    data = encoded(image, "PNG", transparency=transparency)
    with quiet_pillow():
        decoded = np.asarray(SCALE.decode(data))
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_16_bits_per_channel_of_rgb_keep_the_high_byte(tmp_path):
    high = np.asarray(photo(1))
    stored = raw_rgb16_png(high)
    for conversion in (Conversion(), SCALE):
        assert np.array_equal(np.asarray(conversion.decode(stored)), high)
    (tmp_path / "a.png").write_bytes(stored)
    assert read_header(str(tmp_path / "a.png")) == Header(75, 100)


def raw_rgb16_png(high):
    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    height, width = high.shape[:2]
    wide = (high.astype(np.uint16) * 256 + 77).astype(">u2").reshape(height, -1).view(np.uint8)
    rows = np.concatenate((np.zeros((height, 1), np.uint8), wide), axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("form", ["TIFF", "GIF", "PNG", "WEBP"])
@pytest.mark.parametrize("pages", [1, 3])
def test_the_first_page_or_frame_is_used_and_counted(tmp_path, form, pages):
    pictures = [photo(n) for n in range(pages)]
    path = tmp_path / f"a.{form.lower()}"
    options = {"lossless": True} if form == "WEBP" else {}
    pictures[0].save(path, form, save_all=True, append_images=pictures[1:], **options)
    with Image.open(path) as image:
        first = np.asarray(next(iter(ImageSequence.Iterator(image))).convert("RGB"))
    assert np.array_equal(np.asarray(Conversion().read(path)), first)
    header = read_header(str(path))
    assert isinstance(header, Header)
    assert bool(header.traits & PAGED) == (pages > 1)
    notes = scan_images(tmp_path).notes
    said = "1 images have several pages or frames: the first one is used"
    assert notes == ((said,) if pages > 1 else ())


def test_previews_of_a_camera_are_no_pages(tmp_path):
    photo(1).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photo(2)])
    assert read_header(str(tmp_path / "a.jpg")) == Header(75, 100)


@pytest.fixture
def deep_folder(tmp_path):
    """Two deep images of different formats among four."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        photo(1).save(tmp_path / name)
    Image.fromarray(rng.integers(0, 65536, (60, 60), np.uint16)).save(tmp_path / "c.png")
    Image.fromarray(rng.random((60, 60), np.float32)).save(tmp_path / "d.tif")
    return tmp_path


def test_deep_images_are_counted_and_warned_of_once(deep_folder, tmp_path):
    assert read_header(str(deep_folder / "d.tif")) == Header(60, 60, DEEP)
    cache = tmp_path / "images.npz"
    for _ in range(2):  # also from the cache
        dataset = scan_images(deep_folder, cache=cache)
        assert dataset.deep == 2
        assert "2 of 4 images" in dataset.warning
        assert "--image_range scale" in dataset.warning
    assert scan_images(deep_folder, conversion=SCALE).warning is None
    assert deep_warning(0, 4, "clip") is None


@all_loaders
@pytest.mark.parametrize("image_range", ["clip", "scale"])
def test_loaders_agree_on_deep_images(deep_folder, build, crops, image_range):
    dataset = scan_images(deep_folder, conversion=Conversion(image_range=image_range))
    batch = next(iter(build(dataset, crops=crops).epoch(0)))
    for name in deep_folder.iterdir():  # as if 8-bit images had been stored
        if name.suffix in (".png", ".tif"):
            picture = dataset.conversion.read(name)
            name.unlink()
            picture.save(deep_folder / f"{name.stem}.png")
    shallow = scan_images(deep_folder)
    assert shallow.deep == 0
    expected = next(iter(build(shallow, crops=crops).epoch(0)))
    assert_same([batch], [expected])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_conversion_gives_no_warning(mode):
    values = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(np.full((3, 3), 7, values))
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_rgb(image, "scale").mode == "RGB"
