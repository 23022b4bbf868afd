"""Entropy minimisation at test time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from gradkit.tta.adapter import Adapter, Episodic, OptimizerFactory
from gradkit.tta.objectives import Probabilities, check_probabilities, prediction_entropy
from gradkit.tta.parts import Objective
from gradkit.tta.statistics import Statistics


def TENT(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-4,
    statistics: str | Statistics = "test",
    objective: Objective | None = None,
    optimizer: OptimizerFactory | None = None,
    episodic: Episodic = False,
    probabilities: Probabilities = "auto",
    **options: Any,
) -> Adapter:
    """Test entropy minimisation ([Wang et al., ICLR 2021](https://arxiv.org/abs/2006.10726)).

        φ ← φ − Adam(∇_φ H(p(x; φ)))        φ the scales and shifts of normalisation layers

    H is an entropy that fits the logits. For a classifier's logits [N, C] the default is a softmax
    over classes, as in the paper (`gradkit.tta.softmax_entropy`). If several labels may be right,
    pass `probabilities="sigmoid"` (`gradkit.tta.binary_entropy`), which is the default for a single
    logit [N, 1]. For dense logits [N, C, ...] the default is independent sigmoids, with the
    one-sided entropy (`gradkit.tta.entropy`). The authors of GraTa used TENT in this way for optic
    disc and cup, which are nested. If each pixel has exactly one class, pass
    `probabilities="softmax"`. The learning rate, Adam and test statistics are also those of GraTa's
    authors. TENT's authors' code predicts by the forward pass before the step: `predict="before"`.

    Cost: 2 forward passes and 1 backward pass per batch. State: φ and Adam's moments.

    Args:
        model: The source model; see `Adapter`.
        lr: Adam's learning rate.
        statistics: Where mean and variance come from; see `Adapter`.
        objective: Replaces the entropy, a function `(model, images) -> loss`.
        optimizer: Makes a base optimizer other than Adam with `lr`.
        episodic: Whether to reset before each batch, or "image": before each image; see `Adapter`.
        probabilities: The meaning of the logits, "sigmoid", "softmax" or "auto"; see above.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        ValueError: If both `objective` and `probabilities` are given, or if an argument has no
            valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> adapter = gk.tta.TENT(model, lr=1e-3)
        >>> adapter(torch.rand(1, 3, 8, 8)).shape, adapter.last_step.names
        (torch.Size([1, 2, 8, 8]), ('loss',))

        A vision transformer has LayerNorm, which needs no statistics of the images, but has scales
        and shifts to train:

        >>> class ViT(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.patches = torch.nn.Conv2d(3, 16, kernel_size=8, stride=8)
        ...         block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        ...         self.blocks = torch.nn.TransformerEncoder(block, 2)
        ...         self.norm, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 10)
        ...     def forward(self, images):
        ...         tokens = self.patches(images).flatten(2).transpose(1, 2)
        ...         return self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        >>> adapter = gk.tta.TENT(ViT(), lr=1e-3, statistics="source")
        >>> logits = adapter(torch.rand(4, 3, 32, 32))
        >>> logits.shape, len(adapter.optimizer.param_groups[0]["params"])  # 5 LayerNorms
        (torch.Size([4, 10]), 10)
    """
    check_probabilities(probabilities)
    if objective is None:
        objective = functools.partial(prediction_entropy, probabilities=probabilities)
    elif probabilities != "auto":
        raise ValueError(
            f"probabilities={probabilities!r} chooses the built-in entropy, which objective "
            "replaces; pass one of them"
        )
    return Adapter(
        model,
        statistics=statistics,
        objectives={"loss": objective},
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr)),
        episodic=episodic,
        **options,
    )
