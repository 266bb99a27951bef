"""fastdino.file_names: names survive from scan to picture, JSON, log and features in any locale.

The commands run in subprocesses, because the encodings are fixed when Python starts.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.file_names import as_path, as_text, decode_lines, texts_in

# Chinese, combining and precomposed accents, emoji, Arabic, bytes that are no UTF-8, control
# characters, a line separator, mathtext and shell characters.
STEMS = [
    "中文", "été", "e\u0301te\u0301", "😀", "مرحبا", b"bad\xff\xfe", "new\nline", "esc\x1b[2J",
    "line\u2028separator", "$a_b$ {c} 'd'",
]  # fmt: skip
CLASSES = ["猫", b"dog\xe9"]
ASCII = {
    "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
}  # fmt: skip
ROOT = Path(__file__).parents[1]

# Runs the commands one after the other, and prints their exit statuses.
SCRIPT = """
import json, os, sys
import numpy as np
from fastdino import cli
from fastdino.data import scan_images

print(sys.getfilesystemencoding(), file=sys.stderr)
root = sys.argv[1]
net = "--arch vit_nano --patch_size 8 --device cpu".split()
few = [*net, "--num_workers", "0", "--batch_size_per_gpu", "4"]
train = "--epochs 1 --warmup_epochs 0 --out_dim 64 --global_crops_size 16 --local_crops_size 8 "
train += "--local_crops_number 1 --max_bad_share 0.5"
out = os.path.join(root, os.fsdecode(b"out\\xe4\\xb8\\xad\\xff"))
os.mkdir(out)
scored = [*few, "--imsize", "16", "--output"]
lines = {
    "attention": [*net, "--image_path", f"{root}/set/train/" + os.fsdecode(b"\\xe7\\x8c\\xab"),
                  "--image_size", "16", "--output_dir", f"{out}/attention"],
    "jaccard": [*net, "--data_path", f"{root}/voc", "--image_size", "16", "--output_dir", out],
    "knn": [*few, "--data_path", f"{root}/set", "--resize", "24", "--crop", "16", "--nb_knn", "3",
            "--output", f"{out}/knn.json", "--dump_features", f"{out}/features"],
    "train": [*few, *train.split(), "--data_path", f"{root}/list.txt", "--output_dir",
              f"{out}/run"],
    "video": [*net, "--input_path", f"{root}/set/train/{os.fsdecode(b'dog' + bytes([0xe9]))}",
              "--output_path", f"{out}/video.mkv"],
    "davis": [*net, "--data_path", f"{root}/davis", "--size", "64", "--output_dir",
              f"{out}/davis"],
    "copydays": [*scored, f"{out}/copydays.json", "--data_path", f"{root}/copydays"],
    "retrieval": [*scored, f"{out}/retrieval.json", "--data_path", root, "--dataset", "roxford5k"],
}
lines["resume"] = [*lines["train"], "--epochs", "2"]
names = {"jaccard": "attention", "resume": "train"}
status = {name: cli.main([names.get(name, name), *line]) for name, line in lines.items()}
tar = scan_images(f"{root}/a.tar")
with open(os.path.join(out, "status.json"), "w") as file:
    read = [tar.read_rgb(i).size for i in range(len(tar))]
    members = [name.encode("utf-8", "surrogateescape").hex() for name in tar.manifest.members]
    json.dump({"status": status, "tar": members, "read": read, "classes": tar.classes}, file)
"""


def raw(name):
    return name if isinstance(name, bytes) else name.encode()


def write_picture(path, *, size=(48, 40), mode="RGB", form="PNG"):
    """Write a picture of noise to a path of bytes; return its encoding."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = io.BytesIO()
    noise = np.random.default_rng(len(path)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, form)
    with open(path, "wb") as target:
        target.write(file.getvalue())
    return file.getvalue()


