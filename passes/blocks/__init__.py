"""Where a graph branches, and what goes together in a block."""
