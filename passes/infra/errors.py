"""What the machinery raises when a pass breaks its contract."""

from __future__ import annotations


class PassError(Exception):
    """A pass broke its contract; the message names the pass and, where there is one, the node."""


class OrderError(PassError):
    """The passes of a pipeline stand in an order that one of them forbids."""


class UnsupportedGraphError(PassError):
    """The graph is the user's and asks for what no pass can express; says what to change."""


class VerificationError(PassError):
    """A graph does not hold what its stage promises, or an exact pass changed its outputs."""
