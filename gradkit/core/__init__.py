"""Flat vectors, gradients, and the seams between oracles and transforms."""
