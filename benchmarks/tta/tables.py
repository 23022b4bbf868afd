"""Which variants each table compares, in the order of its rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from benchmarks.tta.variants import (
    Make,
    Variant,
    alone,
    binary,
    constant,
    detta,
    look_ahead,
    named,
    pair,
    projected,
    registered,
    still,
    views,
)
from examples.fundus.methods import METHODS
from examples.fundus.objectives import OBJECTIVES

Table = Literal["1", "2", "3", "4", "5", "6", "figure4"]

REFERENCES = ("none", "ptbn")
"""Variants that every table has, and that all others are compared with."""


def table_1(lr: float) -> list[Variant]:
    """Every method of `compare`, and the controls."""
    first = [
        *map(registered, REFERENCES),
        Variant("none-views", "No Adapt, mean over six views", views),
        replace(registered("tent", lr), title="TENT (one-sided entropy)"),
        Variant(named("tent-binary", lr), "TENT, full entropy", binary, lr),
        registered("grata", lr),
        constant(lr),
    ]
    others = [method for method in METHODS if method not in {*REFERENCES, "tent", "grata"}]
    slow = Variant(named("detta", 1e-6), "DeTTA, lr 1e-06", detta, 1e-6, heads=True)
    return [*first, *(registered(method) for method in others), slow]


def table_2(lr: float) -> list[Variant]:
    """Objective and learning rate, one after the other."""
    return [
        *map(registered, REFERENCES),
        Variant(named("con", lr), "L_con(θ), lr β", partial(alone, objective="con"), lr),
        pair("con", "ent", lr, "constant", "L_con(θ - ∇L_ent), lr β"),
        pair("con", "ent", lr, title="L_con(θ - ∇L_ent), lr η (GraTa)"),
        constant(lr),
    ]


def table_3(lr: float) -> list[Variant]:
    """The objectives in each other's place."""
    return [
        *map(registered, REFERENCES),
        replace(registered("tent", lr), title="L_ent(θ), lr β (TENT)"),
        pair("ent", "con", lr, title="L_ent(θ - ∇L_con), lr η"),
        pair("con", "ent", lr, title="L_con(θ - ∇L_ent), lr η (GraTa)"),
    ]


ACTIVATIONS = {
    "linear": "linear, ½(c + 1)",
    "sigmoid": "sigmoid, 1/(1 + e^-c)",
    "relu": "ReLU, max(0, c)",
    "softplus": "softplus, ln(1 + e^c)",
    "quadratic": "quadratic, ¼(c + 1)² (GraTa)",
    "constant": "constant, 1",
}


def table_4(lr: float) -> list[Variant]:
    """Functions from the cosine to the factor of the learning rate."""
    return [
        *map(registered, REFERENCES),
        *(pair("con", "ent", lr, name, title) for name, title in ACTIVATIONS.items()),
    ]


def table_5(lr: float) -> list[Variant]:
    """Every pair of objectives."""
    return [
        *map(registered, REFERENCES),
        *(pair(pseudo, auxiliary, lr) for pseudo in OBJECTIVES for auxiliary in OBJECTIVES),
    ]


STATISTICS = ("source", "mixed:0.8", "mixed:0.5", "test")
PREDICTIONS = ("before", "after", "views")
LEARNT: dict[str, tuple[str, Make]] = {
    "ent": ("entropy", partial(alone, objective="ent")),
    "ent-sam": ("entropy, SAM", partial(alone, objective="ent", sharpness=True)),
    "con": ("consistency", partial(alone, objective="con")),
    "con+ent-pcgrad": ("consistency and entropy, PCGrad", projected),
    "grata": ("GraTa", partial(look_ahead, pseudo="con", auxiliary="ent")),
}
"""Gradient methods of the product: their titles, and how they are made."""


def table_6(lr: float) -> list[Variant]:
    """Statistics × gradient methods; predictions are taken of each."""
    found: list[Variant] = [*map(registered, REFERENCES)]
    for statistics in STATISTICS:
        place = statistics.replace(":", "")
        found.append(
            Variant(
                f"{place}+nothing",
                f"{statistics}, nothing learnt",
                still,
                statistics=statistics,
                predictions=("after", "views"),  # before is after, as nothing changes
                product=True,
            )
        )
        found += [
            Variant(
                named(f"{place}+{key}", lr),
                f"{statistics}, {title}",
                make,
                lr,
                statistics,
                predictions=PREDICTIONS,
                product=True,
            )
            for key, (title, make) in LEARNT.items()
        ]
    return found


def figure_4(lr: float) -> list[Variant]:
    """Both objectives with and without alignment, beside the gradient of the labels."""
    makes: dict[str, tuple[str, Make]] = {
        "ent": ("L_ent(θ) (TENT)", partial(alone, objective="ent")),
        "ent-con": ("L_ent(θ - ∇L_con)", partial(look_ahead, pseudo="ent", auxiliary="con")),
        "con": ("L_con(θ)", partial(alone, objective="con")),
        "con-ent": (
            "L_con(θ - ∇L_ent) (GraTa)",
            partial(look_ahead, pseudo="con", auxiliary="ent"),
        ),
    }
    return [
        Variant(named(f"{name}-empirical", lr), title, make, lr, empirical=True)
        for name, (title, make) in makes.items()
    ]


TABLES: dict[Table, Callable[[float], list[Variant]]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "5": table_5,
    "6": table_6,
    "figure4": figure_4,
}


def variants_of(table: Table, lr: float) -> list[Variant]:
    """The variants of a table, in its order."""
    return TABLES[table](lr)
