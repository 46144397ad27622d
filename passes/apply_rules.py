"""Runs a table of rules to its fixpoint."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from passes.infra.base import Decline, Pass, PassResult
from passes.infra.errors import PassError
from passes.infra.pattern import Rule, RuleTable
from passes.infra.rewrite import Rewriter

__all__ = ["ApplyRules"]

_MOST_SWEEPS = 100


class ApplyRules(Pass):
    """Rewrite every node for which a rule of the table stands, until none does.

    Each sweep asks every node once, in execution order, and looks its rules up by what it
    calls; nodes that a rule made are asked in the next sweep. A subclass gives the pass its
    name, and says whether its rules are exact and what it must come after:

        class LowerX86(ApplyRules):
            exact = False

        LowerX86(X86_RULES).run(graph_module)

    Declines with the reason of the rule where one matches and has something against it. Raises
    PassError where the rules never settle, naming the nodes that still change.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.table = RuleTable(rules)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Sweep until a sweep changes nothing; the declines are those of that last sweep."""
        rewriter = Rewriter(graph_module)
        changed = False
        for _ in range(_MOST_SWEEPS):
            fired, declines = self._sweep(rewriter)
            if not fired:
                rewriter.modified = changed
                return PassResult(rewriter.finish(), tuple(declines))
            changed = True
        raise PassError(
            f"{self.name}: does not settle: {', '.join(fired[:4])} still changes after "
            f"{_MOST_SWEEPS} sweeps; a rule must leave nothing that it matches"
        )

    def _sweep(self, rewriter: Rewriter) -> tuple[list[str], list[Decline]]:
        """The nodes that a rule changed, by name, and those where all rules refused."""
        fired: list[str] = []
        declines: list[Decline] = []
        for node in list(rewriter.graph.nodes):
            # A rule that took in several nodes has erased those that come before the last.
            if node._erased or not self.table.candidates(node):
                continue
            name = node.name
            rewriter.modified = False
            reason = self.table.apply(node, rewriter)
            if rewriter.modified:
                fired.append(name)
            elif reason is not None:
                declines.append(Decline.at(node, reason))
        return fired, declines
