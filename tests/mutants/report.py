"""The table of the mutants, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.mutants.mutant import Mutant
from tests.mutants.runner import Outcome

HEAD = """# Mutants

A mutant is a small fault in one line; the tests have to notice it. The list is in
[tests/mutants/catalog](../../tests/mutants/catalog); `make mutants` runs it and writes this page.
It was chosen by hand where tests were suspected to be weak, so the share is no random sample.
"""


def markdown(parts: Mapping[str, Sequence[Mutant]], outcomes: Mapping[str, Outcome]) -> str:
    """Return the page: a summary per part of the project, then the survivors and all mutants."""
    text = [HEAD, "| part | mutants | killed | survived | equivalent | not run |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    text += [_summary(name, mutants, outcomes) for name, mutants in parts.items()]
    everything = [mutant for mutants in parts.values() for mutant in mutants]
    text += [_summary("all", everything, outcomes), ""]
    survivors = [m for m in everything if _state(m, outcomes) in ("survived", "equivalent")]
    if survivors:
        text += ["## Survivors", "", "| file | change | why |", "|---|---|---|"]
        text += [f"| {m.file} | {_change(m)} | {m.equivalent or 'open'} |" for m in survivors]
        text += [""]
    text += ["## Killed", "", "| file | change | first test that fails |", "|---|---|---|"]
    text += [
        f"| {m.file} | {_change(m)} | {_cell(outcomes[m.key()].killed_by)} |"
        for m in everything
        if _state(m, outcomes) == "killed"
    ]
    return "\n".join(text) + "\n"


def _state(mutant: Mutant, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(mutant.key())
    if outcome is None:
        return "not run"
    if outcome.killed_by:
        return "killed"
    return "equivalent" if mutant.equivalent else "survived"


def _summary(name: str, mutants: Sequence[Mutant], outcomes: Mapping[str, Outcome]) -> str:
    states = [_state(mutant, outcomes) for mutant in mutants]
    kinds = ("killed", "survived", "equivalent", "not run")
    counts = " | ".join(str(states.count(kind)) for kind in kinds)
    return f"| {name} | {len(mutants)} | {counts} |"


def _change(mutant: Mutant) -> str:
    return f"{_cell(mutant.was)} → {_cell(mutant.became) if mutant.became else '(removed)'}"


def _cell(text: str) -> str:
    """Return a text as code in a cell of a table: on one line, with its pipes escaped."""
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`{line}`"
