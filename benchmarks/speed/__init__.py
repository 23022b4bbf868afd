"""What a step costs beside the passes and the memory traffic that no method can do without.

Ratios are taken within rounds in which every variant takes one step, so that both sides see the
same machine; peak memory is measured in a fresh process each.
"""

from benchmarks.speed.command import Speed

__all__ = ["Speed"]
