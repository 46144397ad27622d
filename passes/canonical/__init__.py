"""What canonicalization knows: spellings, composites, layers as functions."""
