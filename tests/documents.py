"""Commands that the documentation contains, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

CLUSTERS = Path(__file__).parents[1] / "docs/clusters.md"


def documented_script() -> str:
    """Return the batch script of docs/clusters.md."""
    blocks = re.findall(r"\n    #!/bin/bash\n(?:    .*\n)+", CLUSTERS.read_text(encoding="utf-8"))
    assert len(blocks) == 1
    return "".join(line.removeprefix("    ") for line in blocks[0].lstrip("\n").splitlines(True))
