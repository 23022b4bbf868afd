"""The trajectory loss of MESA."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from gradkit.core.arguments import check_number


def mesa(
    logits: Float[Tensor, "N C *space"],
    averaged: Float[Tensor, "N C *space"],
    lmbda: float = 0.3,
    tau: float = 5.0,
) -> Float[Tensor, ""]:
    """What MESA adds to the cross-entropy ([Du et al., NeurIPS 2022](https://arxiv.org/abs/2205.14083)).

        λ·τ²·KL(softmax(ŷ/τ) ‖ softmax(y/τ))

    where y are the model's logits and ŷ those of an exponential moving average of its weights. A
    model that moves away from its average in a sharp direction changes its outputs, which this
    penalises: sharpness at the cost of a forward pass. The mean is over the batch, and over
    positions where there are any (ours: the paper classifies images).

    The authors take the average with a decay of 0.9998 per step, in evaluation mode, with its
    buffers copied (`gk.EMA(model, decay=0.9998)`), λ = 0.3, in a script 0.8,
    and apply the loss in epochs 6 to 359.

    It is computed in float32 or wider, whatever autocast says. No gradient reaches `averaged`.

    Args:
        logits: The model's logits.
        averaged: The averaged model's logits.
        lmbda: λ ≥ 0.
        tau: The temperature τ > 0.

    Returns:
        The term to add to the cross-entropy.

    Raises:
        TypeError: If `lmbda` or `tau` is not a number.
        ValueError: If λ or τ is out of range, or if the shapes differ or lack the classes.

    Examples:
        >>> import torch, gradkit as gk
        >>> model = torch.nn.Linear(2, 3)
        >>> ema = gk.EMA(model, decay=0.9998)
        >>> optimizer = gk.wrap(torch.optim.SGD(model.parameters(), lr=0.1), ema, model=model)
        >>> x, y = torch.rand(8, 2), torch.arange(8) % 3
        >>> def loss():
        ...     logits = model(x)
        ...     with torch.no_grad():
        ...         averaged = ema.teacher.eval()(x)
        ...     return torch.nn.functional.cross_entropy(logits, y) + gk.mesa(logits, averaged)
        >>> _ = optimizer.step(loss)
        >>> logits, certain = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log()
        >>> gk.mesa(logits, certain, lmbda=1.0, tau=1.0)  # KL of (0, 1) from (1/2, 1/2)
        tensor(0.6931)
    """
    check_number("lmbda", lmbda, least=0)
    check_number("tau", tau, above=0)
    if logits.shape != averaged.shape or logits.dim() < 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)} and the averaged ones "
            f"{tuple(averaged.shape)}; pass two alike, [N, C] or [N, C, *space]"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        log_q = functional.log_softmax(logits.to(wide) / tau, 1)
        log_p = functional.log_softmax(averaged.detach().to(wide) / tau, 1)
        # xlogy-like: a probability of 0 counts as 0, although its logarithm is infinite.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        return lmbda * tau**2 * terms.sum(1).mean()
