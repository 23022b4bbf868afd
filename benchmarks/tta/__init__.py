"""Test-time adaptation, measured: the tables of GraTa's paper with further methods and controls."""

from benchmarks.tta.command import TTA

__all__ = ["TTA"]
