"""What went wrong while tracing: the line of the user's code, the value, and what helps."""

from __future__ import annotations

import ast
import functools
import linecache
import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import torch

__all__ = ["Diagnosis", "diagnose", "guarded_outcome", "innermost_user_line", "user_line"]

_FOREIGN = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent / "trace.py"),
    str(Path(__file__).parent / "tracer.py"),
    str(Path(__file__).parent / "doctor.py"),
    "<eval_with_key>",
)

# What the message of torch.fx or Python holds: what the code did with the value; what helps.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        "iterated",
        "iterates over",
        "unpack it into a fixed number of names (a, b = ...), index it, or move the loop into a "
        "submodule of its own, which then stays float",
    ),
    (
        "'len'",
        "takes the length of",
        "use .size(dim), or store the length as a constant in __init__",
    ),
    (
        "control flow",
        "branches on",
        "use torch.where, decide it once in __init__, or move the branch into a submodule of its "
        "own, which then stays float",
    ),
    (
        "Proxy",
        "needs the number behind",
        "use tensor operations on it, store the number as a constant in __init__, or move the "
        "code into a submodule of its own, which then stays float",
    ),
)


_ENTRY = re.compile(r'\s*File "([^"]+)", line (\d+), in ')


@dataclass(frozen=True)
class Diagnosis:
    """Where tracing stopped and why; `str` gives all of it on one line."""

    file: str
    line: int
    function: str
    problem: str
    advice: str

    @property
    def reason(self) -> str:
        """``FILE:LINE PROBLEM``, without the advice."""
        return f"{self.file}:{self.line} (in {self.function}) {self.problem}"

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def diagnose(error: BaseException) -> Diagnosis:
    """What `error`, raised while tracing, says about the innermost line of the user's code."""
    message = " ".join(str(error).split())
    step = _innermost_user_step(error.__traceback__)
    if step is None:
        return Diagnosis("<unknown>", 0, "<unknown>", f"raises {type(error).__name__}", message)
    code, instruction, line = step.tb_frame.f_code, step.tb_lasti, step.tb_lineno
    file, function = code.co_filename, code.co_qualname
    for phrase, does, advice in _CAUSES:
        if phrase in message:
            value = _expression_at(code, instruction) or linecache.getline(file, line).strip()
            problem = f"{does} the value `{value}`, which is known only when the model runs"
            return Diagnosis(file, line, function, problem, advice)
    source = linecache.getline(file, line).strip()
    return Diagnosis(
        file, line, function, f"fails at `{source}`: {type(error).__name__}: {message}", ""
    )


def user_line(frame: FrameType | None) -> str:
    """``File "...", line N, in forward`` and the source of the first user frame from `frame` up."""
    while frame is not None and _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    file, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(file, line).strip()
    return f'  File "{file}", line {line}, in {frame.f_code.co_name}\n    {source}'


def innermost_user_line(stack: str) -> str:
    """Of a stack as text, innermost last: the last entry of the user's code, its source below."""
    lines = stack.splitlines()
    for index in range(len(lines) - 1, -1, -1):
        found = _ENTRY.match(lines[index])
        if found and not _is_foreign(found[1]):
            source = linecache.getline(found[1], int(found[2])).strip()
            return f"{lines[index]}\n    {source}"
    return ""


def guarded_outcome(frame: FrameType | None) -> bool | None:
    """The truth that lets `frame` pass a check, where it is at ``assert`` or ``if ...: raise``.

    Symbolic tracing cannot evaluate a check; what it guards against is the caller's mistake, so
    the check is taken to hold. None where the branch is no such check.
    """
    if frame is None:
        return None
    span = _span(frame.f_code, frame.f_lasti)
    if span is None:
        return None
    for statement in _branches(frame.f_code.co_filename, span):
        if isinstance(statement, ast.Assert):
            return _truth_of_part(statement.test, span, True)
        if isinstance(statement, ast.If) and not statement.orelse:
            raises = isinstance(statement.body[-1], ast.Raise) and len(statement.body) == 1
            return _truth_of_part(statement.test, span, False) if raises else None
    return None


_Span = tuple[int, int, int, int]


def _truth_of_part(test: ast.expr, span: _Span, wanted: bool) -> bool | None:
    if not _contains(test, span):
        return _truth_of_any_part(test, wanted)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _truth_of_part(test.operand, span, not wanted)
    if isinstance(test, ast.BoolOp):
        for operand in test.values:
            if _contains(operand, span):
                return _truth_of_part(operand, span, wanted)
        return wanted
    # `all(f(x))` and the like ask for a truth value deep inside: no telling what it should be.
    if isinstance(test, ast.Compare) or _span_of(test) == span:
        return wanted
    return None


def _truth_of_any_part(test: ast.expr, wanted: bool) -> bool | None:
    # Python 3.11 attributes all of an assertion to the statement: the parts have to agree.
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, wanted = test.operand, not wanted
    mixed = isinstance(test, ast.BoolOp) and any(isinstance(n, ast.Not) for n in ast.walk(test))
    return None if mixed else wanted


def _innermost_user_step(traceback: TracebackType | None) -> TracebackType | None:
    found = None
    while traceback is not None:
        if not _is_foreign(traceback.tb_frame.f_code.co_filename):
            found = traceback
        traceback = traceback.tb_next
    return found


def _is_foreign(file: str) -> bool:
    return file.startswith(_FOREIGN)


def _span(code: CodeType, instruction: int) -> _Span | None:
    positions = list(code.co_positions())[instruction // 2]
    line, end_line, column, end_column = positions
    if line is None or end_line is None or column is None or end_column is None:
        return None
    return line, column, end_line, end_column


def _expression_at(code: CodeType, instruction: int) -> str:
    """The source of the expression that the instruction evaluates, on one line; "" if unknown."""
    span = _span(code, instruction)
    tree = _parse(code.co_filename)
    if span is None or tree is None:
        return ""
    nodes = [node for node in ast.walk(tree) if _contains(node, span)]
    exact = [node for node in nodes if _span_of(node) == span]
    if not exact:
        return ""
    expression = exact[-1]
    if isinstance(expression, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        expression = expression.generators[0].iter
    elif isinstance(expression, ast.For):
        expression = expression.iter
    elif isinstance(expression, (ast.If, ast.While, ast.Assert)):
        expression = expression.test
    return " ".join(ast.unparse(expression).split())


def _branches(file: str, span: _Span) -> list[ast.stmt]:
    """The statements whose test holds `span`, innermost first."""
    tree = _parse(file)
    if tree is None:
        return []
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.If, ast.Assert, ast.While))
        and (_contains(node.test, span) or _span_of(node) == span)
    ]
    return list(reversed(found))


@functools.lru_cache(maxsize=64)
def _parse(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None


def _span_of(node: ast.AST) -> _Span | None:
    if not isinstance(node, (ast.expr, ast.stmt)):
        return None
    end_line, end_column = node.end_lineno, node.end_col_offset
    if end_line is None or end_column is None:
        return None
    return node.lineno, node.col_offset, end_line, end_column


def _contains(node: ast.AST, span: _Span) -> bool:
    own = _span_of(node)
    return own is not None and own[:2] <= span[:2] and span[2:] <= own[2:]
