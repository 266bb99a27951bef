"""DAVIS as images to train on: the frames of its sequences, each sequence a class.

    JPEGImages/480p/<sequence>/00000.jpg    frames; other folders beside 480p hold larger ones
    ImageSets/2017/train.txt                a split: a sequence's name a line
    ImageSets/480p/train.txt                of DAVIS 2016: a frame's and a mask's path a line

Annotations lie in folders of their own, and are no images to train on.
"""

from __future__ import annotations

from pathlib import Path

from fastdino.data.datasets.data_path import SPLIT_OPTIONS, Found, Place
from fastdino.data.image_files import EXTENSIONS
from fastdino.errors import DataError

RESOLUTION = "480p"
OPTIONS = (*SPLIT_OPTIONS, "resolution")


def is_davis(root: str) -> bool:
    """Whether a folder has DAVIS's layout: folders of frames by resolution."""
    return bool(_resolutions(Path(root)))


def find_davis(place: Place) -> Found:
    """The frames, of a split's sequences where the options name one ("2017/train" or "train").

    Raises: DataError: no such split or resolution, a sequence without frames.
    """
    root = Path(place.path)
    frames = root / "JPEGImages" / _resolution(root, place)
    here = sorted(folder.name for folder in frames.iterdir() if folder.is_dir())
    split = None
    if place.role or place.asked_split():
        split = _split(root, place)
        names = sorted(sequence_names(root / "ImageSets" / f"{split}.txt"))
    else:
        names = here
    missing = [name for name in names if name not in here]
    if missing:
        raise DataError(
            f"--data_path {place.text}: {split} names {len(missing)} sequences that are not in "
            f"{frames}, among them {missing[0]}"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        pictures = [p.name for p in (frames / name).iterdir() if p.suffix.lower() in EXTENSIONS]
        files += [f"{name}/{picture}" for picture in sorted(pictures)]
        labels += [label] * len(pictures)
    if not files:
        raise DataError(f"no images in {frames}: none of its {len(names)} folders has a frame")
    kind = f"DAVIS {split or 'sequences'}, {frames.name}"
    return Found(kind, str(frames), files, labels, names)


def sequence_names(path: Path) -> list[str]:
    """A list's sequences, once each; a line is `name` or `/JPEGImages/480p/name/00000.jpg ...`.

    Raises: DataError: it cannot be read, or names none.
    """
    names: dict[str, None] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}") from error
    for line in lines:
        if words := line.split():
            parts = words[0].split("/")
            names[parts[-2] if len(parts) > 1 else parts[0]] = None
    if not names:
        raise DataError(f"{path} names no sequence")
    return list(names)


def _resolutions(root: Path) -> list[str]:
    """The folders of JPEGImages that hold folders, as PASCAL VOC's does not."""
    try:
        folders = [folder for folder in (root / "JPEGImages").iterdir() if folder.is_dir()]
        holding = [f.name for f in folders if any(below.is_dir() for below in f.iterdir())]
    except OSError:
        return []
    return sorted(holding)


def _resolution(root: Path, place: Place) -> str:
    there = _resolutions(root)
    asked = place.options.get("resolution")
    if asked is None:
        return RESOLUTION if RESOLUTION in there else there[0]
    if asked in there:
        return asked
    raise DataError(
        f"--data_path {place.text}: there is no resolution {asked!r}; there are {', '.join(there)}"
    )


def _split(root: Path, place: Place) -> str:
    """The list that is meant, without .txt, below ImageSets; of "train" that of 2017 first."""
    lists = sorted((root / "ImageSets").glob("*/*.txt"), key=lambda p: (p.parent.name != "2017", p))
    splits = [f"{path.parent.name}/{path.stem}" for path in lists]
    short = [path.stem for path in lists]
    chosen = place.choose_split(list(dict.fromkeys([*splits, *short])))
    return chosen if chosen in splits else splits[short.index(chosen)]
