"""GraTa with any two of the objectives of its paper's Table 5, and any function of the cosine."""

import torch
from torch import nn

from examples.common.adaptation import parse_statistics
from examples.fundus.objectives import build_objective
from gradkit import tta
from gradkit.tta.parts import Objective


def make_objective(name: str, seed: int) -> Objective:
    """One of `examples.fundus.objectives.OBJECTIVES`, with random numbers of its own."""
    return build_objective(name, torch.Generator().manual_seed(seed))


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
        model: the source model, which is not changed; with trained heads if an objective needs one.
        pseudo: the objective whose gradient is applied.
        auxiliary: the objective along whose gradient the look-ahead step is made.
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
