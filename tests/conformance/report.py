"""What the conformance tests found, gathered while they run and shown at the end of the run."""

from __future__ import annotations

from collections import defaultdict

equal: dict[str, list[str]] = defaultdict(list)
"""Family to names of the cases that were reproduced as they are."""

explained: dict[str, list[str]] = defaultdict(list)
"""Rule to names of the cases whose recorded output follows from it."""


def found() -> dict[str, dict[str, list[str]]]:
    """All that was gathered in this process, in a form that a test worker can send."""
    return {"equal": dict(equal), "explained": dict(explained)}


def add(other: dict[str, dict[str, list[str]]]) -> None:
    """Takes in what another process has `found`."""
    for mine, theirs in ((equal, other["equal"]), (explained, other["explained"])):
        for key, names in theirs.items():
            mine[key].extend(names)


def lines(not_covered: dict[str, list[str]]) -> list[str]:
    """The report. `not_covered` maps a reason to names of cases."""
    text = []
    for family, names in sorted(equal.items()):
        text.append(f"{family}: {len(names)} equal to the record")
    for rule, names in sorted(explained.items()):
        text.append(f"{len(names)} explained by a rule - {rule}: {', '.join(sorted(names))}")
    for reason, names in sorted(not_covered.items()):
        text.append(f"{len(names)} not covered - {reason}: {', '.join(sorted(names))}")
    return text
