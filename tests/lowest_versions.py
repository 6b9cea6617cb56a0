"""Prints the oldest version of each runtime dependency that pyproject.toml allows, as constraints for pip.

    python tests/lowest_versions.py > lowest.txt
    python tests/lowest_versions.py torch > lowest.txt      # all but torch

`make test-lowest` installs these; pip refuses them where they contradict each other, so that the bounds are met as
written.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def lowest_versions() -> dict[str, str]:
    """Names of runtime dependencies and their lower bounds."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found = {}
    for requirement in project["dependencies"]:
        match = re.fullmatch(r"([\w-]+)>=([\w.]+)(,.*)?", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound of the form name>=version")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in lowest_versions().items() if name not in sys.argv[1:]))
