"""Benchmarks: strategies compared side by side, with machine and versions."""
