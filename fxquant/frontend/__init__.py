"""From a user's model to the float graph."""
