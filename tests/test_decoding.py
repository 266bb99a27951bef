"""fastdino.data.decoding and dali_decoding: every decoder gives Pillow's images and errors."""

from __future__ import annotations

import importlib
import io
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.data.bad_images import BadImages
from fastdino.data.decoding import PictureReader, is_one_whole_jpeg
from fastdino.data.image_dataset import scan_images
from fastdino.data.image_files import Conversion
from fastdino.errors import DataError
from fastdino.runtime import choose_decode
from tests.loaders import needs_dali, odd_folder, photo


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def thumbnailed(image):
    """A JPEG with another in its EXIF, as cameras write it."""
    small = encoded(image.resize((16, 12)))
    return encoded(image, exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0" + small)


GOOD = {
    "4:4:4": encoded(photo(0), quality=95, subsampling=0),
    "4:2:2": encoded(photo(1, (33, 47)), subsampling=1),
    "4:2:0": encoded(photo(2, (50, 37)), subsampling=2),
    "progressive": encoded(photo(3), progressive=True),
    "restarts": encoded(photo(4), restart_marker_blocks=2),
    "gray": encoded(photo(5).convert("L")),
    "RGB": encoded(photo(6), keep_rgb=True),
    "a pixel": encoded(photo(7, (1, 1))),
    "a row": encoded(photo(8, (300, 1))),
    "quality 1": encoded(photo(9), quality=1),
    "thumbnail": thumbnailed(photo(10)),
    "profile": encoded(photo(11), icc_profile=bytes(range(256)) * 9),
}
ODD = {
    "cut": GOOD["4:2:0"][:-40],
    "cut at the end marker": GOOD["4:2:0"][:-2],
    "cut, with an end marker": GOOD["4:2:0"][:-300] + b"\xff\xd9",
    "progressive, cut": GOOD["progressive"][:-40],
    "a marker inside": GOOD["4:4:4"][:-400] + b"\xff\xdb" + GOOD["4:4:4"][-398:],
    "trailing bytes": GOOD["gray"] + bytes(30),
    "two JPEGs": GOOD["gray"] + GOOD["4:2:2"],
    "CMYK": encoded(photo(1).convert("CMYK")),
    "PNG": encoded(photo(1), "PNG"),
    "first bytes only": b"\xff\xd8\xff",
    "text": b"no image at all",
    "empty": b"",
}


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def damaged(count):
    """Yield JPEGs of several kinds with bytes changed, deleted or inserted between both ends."""
    rng = np.random.default_rng(0)
    sound = [encoded(photo(n, (40, 30)), progressive=n % 2, subsampling=n % 3) for n in range(6)]
    for n in range(count):
        data = bytearray(sound[n % len(sound)])
        for i in rng.integers(200, len(data) - 300, 1 + n % 3).tolist():
            kind = rng.integers(4)
            if kind == 0:
                data[i] = rng.integers(256)
            elif kind == 1:
                data[i] = 0xFF
            elif kind == 2:
                del data[i : i + int(rng.integers(1, 200))]
            else:
                data[i:i] = rng.bytes(9)
        yield bytes(data)


class Files:
    """An in-memory stand-in for ImageDataset."""

    def __init__(self, files, exif=False):
        self.files, self.conversion = list(files), Conversion(exif=exif)

    def path(self, index):
        return str(index)

    def read_bytes(self, index):
        return self.files[index]


class Refusing:
    """A decoder that refuses some files and records all it was given."""

    name = "refusing"

    def __init__(self, refused=()):
        self.refused, self.given = list(refused), []

    def decode(self, files):
        self.given += files
        return [None if data in self.refused else pixels(data) for data in files]


@pytest.fixture
def dali_decoder():
    """Build DaliDecoders, closed at the end of the test."""
    made = []

    def make(batch_size=8, threads=2):
        module = importlib.import_module("fastdino.data.dali_decoding")
        made.append(module.DaliDecoder(batch_size, threads))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def read_all(dataset, decoder, batch=8):
    """Read all samples in order, twice: indices, images and skipped files."""
    bad = BadImages(len(dataset.files), 1.0)
    with ThreadPoolExecutor(2) as pool:
        reader = PictureReader(dataset, bad, pool, decoder)
        places = range(len(dataset.files))
        parts = [reader.read(places[n : n + batch]) for n in places[::batch]]
        assert [reader.read(places[n : n + batch])[0] for n in places[::batch]] == [
            indices for indices, _ in parts
        ]
    indices, pictures = zip(*parts, strict=True)
    return [*itertools.chain(*indices)], [*itertools.chain(*pictures)], bad.skipped


def assert_same_reading(ours, theirs):
    assert ours[0] == theirs[0]
    for index, a, b in zip(ours[0], ours[1], theirs[1], strict=True):
        assert np.array_equal(a, b), index
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("name", GOOD)
def test_complete_jpegs_are_recognized(name):
    assert is_one_whole_jpeg(GOOD[name])
    for end in range(len(GOOD[name])):
        assert not is_one_whole_jpeg(GOOD[name][:end])


@pytest.mark.parametrize(
    "name", [name for name in ODD if name not in ("CMYK", "cut, with an end marker")]
)
def test_other_data_is_not_a_complete_jpeg(name):
    assert not is_one_whole_jpeg(ODD[name])


def test_decoder_gets_only_complete_jpegs():
    files = [*GOOD.values(), *ODD.values()]
    decoder = Refusing()
    read_all(Files(files), decoder)
    assert set(decoder.given) == {*GOOD.values(), ODD["cut, with an end marker"]}


def test_pillow_decodes_images_that_exif_rotates():
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(photo(0), exif=exif), GOOD["4:4:4"]]
    for rotate, given in ((False, files), (True, files[1:])):
        decoder = Refusing()
        _, (picture, _), _ = read_all(Files(files, exif=rotate), decoder)
        assert picture.shape == ((100, 75, 3) if rotate else (75, 100, 3))
        assert [data for data in files if data in decoder.given] == given


