"""Published methods as chains of transforms."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradkit.alignment.cosine_lr import Activation, CosineLR
from gradkit.alignment.look_ahead import LookAhead
from gradkit.optimizer.gradient_optimizer import GradientOptimizer
from gradkit.optimizer.wrapping import wrap


def GraTa(  # noqa: N802 # the method's name
    base: Optimizer,
    model: nn.Module | None = None,
    look_ahead: float = 1.0,
    activation: str | Activation = "quadratic",
    **options: Any,
) -> GradientOptimizer:
    """Gradient alignment with a dynamic learning rate (GraTa, AAAI 2025).

    Algorithm 1 of [Gradient Alignment Improves Test-Time Adaptation for Medical Image
    Segmentation](https://arxiv.org/abs/2408.07343), on objectives "pseudo" and "auxiliary":

        g_a = ∇L_auxiliary(θ)
        g   = ∇L_pseudo(θ − look_ahead·g_a)
        η   = β·f(cos(g, g_a))
        θ   ← base step on g with learning rate η        β the base's own learning rate

    The paper writes the step as plain gradient descent; its code uses Adam with β = 1e-4, whose
    moments are kept from image to image. `gradkit.tta.GraTa` is the whole method on images.

    Cost: one gradient of each objective.

    Args:
        base: The optimizer to wrap.
        model: See `wrap`.
        look_ahead: The step size of the look-ahead step.
        activation: f; see `CosineLR`.
        **options: Further arguments of `wrap`.

    Returns:
        The optimizer; see `GradientOptimizer`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value; see `wrap`.

    Examples:
        >>> import torch, gradkit as gk
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        >>> optimizer = gk.GraTa(torch.optim.SGD([w], lr=0.1))
        >>> _ = optimizer.step(
        ...     {"pseudo": lambda: w.square().sum() / 2, "auxiliary": lambda: w[0] / 2}
        ... )
        >>> optimizer.last_step.lr_scale, w.data  # both point along w
        (tensor(1.), tensor([0.9500, 0.0000]))
    """
    return wrap(
        base,
        LookAhead(along="auxiliary", update="pseudo", step_size=look_ahead),
        CosineLR("pseudo", "auxiliary", activation=activation),
        model=model,
        **options,
    )
