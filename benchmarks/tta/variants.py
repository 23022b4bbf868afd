"""What the tables compare: each variant under a name of its own, shared by all tables that show it.

A variant is a method of `examples.fundus.methods`, or a control that differs from one in one thing.
Settings are fixed beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import gradkit as gk
from examples.common.adaptation import parse_statistics
from examples.fundus.gate import CupRatio
from examples.fundus.methods import METHODS, Chosen, build_adapter, denoise
from examples.fundus.objectives import HEADS_OF, build_grata, build_objective
from gradkit import tta

Make = Callable[..., tta.Adapter]
"""From the source model and what is chosen, as `examples.fundus.methods.Make`; can be pickled."""

BETA = 1e-4
"""GraTa's learning rate before scaling, and TENT's on fundus photographs."""


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: tells it from others; the name of its files.
        title: what the table calls it.
        make: makes the adapter.
        lr: learning rate, for those that have none of their own.
        statistics: where normalisation takes mean and variance, for the same.
        scale_of: a variant whose mean factor of the learning rate, on the same pair of centres, is
            this one's constant factor.
        heads: whether it needs a network with auxiliary heads.
        predictions: which predictions are scored: "after" the step (or whatever the method
            returns), "before" it, and "views", the mean over six views after it.
        empirical: whether to measure the cosine with the gradient of the labels, too.
        objectives: pseudo and auxiliary, of a pair of Table 5.
        product: whether it is one of the compositions of Table 6.
        ratio: whether it needs the ratio of cup to disc in the source's labels.
        target_first: images of a batch, where it sees all of the target before it predicts.
    """

    name: str
    title: str
    make: Make
    lr: float = BETA
    statistics: str = "test"
    scale_of: str | None = None
    heads: bool = False
    predictions: tuple[str, ...] = ("after",)
    empirical: bool = False
    objectives: tuple[str, str] | None = None
    product: bool = False
    ratio: bool = False
    target_first: int | None = None

    def adapter(
        self, model: nn.Module, seed: int, scale: float = 1.0, ratio: CupRatio | None = None
    ) -> tta.Adapter:
        """A fresh adapter of a copy of the source model.

        Args:
            model: the source model, which is not changed.
            seed: of the random numbers that it draws.
            scale: factor of the learning rate.
            ratio: of cup to disc in the source's labels, if it needs that.
        """
        return self.make(model, Chosen(self.statistics, self.lr * scale, seed, ratio))


# How adapters are made. These are functions with names, since other processes get the variants.


def _method(model: nn.Module, chosen: Chosen, *, name: str) -> tta.Adapter:
    return build_adapter(name, model, chosen.statistics, chosen.lr, chosen.seed, chosen.ratio)


def views(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    """The source model, its prediction averaged over views."""
    return tta.Fuse(model, statistics=("source",), image_share=0)


def still(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    """Statistics alone."""
    return tta.PTBN(model, parse_statistics(chosen.statistics))


def detta(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    """DeTTA at another learning rate."""
    return tta.DeTTA(model, denoise, chosen.lr, noise="gaussian", generator=chosen.generator())


def binary(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    """TENT with the entropy of both outcomes."""
    return tta.TENT(model, chosen.lr, objective=tta.binary_entropy)


def alone(
    model: nn.Module, chosen: Chosen, *, objective: str, sharpness: bool = False
) -> tta.Adapter:
    """One objective, with SAM if so chosen."""
    return tta.TENT(
        model,
        chosen.lr,
        parse_statistics(chosen.statistics),
        objective=build_objective(objective, chosen.generator()),
        transforms=(gk.SAM(rho=0.05),) if sharpness else (),
    )


def projected(model: nn.Module, chosen: Chosen) -> tta.Adapter:
    """Consistency and entropy, joined by PCGrad."""
    return tta.Adapter(
        model,
        statistics=parse_statistics(chosen.statistics),
        objectives={name: build_objective(name, chosen.generator()) for name in ("con", "ent")},
        transforms=(gk.PCGrad(),),
        optimizer=partial(torch.optim.Adam, lr=chosen.lr),
    )


def look_ahead(
    model: nn.Module,
    chosen: Chosen,
    *,
    pseudo: str,
    auxiliary: str,
    activation: str = "quadratic",
) -> tta.Adapter:
    """GraTa with two objectives and a function of their cosine."""
    return build_grata(
        model, pseudo, auxiliary, chosen.lr, chosen.statistics, chosen.seed, activation
    )


# Rows that several tables have.


def named(name: str, lr: float) -> str:
    """The name of a variant with a learning rate, which the usual one does not show."""
    return name if lr == BETA else f"{name}@{lr:g}"


def registered(name: str, lr: float = BETA) -> Variant:
    """A method of `examples.fundus.methods`; `lr` is for those without one of their own."""
    method = METHODS[name]
    return Variant(
        named(name, lr) if method.learns else name,
        method.title,
        partial(_method, name=name),
        lr,
        heads=method.heads,
        ratio=method.ratio,
        target_first=method.target_first,
    )


def pair(
    pseudo: str,
    auxiliary: str,
    lr: float = BETA,
    activation: str = "quadratic",
    title: str | None = None,
) -> Variant:
    """GraTa with two objectives; with its own two and its own activation, GraTa itself."""
    suffix = "" if activation == "quadratic" else f"-{activation}"
    found = Variant(
        named(f"{pseudo}-{auxiliary}{suffix}", lr),
        title or f"{pseudo} ahead of {auxiliary}",
        partial(look_ahead, pseudo=pseudo, auxiliary=auxiliary, activation=activation),
        lr,
        heads=bool({pseudo, auxiliary} & HEADS_OF.keys()),
        objectives=(pseudo, auxiliary),
    )
    if (pseudo, auxiliary, activation) == ("con", "ent", "quadratic"):
        method = registered("grata", lr)
        return replace(found, name=method.name, make=method.make)
    return found


def constant(lr: float = BETA) -> Variant:
    """GraTa at its own mean learning rate on the same pair, held constant."""
    return Variant(
        named("grata-mean", lr),
        "GraTa, its mean learning rate held constant",
        partial(look_ahead, pseudo="con", auxiliary="ent", activation="constant"),
        lr,
        scale_of=named("grata", lr),
    )
