"""A mutant: one small change of one file, which the tests named with it should notice."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import catalog

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """Replace the text `was`, which occurs once in `file`, by `became`.

    tests: arguments of pytest, relative to the root; the mirroring test file if empty.
    equivalent: why no test can notice it; such a mutant is expected to survive.
    crash: why its tests may end the process, which then counts as a failing test.
    reported: found in a review, when no test noticed it; the table lists these mutants first.
    """

    file: str
    was: str
    became: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""
    crash: str = ""
    reported: bool = False

    def selection(self) -> tuple[str, ...]:
        """Return the arguments of pytest."""
        return self.tests or (f"tests/test_{Path(self.file).stem}.py",)

    def source(self, root: Path = ROOT) -> str:
        """Return the mutated file.

        Raises: ValueError if `was` does not occur exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.was) != 1:
            raise ValueError(
                f"{self.file}: expected {self.was!r} once, found it {text.count(self.was)} times: "
                "update the mutant to the present code"
            )
        return text.replace(self.was, self.became)

    def key(self, root: Path = ROOT) -> str:
        """Return a hash of the mutated file and of the files with its tests."""
        digest = hashlib.sha256(self.source(root).encode())
        digest.update("\0".join(self.selection()).encode())
        for name in sorted({argument.split("::")[0] for argument in self.selection()}):
            if (root / name).is_file():
                digest.update((root / name).read_bytes())
        return digest.hexdigest()[:16]


def all_mutants() -> dict[str, tuple[Mutant, ...]]:
    """Return the mutants of each module of the catalog, by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(catalog.__path__))
    return {
        name: importlib.import_module(f"tests.mutants.catalog.{name}").MUTANTS for name in names
    }
