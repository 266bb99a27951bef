"""Frames of DAVIS as training images, with one class per sequence.

    JPEGImages/480p/<sequence>/00000.jpg    frames; folders next to 480p hold larger ones
    ImageSets/2017/train.txt                a split: one sequence per line
    ImageSets/480p/train.txt                a split of DAVIS 2016: the paths of a frame and its mask

Annotations are in folders of their own and are not used for training.
"""

from __future__ import annotations

from pathlib import Path

from fastdino.data.datasets.data_path import DataPath
from fastdino.data.datasets.file_list import FileList
from fastdino.data.datasets.splits import choose_split, requested_split
from fastdino.data.image_files import read_file
from fastdino.data.image_names import image_files, is_leftover
from fastdino.errors import DataError
from fastdino.file_names import as_path, decode_lines

RESOLUTION = "480p"


def is_davis(data_path: DataPath) -> bool:
    """Return whether the path is a folder with the layout of DAVIS."""
    return bool(_resolutions(Path(data_path.path)))


def find_davis(data_path: DataPath) -> FileList:
    """Return all frames, or those of a split ("2017/train" or "train").

    Sequences without frames are left out.

    Raises: DataError: no such split or resolution, or no sequence has frames.
    """
    root = Path(data_path.path)
    available = _resolutions(root)
    default = RESOLUTION if RESOLUTION in available else available[0]
    resolution = data_path.options.get("resolution", default)
    if resolution not in available:
        raise data_path.error(f"no resolution {resolution!r}; available: {', '.join(available)}")
    frames = root / "JPEGImages" / resolution
    existing = _folders(frames)
    sequences, split = existing, None
    if data_path.role or requested_split(data_path):
        split = _choose_split(root, data_path)
        sequences = sorted(sequence_names(root / "ImageSets" / f"{split}.txt"))
    files: list[str] = []
    labels: list[int] = []
    skipped: dict[str, str] = {}
    for label, name in enumerate(sequences):
        images = image_files(frames / name) if name in existing else []
        if not images:
            reason = "has no frames" if name in existing else f"is missing; {split} lists it"
            skipped[str(frames / name)] = reason
        files += [f"{name}/{image.name}" for image in images]
        labels += [label] * len(images)
    if not files:
        raise DataError(
            f"no images in {frames}: none of {len(sequences)} sequences has frames, for example "
            f"{sequences[0]}"
        )
    kind = f"DAVIS {split or 'sequences'}, {frames.name}"
    return FileList(kind, str(frames), files, labels, sequences, skipped=skipped)


def sequence_names(path: Path) -> list[str]:
    """Read the distinct sequences of a list of names or of /JPEGImages/480p/NAME/00000.jpg paths.

    Raises: DataError: the list cannot be read, or is empty.
    """
    names: dict[str, None] = {}
    try:
        lines = decode_lines(read_file(str(path)))
    except OSError as error:
        raise DataError(f"the list {path} cannot be read: {error}") from error
    for line in lines:
        if words := line.split():
            parts = words[0].split("/")
            names[as_path(parts[-2] if len(parts) > 1 else parts[0])] = None
    if not names:
        raise DataError(f"{path} lists no sequence")
    return list(names)


def _resolutions(root: Path) -> list[str]:
    """Return the folders of JPEGImages that contain folders; PASCAL VOC has none."""
    try:
        images = root / "JPEGImages"
        return [name for name in _folders(images) if _folders(images / name)]
    except OSError:
        return []


def _folders(path: Path) -> list[str]:
    names = (folder.name for folder in path.iterdir() if folder.is_dir())
    return sorted(name for name in names if not is_leftover(name))


def _choose_split(root: Path, data_path: DataPath) -> str:
    """Return YEAR/NAME of the split; a plain name prefers DAVIS 2017."""
    lists = sorted((root / "ImageSets").glob("*/*.txt"), key=lambda p: (p.parent.name != "2017", p))
    splits = [f"{path.parent.name}/{path.stem}" for path in lists]
    names = [path.stem for path in lists]
    chosen = choose_split(data_path, list(dict.fromkeys([*splits, *names])))
    return chosen if chosen in splits else splits[names.index(chosen)]
