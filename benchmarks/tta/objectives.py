"""The objectives of GraTa's paper by the names of its Table 5, and GraTa with any two of them."""

from collections.abc import Callable

import torch
from torch import nn

from examples.common.adaptation import parse_statistics
from gradkit import tta
from gradkit.tta.parts import Objective

OBJECTIVES = ("con", "ent", "rec", "rot", "sup", "den")
"""Consistency, entropy, reconstruction, rotation, super-resolution, denoising."""

BUILT: dict[str, Callable[[int], Objective]] = {
    "con": lambda seed: tta.Consistency(generator=torch.Generator().manual_seed(seed)),
    "ent": lambda seed: tta.entropy,
}
"""Those that need no head of the network: how they are made, given a seed."""


def make_objective(name: str, seed: int) -> Objective:
    """One of the objectives that need no head.

    Raises:
        ValueError: the name is unknown, or the objective needs a head.
    """
    if name not in BUILT:
        raise ValueError(
            f"there is no objective {name!r} without a head of the network; choose from "
            f"{', '.join(BUILT)}"
        )
    return BUILT[name](seed)


def look_ahead(
    model: nn.Module,
    pseudo: str,
    auxiliary: str,
    lr: float,
    activation: str = "quadratic",
    statistics: str = "test",
    seed: int = 0,
) -> tta.Adapter:
    """GraTa with a chosen pseudo objective, ahead of a chosen auxiliary one.

    Args:
        model: the source model, which is not changed.
        pseudo: one of `OBJECTIVES`, whose gradient is applied.
        auxiliary: one of `OBJECTIVES`, along whose gradient the look-ahead step is made.
        lr: Adam's learning rate before scaling.
        activation: of the cosine; see `gradkit.CosineLR`.
        statistics: see `parse_statistics`.
        seed: of the objectives' random numbers.

    Raises:
        ValueError: an argument has no valid value.
    """
    return tta.GraTa(
        model,
        lr,
        parse_statistics(statistics),
        activation=activation,
        pseudo=make_objective(pseudo, seed),
        auxiliary=make_objective(auxiliary, seed + 1),
    )
