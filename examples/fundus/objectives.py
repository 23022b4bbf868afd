"""What GraTa's Table 5 pairs: objectives without labels, by the network's heads among others."""

from functools import partial

import torch

from examples.common.adaptation import parse_statistics
from examples.fundus.network import ResUNet34
from gradkit import tta
from gradkit.tta.parts import Objective

HEADS_OF = {
    "rec": "reconstruction",
    "rot": "rotation",
    "sup": "super_resolution",
    "den": "denoising",
}
"""Objectives of auxiliary heads, and the names of their heads."""

OBJECTIVES = ("con", "ent", *HEADS_OF)
"""Consistency, entropy, reconstruction, rotation, super-resolution, denoising."""


def build_objective(name: str, generator: torch.Generator) -> Objective:
    """An objective of adaptation with the settings of GraTa's released code.

    Args:
        name: one of `OBJECTIVES`; those of `HEADS_OF` need a network with trained heads.
        generator: of the random numbers of `con`, `rot` and `den`.

    Raises:
        ValueError: there is no such objective.
    """
    if name == "con":
        return tta.Consistency(generator=generator)
    if name == "ent":
        return tta.entropy
    if name == "rec":
        return tta.Reconstruction(partial(ResUNet34.auxiliary, head="reconstruction"))
    if name == "rot":
        return tta.Rotation(partial(ResUNet34.auxiliary, head="rotation"), generator=generator)
    if name == "sup":
        return tta.SuperResolution(partial(ResUNet34.auxiliary, head="super_resolution"))
    if name == "den":
        head = partial(ResUNet34.auxiliary, head="denoising")
        return tta.Denoising(head, noise="gaussian", generator=generator)
    raise ValueError(f"there is no objective {name!r}; choose one of {', '.join(OBJECTIVES)}")


def build_grata(
    model: ResUNet34,
    pseudo: str = "con",
    auxiliary: str = "ent",
    lr: float = 1e-4,
    statistics: str = "test",
    seed: int = 0,
    activation: str = "quadratic",
) -> tta.Adapter:
    """GraTa with other objectives, on a copy of the source model (Table 5 of the paper).

    With the defaults it is GraTa itself.

    Args:
        model: the source model, with trained heads if an objective needs one; those that were
            trained with the same statistics.
        pseudo: the objective that updates, one of `OBJECTIVES`.
        auxiliary: the objective along whose gradient the look-ahead step is made.
        lr: learning rate of Adam before scaling.
        statistics: see `parse_statistics`.
        seed: of the pseudo objective's random numbers; the next one is the auxiliary objective's.
        activation: from the cosine to the factor of the learning rate; see `gradkit.CosineLR`.

    Raises:
        ValueError: there is no such objective, the model lacks its head, or an argument is out of
            range.
    """
    if not model.auxiliary_heads and {pseudo, auxiliary} & HEADS_OF.keys():
        raise ValueError(
            f"{pseudo} and {auxiliary} need a network with auxiliary heads; train them with "
            "`python -m examples.fundus heads`"
        )
    one, other = (torch.Generator().manual_seed(each) for each in (seed, seed + 1))
    return tta.GraTa(
        model,
        lr=lr,
        statistics=parse_statistics(statistics),
        activation=activation,
        pseudo=build_objective(pseudo, one),
        auxiliary=build_objective(auxiliary, other),
    )
