"""Logging of a run: progress bar, log.txt, loggers, and warnings of a collapse."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdino import distributed
from fastdino.epoch_log import drop_log_lines, epoch_of
from fastdino.files import append, explain_write_errors
from fastdino.terminal import is_terminal, print_line
from fastdino.training.loggers import Loggers

# A teacher entropy below or above these fractions of ln K means that the training collapses.
COLLAPSED_TO_ONE, COLLAPSED_TO_UNIFORM = 0.01, 0.995


@dataclass(kw_only=True)
class Progress:
    """Reports the steps and epochs of a run.

    Args:
        output_dir: folder of log.txt.
        epochs, steps_per_epoch: length of the run.
        images_per_step: global batch size.
        prototypes: K, for the bounds of the entropy.
        enabled: print and write; true on one rank only.
        loggers: receive the values that are measured; without any on the other ranks.
    """

    output_dir: Path
    epochs: int
    steps_per_epoch: int
    images_per_step: int
    prototypes: int
    enabled: bool = True
    loggers: Loggers = field(default_factory=Loggers)

    def __post_init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._warned: set[tuple[int, str]] = set()
        self._bar: tqdm[Any] | None = None
        self._open: dict[str, Any] | None = None  # line of a finished epoch, without its results
        self._unwritten: list[str] = []  # lines that log.txt does not have because of an error
        self._clock, self._clock_iteration = time.perf_counter(), 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self.loggers.close()

    @property
    def open_epoch(self) -> int | None:
        """The epoch that `close_epoch` has closed and `write_epoch` has not written yet."""
        return None if self._open is None else self._open["epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the current epoch, so a resumed epoch has the same means.

        It also has the lines that could not be written to log.txt, and that of `close_epoch`, if
        any.
        """
        state: dict[str, Any] = {"sums": dict(self._sums), "counts": dict(self._counts)}
        if self._unwritten:
            state["unwritten"] = list(self._unwritten)
        if self._open is not None:
            state["open"] = dict(self._open)
        return state

    def restart(self, iteration: int, state: dict[str, Any] | None) -> None:
        """Continue from `iteration`; drop what an interrupted run logged after it.

        Without a `state` at iteration 0, an existing log.txt belongs to another run and is moved
        to the end of log.old.txt.

        Raises: UserError: a logger cannot be started.
        """
        self._restore(iteration, state)
        with distributed.fail_together():
            if self.enabled:
                self._drop_lines(iteration, new=state is None and iteration == 0)
                self.loggers.restart(iteration, new=state is None and iteration == 0)
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=self.epochs * self.steps_per_epoch,
            initial=iteration,
            disable=not is_terminal(sys.stderr),
            dynamic_ncols=True,
            unit="step",
            bar_format="{desc} {percentage:3.0f}%|{bar}|{n}/{total} {elapsed}<{remaining}{postfix}",
        )

    def _restore(self, iteration: int, state: dict[str, Any] | None) -> None:
        """Load a state_dict()."""
        self._unwritten = list((state or {}).get("unwritten", []))
        sums = {k: float(v) for k, v in (state or {}).get("sums", {}).items()}
        self._sums = defaultdict(float, sums)
        counts = {k: int(v) for k, v in (state or {}).get("counts", {}).items()}
        self._counts = defaultdict(int, counts)
        self._open = None
        if "open" in (state or {}):
            assert state is not None
            self._open = {**state["open"], "epoch": int(state["open"]["epoch"])}
        self._clock, self._clock_iteration = time.perf_counter(), iteration

    def _drop_lines(self, iteration: int, *, new: bool) -> None:
        """Drop the lines of log.txt from `iteration` on, or with `new` move all of them."""
        log = self.output_dir / "log.txt"
        if not log.exists():
            return
        with explain_write_errors(log):
            if new:
                append(log.read_bytes(), self.output_dir / "log.old.txt")
                log.unlink()
                return
            unwritten = (epoch_of(line.encode()) for line in self._unwritten)
            epochs = [iteration // self.steps_per_epoch, self.open_epoch, *unwritten]
            drop_log_lines(log, min(epoch for epoch in epochs if epoch is not None))

    def flush(self, iteration: int) -> None:
        """Write the loggers' buffered values; `iteration` is the next one."""
        self.loggers.flush(iteration)

    def info(self, text: str) -> None:
        """Print a line to stdout, above the bar, if there is still a stdout."""
        if self.enabled:
            print_line(text, sys.stdout, write=tqdm.write)

    def warn(self, text: str) -> None:
        """Print a warning to stderr, above the bar, if there is still a stderr."""
        if self.enabled:
            print_line(f"warning: {text}", sys.stderr, write=tqdm.write)

    def step(
        self, iteration: int, values: dict[str, float], *, entropy: float | None = None
    ) -> None:
        """Add a finished step.

        Args:
            values: loss, lr and wd; with KoLeo also the terms dino and koleo.
            entropy: entropy of the targets, if it was measured in this step.
        """
        if entropy is not None:
            kl = values.get("dino", values["loss"]) - entropy
            values = {**values, "entropy": entropy, "kl": kl}
        for name, value in values.items():
            self._sums[name] += value
            self._counts[name] += 1
        if not self.enabled or self._bar is None:
            return
        self._bar.update(1)
        if entropy is not None:
            self._show(iteration, values)
            self._check_collapse(iteration // self.steps_per_epoch, values)

    def close_epoch(self, epoch: int, **extra: float) -> None:
        """Keep the epoch's means, the paper's keys first, for `write_epoch`, and reset them."""
        means = {f"train_{name}": self._sums[name] / self._counts[name] for name in self._sums}
        self._sums.clear()
        self._counts.clear()
        self._open = {**means, "epoch": epoch, **extra}

    def write_epoch(self, results: Mapping[str, float] | None = None) -> None:
        """Append the line of the closed epoch to log.txt; show and log its results.

        Lines that cannot be written are kept, and written after the next epoch.

        Args: results: of an evaluation, such as knn_top1, which is logged as knn/top1.
        """
        assert self._open is not None
        line, results, self._open = self._open, results or {}, None
        epoch = line["epoch"]
        if not self.enabled:
            return
        self._unwritten.append(json.dumps({**line, **results}) + "\n")
        self._write_log()
        means = {k.removeprefix("train_"): v for k, v in line.items() if k.startswith("train_")}
        if self._bar is not None:
            values = {**means, **results} if self._bar.disable else results
            if values:
                shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
                self.info(f"epoch {epoch + 1}/{self.epochs}: {shown}")
        if results:
            last = (epoch + 1) * self.steps_per_epoch - 1
            curves = {name.replace("_", "/", 1): value for name, value in results.items()}
            self.loggers.add(curves, last)
            self._clock, self._clock_iteration = time.perf_counter(), last + 1

    def _write_log(self) -> None:
        """Append the lines that log.txt does not have yet; warn if that fails."""
        log = self.output_dir / "log.txt"
        try:
            append("".join(self._unwritten).encode(), log)
        except OSError as error:
            self.warn(
                f"cannot write {log} ({error.strerror or error}): the run continues; the line is "
                "kept in the checkpoint and written after the next epoch"
            )
        else:
            self._unwritten.clear()

    def _show(self, iteration: int, values: dict[str, float]) -> None:
        """Show the values next to the bar and log them."""
        now = time.perf_counter()
        steps = iteration + 1 - self._clock_iteration
        rate = steps * self.images_per_step / max(now - self._clock, 1e-9)
        self._clock, self._clock_iteration = now, iteration + 1
        assert self._bar is not None
        self._bar.set_description(f"epoch {iteration // self.steps_per_epoch + 1}/{self.epochs}")
        koleo = f"KoLeo {values['koleo']:.3f}, " if "koleo" in values else ""
        self._bar.set_postfix_str(
            f"{rate:.0f} images/s, loss {values['loss']:.3f}, {koleo}lr {values['lr']:.2e}, "
            f"teacher entropy {values['entropy']:.2f}/{math.log(self.prototypes):.2f}, "
            f"KL {values['kl']:.3f}",
        )
        shown = {**values, "images_per_second": rate}
        self.loggers.add({f"train/{name}": value for name, value in shown.items()}, iteration)

    def _check_collapse(self, epoch: int, values: dict[str, float]) -> None:
        """Warn if the teacher's entropy is near a bound, once per epoch and bound."""
        if self.prototypes == 1:
            return
        share = values["entropy"] / math.log(self.prototypes)
        if share < COLLAPSED_TO_ONE:
            kind, todo = "puts all its weight on one prototype", "raise --teacher_temp"
        elif share > COLLAPSED_TO_UNIFORM:
            kind, todo = "is uniform over the prototypes", "lower --teacher_temp or --lr"
        else:
            return
        if (epoch, kind) not in self._warned:
            self._warned.add((epoch, kind))
            self.warn(
                f"epoch {epoch + 1}: the teacher {kind} (entropy {values['entropy']:.3f} of "
                f"{math.log(self.prototypes):.2f} nats): the training is collapsing; {todo}"
            )
