"""Flat vectors, gradients, and the interfaces of oracles and transforms."""