def write_masks(root):
    """Write a dataset in PASCAL VOC's layout, and one in DAVIS's."""
    mask = np.zeros((64, 96), np.uint8)
    mask[8:40, 8:40] = 1
    mask_file = io.BytesIO()
    Image.fromarray(mask).save(mask_file, "PNG")
    voc, davis = os.path.join(root, b"voc"), os.path.join(root, b"davis")
    listed, sequences = [], []
    targets = []
    for stem in (raw("中文"), b"bad\xff"):
        write_picture(os.path.join(voc, b"JPEGImages", stem + b".jpg"), size=(96, 64))
        targets.append(os.path.join(voc, b"SegmentationClass", stem + b".png"))
        listed.append(stem)
        for time in range(3):
            frame = os.path.join(b"480p", stem, b"%d" % time)
            write_picture(os.path.join(davis, b"JPEGImages", frame + b".jpg"), size=(96, 64))
            targets.append(os.path.join(davis, b"Annotations", frame + b".png"))
        sequences.append(stem)
    lists = {
        os.path.join(voc, b"ImageSets/Segmentation/val.txt"): b"\xef\xbb\xbf" + b"\n".join(listed),
        os.path.join(davis, b"ImageSets/2017/val.txt"): b"\r\n".join(sequences) + b"\r\n",
    }
    for path, content in {**dict.fromkeys(targets, mask_file.getvalue()), **lists}.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(content)


