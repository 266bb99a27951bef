"""`python -m fastdino`, which is the command `fastdino`."""

import sys

from fastdino.cli import main

if __name__ == "__main__":
    sys.exit(main())
