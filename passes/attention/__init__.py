"""Attention in its many spellings, and what it is made of."""
