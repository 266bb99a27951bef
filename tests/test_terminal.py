"""fastdino.terminal: names in messages cannot control the terminal, output that is gone."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdino import cli, terminal
from fastdino.terminal import is_terminal, print_err, print_line, print_out, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a photo, Zo\u00eb \u732b.jpg", "a photo, Zo\u00eb \u732b.jpg"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nwarning: b\r", "a\\nwarning: b\\r"),
        ("\udcff\x07\u202e\u2028", "\\udcff\\x07\\u202e\\u2028"),
    ],
)
def test_only_characters_that_print_remain(text, expected):
    assert printable(text) == expected


def test_characters_that_a_stream_cannot_encode_are_escaped():
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    print_line("Zo\u00eb \u732b.jpg", stream)
    assert written.getvalue() == b"Zo\\xeb \\u732b.jpg\n"
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    print_line("Zo\u00eb", utf8)
    assert utf8.buffer.getvalue().decode() == "Zo\u00eb\n"


def test_names_of_an_ascii_locale_are_shown_as_utf8():
    assert printable("Zo\udcc3\udcab \udcff") == "Zo\u00eb \\udcff"


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1, closefd=False)


def full():
    return open("/dev/full", "w")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", [lambda: None, closed, broken_pipe, full])
def test_output_that_is_gone_is_no_error(make):
    stream = make()
    assert not is_terminal(stream)
    for _ in range(3):
        print_line("a line", stream)
    if stream is not None:
        with pytest.raises((OSError, ValueError)):
            stream.write("x" * 100_000)  # more than the buffer


@pytest.mark.parametrize("target", ["/dev/full", "pipe"])
def test_program_ends_with_its_status_if_its_output_is_gone(target):
    code = (
        "import sys; from fastdino.terminal import finish_output\n"
        "print('a line'); finish_output(); sys.exit(3)"
    )
    stdout = os.open("/dev/full", os.O_WRONLY) if target == "/dev/full" else broken_pipe().fileno()
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, env=buffered
    )
    os.close(stdout)
    assert (done.returncode, done.stderr) == (3, b"")


def calls_of_print(path):
    """Return the lines on which a module writes text by itself."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "warnings.warn", "tqdm.write", "sys.stdout.write")
    ]


def test_all_output_passes_through_this_module():
    """A print of its own could forget to escape a file name."""
    package = Path(terminal.__file__).parent
    modules = [path for path in package.rglob("*.py") if "bench" not in path.parts]
    modules.remove(Path(terminal.__file__))
    assert len(modules) > 50
    found = {str(path): lines for path in modules if (lines := calls_of_print(path))}
    assert found == {}


HOSTILE = [
    "\x1b[2J\x1b]0;title\x07", "a\nwarning: forged", "b\rc", "\u202egpj.exe", "\x9b2J", "\u2028d",
    "<script>alert(1)</script>", "a|b`c`*d*", "\udcff", "$\\frac{$",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("write", [print_out, print_err])
def test_each_text_is_one_line(capsys, name, write):
    write(f"skipped {name}: is not an image", "next")
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_of_flags_are_printable(capsys, name):
    """A shell expands a pattern to file names."""
    with pytest.raises(SystemExit):
        cli.main(["info", f"--{name}"])
    error = capsys.readouterr().err
    assert "unrecognized arguments" in error
    assert error.splitlines()[-1].isprintable()