def test_refused_files_are_decoded_by_pillow_from_then_on():
    files = [*GOOD.values(), *damaged(20)]
    refused = [GOOD["gray"], GOOD["4:2:0"], *files[len(GOOD) :]]
    decoder = Refusing(refused)
    ours = read_all(Files(files), decoder)
    assert_same_reading(ours, read_all(Files(files), None))
    # read_all reads everything twice.
    assert decoder.given.count(GOOD["gray"]) == decoder.given.count(GOOD["4:2:0"]) == 1
    assert decoder.given.count(GOOD["4:2:2"]) == 2


def test_replacement_is_decoded_by_the_decoder():
    broken = next(data for data in damaged(99) if is_one_whole_jpeg(data) and not opens(data))
    files = [broken, broken, GOOD["4:4:4"], GOOD["gray"]]
    decoder = Refusing([broken])
    indices, pictures, skipped = read_all(Files(files), decoder)
    assert indices == [2, 2, 2, 3]
    assert set(skipped) == {"0", "1"}
    assert np.array_equal(pictures[0], pixels(GOOD["4:4:4"]))


def opens(data):
    try:
        return pixels(data) is not None
    except OSError:
        return False


def test_only_unreadable_files_is_an_error():
    with pytest.raises(DataError, match="none of the 3 images"):
        read_all(Files([ODD["cut"], ODD["text"], ODD["empty"]]), Refusing())


@needs_dali
def test_dali_decodes_to_the_pixels_of_pillow(dali_decoder):
    pictures = dali_decoder(len(GOOD)).decode(list(GOOD.values()))
    for name, picture in zip(GOOD, pictures, strict=True):
        assert np.array_equal(picture, pixels(GOOD[name])), name


@needs_dali
def test_refused_file_does_not_affect_its_batch(dali_decoder):
    good, cut = GOOD["4:2:0"], ODD["cut"]
    decoder = dali_decoder()
    for files in ([good, cut, good], [cut], [cut] * 8, [good] * 7 + [cut], [good] * 8):
        pictures = decoder.decode(files)
        assert [picture is None for picture in pictures] == [data is cut for data in files]
        assert all(np.array_equal(p, pixels(good)) for p in pictures if p is not None)


