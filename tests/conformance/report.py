"""What the conformance tests found, gathered while they run and shown at the end of the run."""

from __future__ import annotations

from collections import defaultdict

equal: dict[str, list[str]] = defaultdict(list)
"""Family to names of the cases that were reproduced as they are."""

explained: dict[str, list[str]] = defaultdict(list)
"""Rule to names of the cases whose recorded output follows from it."""


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
