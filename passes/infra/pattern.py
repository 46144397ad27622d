"""Patterns of calls, and rules that say what to do where one stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from passes.infra.errors import PassError
from passes.infra.rewrite import Rewriter

__all__ = ["Call", "Rule", "RuleTable", "call"]


@dataclass(frozen=True)
class Call:
    """Matches a call of one of `targets` whose first operands match `operands`.

    A target is a function or operator overload (``call_function``), a name (``call_method``) or
    a module class (``call_module``, exactly that class). An operand is another Call, which only
    this call may read, unless `shared`, or None for anything. `when` is a further condition on
    the node, and `name` is what `captures` calls it.
    """

    targets: tuple[Any, ...]
    operands: tuple[Call | None, ...] = ()
    name: str | None = None
    when: Callable[[fx.Node], bool] | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("a call needs a target")

    def matches(self, node: Any) -> bool:
        """Whether `node` and its operands are of this form."""
        return self.captures(node) is not None

    def captures(self, node: Any) -> dict[str, fx.Node] | None:
        """The nodes of the named calls where `node` is of this form, else None."""
        if not isinstance(node, fx.Node) or target_key(node) not in self.targets:
            return None
        if self.when is not None and not self.when(node):
            return None
        if len(node.args) < len(self.operands):
            return None
        found = {self.name: node} if self.name else {}
        for operand, argument in zip(self.operands, node.args, strict=False):
            if operand is None:
                continue
            inner = operand.captures(argument)
            if inner is None:
                return None
            assert isinstance(argument, fx.Node)
            if len(argument.users) > 1 and not operand.shared:
                return None
            found.update(inner)
        return found


def call(
    *targets: Any,
    operands: Sequence[Call | None] = (),
    name: str | None = None,
    when: Callable[[fx.Node], bool] | None = None,
    shared: bool = False,
) -> Call:
    """A Call, spelled shortly: ``call(F.relu, operands=[call(torch.add, name="sum")])``."""
    return Call(targets, tuple(operands), name, when, shared)


@dataclass(frozen=True)
class Rule:
    """Where `pattern` stands: `check` for a reason against it, else `rewrite`.

    `rewrite` edits the graph through the Rewriter and through nothing else. It must leave
    something that the rule no longer matches, or the table never settles.
    """

    name: str
    pattern: Call
    rewrite: Callable[[fx.Node, Rewriter], object]
    check: Callable[[fx.Node], str | None] = lambda node: None


class RuleTable:
    """Rules in order of preference, found by target in one look-up."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        names = [rule.name for rule in rules]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise PassError(f"rule table: several rules are called {', '.join(doubled)}")
        self.rules = tuple(rules)
        self._by_target: dict[Any, list[Rule]] = {}
        for rule in self.rules:
            for target in rule.pattern.targets:
                self._by_target.setdefault(target, []).append(rule)

    def candidates(self, node: fx.Node) -> Sequence[Rule]:
        """The rules for the target of `node`, in order of preference."""
        return self._by_target.get(target_key(node), ())

    def apply(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        """Rewrite with the first rule that matches and has nothing against it.

        Returns the first reason against one where no rule applied; None otherwise. Whether
        anything changed stands in ``rewriter.modified``.
        """
        first: str | None = None
        for rule in self.candidates(node):
            if not rule.pattern.matches(node):
                continue
            reason = rule.check(node)
            if reason is None:
                rule.rewrite(node, rewriter)
                return None
            first = first or f"{rule.name}: {reason}"
        return first


def target_key(node: fx.Node) -> Any:
    """What a node calls: its function, its method's name, or its module's class."""
    if node.op in ("call_function", "call_method"):
        return node.target
    if node.op == "call_module":
        owner: nn.Module | None = node.graph.owning_module
        return type(owner.get_submodule(str(node.target))) if owner is not None else None
    return None
