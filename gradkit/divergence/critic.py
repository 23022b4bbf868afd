"""A divergence that a critic estimates, and the reversal of gradients."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradkit.core.arguments import check_number
from gradkit.divergence.named import f_divergence


class _Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: int | float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def reverse_gradient(
    x: Float[Tensor, "*shape"], factor: int | float = 1.0
) -> Float[Tensor, "*shape"]:
    """The tensor itself, whose gradient is multiplied by −factor.

    The gradient reversal layer of [domain-adversarial training (Ganin et al., JMLR
    2016)](https://arxiv.org/abs/1505.07818), without hooks.

    Args:
        x: Any tensor.
        factor: What gradients are multiplied by, besides −1.

    Raises:
        TypeError: If `factor` is not a number.
        ValueError: If it is not finite.

    Examples:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> reverse_gradient(x, 0.5).square().backward()
        >>> x.grad
        tensor(-2.)
    """
    check_number("factor", factor)
    result: Tensor = _Reversed.apply(x, factor)  # type: ignore[no-untyped-call] # torch's own
    return result


class CriticDivergence(nn.Module):
    """A critic's estimate of the divergence between the features of two domains.

        D ≥ E_P[g(V(x))] − E_Q[f*(g(V(x)))]        V the critic, g the activation

    This is f-GAN's bound ([Nowozin et al., NeurIPS 2016](https://arxiv.org/abs/1606.00709)). The
    result's gradient in the features is the bound's, and that in the critic's own parameters is
    reversed: descending it draws the domains together and raises the bound. The critic has an
    optimizer of its own:

        loss = critic(source, target)                       in the objective "divergence"
        critic(source.detach(), target.detach()).backward() and a step of the critic's optimizer

    Leave the critic's parameters out of the wrapped optimizer: then they are not displaced, do not
    count in the norm of the ascent, and get no gradients in a step. There is no tolerance, which
    would keep the critic from learning while its estimate is small.

    Args:
        network: V, from features to one number for each sample, of any shape. It is the same
            function for both domains; use no BatchNorm in it.
        divergence: The name of an f-divergence; see `gk.f_divergence`.
        normalize: Whether D is divided by f''(1).
        **arguments: Further arguments of `gk.f_divergence`, `alpha=`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument has no valid value.

    Examples:
        >>> import torch, gradkit as gk
        >>> linear = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(linear.weight, 0.5)
        >>> critic = gk.divergence.CriticDivergence(linear, "pearson")
        >>> features = torch.tensor([[2.0]], requires_grad=True)
        >>> loss = critic(features, torch.zeros(1, 1))  # v = 1, and 0 for the other domain
        >>> loss.backward()
        >>> loss.detach(), features.grad, linear.weight.grad
        (tensor(1.), tensor([[0.5000]]), tensor([[-2.]]))
    """

    def __init__(
        self,
        network: nn.Module,
        divergence: str = "js",
        *,
        normalize: bool = False,
        **arguments: float,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is a {type(network).__name__}; pass a torch.nn.Module")
        self.network = network
        self.divergence = f_divergence(divergence, normalize=normalize, **arguments)

    def extra_repr(self) -> str:
        return f"divergence={self.divergence}"

    def forward(self, source: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """The bound for features of two domains.

        Args:
            source: Features of the domain P, as the critic takes them.
            target: Features of the domain Q.
        """
        # Reversed before and after the network: twice for the features, once for its parameters.
        outputs = (
            reverse_gradient(self.network(reverse_gradient(each))) for each in (source, target)
        )
        return self.divergence.variational(*outputs)
