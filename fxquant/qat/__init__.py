"""Training through the quantizers."""
