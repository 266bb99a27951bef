"""The catalog of mutants fits the code, and the runner tells killed mutants from survivors."""

from __future__ import annotations

import pytest

from tests.mutants.mutant import ROOT, Mutant, all_mutants
from tests.mutants.report import markdown
from tests.mutants.runner import CRASHED, Journal, Outcome, run

SCHEDULES = "fastdino/training/schedules.py"
CASES = [
    pytest.param(mutant, id=f"{part}-{i}")
    for part, mutants in all_mutants().items()
    for i, mutant in enumerate(mutants)
]


@pytest.mark.parametrize("mutant", CASES)
def test_mutants_change_the_present_code_and_have_tests(mutant):
    compile(mutant.source(), mutant.file, "exec")
    assert mutant.became != mutant.was
    for argument in mutant.selection():
        file, _, name = argument.partition("::")
        assert (ROOT / file).exists(), argument
        if name:
            function = name.partition("[")[0].rpartition("::")[2]
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), argument


def test_a_text_that_is_not_in_the_file_once_is_an_error():
    with pytest.raises(ValueError, match="expected 'return' once, found it 3 times"):
        Mutant(SCHEDULES, "return", "pass").source()


def test_a_fault_is_killed_and_a_comment_survives(tmp_path, capfd):
    fault = Mutant(SCHEDULES, "max(warmup - 1, 1)", "max(warmup + 1, 1)")
    comment = Mutant(SCHEDULES, "iterations per epoch.", "steps per epoch.", equivalent="a comment")
    other = Mutant(SCHEDULES, "if iteration < warmup:", "if iteration <= warmup:")
    journal = Journal(tmp_path / "journal.jsonl")
    run([fault, comment], journal, jobs=1)
    outcomes = journal.outcomes()
    assert outcomes[fault.key()].killed_by.startswith("tests/test_schedules.py::test_")
    assert outcomes[comment.key()].killed_by == ""
    page = markdown({"training": [fault, comment, other]}, outcomes)
    assert "| training | 3 | 1 | 0 | 0 | 1 | 0 | 1 |" in page
    assert "`iterations per epoch.` → `steps per epoch.` | equivalent | a comment |" in page
    assert f"| {SCHEDULES} | 1 | `test_schedules.py`: " in page
    run([fault, comment], journal, jobs=1)  # nothing is run again
    assert len(journal.path.read_text().splitlines()) == 2


@pytest.mark.slow
def test_tests_that_fail_without_a_mutant_end_the_run(tmp_path):
    mutant = Mutant(SCHEDULES, "max(warmup - 1, 1)", "1", ("tests/test_schedules.py::missing",))
    with pytest.raises(RuntimeError, match="worker failed"):
        run([mutant], Journal(tmp_path / "journal.jsonl"), jobs=1)


def test_outcomes_of_changed_files_are_forgotten(tmp_path):
    mutant = Mutant(SCHEDULES, "max(warmup - 1, 1)", "1")
    copy = tmp_path / SCHEDULES
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / SCHEDULES).read_text() + "# changed\n")
    assert mutant.key(tmp_path) != mutant.key()
    page = markdown({"all": [mutant]}, {"other": Outcome("other", "", 0)})
    assert page.count("| 1 | 0 | 0 | 0 | 0 | 0 | 1 |") == 2


def test_an_end_without_a_failing_test_is_a_kill_only_if_it_is_explained():
    hangs, dies, crashes = mutants = [
        Mutant(SCHEDULES, "max(warmup - 1, 1)", became, reported=True, crash=crash)
        for became, crash in (("1", "a reason"), ("2", ""), ("3", "it writes out of bounds"))
    ]
    ends = {hangs: "time limit", dies: CRASHED, crashes: CRASHED}
    outcomes = {m.key(): Outcome(m.key(), end, 1.0) for m, end in ends.items()}
    states = [outcomes[m.key()].state(m) for m in mutants]
    assert states == ["no verdict", "no verdict", "crash"]
    page = markdown({"training": mutants}, outcomes)
    assert "| training | 3 | 0 | 1 | 0 | 0 | 2 | 0 |" in page
    before, reported = page.split("## Tests that kill the mutants reported")
    for row in ("`1` | no verdict | time limit |", "`2` | no verdict | the process died |",
                "`3` | crash | it writes out of bounds |"):  # fmt: skip
        assert row in before
    assert reported.count("| no verdict |") == 2
    assert "## Killed" not in page
