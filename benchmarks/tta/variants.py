"""What the tables compare: each variant under a name of its own, shared by all tables that show it.

Settings are fixed beforehand: published ones, and controls that differ from a published method in
one thing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

import gradkit as gk
from benchmarks.tta.objectives import look_ahead, make_objective
from examples.common.adaptation import denoise, parse_statistics
from examples.fundus.fusion import CHOICES, build_adapter
from examples.fundus.gate import CupRatio
from examples.fundus.objectives import HEADS_OF, OBJECTIVES
from gradkit import tta

Table = Literal["1", "2", "3", "4", "5", "6", "figure4"]
Make = Callable[..., tta.Adapter]
"""From the source model, a seed and a factor of the learning rate to an adapter."""

BETA = 1e-4
"""GraTa's learning rate before scaling, and TENT's on fundus photographs."""
REFERENCES = ("none", "ptbn")
"""Variants that every table has, and that all others are compared with."""


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: tells it from others; the name of its files.
        title: what the table calls it.
        make: makes the adapter; can be pickled.
        scale_of: a variant whose mean factor of the learning rate, on the same pair of centres, is
            this one's constant factor.
        heads: whether it needs a network with auxiliary heads.
        predictions: which predictions are scored: "after" the step (or whatever the method
            returns), "before" it, and "views", the mean over six views after it.
        empirical: whether to measure the cosine with the gradient of the labels, too.
        objectives: pseudo and auxiliary, of a pair of Table 5.
        product: whether it is one of the compositions of Table 6.
        ratio: whether `make` also takes the ratio of cup to disc in the source's labels.
    """

    name: str
    title: str
    make: Make
    scale_of: str | None = None
    heads: bool = False
    predictions: tuple[str, ...] = ("after",)
    empirical: bool = False
    objectives: tuple[str, str] | None = None
    product: bool = False
    ratio: bool = False


TITLES = {
    "none": "No Adapt",
    "ptbn": "PTBN",
    "dua": "DUA",
    "diga": "DIGA",
    "medbn": "MedBN",
    "tent": "TENT",
    "dltta": "DLTTA",
    "domainadaptor": "DomainAdaptor",
    "sar": "SAR, literal threshold",
    "sar-scaled": "SAR, scaled threshold",
    "grata": "GraTa",
    "eata": "EATA",
    "cotta": "CoTTA",
    "memo": "MEMO",
    "deyo": "DeYO",
    "vptta": "VPTTA",
    "intent": "InTEnt",
    "intent-balanced": "InTEnt, balanced",
    "rotta": "RoTTA",
    "pass": "PASS without shape prompts",
    "pass-shapes": "PASS",
    "fused": "Fuse, fixed weights of disc and cup",
    "gated": "Fuse, gated",
}
"""What tables call the registered methods; others keep their registered name."""


def _registered(
    model: nn.Module,
    seed: int,
    scale: float,
    ratio: CupRatio | None = None,
    *,
    method: str,
    lr: float,
) -> tta.Adapter:
    return build_adapter(method, model, "test", lr, seed, ratio)


def _views(model: nn.Module, seed: int, scale: float) -> tta.Adapter:
    return tta.Fuse(model, statistics=("source",), image_share=0)


def _detta(model: nn.Module, seed: int, scale: float, *, lr: float) -> tta.Adapter:
    generator = torch.Generator().manual_seed(seed)
    return tta.DeTTA(model, denoise, lr, noise="gaussian", generator=generator)


def _binary(model: nn.Module, seed: int, scale: float, *, lr: float) -> tta.Adapter:
    return tta.TENT(model, lr, objective=tta.binary_entropy)


def _alone(
    model: nn.Module,
    seed: int,
    scale: float,
    *,
    objective: str,
    lr: float,
    statistics: str = "test",
    sharpness: bool = False,
) -> tta.Adapter:
    return tta.TENT(
        model,
        lr,
        parse_statistics(statistics),
        objective=make_objective(objective, seed),
        transforms=(gk.SAM(rho=0.05),) if sharpness else (),
    )


def _projected(
    model: nn.Module, seed: int, scale: float, *, lr: float, statistics: str
) -> tta.Adapter:
    return tta.Adapter(
        model,
        statistics=parse_statistics(statistics),
        objectives={name: make_objective(name, seed) for name in ("con", "ent")},
        transforms=(gk.PCGrad(),),
        optimizer=partial(torch.optim.Adam, lr=lr),
    )


def _still(model: nn.Module, seed: int, scale: float, *, statistics: str) -> tta.Adapter:
    return tta.PTBN(model, parse_statistics(statistics))


def _pair(
    model: nn.Module,
    seed: int,
    scale: float,
    *,
    pseudo: str,
    auxiliary: str,
    lr: float,
    activation: str = "quadratic",
    statistics: str = "test",
) -> tta.Adapter:
    return look_ahead(model, pseudo, auxiliary, lr * scale, activation, statistics, seed)


def _named(name: str, lr: float) -> str:
    """The name of a variant with a learning rate, which the usual one does not show."""
    return name if lr == BETA else f"{name}@{lr:g}"


