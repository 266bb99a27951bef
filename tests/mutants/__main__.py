"""Run mutants and write their table; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.mutants.mutant import ROOT, all_mutants
from tests.mutants.report import markdown
from tests.mutants.runner import Journal, run


def main() -> int:
    """Return 0 if no mutant survives, except those known to be equivalent."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", help="modules of the catalog (default: all)")
    parser.add_argument("--file", default="", help="only mutants of files whose path has this text")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--journal", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    parser.add_argument("--write", type=Path, help="write the table of all mutants to this file")
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
    survivors = [m for m in selected if not outcomes[m.key()].killed_by and not m.equivalent]
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.was!r} -> {mutant.became!r}")
    print(f"{len(selected)} mutants, {len(survivors)} survivors without an explanation")
    if args.write:
        args.write.write_text(markdown(catalog, outcomes), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
