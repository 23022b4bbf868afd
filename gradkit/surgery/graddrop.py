"""Gradient components of one sign, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import own_generator
from gradkit.core.ranks import Shards
from gradkit.surgery.elementwise import Blocks, ElementwiseRule
from gradkit.surgery.inputs import Preference, check_preference, numbers_of


@dataclass(eq=False)
class GradDrop(ElementwiseRule):
    """Keep one sign, drawn by its share ([Chen et al., 2020](https://arxiv.org/abs/2010.06808)).

    Algorithm 1, lines 10 to 15, for each parameter p:

        P   = ½·(1 + Σ_i g_ip / Σ_i |g_ip|)          the purity: the positive share
        U   ~ uniform on [0, 1)
        M_i = [f(P) > U]·[g_ip > 0] + [f(P) < U]·[g_ip < 0]
        d_p = Σ_i (ℓ_i + (1 − ℓ_i)·M_i)·g_ip

    The lines before line 10 multiply the gradients of a layer's activations by the activations'
    signs and sum them over the batch. This rule works on the gradients of the parameters, as other
    libraries do. Where all gradients are 0, d is 0. f(P) = U, which has probability 0 in theory,
    keeps the negative sign, so that each sign is kept with exactly its probability.

    Homogeneous of degree 1. Cost: none beyond the gradients. State: the generator.

    Args:
        leak: ℓ, the fraction of each objective's gradient that is never dropped, between 0 and 1: a
            list in the objectives' order or a mapping from their names. By default 0.
        function: f, increasing, applied to a tensor of purities; by default the purity itself.
        generator: A CPU generator; by default a new one with seed 0, the same in every process.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `leak` is not between 0 and 1, or the generator is not on the CPU.

    Examples:
        >>> import torch, gradkit as gk
        >>> jacobian = torch.tensor([[-4.0, 1.0], [6.0, 1.0]])
        >>> d = gk.GradDrop()(jacobian.repeat(1, 5000))
        >>> d.unique()
        tensor([-4.,  2.,  6.])
        >>> round((d[::2] > 0).float().mean().item(), 1)
        0.6
    """

    noise = "uniform"
    leak: Preference | None = None
    function: Callable[[Tensor], Tensor] | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_preference("leak", self.leak, least=0, most=1)
        if self.function is not None and not callable(self.function):
            raise TypeError(
                f"function is {self.function!r}; pass a function of a tensor of purities"
            )
        self.generator = own_generator(self.generator)

    def prepare(self, blocks: Blocks, over: Shards | None) -> Float[Tensor, "K 1"] | None:
        if self.leak is None:
            return None
        like = torch.empty(0, dtype=torch.float64, device=blocks.device)
        return numbers_of(self.leak, blocks.names, like)[:, None]

    def merge(
        self,
        rows: Float[Tensor, "K n"],
        noise: Float[Tensor, " n"] | None,
        prepared: Float[Tensor, "K 1"] | None,
    ) -> Float[Tensor, " n"]:
        assert noise is not None  # the rule asks for some
        positive, negative = _by_sign(rows)
        purity = positive / (positive - negative)
        if self.function is not None:
            purity = self.function(purity.nan_to_num_(0.5)).clone()
        # 1 or 0; also 0 for the purity 0/0 where all gradients are 0. torch.where takes longer.
        positive_kept = purity.sub_(noise).sign_().clamp_(min=0)
        if prepared is None:
            return torch.lerp(negative, positive, positive_kept)
        leaked = rows * prepared.to(rows)
        positive, negative = _by_sign(rows - leaked)
        return torch.lerp(negative, positive, positive_kept).add_(leaked.sum(0))


def _by_sign(rows: Float[Tensor, "K n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The sums of the positive and of the negative elements of each column."""
    return rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
