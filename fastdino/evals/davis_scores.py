"""Scores of `fastdino davis`: J and F per sequence, davis.json, and the printed lines."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdino.errors import DataError
from fastdino.evals.davis_dataset import Sequence
from fastdino.evals.segmentation_metrics import boundary_accuracy, region_similarity, statistics
from fastdino.files import write_json
from fastdino.terminal import print_err


def score(
    masks: NDArray[np.uint8], truth: NDArray[np.uint8], device: torch.device
) -> dict[str, Any]:
    """Compute J and F of each object of the first frame, and their means, in percent.

    As in the benchmark, the first frame (given) and the last are not scored. In a frame without an
    object, J and F are 1 if the mask is empty and 0 otherwise. Objects that appear after the first
    frame are not scored, and count as background.

    Args:
        masks, truth: [T, H, W], T >= 3.
    """
    predicted, true = (torch.from_numpy(stack[1:-1]).to(device) for stack in (masks, truth))
    objects = {}
    for number in np.unique(truth[0][truth[0] > 0]).tolist():
        pair = (predicted == number, true == number)
        measures = {"J": region_similarity(*pair), "F": boundary_accuracy(*pair)}
        objects[str(number)] = {
            name: {key: 100 * value for key, value in statistics(values).items()}
            for name, values in measures.items()
        }
    later = sorted(set(np.unique(truth).tolist()) - set(np.unique(truth[0]).tolist()) - {0})
    return {**mean_scores(list(objects.values())), "objects": objects, "not_scored": later}


def mean_scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Average J and F with their recall and decay over objects; J&F is the mean of both."""
    means: dict[str, Any] = {
        name: {key: fmean(one[name][key] for one in scores) for key in scores[0][name]}
        for name in ("J", "F")
    }
    return {"J&F": (means["J"]["mean"] + means["F"]["mean"]) / 2, **means}


class Results:
    """The contents of davis.json, rewritten after each sequence; a file of equal settings is
    continued.

    Attributes:
        sequences: name -> the scores of `score`, and the number of frames.
        left_out: name -> why a sequence of the list has no scores.
        total: means over all objects; None before `finish`, or if nothing was scored.
    """

    def __init__(self, path: Path, settings: dict[str, Any], left_out: dict[str, str]):
        self.path, self.settings, self.left_out = path, settings, left_out
        self.sequences: dict[str, Any] = {}
        self.total: dict[str, Any] | None = None
        try:
            previous = json.loads(path.read_text())
            if previous["settings"] == settings:
                self.sequences = dict(previous["sequences"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            print_err(f"warning: {path} cannot be used ({error!r}): all sequences are processed")
        self._write()  # now, so that masks of other settings never count as done

    def has(self, sequence: Sequence) -> bool:
        """Return whether a sequence is done: it has all masks, and scores if it is scored."""
        entry = self.sequences.get(sequence.name)
        if entry is None or ("J&F" in entry) != sequence.is_scored:
            return False
        folder = self.path.parent / sequence.name
        return all((folder / f"{frame.stem}.png").is_file() for frame in sequence.frames)

    def add(self, sequence: Sequence, scores: dict[str, Any] | None) -> None:
        """Add the scores of a sequence, and write the file."""
        self.sequences[sequence.name] = {"frames": len(sequence.frames), **(scores or {})}
        self._write()

    def leave_out(self, sequence: Sequence, reason: str) -> None:
        """Record that a sequence cannot be used, and write the file."""
        self.left_out[sequence.name] = reason
        self.sequences.pop(sequence.name, None)
        self._write()

    def finish(self, sequences: list[Sequence]) -> None:
        """Average over the objects of these sequences, and write the file.

        Raises: DataError: none of them could be used.
        """
        names = [one.name for one in sequences if one.name not in self.left_out]
        if not names:
            raise DataError(describe_left_out(self.left_out))
        entries = {name: self.sequences[name] for name in names}
        objects = [one for entry in entries.values() for one in entry.get("objects", {}).values()]
        self.sequences = entries
        self.total = mean_scores(objects) if objects else None
        self._write()

    def _write(self) -> None:
        state = {"settings": self.settings, "global": self.total, "sequences": self.sequences}
        write_json({**state, "left_out": self.left_out}, self.path)


def describe(sequence: Sequence, entry: dict[str, Any]) -> str:
    """Format the scores of a sequence as one line."""
    if "J&F" not in entry:
        return f"{sequence.name}: {entry['frames']} frames, not scored: only the first is annotated"
    later = entry["not_scored"]
    note = f"; objects {later} appear after the first frame: not followed" if later else ""
    return (
        f"{sequence.name}: J&F {entry['J&F']:.1f}, J {entry['J']['mean']:.1f}, "
        f"F {entry['F']['mean']:.1f}, {len(entry['objects'])} objects, "
        f"{entry['frames']} frames{note}"
    )


def describe_left_out(left_out: dict[str, str]) -> str:
    """Format the number of sequences that are left out, and the first reason."""
    return f"{len(left_out)} sequences left out: {next(iter(left_out.values()))}"


def describe_total(total: dict[str, Any] | None) -> str:
    """Format the scores over all objects as the benchmark's table, in percent."""
    if total is None:
        return "no sequence could be scored"
    rows = [f"J&F-Mean {total['J&F']:.1f}"]
    for name in ("J", "F"):
        rows.append("  ".join(f"{name}-{k.title()} {v:.1f}" for k, v in total[name].items()))
    return "\n".join(rows)
