"""The methods that gradkit exports, and what tests must know of each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradkit as gk
from gradkit.surgery import ElementwiseRule, GramRule, Rule

# Where methods lie that weigh objectives against each other.
FOLDERS = ("surgery", "weighting")
PACKAGES = [
    importlib.import_module(f"gradkit.{folder}")
    for folder in FOLDERS
    if (Path(gk.__file__).parent / folder).is_dir()
]


@dataclass(frozen=True)
class Entry:
    """What tests must know of a method; the defaults fit most.

    Attributes:
        make: Makes one for this many objectives, with these arguments.
        names: The objectives of a step.
        ordered: Why the result depends on the objectives' order; "" if it does not.
        blind: Why NaNs in a Gram matrix leave no NaN among the weights, or an infinite number no
            infinite direction to a rule that works number by number; "" if they do.
        silent: Why a single objective may be given a weight of 0; "" if it may not.
        trivial: Whether it is too simple for a source.
        whole: Why it cannot work on parameters of which each rank holds a part; "" if it can.
        unreadable: Why its repr is not how it was made; "" if it is.
        unscoped: Why a rule by Gram matrix has no scope; "" if it has.
        fixed_count: Whether it must be told of all objectives when it is made.
        tolerance: How exactly it is homogeneous, relative to the rows that are added up.
        rounding: How far a rounding error may move the direction, relative to them.
    """

    make: Callable[..., gk.Transform]
    names: tuple[str, ...] = ("source", "target", "third")
    ordered: str = ""
    blind: str = ""
    silent: str = ""
    trivial: bool = False
    whole: str = ""
    unreadable: str = ""
    unscoped: str = ""
    fixed_count: bool = False
    tolerance: float = 1e-9
    rounding: float = 1e-7


def of_class(cls: type[gk.Transform]) -> Callable[..., gk.Transform]:
    """Makes a method that needs no arguments, for any number of objectives."""
    return lambda count, **options: cls(**options)


def constant(count: int, **options: Any) -> gk.Transform:
    return gk.Constant([1 + k / 2 for k in range(count)], **options)


def longest(jacobian: Tensor) -> Tensor:
    """The longest row, by somebody else's function."""
    return jacobian[jacobian.norm(dim=1).argmax()]


def aggregate(count: int, **options: Any) -> gk.Transform:
    return gk.Aggregate(longest, **options)


def gsmorph(count: int, **options: Any) -> gk.Transform:
    """Over all parameters, since a bare matrix does not say where tensors lie."""
    return gk.GSMorph(**{"scope": "global", **options})


DRAWN = "the objectives are visited in an order that is drawn"
MAIN = "the first objective is the main one"
FIXED = "its weights do not depend on the gradients"

ENTRIES: dict[str, dict[str, Any]] = {
    "Sum": {"blind": FIXED, "unscoped": FIXED, "trivial": True},
    "Mean": {"blind": FIXED, "unscoped": FIXED, "trivial": True},
    "Constant": {
        "make": constant,
        "fixed_count": True,
        "ordered": FIXED,
        "blind": FIXED,
        "unscoped": FIXED,
        "trivial": True,
    },
    "RandomWeights": {
        "ordered": "each objective draws a weight",
        "blind": FIXED,
        "unscoped": FIXED,
    },
    "PCGrad": {"ordered": DRAWN, "blind": "an unknown product is no conflict"},
    "GradVac": {"ordered": DRAWN},
    "CosineGate": {"ordered": MAIN},
    "GSMorph": {"make": gsmorph, "ordered": MAIN},
    # Of lengths that differ by 1e12, inner products differ by more than the digits of a float64.
    "AlignedMTL": {"rounding": 1e-3},
    "Krum": {"ordered": "of equal scores the first wins"},
    "GradNorm": {"blind": "a step uses the weights that the steps before it have learnt"},
    "TrimmedMean": {"blind": "what is dropped may be infinite"},
    "PCD": {"ordered": MAIN},
    "CRMOGM": {"unscoped": "its rule has one"},
    "Aggregate": {
        "make": aggregate,
        "whole": "somebody else's function needs whole rows",
        "unreadable": "it shows a function",
        "trivial": True,
    },
}


def is_method(thing: object) -> bool:
    return (
        inspect.isclass(thing)
        and issubclass(thing, gk.Transform)
        and not inspect.isabstract(thing)
        and thing.around is not gk.Transform.around
    )


def exported() -> dict[str, type[gk.Transform]]:
    """The concrete methods that are exported, by name."""
    found = {n: getattr(module, n) for module in (*PACKAGES, gk) for n in module.__all__}
    return {
        name: thing
        for name, thing in sorted(found.items())
        if is_method(thing) and thing.__module__.split(".")[1] in FOLDERS
    }


def defined() -> Iterator[type[gk.Transform]]:
    """The concrete methods that are defined in the packages, exported or not."""
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, thing in vars(module).items():
                if is_method(thing) and thing.__module__ == info.name and name[0] != "_":
                    yield thing


def entry(cls: type[gk.Transform]) -> Entry:
    """The facts of an exported method, or the defaults."""
    return Entry(**{"make": of_class(cls), **ENTRIES.get(cls.__name__, {})})


EXPORTED = {name: entry(cls) for name, cls in exported().items()}


def classes(kind: type) -> list[str]:
    """The names of the exported methods of a kind."""
    return [name for name, cls in exported().items() if issubclass(cls, kind)]


GRAM_RULES = classes(GramRule)
ELEMENTWISE_RULES = classes(ElementwiseRule)
RULES = classes(Rule)


def losses(count: int, step: int = 0) -> Tensor:
    """Losses in some step, for methods that look at them."""
    numbers = [0.7, 1.3, 0.4, 2.1, 0.9, 1.7, 0.6, 1.1]
    return torch.tensor(numbers, dtype=torch.float64).roll(step)[:count]