def write_datasets(root):
    """Write images of every name in each layout; one image is broken."""
    paths = [
        os.path.join(root, b"set", split, raw(cls), raw(stem) + b".png")
        for split in (b"train", b"val")
        for cls in CLASSES
        for stem in STEMS
    ]
    with tarfile.open(os.path.join(root, b"a.tar"), "w", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            data = write_picture(path)
            member = tarfile.TarInfo(os.fsdecode(os.path.relpath(path, root)))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    broken = os.path.join(root, b"set", b"train", raw("猫"), raw("坏") + b"\xff.png")
    Path(os.fsdecode(broken)).write_text("no image")
    listed = [os.path.relpath(path, root) for path in paths if b"\n" not in path]
    Path(os.fsdecode(root), "list.txt").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(listed))
    write_masks(root)
    for folder, name in ((b"original", "2000é"), (b"strong", "2000中"), (b"crops/50", "2000é")):
        write_picture(os.path.join(root, b"copydays", folder, raw(name) + b".jpg"))
    for name in ("中文", "été", "q😀"):
        write_picture(os.path.join(root, b"roxford5k/jpg", raw(name) + b".jpg"))
    marks = [{"easy": [0], "hard": [], "junk": []}]
    truth = {"imlist": ["中文", "été"], "qimlist": ["q😀"], "gnd": marks}
    Path(os.fsdecode(root), "roxford5k/gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))


@pytest.fixture(scope="module", params=["utf-8", "ascii"])
def outputs(request, tmp_path_factory):
    """Run all commands in a locale; return the encoding, the datasets, and the output folder."""
    root = tmp_path_factory.mktemp("names")
    write_datasets(os.fsencode(root))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1"}
    env |= ASCII if request.param == "ascii" else {}
    command = [sys.executable, "-W", "error:Glyph:UserWarning", "-c", SCRIPT, str(root)]
    done = subprocess.run(command, env=env, capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert done.stderr.startswith(request.param.encode())
    return root, Path(os.fsdecode(os.fsencode(root) + b"/out\xe4\xb8\xad\xff")), done


def report(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


@pytest.mark.skipif(os.fsencode("é") != "é".encode(), reason="needs a UTF-8 locale")
def test_every_command_keeps_the_names(outputs):
    _, out, _ = outputs
    status = report(out, "status.json")
    assert set(status["status"].values()) == {0}
    # The names in JSON are those of the files, from which they can be opened again.
    attention = report(out, "attention/attention.json")
    assert len(attention["images"]) == len(STEMS)
    for image in attention["images"]:
        assert Path(image["image"]).is_file()
        assert all((out / "attention" / name).is_file() for name in image["files"])
    names = {os.fsencode(image["image"]).split(b"/")[-1] for image in attention["images"]}
    assert names == {raw(stem) + b".png" for stem in STEMS}
    (broken,) = attention["skipped"]
    assert os.fsencode(broken).endswith(raw("坏") + b"\xff.png")
    jaccard = report(out, "jaccard.json")
    stems = {os.fsencode(Path(name).stem) for name in jaccard["per_image"]}
    assert stems == {raw("中文"), b"bad\xff"}
    davis = report(out, "davis/davis.json")
    assert {os.fsencode(name) for name in davis["sequences"]} == {raw("中文"), b"bad\xff"}
    assert davis["left_out"] == {}
    assert (out / "davis/中文/2.png").is_file()
    assert report(out, "video.json")["frames"] == len(STEMS)
    assert os.fsencode(report(out, "video.json")["output_path"]) == os.fsencode(out / "video.mkv")


@pytest.mark.skipif(os.fsencode("é") != "é".encode(), reason="needs a UTF-8 locale")
def test_every_image_is_read(outputs):
    _, out, _ = outputs
    number = len(STEMS) * len(CLASSES)
    assert report(out, "knn.json")["images"] == {"train": number, "val": number}
    for name in ("trainfeat", "testfeat"):
        features = torch.load(out / f"features/{name}.pth", weights_only=True)
        assert len(features) == number
        assert features.any(dim=1).all()
    assert report(out, "copydays.json")["images"] == {"original": 1}
    assert report(out, "copydays.json")["blocks"]["strong"]["copies"] == 1
    assert report(out, "retrieval.json")["images"] == {"queries": 1, "database": 2}
    status = report(out, "status.json")
    assert status["read"] == [[48, 40]] * 2 * number
    members = {bytes.fromhex(name).split(b"/")[-1] for name in status["tar"]}
    assert members == {raw(stem) + b".png" for stem in STEMS}


@pytest.mark.skipif(os.fsencode("é") != "é".encode(), reason="needs a UTF-8 locale")
def test_training_reads_a_list_and_resumes(outputs):
    root, out, done = outputs
    config = report(out, "run/config.json")["config"]
    assert config["data_path"] == f"{root}/list.txt"
    assert Path(config["output_dir"]) == out / "run"
    log = [json.loads(line) for line in (out / "run/log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    listed = 2 * len(CLASSES) * (len(STEMS) - 1)
    assert f"{listed} images (0 skipped)".encode() in done.stdout
    assert b"resumed " in done.stdout
    assert b"is outdated" not in done.stdout, "the cache of the scan has the same names"
    assert b"resuming with other images" not in done.stderr


@pytest.mark.skipif(os.fsencode("é") != "é".encode(), reason="needs a UTF-8 locale")
def test_output_for_the_terminal_has_no_control_characters(outputs):
    for stream in (outputs[2].stdout, outputs[2].stderr):
        assert b"\x1b" not in stream
        assert b"Traceback" not in stream


def test_names_convert_both_ways(monkeypatch):
    for name in ("plain", "中文", "bad\udcff", "e\u0301"):
        assert as_path(as_text(name)) == as_text(name) == name
    # In an ASCII locale, os.fsdecode gives surrogates for all bytes of a name.
    escaped = "中文.png".encode().decode("ascii", "surrogateescape")
    assert as_text(escaped) == "中文.png"
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode("ascii", "surrogateescape"))
    assert as_path("中文.png") == escaped
    assert as_path(as_text(escaped)) == escaped
    for alone in ("\ud800", "a\udc00"):  # no byte, as JSON can hold it
        assert as_text(alone) == as_path(alone) == alone


def test_texts_in_converts_strings_and_keys_at_any_depth():
    escaped = "中".encode().decode("ascii", "surrogateescape")
    value = {escaped: [escaped, {"a": (escaped, 1, None, True)}]}
    assert texts_in(value) == {"中": ["中", {"a": ["中", 1, None, True]}]}


def test_lines_are_separated_by_line_breaks_only():
    data = b"\xef\xbb\xbfa\r\nb\rc\nd\xe2\x80\xa8e\x0cf \xff"
    assert decode_lines(data) == ["a", "b", "c", "d\u2028e\x0cf \udcff"]
    assert decode_lines(b"") == [""]
