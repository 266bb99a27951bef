"""`fastdino bench`: which benchmark its flags ask for, and mistakes told before it begins."""

import pytest

from fastdino import cli


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages"], "--stages goes with --loader"),
        (["--loader", "--scaling"], "--scaling does not go with --loader"),
        (["--loader", "--arch", "vit_tiny"], "--arch does not go with --loader"),
        (["--loader", "--output", "/dev/null/here"], "--output /dev/null/here cannot be made"),
        (["--output", "/dev/null/here"], "--output /dev/null/here cannot be made"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(capsys, words, message):
    assert cli.main(["bench", *words]) == cli.EXIT_MISTAKE
    assert message in capsys.readouterr().err
