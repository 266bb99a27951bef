"""Run mutants and write their table; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant, all_mutants
from tests.mutants.report import markdown
from tests.mutants.runner import Journal, Outcome, run


def main() -> int:
    """Return 0 if a test kills every mutant, except those known to be equivalent."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", help="modules of the catalog (default: all)")
    parser.add_argument("--file", default="", help="only mutants of files whose path has this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--journal", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    parser.add_argument("--write", type=Path, help="write the parts' table to this file")
    args = parser.parse_args()
    catalog = all_mutants()
    unknown = sorted(set(args.parts) - set(catalog))
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}: expected some of {', '.join(catalog)}")
    parts = args.parts or list(catalog)
    selected = [m for part in parts for m in catalog[part] if args.file in m.file]
    journal = Journal(args.journal)
    run(selected, journal, args.jobs)
    outcomes = journal.outcomes()
    alive = [m for m in selected if _is_alive(m, outcomes[m.key()])]
    for mutant in alive:
        outcome = outcomes[mutant.key()]
        reason = f" ({outcome.killed_by})" if outcome.killed_by else ""
        print(
            f"{outcome.state(mutant)}{reason}: {mutant.file}: {mutant.was!r} -> {mutant.became!r}"
        )
    print(f"{len(selected)} mutants, {len(alive)} not killed and without an explanation")
    if args.write:
        args.write.write_text(
            markdown({part: catalog[part] for part in parts}, outcomes), encoding="utf-8"
        )
    return 1 if alive else 0


def _is_alive(mutant: Mutant, outcome: Outcome) -> bool:
    """Return True without a kill, and without a reason why the mutant survives."""
    state = outcome.state(mutant)
    return state == "no verdict" or (state == "survived" and not mutant.equivalent)


if __name__ == "__main__":
    sys.exit(main())
