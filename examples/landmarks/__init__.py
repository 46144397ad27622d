"""A facial-landmark network in 8 bits: regression instead of classification."""
