"""The table of the mutants, in Markdown."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tests.mutants.mutant import Mutant
from tests.mutants.runner import Outcome

HEAD = """# Mutants

A mutant is a small fault in one place of the code, which the tests have to notice. `make mutants`
runs those of [tests/mutants/catalog](../../tests/mutants/catalog) and writes this page. They were
chosen by hand where tests were suspected to be weak, so the share of killed ones is no estimate for
faults in general.

- killed: a test fails. Tests run in order up to the first failure, so others may notice it too.
- crash: the process dies, for the reason given; this counts as noticed, too.
- survived: no test fails. Equivalent: no test can fail, for the reason given.
- no verdict: the tests reached the time limit, crashed or could not be imported. Not counted as
  killed.
- not run: not since its file, or a file with its tests, was changed.

"""
STATES = ("killed", "crash", "survived", "equivalent", "no verdict", "not run")


def markdown(parts: Mapping[str, Sequence[Mutant]], outcomes: Mapping[str, Outcome]) -> str:
    """Return the page: a summary, mutants not killed, reported ones, and killed ones per file."""
    everything = [mutant for mutants in parts.values() for mutant in mutants]
    summary = [_summary(name, mutants, outcomes) for name, mutants in parts.items()]
    others = [
        (m.file, _change(m), _state(m, outcomes), _reason(m, outcomes))
        for m in everything
        if _state(m, outcomes) not in ("killed", "not run")
    ]
    reported = [(m.file, _change(m), _result(m, outcomes)) for m in everything if m.reported]
    sections = [
        HEAD
        + _table(("part", "mutants", *STATES), [*summary, _summary("all", everything, outcomes)]),
        _section("Without a failing test", ("file", "change", "result", "why"), others),
        _section(
            "Tests that kill the mutants reported by a review\n\n"
            "No test noticed these at commit 0f41454. The code has changed since, so some are the "
            "same fault\nin another line.",
            ("file", "change", "first test that fails"),
            reported,
        ),
    ]
    for name, mutants in parts.items():
        killed = [m for m in mutants if _state(m, outcomes) == "killed"]
        header = ("file", "killed", "first tests that fail (times)")
        sections.append(_section(f"Killed: {name}", header, _per_file(killed, outcomes)))
    return "\n".join(filter(None, sections))


def _per_file(killed: Sequence[Mutant], outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """Return a row per mutated file: its name, the number of mutants, and the tests."""
    rows = []
    in_order = sorted(killed, key=lambda m: m.file)
    for file, mutants in itertools.groupby(in_order, key=lambda m: m.file):
        tests: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for mutant in mutants:
            module, _, name = _test(outcomes[mutant.key()]).partition("::")
            tests[module][name.removeprefix("test_")] += 1
        cells = (f"`{module}`: {_numbered(names)}" for module, names in tests.items())
        count = sum(names.total() for names in tests.values())
        rows.append([file, str(count), "; ".join(cells)])
    return rows


def _numbered(names: Counter[str]) -> str:
    """Return the names, each with its number if that is not 1."""
    return ", ".join(f"{name} ({n})" if n > 1 else name for name, n in names.items())


def _state(mutant: Mutant, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(mutant.key())
    if outcome is None:
        return "not run"
    state = outcome.state(mutant)
    return "equivalent" if mutant.equivalent and state == "survived" else state


def _reason(mutant: Mutant, outcomes: Mapping[str, Outcome]) -> str:
    state = _state(mutant, outcomes)
    reasons = {"crash": mutant.crash, "equivalent": mutant.equivalent, "survived": "open"}
    return reasons.get(state, outcomes[mutant.key()].killed_by)


def _result(mutant: Mutant, outcomes: Mapping[str, Outcome]) -> str:
    """Return the test that kills a mutant, or its state."""
    state = _state(mutant, outcomes)
    return f"`{_test(outcomes[mutant.key()])}`" if state == "killed" else state


def _test(outcome: Outcome) -> str:
    """Return the test without its folder and parameters."""
    return outcome.killed_by.removeprefix("tests/").partition("[")[0]


def _summary(name: str, mutants: Sequence[Mutant], outcomes: Mapping[str, Outcome]) -> list[str]:
    states = Counter(_state(mutant, outcomes) for mutant in mutants)
    return [name, str(len(mutants)), *(str(states[state]) for state in STATES)]


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a section with a table, "" without rows."""
    return f"## {title}\n\n{_table(header, rows)}" if rows else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) + "\n"


def _change(mutant: Mutant) -> str:
    return f"{_code(mutant.was)} → {_code(mutant.became) if mutant.became else '(removed)'}"


def _code(text: str) -> str:
    """Return a text as code in a cell of a table: on one line, with its pipes escaped."""
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`{line}`"
