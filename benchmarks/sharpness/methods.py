"""What the benchmark compares: plain training, and every method of the sharpness family.

`DISAM`, which needs the losses of several domains, is left out.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

import gradkit as gk

REFERENCE = "SGD"
"""Plain training, which the methods are compared with."""


@dataclass(frozen=True)
class Method:
    """A method and what it needs.

    Attributes:
        kind: Its class, or a function that makes it.
        landscape: Arguments on the landscape of two wells; by default ρ = 0.75.
        plain: Whether its base optimizer has no momentum and no weight decay.
        samples: Whether it chooses samples by their losses, so that the objective returns one for
            each; not on the landscape, which has none.
    """

    kind: Callable[..., gk.Transform]
    landscape: Mapping[str, float] = field(default_factory=lambda: {"rho": 0.75})
    plain: bool = False
    samples: bool = False

    @property
    def radius(self) -> float | None:
        """The default of its argument `rho`; None if it has none."""
        argument = inspect.signature(self.kind).parameters.get("rho")
        return None if argument is None else float(argument.default)


def every_fifth_sam(rho: float = 0.05) -> gk.Transform:
    """SAM in every fifth step, and plain steps in between."""
    return gk.Every(5, gk.SAM(rho))


# The radius on the landscape is 0.75 where it is one in the space of weights. ASAM's is in units of
# the weights, which are about 2 there, and BSAM's elementwise in those of its preconditioner.
METHODS: dict[str, Method] = {
    "SAM": Method(gk.SAM),
    "ASAM": Method(gk.ASAM, {"rho": 0.375}),
    "GSAM": Method(gk.GSAM),
    "SAGM": Method(gk.SAGM),
    "WSAM": Method(gk.WSAM),
    "FriendlySAM": Method(gk.FriendlySAM),
    "VaSSO": Method(gk.VaSSO),
    "SAMPa": Method(gk.SAMPa),
    "ESAM": Method(gk.ESAM, {"rho": 0.75, "gamma": 1.0}, samples=True),
    "CRSAM": Method(gk.CRSAM),
    "GAM": Method(gk.GAM, {"rho": 0.75, "rho_inner": 0.75}),
    "LookSAM": Method(gk.LookSAM),
    "Every": Method(every_fifth_sam),
    "AESAM": Method(gk.AESAM),
    "MSAM": Method(gk.MSAM),
    "BSAM": Method(gk.BSAM, {"rho": 0.5}, plain=True),
    "SlowWeights": Method(gk.SlowWeights, {}),
}
"""Every method by its name, in the order of the documentation. A new one is a line here."""


def build(
    name: str, *, steps: int, examples: int, seed: int, **arguments: float
) -> tuple[gk.Transform, ...]:
    """A chain with the method, made anew since many keep state; empty for `REFERENCE`.

    Args:
        name: `REFERENCE` or one of `METHODS`.
        steps: The training's length, for methods that ask for it.
        examples: The number of training examples, for those that ask.
        seed: For methods that draw random numbers.
        **arguments: Those that are not to have their defaults.
    """
    if name == REFERENCE:
        return ()
    kind = METHODS[name].kind
    known = {
        "total_steps": steps,
        "num_data": examples,
        "generator": torch.Generator().manual_seed(seed),
    }
    taken = inspect.signature(kind).parameters
    given = {key: value for key, value in known.items() if key in taken}
    return (kind(**given, **arguments),)


FAILURES = (ArithmeticError, RuntimeError, ValueError)
"""What a method may raise where it diverges; such a run is reported."""
