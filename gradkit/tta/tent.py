"""Entropy minimisation at test time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradkit.tta.adapter import Adapter, Objective, OptimizerFactory
from gradkit.tta.objectives import entropy
from gradkit.tta.statistics import Statistics


def TENT(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-4,
    statistics: str | Statistics = "test",
    objective: Objective = entropy,
    optimizer: OptimizerFactory | None = None,
    episodic: bool = False,
    **options: Any,
) -> Adapter:
    """Test entropy minimisation ([Wang et al., ICLR 2021](https://arxiv.org/abs/2006.10726)).

        φ ← φ − Adam(∇_φ H(p(x; φ)))        φ the scales and shifts of normalisation layers

    Learning rate, Adam, test statistics and the one-sided entropy of independent sigmoids are
    what the authors of GraTa used for optic disc and cup; the original takes a softmax over
    classes, which would be wrong for nested ones.

    Cost: 2 forward passes and 1 backward pass a batch. State: φ and Adam's moments.

    Args:
        model: The source model; see `Adapter`.
        lr: Adam's learning rate.
        statistics: Where mean and variance come from; see `Adapter`.
        objective: What is minimised, a function `(model, images) -> loss`.
        optimizer: Makes another base optimizer than Adam with `lr`.
        episodic: Whether to start anew for each batch.
        **options: Further arguments of `Adapter`.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, lr=1e-3)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.last_step.names
        (torch.Size([1, 2, 8, 8]), ('loss',))
    """
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": objective},
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr)),
        episodic=episodic,
        **options,
    )
