"""The fusion of candidates on disc and cup, beside its parts, its controls and a bound."""

from benchmarks.composition.command import Composition

__all__ = ["Composition"]
