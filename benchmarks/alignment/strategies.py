"""What the benchmarks compare: every way that gradkit has of joining objectives."""

import inspect
from collections.abc import Callable, Sequence

import torch

import gradkit as gk

REFERENCE = "Sum"
"""The strategy that the others are compared with: plain training on the sum of the losses."""

RULES: tuple[type[gk.Transform], ...] = (
    gk.Sum, gk.Mean, gk.Constant, gk.RandomWeights, gk.PCGrad, gk.GradVac, gk.CAGrad, gk.MGDA,
    gk.IMTLG, gk.NashMTL, gk.AlignedMTL, gk.UPGrad, gk.DualProj, gk.ConFIG, gk.FairGrad, gk.SDMGrad,
    gk.CosineGate, gk.GradDrop, gk.AgrSum, gk.AgrRand, gk.ANDMask, gk.SANDMask, gk.GSMorph, gk.Krum,
    gk.TrimmedMean, gk.PCD, gk.CRMOGM, gk.MoDo, gk.ExcessMTL,
)  # fmt: skip
OTHERS: tuple[type[gk.Transform], ...] = (
    gk.GradNorm, gk.DBMTL, gk.MoCo, gk.Fish, gk.IDGM, gk.MLDG,
)  # fmt: skip
WEIGHTINGS: tuple[type[gk.Transform], ...] = (
    gk.RLW, gk.UW, gk.IMTLL, gk.DWA, gk.GLS, gk.FAMO, gk.STCH, gk.PBI, gk.COSMOS,
)  # fmt: skip

STRATEGIES: dict[str, Callable[..., gk.Transform]] = {
    kind.__name__: kind for kind in (*RULES, *OTHERS, *WEIGHTINGS)
}

FEWEST_OBJECTIVES = {"Krum": 3, "TrimmedMean": 3}
"""Strategies that two objectives are too few for."""


def suitable(objectives: int) -> list[str]:
    """The names of the strategies for this many objectives, in the order of the table."""
    return [name for name in STRATEGIES if FEWEST_OBJECTIVES.get(name, 2) <= objectives]


def build(name: str, objectives: int, seed: int) -> gk.Transform:
    """A strategy with its default settings, made anew: many keep state from step to step.

    `Constant`, which has no defaults, counts the first objective twice.

    Args:
        name: One of `STRATEGIES`.
        objectives: How many there will be.
        seed: For strategies that draw random numbers.
    """
    kind = STRATEGIES[name]
    if name == "Constant":
        weights: Sequence[float] = [2.0] + [1.0] * (objectives - 1)
        return kind(weights)
    if "generator" in inspect.signature(kind).parameters:
        return kind(generator=torch.Generator().manual_seed(seed))
    return kind()


FAILURES = (ArithmeticError, RuntimeError, ValueError)
"""What a strategy may raise on a problem that it is not made for; such a run is reported."""


def one_line(error: BaseException) -> str:
    """An exception's name and message, for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
