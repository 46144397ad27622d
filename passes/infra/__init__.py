"""The machinery of passes: rewriting, verifying, listing, running."""
