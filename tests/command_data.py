"""Small datasets of all evaluation commands, as they are, turned by EXIF, and with 16 bits."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdino.evals import knn
from tests.commands import make_gray, write_colours
from tests.test_copydays import write as write_copy
from tests.test_davis import write_list, write_sequence


def smooth(seed: int, size: tuple[int, int]) -> Image.Image:
    """Return a picture of smooth colors, [width, height]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_masked(root: Path) -> None:
    """Write images with masks in the layout of `fastdino shapes`."""
    for split, seeds in (("train", (1, 2)), ("val", (3, 4, 5))):
        for seed in seeds:
            image, mask = root / split / "a" / f"{seed}.png", np.zeros((40, 48), np.uint8)
            image.parent.mkdir(parents=True, exist_ok=True)
            smooth(seed, (48, 40)).save(image)
            mask[8 : 8 + 5 * seed, 8:32] = 255
            path = root / "masks" / split / "a" / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)


def write_davis(root: Path) -> None:
    write_sequence(root, "two", {1: (8, 6, 20), 2: (30, 34, 22)}, frames=5)
    write_sequence(root, "one", {1: (16, 16, 30)}, frames=4)
    write_list(root, "2017", ["two"])
    write_list(root, "2017", ["one"], "train")
    write_list(root, "2016", ["two"])


def write_retrieval(root: Path, dataset: str, seed: int) -> None:
    """Write 12 database images and 3 queries with random relevance."""
    rng = np.random.default_rng(seed)
    jpg = root / dataset / "jpg"
    jpg.mkdir(parents=True)
    names = [str(i) for i in range(12)]
    for i, name in enumerate([*names, "q0", "q1", "q2"]):
        smooth(100 * seed + i, (64, 48) if i % 2 else (48, 64)).save(jpg / f"{name}.jpg")
    marks = []
    for order in (rng.permutation(12).tolist() for _ in range(3)):
        marks.append({"easy": order[:2], "hard": order[2:4], "junk": order[4:6]})
        marks[-1]["bbx"] = [4.0, 4.0, 36.0, 28.0]
    truth = {"imlist": names, "qimlist": ["q0", "q1", "q2"], "gnd": marks}
    (root / dataset / f"gnd_{dataset}.pkl").write_bytes(pickle.dumps(truth))


def write_copydays(root: Path) -> None:
    for i in range(6):
        write_copy(root / "original" / f"20{i:02}00.jpg", i)
        write_copy(root / "crops" / "50" / f"20{i:02}00.jpg", i, noise=60)
        write_copy(root / "strong" / f"20{i:02}01.jpg", i, noise=120)


def write_features(folder: Path) -> None:
    """Write feature files of 8 classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 6, generator=generator)
    tensors = {}
    for name, number in (("train", 150), ("test", 60)):
        labels = torch.arange(number) % 8
        features = centers[labels] + 1.6 * torch.randn(number, 6, generator=generator)
        tensors[f"{name}feat"] = torch.nn.functional.normalize(features, dim=1)
        tensors[f"{name}labels"] = labels
    knn.dump_features(folder, tensors)


def write_all(root: Path) -> dict[str, str]:
    """Write the data of all commands; return the folders by name."""
    write_colours(root / "colours")
    (root / "pictures").mkdir()
    for i in range(2):
        smooth(i, (61, 45)).save(root / "pictures" / f"{i}.png")
    (root / "frames").mkdir()
    for i in range(5):
        smooth(10 + i, (50, 33)).save(root / "frames" / f"{i}.png")
    write_masked(root / "masked")
    write_davis(root / "davis")
    write_retrieval(root / "retrieval", "rparis6k", 1)
    write_retrieval(root / "retrieval", "roxford5k", 2)
    write_copydays(root / "copydays")
    for name, seed in (("distractors", 100), ("whitening", 200)):
        for i in range(12):
            write_copy(root / name / f"{i}.jpg", seed + i)
    write_features(root / "features")
    for path in list(root.iterdir()):
        _write_turned(path, root / f"{path.name}-turned")
        _write_deep(path, root / f"{path.name}-deep")
        shutil.copytree(path, root / f"{path.name}-moved")
        _brighten(root / f"{path.name}-moved")
    with open(root / "features.npz", "wb") as file:
        np.savez(file, cls=np.zeros((2, 3)))
    places = {path.name: str(path) for path in root.iterdir()}
    return places | {"old features": places["features.npz"]}


def write_weights(folder: Path, nano_weights: Path) -> dict[str, str]:
    """Write weight files of vit_nano, and linear classifiers of three classes, by name."""
    folder.mkdir()
    state = torch.load(nano_weights, weights_only=True)
    other = {name: tensor.roll(1, -1) for name, tensor in state.items()}
    both = {"teacher": state, "student": other}
    contents = {"nano": state, "other": other, "both": both}
    for name, seed in (("classifier", 0), ("other classifier", 1)):
        weight = torch.randn(3, 96, generator=torch.Generator().manual_seed(seed))
        tensors = {"module.linear.weight": weight, "module.linear.bias": torch.zeros(3)}
        contents[name] = {"state_dict": tensors}
    paths = {name: folder / f"{name.replace(' ', '-')}.pth" for name in contents}
    for name, path in paths.items():
        torch.save(contents[name], path)
    return {name: str(path) for name, path in paths.items()}


def _pictures(root: Path) -> list[Path]:
    masks = {"masks", "Annotations"}
    return [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in (".png", ".jpg") and not masks & set(path.parts)
    ]


def _write_turned(source: Path, target: Path) -> None:
    """Copy a folder; every other image is to be turned by its EXIF orientation."""
    shutil.copytree(source, target)
    for path in _pictures(target)[::2]:
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 3  # half a turn, so that frames keep their size
            image.convert("RGB").save(path, format="PNG", exif=exif)


def _write_deep(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    make_gray(*_pictures(target), deep=True)


def _brighten(root: Path) -> None:
    """Change the pixels of a folder's images."""
    for path in _pictures(root):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        Image.fromarray(255 - pixels // 2).save(path, format="PNG")
