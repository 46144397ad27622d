"""What the machinery raises when a pass breaks its contract."""

from __future__ import annotations

from typing import Any


class PassError(Exception):
    """A pass broke its contract; the message names the pass and, where there is one, the node.

    `failure` is the `Failure` of `passes.infra.reproducer`, where a pipeline ran the pass.
    """

    failure: Any = None


class OrderError(PassError):
    """The passes of a pipeline stand in an order that one of them forbids."""


class UnsupportedGraphError(PassError):
    """The graph is the user's and asks for what no pass can express; says what to change."""


class VerificationError(PassError):
    """A graph does not hold what its stage promises, or an exact pass changed its outputs."""
