"""Mutation tests: small faults are put into the code, and the tests have to notice them.

mutant.py     a mutant, and all of the catalog
catalog/      the mutants, a module per part of the project
runner.py     runs the tests of each mutant in a copy of the repository
report.py     the table in benchmarks/results/mutants.md

Run `python -m tests.mutants --help`, or `make mutants`.
"""