@needs_dali
def test_held_images_of_dali_do_not_change(dali_decoder):
    decoder = dali_decoder()
    files = list(GOOD.values())[:8]
    kept = [decoder.decode(files) for _ in range(5)]
    for _ in range(5):
        decoder.decode([ODD["cut, with an end marker"]] * 8)
    decoder.close()
    for pictures in kept:
        assert all(np.array_equal(p, pixels(f)) for p, f in zip(pictures, files, strict=True))


@needs_dali
def test_closed_decoder_has_no_threads():
    module = importlib.import_module("fastdino.data.dali_decoding")

    def threads():
        return len(os.listdir("/proc/self/task"))

    before = threads()
    decoder = module.DaliDecoder(4, 3)
    decoder.decode([ODD["cut"], GOOD["gray"]])
    assert threads() > before
    decoder.close()
    decoder.close()
    assert threads() == before


@needs_dali
def test_cuda_error_is_not_a_refused_file(dali_decoder, monkeypatch):
    decoder = dali_decoder()

    def fail(files):
        raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2)\nStacktrace ...")

    monkeypatch.setattr(decoder, "_run", fail)
    with pytest.raises(RuntimeError, match="MemoryAllocation"):
        decoder.decode([GOOD["gray"]])


@needs_dali
def test_damaged_files_are_accepted_or_refused_as_by_pillow(dali_decoder):
    files = [*GOOD.values(), *ODD.values(), *damaged(150)]
    theirs = read_all(Files(files), None)
    assert_same_reading(read_all(Files(files), dali_decoder()), theirs)
    assert 20 < len(theirs[2]) < 120


@needs_dali
def test_unusual_formats_give_the_images_of_pillow(dali_decoder, tmp_path):
    paths = sorted(odd_folder(tmp_path).iterdir())
    (tmp_path / "k" / "huge.png").unlink()
    exact = scan_images(tmp_path)
    for exif in (False, True):
        dataset = scan_images(tmp_path, conversion=Conversion(exif=exif))
        bad = BadImages(len(dataset), 0.0)
        with ThreadPoolExecutor(2) as pool:
            reader = PictureReader(dataset, bad, pool, dali_decoder(32))
            _, pictures = reader.read(range(len(dataset)))
        for n, picture in enumerate(pictures):
            assert np.array_equal(picture, np.asarray(dataset.read_rgb(n))), dataset.paths[n]
    assert len(exact) == len(paths) - 1


@needs_dali
def test_dali_with_different_pixels_is_not_chosen(monkeypatch):
    module = importlib.import_module("fastdino.data.dali_decoding")
    module.cpu_problem.cache_clear()
    real = module.DaliDecoder._run
    with monkeypatch.context() as patch:
        patch.setattr(
            module.DaliDecoder, "_run", lambda self, files: [p ^ 1 for p in real(self, files)]
        )
        choice = choose_decode("auto", "fused", "cpu")
    module.cpu_problem.cache_clear()
    assert choice.value == "pillow"
    assert "to different pixels" in choice.reason
    assert choose_decode("auto", "fused", "cpu").value == "cpu"


@pytest.mark.gpu
@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nvjpeg_is_close_to_pillow_and_refuses_single_files():
    module = importlib.import_module("fastdino.data.dali_decoding")
    stream = torch.cuda.Stream()
    decoder = module.DaliDecoder(16, 4, stream=stream)
    files = [*GOOD.values(), ODD["cut"]]
    pictures = decoder.decode(files)
    stream.synchronize()
    for name, picture in zip(GOOD, pictures, strict=False):
        assert picture.is_cuda
        gap = np.abs(picture.cpu().numpy().astype(int) - pixels(GOOD[name]))
        assert gap.mean() < 1, name
    decoder.close()
