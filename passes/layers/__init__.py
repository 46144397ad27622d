"""Convolutions and linear layers: what passes ask about them, and what fusing makes of them."""