def registered(method: str, lr: float = BETA) -> Variant:
    """A method of `examples.common.adaptation`; `lr` is for those without one of their own."""
    learns = method in ("tent", "grata")
    return Variant(
        _named(method, lr) if learns else method,
        TITLES.get(method, method),
        partial(_registered, method=method, lr=lr),
        ratio=method == "gated",
    )


def pair(
    pseudo: str,
    auxiliary: str,
    lr: float = BETA,
    activation: str = "quadratic",
    title: str | None = None,
) -> Variant:
    """GraTa with two objectives; with its own two and its own activation, GraTa itself."""
    found = Variant(
        _named(f"{pseudo}-{auxiliary}" + _suffix(activation), lr),
        title or f"{pseudo} ahead of {auxiliary}",
        partial(_pair, pseudo=pseudo, auxiliary=auxiliary, lr=lr, activation=activation),
        heads=bool({pseudo, auxiliary} & HEADS_OF.keys()),
        objectives=(pseudo, auxiliary),
    )
    if (pseudo, auxiliary, activation) == ("con", "ent", "quadratic"):
        method = registered("grata", lr)
        return replace(found, name=method.name, make=method.make)
    return found


def _suffix(activation: str) -> str:
    return "" if activation == "quadratic" else f"-{activation}"


def constant(lr: float = BETA) -> Variant:
    """GraTa at its own mean learning rate on the same pair, held constant."""
    return Variant(
        _named("grata-mean", lr),
        "GraTa, its mean learning rate held constant",
        partial(_pair, pseudo="con", auxiliary="ent", lr=lr, activation="constant"),
        scale_of=_named("grata", lr),
    )


def table_1(lr: float) -> list[Variant]:
    """Every registered method, and the controls."""
    tent = registered("tent", lr)
    first = [
        *map(registered, REFERENCES),
        Variant("none-views", "No Adapt, mean over six views", _views),
        Variant(tent.name, "TENT (one-sided entropy)", tent.make),
        Variant(_named("tent-binary", lr), "TENT, full entropy", partial(_binary, lr=lr)),
        registered("grata", lr),
        constant(lr),
    ]
    others = [method for method in CHOICES if method not in {*REFERENCES, "tent", "grata"}]
    denoising = [
        Variant(_named("detta", rate), f"DeTTA, lr {rate:g}", partial(_detta, lr=rate), heads=True)
        for rate in (BETA, 1e-6)
    ]
    every = [*first, *(registered(method, lr) for method in others), *denoising]
    return list({variant.name: variant for variant in every}.values())


def table_2(lr: float) -> list[Variant]:
    """Objective and learning rate, one after the other."""
    return [
        *map(registered, REFERENCES),
        Variant(_named("con", lr), "L_con(θ), lr β", partial(_alone, objective="con", lr=lr)),
        pair("con", "ent", lr, "constant", "L_con(θ - ∇L_ent), lr β"),
        pair("con", "ent", lr, title="L_con(θ - ∇L_ent), lr η (GraTa)"),
        constant(lr),
    ]


def table_3(lr: float) -> list[Variant]:
    """The objectives in each other's place."""
    tent = registered("tent", lr)
    return [
        *map(registered, REFERENCES),
        Variant(tent.name, "L_ent(θ), lr β (TENT)", tent.make),
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
LEARNT: dict[str, tuple[str, Callable[..., tta.Adapter]]] = {
    "ent": ("entropy", partial(_alone, objective="ent")),
    "ent-sam": ("entropy, SAM", partial(_alone, objective="ent", sharpness=True)),
    "con": ("consistency", partial(_alone, objective="con")),
    "con+ent-pcgrad": ("consistency and entropy, PCGrad", _projected),
    "grata": ("GraTa", partial(_pair, pseudo="con", auxiliary="ent")),
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
                partial(_still, statistics=statistics),
                predictions=("after", "views"),  # before is after, as nothing changes
                product=True,
            )
        )
        found += [
            Variant(
                _named(f"{place}+{key}", lr),
                f"{statistics}, {title}",
                partial(make, lr=lr, statistics=statistics),
                predictions=PREDICTIONS,
                product=True,
            )
            for key, (title, make) in LEARNT.items()
        ]
    return found


def figure_4(lr: float) -> list[Variant]:
    """Both objectives with and without alignment, beside the gradient of the labels."""
    makes: dict[str, tuple[str, Make]] = {
        "ent": ("L_ent(θ) (TENT)", partial(_alone, objective="ent", lr=lr)),
        "ent-con": ("L_ent(θ - ∇L_con)", partial(_pair, pseudo="ent", auxiliary="con", lr=lr)),
        "con": ("L_con(θ)", partial(_alone, objective="con", lr=lr)),
        "con-ent": (
            "L_con(θ - ∇L_ent) (GraTa)",
            partial(_pair, pseudo="con", auxiliary="ent", lr=lr),
        ),
    }
    return [
        Variant(_named(f"{name}-empirical", lr), title, make, empirical=True)
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
