"""The divergence between the features of two domains, as Gaussians."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.divergence.floor import in_float32
from gradkit.divergence.named import f_divergence


class GaussianDivergence(nn.Module):
    """max(0, D(P‖Q) − δ) of the features of two domains, each channel a Gaussian of its own.

        μ_c, σ_c² + ε the mean and variance of channel c over images and positions
        D = 1/C·Σ_c D(N(μ_c^P, σ_c^P² + ε) ‖ N(μ_c^Q, σ_c^Q² + ε))

    In closed form, so that not every divergence can be had. The default is Hellinger's, which is
    bounded as Jensen-Shannon's is, and has the same f''(1). Its gradient vanishes where domains are
    far apart; that of "jeffreys" does not.

    Args:
        divergence: "kl", "reverse_kl", "jeffreys", "hellinger", "pearson", "neyman" or "alpha"; see
            `gk.f_divergence`.
        tolerance: δ ≥ 0.
        normalize: Whether D is divided by f''(1).
        eps: ε > 0, which is added to variances.
        **arguments: Further arguments of `gk.f_divergence`, `alpha=`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is outside its range, or if the divergence has no closed form;
            when called, if the numbers of channels differ, or if there is nothing.

    Examples:
        >>> import torch, gradkit as gk
        >>> divergence = gk.divergence.GaussianDivergence("jeffreys")
        >>> features = torch.tensor([[-1.0], [1.0]])  # of variance 1
        >>> divergence(features, features + 1)
        tensor(1.0000)
    """

    def __init__(
        self,
        divergence: str = "hellinger",
        *,
        tolerance: int | float = 0.0,
        normalize: bool = False,
        eps: int | float = 1e-5,
        **arguments: float,
    ) -> None:
        super().__init__()
        check_number("tolerance", tolerance, least=0)
        check_number("eps", eps, above=0)
        self.divergence = f_divergence(divergence, normalize=normalize, **arguments)
        self.divergence.between_gaussians(*torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
        self.tolerance = tolerance
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{self.divergence}, tolerance={self.tolerance}, eps={self.eps}"

    def forward(
        self,
        source: Float[Tensor, "batch_p channels *positions_p"],
        target: Float[Tensor, "batch_q channels *positions_q"],
    ) -> Float[Tensor, ""]:
        """The divergence of two batches of features.

        Args:
            source: Features of the domain P.
            target: Features of the domain Q.
        """
        shapes = tuple(source.shape), tuple(target.shape)
        if min(map(len, shapes)) < 2 or shapes[0][1] != shapes[1][1] or 0 in shapes[0] + shapes[1]:
            raise ValueError(
                f"source has shape {shapes[0]} and target {shapes[1]}; pass features of one layer, "
                "with equally many channels in the second dimension"
            )
        moments = [
            torch.var_mean(each.transpose(0, 1).flatten(1), 1, correction=0)
            for each in in_float32(source, target)
        ]
        (var_p, mean_p), (var_q, mean_q) = moments
        given = (mean_p, var_p + self.eps, mean_q, var_q + self.eps)
        # One dimension each: a product over channels would be near its bound for most features.
        each_channel = self.divergence.between_gaussians(*(each[:, None] for each in given))
        return F.relu(each_channel.mean() - self.tolerance)
