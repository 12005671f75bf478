"""What was wrong with the files of a set: one line of the log, and the list of all."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from fastgan.data.files import plural, printable

__all__ = ["Remarks", "listed", "tell"]

log = logging.getLogger("fastgan.data")

Remarks = list[tuple[str, str]]  # (file, what was wrong with it)

KINDS = 8  # in a line


def tell(name: str, remarks: Sequence[tuple[str, str]], what: str = "") -> None:
    """Log one line on the files of set `name`: how many there are, and each kind of remark with its first file.

    what: the verb of the line; by default that the files are not as they should be. Remarks are of one kind where they
    differ in numbers and names of files alone. The whole list is the set's `skipped`, and a run's skipped.txt.
    """
    if not remarks:
        return
    kinds: dict[str, tuple[str, int]] = {}
    for file, why in remarks:
        kind = re.sub(r"\S*[\d/.]\S*|s\b", "", why)
        first, count = kinds.get(kind, (f"{file}: {why}" if file else why, 0))
        kinds[kind] = first, count + 1
    found = sorted(kinds.values(), key=lambda pair: -pair[1])
    parts = [f"{first} ({count:,} such)" if count > 1 else first for first, count in found[:KINDS]]
    if others := sum(count for _, count in found[KINDS:]):
        parts.append(f"{others:,} of other kinds")
    if len(remarks) > len(found) or others:
        parts.append("a run has all of them in its skipped.txt")
    count = len({file for file, _ in remarks})
    what = what or ("is not as it should be" if count == 1 else "are not as they should be")
    log.warning("load: %s of %s %s: %s", plural(count, "file"), printable(name), what, "; ".join(map(printable, parts)))


def listed(remarks: Sequence[tuple[str, str]]) -> str:
    """A line a remark, as text that any file can hold."""
    return "".join(" ".join(printable(f"{file}: {what}").split()) + "\n" for file, what in remarks)
