"""A method's floor, and the variants that are measured against it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Step = Callable[[], object]
MakeStep = Callable[[], Step]
FLOOR = "floor"


@dataclass(frozen=True)
class Traffic:
    """Reads and writes of P-sized vectors that a method cannot do without, beyond its passes.

    Attributes:
        parts: What they are for: name, reads, writes.
        numbers: P.
    """

    parts: tuple[tuple[str, int, int], ...]
    numbers: int

    @property
    def reads(self) -> int:
        """How many vectors are read."""
        return sum(reads for _, reads, _ in self.parts)

    @property
    def writes(self) -> int:
        """How many vectors are written."""
        return sum(writes for *_, writes in self.parts)

    def milliseconds(self, gigabytes_per_second: float, width: int = 4) -> float:
        """What they must cost; `width` is the bytes of a number.

        Example:
            >>> Traffic((("copy", 1, 1),), numbers=1_000_000).milliseconds(8.0)
            1.0
        """
        moved = (self.reads + self.writes) * self.numbers * width
        return moved / (gigabytes_per_second * 1e9) * 1e3


@dataclass(frozen=True)
class Comparison:
    """What is timed in turn: each entry makes a step with a network of its own.

    Attributes:
        method: The method's name, with K.
        passes: The floor in words.
        floor: The floor's step.
        ours: gradkit's variants, and others that take part in every round.
        peers: Other libraries'.
        without: For some of `ours`, a step whose time is taken off the variant's in each round;
            what is left is what the method adds.
        traffic: The second floor, in bytes.
    """

    method: str
    passes: str
    floor: MakeStep
    ours: Mapping[str, MakeStep]
    peers: Mapping[str, MakeStep]
    traffic: Traffic
    without: Mapping[str, MakeStep] = field(default_factory=dict)
