"""`python -m rl4dlm.cli` is the command `rl4dlm`."""

from __future__ import annotations

import sys

from rl4dlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
