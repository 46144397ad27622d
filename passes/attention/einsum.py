"""`torch.einsum` of two tensors that is a batched matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from passes.infra.base import shape_of
from passes.infra.expansion import Expansion
from passes.infra.rewrite import Rewriter
from passes.infra.stored import constant_value

__all__ = ["expand_einsum"]


def expand_einsum(rewriter: Rewriter, node: fx.Node) -> str | None:
    """Write an einsum as permutations, reshapes and `torch.matmul`; the reason where not.

    With the letters sorted into those of both operands and the result (B), of the first and the
    result (I), of the second and the result (J) and of both operands alone (K), it is
    [B, I, K] @ [B, K, J] = [B, I, J].
    """
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or node.kwargs:
        return "its equation is not given as text"
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return f"it has {len(operands)} operands, and a matrix product has 2"
    shapes = [shape_of(operand) for operand in operands]
    if shapes[0] is None or shapes[1] is None:
        return "the shapes of its operands are not known"
    if all(constant_value(operand) is not None for operand in operands):
        return "both operands are constants"
    letters = _letters(equation, [len(shapes[0]), len(shapes[1])])
    if isinstance(letters, str):
        return letters
    (a, b), out = letters
    sizes = dict(zip(a, shapes[0], strict=True))
    if any(
        sizes.setdefault(letter, size) != size for letter, size in zip(b, shapes[1], strict=True)
    ):
        return "it broadcasts a dim"
    product = _Product(
        [letter for letter in out if letter in a and letter in b],
        [letter for letter in out if letter in a and letter not in b],
        [letter for letter in out if letter in b and letter not in a],
        [letter for letter in a if letter in b and letter not in out],
    )
    if len(product.letters) != len(set(a) | set(b)):
        return "it sums over a dim that only one operand has"
    if not product.summed:
        return "it sums over nothing"
    # The rows of the result are those of the operand whose letters come first in it.
    if (
        product.rows
        and product.columns
        and out.index(product.columns[0]) < out.index(product.rows[0])
    ):
        product = product.swapped()
        operands, (a, b) = operands[::-1], (b, a)
    _write(Expansion(rewriter, node), operands, (a, b), out, sizes, product)
    return None


@dataclass(frozen=True)
class _Product:
    batch: list[str]
    rows: list[str]
    columns: list[str]
    summed: list[str]

    @property
    def letters(self) -> list[str]:
        return [*self.batch, *self.rows, *self.columns, *self.summed]

    def swapped(self) -> _Product:
        return _Product(self.batch, self.columns, self.rows, self.summed)


def _write(
    expansion: Expansion,
    operands: Sequence[Any],
    given: tuple[list[str], list[str]],
    out: list[str],
    sizes: dict[str, int],
    product: _Product,
) -> None:
    node = expansion.node
    batch, rows, columns, summed = product.batch, product.rows, product.columns, product.summed
    # What stands first in a value that depends on the input may be the batch size.
    dynamic = next(
        letters[0]
        for operand, letters in zip(operands, given, strict=True)
        if constant_value(operand) is None
    )

    def arranged(x: fx.Node, letters: list[str], *groups: list[str]) -> fx.Node:
        order = [letter for group in groups for letter in group]
        x = expansion.permute(x, *(letters.index(letter) for letter in order))
        if all(len(group) == 1 for group in groups):
            return x
        return expansion.reshape(x, *(_size(group, sizes, dynamic) for group in groups))

    left = arranged(operands[0], given[0], *([letter] for letter in batch), rows, summed)
    right = arranged(operands[1], given[1], *([letter] for letter in batch), summed, columns)
    result = expansion.call(torch.matmul, left, right)
    found = [*batch, *rows, *columns]
    if len(rows) != 1 or len(columns) != 1:
        shape = [_size([letter], sizes, dynamic) for letter in found]
        result = expansion.reshape(result, *shape)
    result = expansion.permute(result, *(found.index(letter) for letter in out))
    assert result is not node
    expansion.finish(result)


def _size(group: list[str], sizes: dict[str, int], dynamic: str) -> int:
    return -1 if dynamic in group else prod(sizes[letter] for letter in group)


def _letters(
    equation: str, ranks: Sequence[int]
) -> tuple[tuple[list[str], list[str]], list[str]] | str:
    """The letters of both operands and of the result; text says why not."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return f"its equation has {len(terms)} operands, and a matrix product has 2"
    if not arrow:
        return "its equation does not name the result"
    parts = [*terms, right]
    # An ellipsis stands for the dims that the letters leave over, counted from the end.
    extra = max(
        (rank - len(term) + 3 for term, rank in zip(terms, ranks, strict=True) if "..." in term),
        default=0,
    )
    dots = [str(number) for number in range(extra)]
    split: list[list[str]] = []
    for index, part in enumerate(parts):
        before, found, behind = part.partition("...")
        count = ranks[index] - len(before) - len(behind) if index < 2 else extra
        if found and count != extra:
            return "it broadcasts a dim"
        split.append([*before, *(dots if found else ()), *behind])
    if any(len(set(letters)) != len(letters) for letters in split):
        return "it takes a diagonal"
    if any("..." in term for term in terms) and "..." not in right:
        return "it sums over the dims of its ellipsis"
    return (split[0], split[1]), split[2]
