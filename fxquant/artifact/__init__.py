"""One file for a compiled model."""
