"""Gradient alignment at test time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradkit.lookahead import LookAhead
from gradkit.step_size import Activation, CosineLR
from gradkit.tta.adapter import Adapter, Objective, OptimizerFactory
from gradkit.tta.objectives import Consistency, entropy
from gradkit.tta.statistics import Statistics


def GraTa(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-4,
    statistics: str | Statistics = "test",
    look_ahead: float = 1.0,
    activation: str | Activation = "quadratic",
    generator: torch.Generator | None = None,
    pseudo: Objective | None = None,
    auxiliary: Objective = entropy,
    optimizer: OptimizerFactory | None = None,
    episodic: bool = False,
    **options: Any,
) -> Adapter:
    """Gradient alignment-based test-time adaptation (GraTa, AAAI 2025).

    [Gradient Alignment Improves Test-Time Adaptation for Medical Image
    Segmentation](https://arxiv.org/abs/2408.07343), Algorithm 1, with φ the scales and shifts of
    normalisation layers:

        g_a = ∇L_ent(φ; x)
        φ'  = φ − look_ahead·g_a
        q   = mean of sigmoids over six weak views at φ', a constant
        g   = ∇L_con(φ'; strong(x), q)
        η   = lr·f(cos(g, g_a)),   f(c) = ¼(c + 1)²
        φ   ← Adam step on g with learning rate η
        predict x

    Defaults are those of the authors' code. Unlike it, the strong augmentation leaves the image
    as it was, so that the prediction is of the image itself; the learning rate is scaled in every
    parameter group; and a cosine with a zero gradient is 0.

    Cost: 9 forward passes and 2 backward passes a batch. State: φ, Adam's moments and the
    augmentation's generator.

    Args:
        model: The source model; see `Adapter`.
        lr: β, Adam's learning rate before scaling.
        statistics: Where mean and variance come from; see `Adapter`.
        look_ahead: The length of the look-ahead step, in units of the gradient.
        activation: f; see `gradkit.CosineLR`.
        generator: The strong augmentation's random numbers; by default its own with seed 0.
        pseudo: Replaces the consistency objective, a function `(model, images) -> loss`.
        auxiliary: The objective that is looked ahead along.
        optimizer: Makes another base optimizer than Adam with `lr`.
        episodic: Whether to start anew for each batch.
        **options: Further arguments of `Adapter`.

    Raises:
        ValueError: If both `pseudo` and `generator` are given.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.GraTa(model, lr=1e-4)
        >>> logits = adapter(torch.rand(1, 3, 8, 8))
        >>> cosine = adapter.last_step.cosine("pseudo", "auxiliary")
        >>> torch.allclose(adapter.last_step.lr_scale, (cosine + 1) ** 2 / 4)
        True
    """
    if pseudo is not None and generator is not None:
        raise ValueError(
            "generator is for the built-in consistency objective, which pseudo replaces; give "
            "your own objective its generator yourself"
        )
    return Adapter(
        model,
        statistics=statistics,
        objectives={
            "pseudo": Consistency(generator=generator) if pseudo is None else pseudo,
            "auxiliary": auxiliary,
        },
        transforms=(
            LookAhead(along="auxiliary", update="pseudo", step_size=look_ahead),
            CosineLR("pseudo", "auxiliary", activation=activation),
        ),
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr)),
        episodic=episodic,
        **options,
    )
