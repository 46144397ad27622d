"""What to quantize and how: recipes, their keys, selectors, and the named ones."""
