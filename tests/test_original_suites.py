"""The runner of other repositories' tests, on made-up checkouts, and the table of the guide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import original_suites
from tests.original_suites import Line, Suite, guide_lines

LINES = guide_lines(original_suites.GUIDE.read_text(encoding="utf-8"))
SUITE = Suite(
    "thing",
    ("tests/test_loss.py",),
    (("tests/test_loss.py", "from thing.loss import", "from math import"),),
    source="src",
    select="not slow",
)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout of a repository whose loss and test have lines to replace."""
    files = {
        "src/thing/__init__.py": "from .loss import tau\n",
        "src/thing/loss.py": "raise ImportError('the original ran')\n",
        "tests/test_loss.py": """
import pytest
import thing
from thing.loss import pi

def test_value():
    assert thing.tau > pi > 3

def test_failing():
    assert pi < 3

def test_without_a_gpu():
    pytest.skip("no GPU")

def test_slow():
    raise AssertionError
""",
        ".git/config": "",
    }
    for name, text in files.items():
        path = tmp_path / "thing" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "thing"


def test_suite_runs_with_the_lines_replaced_in_a_copy(checkout):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    line = Line("thing", "src/thing/__init__.py", "from .loss import tau", "from math import tau")
    result = original_suites.run_suite(SUITE, checkout, [line])
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failed == ("tests.test_loss::test_failing",)
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}


def test_suite_that_cannot_be_imported_counts_as_failed(checkout):
    result = original_suites.run_suite(SUITE, checkout, [])
    assert (result.passed, len(result.failed)) == (0, 1)
    assert "the original ran" in result.log


def test_line_that_the_checkout_does_not_have_is_an_error(checkout):
    line = Line("thing", "src/thing/__init__.py", "import other", "")
    with pytest.raises(ValueError, match="'import other' in src/thing/__init__.py, found none"):
        original_suites.run_suite(SUITE, checkout, [line])


def test_main_reports_failures_and_missing_checkouts(checkout, monkeypatch, capsys):
    suites = [SUITE, Suite("absent", ("tests",))]
    monkeypatch.setattr(original_suites, "SUITES", suites)
    monkeypatch.setattr(original_suites, "COMPARED", ())
    for name in ("THING", "ABSENT"):
        monkeypatch.delenv(name, raising=False)
    assert original_suites.main([]) == 1  # no checkout
    assert "thing: skipped, no checkout (set THING or --checkouts)" in capsys.readouterr().out
    monkeypatch.setattr(original_suites, "run_suite", fake_run(failed=("test_x",)))
    assert original_suites.main(["--checkouts", str(checkout.parent)]) == 1
    printed = capsys.readouterr().out
    assert "thing: 3 passed, 1 failed, 2 skipped\n    test_x" in printed
    assert "absent: skipped" in printed
    monkeypatch.setattr(original_suites, "run_suite", fake_run(failed=()))
    monkeypatch.setenv("THING", str(checkout))
    assert original_suites.main(["thing"]) == 0
    with pytest.raises(SystemExit):
        original_suites.main(["unknown"])


def test_line_that_is_not_found_is_reported_as_a_failure(checkout, monkeypatch, capsys):
    monkeypatch.setattr(original_suites, "SUITES", [])
    monkeypatch.setattr(original_suites, "COMPARED", ("thing",))
    rows = "| thing | `main.py` | `import thing` | `import other` |"
    guide = checkout / "README.md"
    guide.write_text(f"{original_suites.HEADER}\n|---|---|---|---|\n{rows}\n")
    monkeypatch.setattr(original_suites, "GUIDE", guide)
    assert original_suites.main(["--checkouts", str(checkout.parent)]) == 1
    printed = capsys.readouterr().out
    assert "thing: 0 passed, 1 failed, 0 skipped\n    expected the line 'import thing'" in printed


def fake_run(failed):
    return lambda *_: original_suites.Result(3, 2, failed, "log")


def test_every_suite_is_in_the_guide():
    names = {suite.repository for suite in original_suites.SUITES}
    assert names <= {line.repository for line in LINES}


def test_table_of_the_guide_is_read_whole():
    text = (
        f"x\n{original_suites.HEADER}\n|---|---|---|---|\n| a | `f.py` | `x \\| y` | `z` |\n\nend"
    )
    assert guide_lines(text) == [Line("a", "f.py", "x \\| y", "z")]
    with pytest.raises(ValueError, match="expected a table"):
        guide_lines("no table")


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.repository} {line.file}")
def test_imports_of_the_table_work(line):
    """A line that ends in a parenthesis imports names on the lines after it."""
    imports = re.findall(r"from fastdino_kernels[\w.]* import [^;`]+", line.after)
    assert imports
    for statement in imports:
        exec(statement.replace("(", "*"), {})


def test_table_has_one_import_per_repository():
    assert all("fastdino_kernels" in line.after for line in LINES)
    assert {line.repository for line in LINES} >= {"dino", "lightly", "solo-learn"}
