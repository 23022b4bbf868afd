"""Gradient alignment at test time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from gradkit.alignment.cosine_lr import Activation, CosineLR
from gradkit.alignment.look_ahead import LookAhead
from gradkit.tta.adapter import Adapter, Episodic, OptimizerFactory
from gradkit.tta.objectives import (
    Consistency,
    Probabilities,
    check_probabilities,
    prediction_entropy,
)
from gradkit.tta.parts import Objective
from gradkit.tta.statistics import Statistics


def GraTa(  # noqa: N802 # the method's name
    model: nn.Module,
    lr: float = 1e-4,
    statistics: str | Statistics = "test",
    look_ahead: float = 1.0,
    activation: str | Activation = "quadratic",
    generator: torch.Generator | None = None,
    pseudo: Objective | None = None,
    auxiliary: Objective | None = None,
    optimizer: OptimizerFactory | None = None,
    episodic: Episodic = False,
    probabilities: Probabilities = "auto",
    batched_views: bool = False,
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

    Defaults are those of the authors' code, with three differences. The strong augmentation does
    not change the image in place, so that the prediction is for the image itself. The learning rate
    is scaled in every parameter group. A cosine with a zero gradient is 0.

    The method was published for segmentation, where dense logits [N, C, ...] are independent
    sigmoids, with the one-sided `gradkit.tta.entropy` and binary cross-entropy. For a classifier's
    logits [N, C] the default is a softmax, with `gradkit.tta.softmax_entropy` and q the mean of
    softmaxes. Choose otherwise with `probabilities`: "sigmoid" for a classifier with several
    labels, "softmax" for pixels of exactly one class. A single logit [N, 1] is a sigmoid.

    Both objectives may be replaced, by those of auxiliary heads for example: `Reconstruction`,
    `Rotation`, `SuperResolution` and `Denoising`, which the paper's Table 5 pairs with each other.
    φ then includes the normalisation layers of the heads, as in the authors' code, and the cosine
    is taken over all of φ; theirs leaves out of the auxiliary gradient's norm the layers that only
    the auxiliary objective reaches.

    Cost: 9 forward passes and 2 backward passes per batch; with `batched_views` the six of the
    views are one, or two if images are not square. State: φ, Adam's moments and the augmentation's
    generator.

    Args:
        model: The source model; see `Adapter`.
        lr: β, Adam's learning rate before scaling.
        statistics: Where mean and variance come from; see `Adapter`.
        look_ahead: The step size of the look-ahead step.
        activation: f; see `gradkit.CosineLR`.
        generator: The strong augmentation's generator; by default a new one with seed 0.
        pseudo: Replaces the consistency objective, along whose gradient φ is updated; a function
            `(model, images) -> loss`.
        auxiliary: Replaces the entropy, along whose gradient the look-ahead step is made.
        optimizer: Makes a base optimizer other than Adam with `lr`.
        episodic: Whether to reset before each batch, or "image": before each image; see `Adapter`.
        probabilities: The meaning of the logits in the built-in objectives; see above.
        batched_views: Whether the six views are evaluated together, with each one's own statistics;
            see `gradkit.tta.objectives.logits_of_views`.
        **options: Further arguments of `Adapter`.

    Returns:
        The adapter.

    Raises:
        RuntimeError: If `torch.inference_mode()` is on.
        ValueError: If `pseudo` is given with `generator` or `batched_views`, if `probabilities` is
            given with both objectives, or if an argument has no valid value.

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
    if pseudo is not None and batched_views:
        raise ValueError(
            "batched_views is for the built-in consistency objective, which pseudo replaces; pass "
            "it to your own objective"
        )
    check_probabilities(probabilities)
    if pseudo is not None and auxiliary is not None and probabilities != "auto":
        raise ValueError(
            f"probabilities={probabilities!r} is for the built-in objectives, both of which are "
            "replaced; leave it out"
        )
    if pseudo is None:
        pseudo = Consistency(
            generator=generator, probabilities=probabilities, batched_views=batched_views
        )
    if auxiliary is None:
        auxiliary = functools.partial(prediction_entropy, probabilities=probabilities)
    return Adapter(
        model,
        statistics=statistics,
        objectives={"pseudo": pseudo, "auxiliary": auxiliary},
        transforms=(
            LookAhead(along="auxiliary", update="pseudo", step_size=look_ahead),
            CosineLR("pseudo", "auxiliary", activation=activation),
        ),
        optimizer=optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr)),
        episodic=episodic,
        **options,
    )
