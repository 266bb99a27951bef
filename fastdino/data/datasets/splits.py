"""The choice of a split: by an option of --data_path, else by the usual names."""

from __future__ import annotations

from collections.abc import Sequence

from fastdino.data.datasets.data_path import DataPath

# Names of the splits that an evaluation uses, in order of preference.
_ROLES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test", "testing"),
}


def requested_split(data_path: DataPath) -> str | None:
    """Return the split named by the options, if any.

    Training reads ?split=...; an evaluation reads ?train=... and ?val=....
    """
    if data_path.role and "split" in data_path.options:
        raise data_path.error(
            "an evaluation needs two splits: use ?train=...&val=... instead of ?split=..."
        )
    return data_path.options.get(data_path.role or "split")


def choose_split(data_path: DataPath, splits: Sequence[str]) -> str:
    """Return the requested split, else the one with a usual name, else the only one.

    Raises: DataError: there is no such split; the message lists those that exist.
    """
    split, role = requested_split(data_path), data_path.role
    if split is None:
        usual = _ROLES.get(role, ("train",))
        split = next((name for name in usual if name in splits), None)
    if split is None and not role and len(splits) == 1:
        split = splits[0]
    if split in splits:
        return str(split)
    problem = f"no split {split!r}" if split else f"no default split for {role or 'training'}"
    raise data_path.error(
        f"{problem}; its splits are {', '.join(splits)}: choose one with ?{role or 'split'}=..."
    )
