"""f-divergences by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gradkit.divergence.alpha import Alpha
from gradkit.divergence.chi_squared import Neyman, Pearson
from gradkit.divergence.f_divergence import FDivergence
from gradkit.divergence.hellinger import Hellinger
from gradkit.divergence.jensen_shannon import GAN, JS
from gradkit.divergence.kullback_leibler import KL, Jeffreys, ReverseKL
from gradkit.divergence.total_variation import TotalVariation

DIVERGENCES: dict[str, type[FDivergence]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "js": JS,
    "gan": GAN,
    "hellinger": Hellinger,
    "pearson": Pearson,
    "neyman": Neyman,
    "tv": TotalVariation,
    "jeffreys": Jeffreys,
    "alpha": Alpha,
}


def f_divergence(name: str, **arguments: Any) -> FDivergence:
    """An f-divergence D(P‖Q) = Σ q·f(p/q) by its name.

    | name | D(P‖Q) | f''(1) |
    |---|---|---|
    | "kl" | Σ p·ln(p/q) | 1 |
    | "reverse_kl" | Σ q·ln(q/p) | 1 |
    | "js" | KL(P‖M) + KL(Q‖M), M = (P + Q)/2: twice the Jensen-Shannon divergence | 1/2 |
    | "gan" | that minus 2·ln 2 | 1/2 |
    | "hellinger" | Σ (√p − √q)² | 1/2 |
    | "pearson" | Σ (p − q)²/q | 2 |
    | "neyman" | Σ (p − q)²/p | 2 |
    | "tv" | half the sum of absolute differences p − q | none |
    | "jeffreys" | KL(P‖Q) + KL(Q‖P) | 2 |
    | "alpha" | (Σ p^α·q^(1−α) − 1)/(α·(α − 1)) | 1 |

    Args:
        name: One of these.
        **arguments: `normalize=True` divides by f''(1); `alpha=` is α of "alpha" (1.5).

    Returns:
        The divergence, with its `generator`, `derivative`, `conjugate` and `activation`, and
        `between`, `between_gaussians` and `variational`.

    Raises:
        TypeError: If there is no such argument, or if `alpha` is not a number.
        ValueError: If there is no such divergence, with `normalize` if it has no f''(1), or if
            `alpha` is 0, 1 or not finite.

    Examples:
        >>> import torch, gradkit as gk
        >>> p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
        >>> gk.f_divergence("kl").between(p.log(), q.log())
        tensor(0.0851)
        >>> gk.f_divergence("alpha", alpha=2.0).between(p.log(), q.log())  # half of Pearson's
        tensor(0.0817)
    """
    if name not in DIVERGENCES:
        raise ValueError(f"there is no divergence {name!r}; choose one of {', '.join(DIVERGENCES)}")
    divergence = DIVERGENCES[name]
    known = [each.name for each in fields(divergence)]
    for argument in arguments:
        if argument not in known:
            raise TypeError(f"{name!r} has no argument {argument!r}; it takes {', '.join(known)}")
    return divergence(**arguments)
