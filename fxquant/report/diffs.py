"""What passes changed, as printed for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from passes import PassRecord

__all__ = ["colored", "format_diff", "print_diffs"]


def print_diffs(records: Iterable[PassRecord], names: Sequence[str] = ()) -> None:
    """Print the diff of every pass that changed something, or of the named ones only."""
    for record in records:
        if record.diff and (not names or record.name in names):
            print(format_diff(record, color=sys.stdout.isatty()))


def format_diff(record: PassRecord, *, color: bool) -> str:
    """A pass's diff under a line with the count of nodes by operation before and after."""
    before, after = record.operations_before, record.operations_after
    changes = [
        f"{name} {before[name]} -> {after[name]}"
        for name in sorted(before.keys() | after.keys())
        if before[name] != after[name]
    ]
    title = f"== {record.name}: {record.milliseconds:.0f} ms; {', '.join(changes) or 'same counts'}"
    return "\n".join([title, *colored(record.diff.splitlines(), color=color)])


def colored(lines: Sequence[str], *, color: bool) -> list[str]:
    """The lines of a unified diff in the terminal's green and red."""
    codes = {"+": "32", "-": "31", "@": "36"}
    if not color:
        return list(lines)
    return [f"\x1b[{codes[line[0]]}m{line}\x1b[0m" if line[:1] in codes else line for line in lines]
