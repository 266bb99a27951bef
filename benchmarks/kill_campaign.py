"""Kill training runs with SIGKILL at random moments, resume them, and compare the results.

    python -m benchmarks.kill_campaign --kills 1000 --write benchmarks/results/cpu

Every run is killed again and again, each time resumed by the same command, until it finishes. Its
checkpoints, log.txt and config.json must then equal those of an uninterrupted run bit for bit. All
moments are drawn from --seed; the machine's speed decides what the run does at a moment. SIGKILL
ends processes, not the machine: a power failure is not simulated.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import killed_runs
from benchmarks.command_line import command_line
from benchmarks.killed_runs import EPOCHS, KINDS, RUN, STEPS, Kind, Timing
from fastdino.bench.report import facts_table, log, table, wrap, write_report
from fastdino.environment import environment
from fastdino.files import write_json

MAX_KILLS_PER_RUN = 40
BEFORE, DURING, OTHER, BETWEEN = PLACES = (
    "before the first save", "in a save", "in another write", "between saves",
)  # fmt: skip


@dataclass
class Tally:
    """Results of the runs of one kind.

    Attributes:
        kills, finished: killed processes, and runs that reached their end.
        places: number of kills by what the run did at that moment.
        differences: a line for every difference from the uninterrupted run.
        failures: a line for every start that ended with another status than 0.
        lost_steps: steps that a checkpoint had before a kill and did not have after it.
        repeated_steps: most steps that a kill caused to be repeated.
        leftovers: files of finished runs that an uninterrupted run does not have.
        runs: runs that were started; the seed of the next.
    """

    kills: int = 0
    finished: int = 0
    places: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost_steps: int = 0
    repeated_steps: int = 0
    leftovers: list[str] = field(default_factory=list)
    runs: int = 0


class Campaign:
    """The kills of one kind of run.

    Args:
        folder: of the uninterrupted run and the killed one.
        seed: decides all moments, with the name and the number of the run.
    """

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.name, self.kind, self.seed = name, KINDS[name], seed
        self.expected = folder / f"{name} uninterrupted"
        self.folder = folder
        self.timing = killed_runs.run_to_end(self.kind, self.expected)

    def run_once(self, tally: Tally) -> None:
        """Kill and resume one run until it finishes; add the result to the tally."""
        folder = self.folder / f"{self.name} {tally.runs}"
        rng = random.Random(f"{self.seed} {self.name} {tally.runs}")
        killed = KilledRun(self.kind, folder, self.timing, rng, tally)
        for _ in range(MAX_KILLS_PER_RUN):
            if killed.start_and_kill():
                break
        else:
            killed.finish()
        problems = killed_runs.differences(folder / RUN, self.expected / RUN)
        names = killed_runs.files_of(folder / RUN) - killed_runs.files_of(self.expected / RUN)
        run = f"run {tally.runs}"
        tally.differences += [f"{run}: {problem}" for problem in problems]
        tally.leftovers += [f"{run}: {name}" for name in sorted(names)]
        tally.finished += 1
        tally.runs += 1
        if not problems:
            shutil.rmtree(folder)


class KilledRun:
    """One run, started again after each kill."""

    def __init__(
        self, kind: Kind, folder: Path, timing: Timing, rng: random.Random, tally: Tally
    ) -> None:
        self.kind, self.folder, self.timing, self.rng = kind, folder, timing, rng
        self.tally = tally

    def start_and_kill(self) -> bool:
        """Start the run and kill it; return True if it ended before."""
        run = self.folder / RUN
        before, old = killed_runs.iteration_of(run), killed_runs.parts_of(run)
        processes = killed_runs.kill_at_random(self.kind, self.folder, self.timing, self.rng)
        if not processes.killed:
            self._check(processes)
            return True
        parts = {name for name, _ in killed_runs.parts_of(run) - old}
        after = killed_runs.iteration_of(run)
        self.tally.kills += 1
        self.tally.places[place_of(run, parts)] += 1
        self.tally.lost_steps += max(before - max(after, 0), 0)
        reached = max(processes.counter.read()[0], before)
        self.tally.repeated_steps = max(self.tally.repeated_steps, reached - max(after, 0))
        return False

    def finish(self) -> None:
        """Start the run and wait for its end."""
        processes = killed_runs.Processes(self.kind, self.folder)
        processes.wait(killed_runs.STUCK_SECONDS)
        processes.end()
        self._check(processes)

    def _check(self, processes: killed_runs.Processes) -> None:
        if any(processes.statuses.values()):
            statuses = sorted(processes.statuses.values())
            line = killed_runs.last_line(self.folder)
            self.tally.failures.append(f"run {self.tally.runs}: status {statuses}: {line}")


def place_of(run: Path, parts: set[str]) -> str:
    """Return what a killed run did, by the temporary files that it left."""
    saved = run / "checkpoint.pth"
    copies = [path for path in run.glob("checkpoint*.pth") if path != saved]
    newest = max((int(re.sub(r"\D", "", path.name)) + 1 for path in copies), default=0)
    half = newest * STEPS > max(killed_runs.iteration_of(run), 0)  # between the two files of a save
    if half or any(name.startswith("checkpoint") for name in parts):
        return DURING
    if parts:
        return OTHER
    return BETWEEN if saved.exists() else BEFORE


def run_campaign(
    kills: int, *, kinds: Sequence[str], seed: int, seconds: float, state: Path | None
) -> dict[str, Tally]:
    """Run kinds in turn until `kills` in total, for at most `seconds`.

    Args: state: JSON of the results; it is continued if it exists, and rewritten after each run.
    """
    tallies = load_state(state, kinds, seed)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="kills") as temporary:
        folder = Path(temporary)
        killed_runs.write_images(folder / "data")
        killed_runs.prepare()
        campaigns = {name: Campaign(name, folder, seed) for name in kinds}
        while total(tallies) < kills and time.monotonic() < end:
            name = min(kinds, key=lambda kind: tallies[kind].kills)
            campaigns[name].run_once(tallies[name])
            if state:
                write_json({"seed": seed, "kinds": as_dicts(tallies)}, state)
            log(f"{total(tallies)} kills, {tallies[name].finished} finished runs with {name}")
    return tallies


def load_state(state: Path | None, kinds: Sequence[str], seed: int) -> dict[str, Tally]:
    """Return the tallies in a file, and empty ones of the other kinds."""
    tallies = {name: Tally() for name in kinds}
    if state is not None and state.exists():
        saved = json.loads(state.read_text())
        if saved["seed"] != seed:
            raise SystemExit(f"{state} has --seed {saved['seed']}, got {seed}: use another file")
        tallies |= {name: Tally(**values) for name, values in saved["kinds"].items()}
    return tallies


def total(tallies: dict[str, Tally]) -> int:
    """Return the number of kills."""
    return sum(tally.kills for tally in tallies.values())


def as_dicts(tallies: dict[str, Tally]) -> dict[str, Any]:
    """Return plain values, for JSON."""
    return {name: asdict(tally) for name, tally in tallies.items()}


def markdown(tallies: dict[str, Tally], command: str, facts: dict[str, str]) -> str:
    """Return kill_campaign.md."""
    everything = [*tallies.values()]
    lost = sum(tally.lost_steps for tally in everything)
    different = sum(len(tally.differences) for tally in everything)
    failed = sum(len(tally.failures) for tally in everything)
    finished = sum(tally.finished for tally in everything)
    about = (
        f"{total(tallies)} kills with SIGKILL, {finished} finished runs of {EPOCHS} epochs of "
        f"{STEPS} steps: {different} differences from the uninterrupted runs, {lost} saved steps "
        f"lost, {failed} failed starts. By `{command}`."
    )
    names = Counter(line.split(": ")[1] for tally in everything for line in tally.leftovers)
    if names:
        left = ", ".join(f"{name} in {number} runs" for name, number in sorted(names.items()))
        about += f" Files left over: {left}."
    places = Counter[str]()
    rows = []
    for name, tally in tallies.items():
        rows.append(row(name, tally, tally.places))
        places.update(tally.places)
    sums = Tally(
        kills=total(tallies),
        finished=finished,
        differences=[line for tally in everything for line in tally.differences],
        failures=[line for tally in everything for line in tally.failures],
        lost_steps=lost,
        repeated_steps=max(tally.repeated_steps for tally in everything),
        leftovers=[line for tally in everything for line in tally.leftovers],
    )
    rows.append(row("all", sums, dict(places)))
    heads = ["run", "kills", *PLACES, "finished runs", "differences", "failed starts", "lost steps"]
    heads += ["most repeated steps", "files left over"]
    lines = [*sums.differences, *sums.failures]
    parts = ["# Killed runs", wrap(about), table(heads, rows)]
    parts += ["\n".join(f"- {line}" for line in lines)] if lines else []
    return "\n\n".join([*parts, facts_table(facts)]) + "\n"


def row(name: str, tally: Tally, places: dict[str, int]) -> list[str]:
    """Return the row of a kind."""
    numbers = [tally.kills, *(places[place] for place in PLACES), tally.finished]
    numbers += [len(tally.differences), len(tally.failures), tally.lost_steps]
    numbers += [tally.repeated_steps, len(tally.leftovers)]
    return [name, *map(str, numbers)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit status is 1 if anything was lost or differed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="in total (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file of results; an existing one is continued")
    parser.add_argument("--time_limit", type=float, default=1e9, help="seconds of this part")
    parser.add_argument("--write", type=Path, help="folder of kill_campaign.md and .json")
    options = parser.parse_args(arguments)
    tallies = run_campaign(
        options.kills,
        kinds=options.kinds,
        seed=options.seed,
        seconds=options.time_limit,
        state=options.state,
    )
    facts = environment(
        torch.device("cpu"),
        ("torch", "torchvision", "numpy", "numba", "pillow"),
        {"seed": str(options.seed)},
    )
    command = command_line("kill_campaign", arguments)
    text = markdown(tallies, command, facts)
    print(text)
    if options.write:
        record = {"command": command, "environment": facts, "seed": options.seed}
        record |= {"kinds": as_dicts(tallies)}  # it can be continued as a --state
        write_report(options.write, "kill_campaign", text, record)
    bad = any(t.differences or t.failures or t.lost_steps for t in tallies.values())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
