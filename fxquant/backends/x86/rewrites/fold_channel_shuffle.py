"""A shuffle of channels that only convolutions read becomes an order of their weights."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from fxquant.backends.x86.rewrites.convolution import Convolution
from fxquant.to_integer import Grid
from passes import Decline, Pass, PassResult, Rewriter

__all__ = ["FoldChannelShuffle"]


class FoldChannelShuffle(Pass):
    """The columns of the reading convolutions are put in the order of the unshuffled channels.

        s = shuffle(x)       =>     return conv(x, w[:, unshuffled])
        return conv(s, w)

    Declines where something else reads the shuffled value, or a convolution in groups.
    """

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Fold every shuffle that allows it."""
        rewriter = Rewriter(graph_module)
        declines = []
        for node in list(rewriter.graph.nodes):
            if node.target is torch.channel_shuffle and "grid" in node.meta:
                reason = self._fold(node, rewriter)
                if reason is not None:
                    declines.append(Decline.at(node, reason))
        return PassResult(rewriter.finish(), tuple(declines))

    def _fold(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        groups = operator.index(node.kwargs["groups"])  # type: ignore[arg-type]
        folded: dict[fx.Node, Convolution] = {}
        for user in node.users:
            convolution = Convolution.read(user)
            if convolution is None or convolution.groups > 1 or convolution.residual is node:
                return f"{user.name} reads it, and is no convolution of all channels"
            order = torch.arange(convolution.weight.shape[1]).reshape(groups, -1).t().flatten()
            weight = convolution.weight[:, order.argsort()].contiguous()
            folded[user] = replace(convolution, x=source, weight=weight)
            if (refusal := folded[user].refusal()) is not None:
                return refusal
        for user, convolution in folded.items():
            grid: Grid = user.meta["grid"]
            convolution.write(rewriter, user, user, grid)
        return None
