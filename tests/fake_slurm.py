"""Commands of Slurm in a folder of PATH, whose answers a test sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
cd {folder}
echo "{name} $*" >> calls
busy=$(cat {name}.busy)
if [ "$busy" -gt 0 ]; then
  echo $((busy - 1)) > {name}.busy
  echo "{name}: error: $(cat error)" >&2
  exit 1
fi
{answer}
"""
ERROR = "Socket timed out on send/recv operation"


class FakeSlurm:
    """squeue, scontrol and srun.

    Args:
        state: of the job, printed by squeue.
        status: exit status of srun.
        busy: number of times that commands fail, by name.
        error: of these failures.
    """

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        state: str = "RUNNING",
        status: int = 75,
        busy: dict[str, int] | None = None,
        error: str = ERROR,
    ) -> None:
        self.folder = folder
        folder.mkdir()
        answers = {"squeue": "cat state", "scontrol": ":", "srun": "exit $(cat status)"}
        for name, answer in answers.items():
            (folder / f"{name}.busy").write_text(f"{(busy or {}).get(name, 0)}\n")
            script = SCRIPT.format(folder=folder, name=name, answer=answer)
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        self.set("state", state)
        self.set("status", status)
        self.set("error", error)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def set(self, name: str, value: object) -> None:
        (self.folder / name).write_text(f"{value}\n")

    def calls(self, name: str) -> list[str]:
        """Return the command lines of one of the commands."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.split()[0] == name]
