"""What passes changed, as printed for people: equal edits together, or the whole diff."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from passes import PassRecord

__all__ = ["colored", "format_diff", "print_diffs", "summarize_diff"]

_LINE = re.compile(r"([-+])(\w+) = (.*)")
_SHAPE = re.compile(r"\s+\(?[a-z]+\d*\[[\d,]*\].*$")
_NUMBER = re.compile(r"-?\d+\.?\d*(e-?\d+)?")
_SHOWN = 3


def print_diffs(records: Iterable[PassRecord], names: Sequence[str] = ()) -> None:
    """Print what every pass changed, equal edits together; of the named passes the whole diff."""
    color = sys.stdout.isatty()
    for record in records:
        if record.diff and (not names or record.name in names):
            form = format_diff if names else summarize_diff
            print(form(record, color=color))


def format_diff(record: PassRecord, *, color: bool) -> str:
    """A pass's diff under a line with the count of nodes by operation before and after."""
    return "\n".join([_title(record), *colored(record.diff.splitlines(), color=color)])


def summarize_diff(record: PassRecord, *, color: bool) -> str:
    """A pass's edits: what went, what came, what became something else, each kind on one line.

    Operations that read another name, because theirs is gone, and arguments that are spelled out
    are no edits.
    """
    lines = record.diff.splitlines()
    removed, added = _by_name(lines, "-"), _by_name(lines, "+")
    groups: dict[str, list[str]] = {}
    respelled = 0
    for name, before in removed.items():
        after = added.get(name)
        if after is None:
            groups.setdefault(f"- {before}", []).append(name)
        elif _call(before) == _call(after):
            detail = after.partition(") ")[2]
            if detail and detail != before.partition(") ")[2]:
                text = f"+ {_call(after)} gets {detail.partition(', scale')[0]}"
                groups.setdefault(text, []).append(name)
            else:
                respelled += before != after
        else:
            groups.setdefault(f"! {before} -> {after}", []).append(name)
    for name, after in added.items():
        if name not in removed:
            groups.setdefault(f"+ {after}", []).append(name)
    for line in lines:
        if line.startswith("~ "):
            place, _, change = line[2:].partition(": ")
            groups.setdefault(f"~ {re.sub(_NUMBER, '#', change)}", []).append(place)
    rows = [
        f"{text[0]} {f'{len(found)} x ' if len(found) > 1 else ''}{text[2:]}   ({_some(found)})"
        for text, found in groups.items()
    ]
    if respelled:
        rows.append(f"  {respelled} x only arguments spelled out")
    return "\n".join([_title(record), *colored(rows, color=color)])


def colored(lines: Sequence[str], *, color: bool) -> list[str]:
    """The lines of a unified diff in the terminal's green and red."""
    codes = {"+": "32", "-": "31", "@": "36", "!": "33", "~": "36"}
    if not color:
        return list(lines)
    return [f"\x1b[{codes[line[0]]}m{line}\x1b[0m" if line[:1] in codes else line for line in lines]


def _title(record: PassRecord) -> str:
    before, after = record.operations_before, record.operations_after
    changes = [
        f"{name} {before[name]} -> {after[name]}"
        for name in sorted(before.keys() | after.keys())
        if before[name] != after[name]
    ]
    return f"== {record.name}: {record.milliseconds:.0f} ms; {', '.join(changes) or 'same counts'}"


def _by_name(lines: Iterable[str], sign: str) -> Mapping[str, str]:
    """What the lines of one side compute, by node; other nodes' names are dots, shapes are gone."""
    found = [match for line in lines if (match := _LINE.fullmatch(line)) and match[1] == sign]
    return {match[2]: _without_names(_SHAPE.sub("", match[3])) for match in found}


def _without_names(right: str) -> str:
    operation, bracket, rest = right.partition("(")
    arguments, close, detail = rest.rpartition(")")
    # A word that is followed by = is the name of an argument, one in quotes a text.
    dotted = re.sub(r"(?<![\w.'])(?!None\b|True\b|False\b)[A-Za-z_]\w*(?![\w.=('])", "·", arguments)
    return f"{operation}{bracket}{dotted}{close}{detail}".strip()


def _call(right: str) -> str:
    """The operation."""
    return right.partition("(")[0]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
