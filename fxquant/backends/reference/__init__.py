"""The target that executes the integer semantics exactly."""
